"""The form of a functional state: where its tensors are, and how long their sides are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Form:
    """The form of the state of a transform.

    Attributes:
        nest: around the tensors.
        shapes: of the tensors, by their paths.
    """

    nest: pytree.TreeSpec
    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, state: Any) -> "Form":
        """The form of a state.

        Example:
            >>> Form.of({"w": (torch.zeros(2, 3),)}).shapes
            {"['w'][0]": torch.Size([2, 3])}
        """
        leaves, nest = pytree.tree_flatten_with_path(state)
        return cls(nest, {pytree.keystr(path): leaf.shape for path, leaf in leaves})

    def leaves(self, state: Any) -> list[Tensor]:
        """The tensors of a state of this form.

        Raises:
            ValueError: it has another form; names a tensor that one has and the other has not.
        """
        leaves, nest = pytree.tree_flatten(state)
        if nest != self.nest or [leaf.shape for leaf in leaves] != list(self.shapes.values()):
            self._refuse(Form.of(state).shapes)
        return leaves

    def _refuse(self, found: dict[str, torch.Size]) -> None:
        names = [name for name in {**self.shapes, **found} if found.get(name) != self.shapes.get(name)]
        where = names[0] if names else "the top"
        raise ValueError(
            f"state does not belong to this step: at {where} it has {_shown(found, where)}, and this step "
            f"keeps {_shown(self.shapes, where)}: take it from this step.init(params, *batch), or use the "
            "options that it was saved with"
        )


def _shown(shapes: dict[str, torch.Size], name: str) -> str:
    return f"shape {tuple(shapes[name])}" if name in shapes else "nothing"
