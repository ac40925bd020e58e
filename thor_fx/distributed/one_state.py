"""The states of all ranks as one: what a checkpoint holds of them.

Ranks have the same tensors under the same names, or names that others have not: with
``work_sharing="gradient"`` a rank's ``state_dict()`` has the inverses of its own layers. Dicts are joined by
their keys. The state of a functional step has the same names on all ranks whatever is in it, so it has to be
the same as a whole. 0-D tensors (counters) are those of one rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .sealed import described

OWN_STATE = (
    'With work_sharing="gradient" a functional step has a state of its own on every rank: save it rank by '
    "rank with torch.save, for as many ranks; or use thor_fx.Thor, whose state_dict() says what is whose, or "
    "another work_sharing"
)


def joined_by_ranks(
    nest: Any, tensors: Mapping[str, Tensor], process_group: Any
) -> tuple[Any, dict[str, str]]:
    """The nest of all ranks together, and of their tensors what must be equal; every rank calls this.

    Args:
        nest: of this rank, with a value that can be pickled in place of every tensor.
        tensors: of this rank, by name.
        process_group: the ranks; None: all of them, or this process where there are no others.

    Raises:
        ValueError: two ranks have different tensors of one name, or nests that cannot be joined.
    """
    sums = {name: text for name, tensor in tensors.items() if (text := described(tensor)) is not None}
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return nest, sums
    sums = {name: text for name, text in sums.items() if tensors[name].dim() > 0}
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, (nest, sums), group=process_group)
    known: dict[str, tuple[int, str]] = {}
    for rank, (_, theirs) in enumerate(found):
        for name, text in theirs.items():
            first, before = known.setdefault(name, (rank, text))
            if before != text:
                raise ValueError(f"state: {name!r} is not the same on ranks {first} and {rank}. {OWN_STATE}")
    merged = _merged([theirs for theirs, _ in found], "state", inside=False)
    return merged, {name: text for name, (_, text) in known.items()}


def _merged(nests: Sequence[Any], where: str, *, inside: bool) -> Any:
    """One nest of several; ``inside`` the state of a functional step keys have to agree."""
    first = nests[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for nest in nests for key in nest)
        if inside and any(nest.keys() != keys.keys() for nest in nests):
            raise ValueError(f"{where}: ranks have different keys. {OWN_STATE}")
        known = {key: [nest[key] for nest in nests if key in nest] for key in keys}
        return _like(first, {k: _merged(v, f"{where}.{k}", inside=inside) for k, v in known.items()})
    if isinstance(first, list | tuple) and {len(nest) for nest in nests} == {len(first)}:
        named = hasattr(first, "_fields")
        values = [
            _merged(values, f"{where}.{i}", inside=inside or named)
            for i, values in enumerate(zip(*nests, strict=True))
        ]
        return type(first)(*values) if named else type(first)(values)
    return first


def _like(first: dict[Any, Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """The values in a dict of the same kind."""
    return values if type(first) is dict else type(first)(values)
