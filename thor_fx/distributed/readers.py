"""Who reads the averaged factors of a layer: every rank, or its owner alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..layers import Coverage
from ..parameter_groups import ParameterGroups
from ..transform import Params
from .work import SharedWork

Readers = Callable[[Coverage, Params], Mapping[str, int]]
"""The rank that alone reads the factors of a layer; those of a layer without one are read by all."""


NOBODY: Mapping[str, int] = MappingProxyType({})
"""No layer has a reader of its own."""


def everybody(_coverage: Coverage, _params: Params) -> Mapping[str, int]:
    """All ranks read all factors."""
    return NOBODY


@dataclass(frozen=True)
class Owners:
    """The readers where ranks share the work; every group of parameters is dealt out by itself.

    Attributes:
        work: how it is shared.
        groups: of the parameters.
    """

    work: SharedWork
    groups: ParameterGroups

    def __call__(self, coverage: Coverage, params: Params) -> dict[str, int]:
        """The owners of the layers whose inverses one rank alone holds."""
        found: dict[str, int] = {}
        for own in self.groups.parts(coverage):
            if self.work.mode(own, params) == "gradient":
                found |= self.work.exchange.owners(own.layers)
        return found
