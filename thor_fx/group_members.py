"""Which parameters of a model belong to a group of an optimizer."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .arguments import check_type, shown


def with_rest(model: nn.Module, groups: Any) -> list[dict[str, Any]]:
    """The groups that were asked for, and one with every other trainable parameter.

    Raises:
        TypeError: ``groups`` is no list of mappings, or ``params`` of one is neither that nor one member.
        ValueError: a group has no parameters, or something that is none of the model's.
    """
    named = [{**group, "params": members(model, group.get("params"))} for group in groups_of(groups)]
    taken = {id(p) for group in named for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [*named, {"params": rest}] if rest else named


def groups_of(groups: Any) -> list[Mapping[str, Any]]:
    """The value of the argument ``params``.

    Raises:
        TypeError: it is no list of groups.
    """
    if groups is None:
        return []
    texts = isinstance(groups, str | bytes | Mapping) or hasattr(groups, "__array__")
    wrong = texts or not isinstance(groups, Iterable)
    found = [] if wrong else list(groups)
    if wrong or not all(isinstance(group, Mapping) for group in found):
        allowed = 'a list of groups, [{"params": [...], "lr": ...}, ...]'
        raise TypeError(f"params must be {allowed}, or None, got {shown(groups)}")
    return found


def members(model: nn.Module, given: Any) -> list[Tensor]:
    """The parameters of a group, given as tensors or by name.

    Raises:
        TypeError: it is no list.
        ValueError: nothing is given, or something that is no parameter of the model.
    """
    if not isinstance(given, Iterable | None):
        raise TypeError(f"params of a group must be tensors or names, got {shown(given)}")
    if given is None:
        raise ValueError("a parameter group needs 'params': tensors or names of the model's parameters")
    names = dict(model.named_parameters())
    known = {id(p) for p in names.values()}
    given = [given] if isinstance(given, Tensor | str) else list(given)
    found = [names.get(m) if isinstance(m, str) else m for m in given]
    for member, parameter in zip(given, found, strict=True):
        if id(parameter) not in known:
            text = repr(member) if isinstance(member, str) else shown(member)
            raise ValueError(f"params holds {text}, which is no parameter of the model")
    return found  # type: ignore[return-value]


def named(model: nn.Module, tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """Parameters of the model, with their names."""
    wanted = {id(tensor) for tensor in tensors}
    return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]


def check_replaced(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to go on with parameters that the model has others for by now.

    Raises:
        RuntimeError: naming those.
    """
    known = {id(p) for group in groups for p in group["params"]}
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gone = known - {id(p) for p in model.parameters()}
    strangers = [name for name, p in names.items() if id(p) not in known]
    if gone and strangers:
        raise RuntimeError(
            f"parameters of the model were replaced after Thor was made: it does not train {strangers}. Make "
            "a new Thor, and load the state_dict() of this one into it if the shapes are the same"
        )


def check_centralization(model: nn.Module, group: Mapping[str, Any]) -> None:
    """Refuse ``grad_centralization`` for what is no weight of a convolution.

    Raises:
        TypeError: it is neither True nor False.
        ValueError: naming the parameter.
    """
    wanted = group.get("grad_centralization", False)
    check_type("grad_centralization", wanted, bool, "True or False")
    flat = [name for name, p in named(model, group["params"]) if p.dim() < 3]
    if wanted and flat:
        raise ValueError(
            f"grad_centralization=True is for weights of convolutions, and {flat[0]!r} is none: "
            "put it into another group"
        )
