"""What a state dict says of the options that it was saved with, where they decide what its tensors are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .blocks import BlockSize
from .options import INVERTS_SIDES, Options
from .state_versions import OPTIMIZER, VERSION, SavedState, migrated, version_of

FIRST_ORDER = ("momentum", "exp_avg", "exp_avg_sq", "step")
CURVATURE = ("inverses", "failing", "factors")

DECIDES: dict[str, tuple[str, ...]] = {
    "inverse": CURVATURE,
    "bias": CURVATURE,
    "sharing": CURVATURE,
    "fisher": CURVATURE,
    "momentum_on": ("momentum",),
    "fallback": FIRST_ORDER,
}
"""Options, and what of a parameter's entry means something else under another value."""

SHAPES = ("block_size", "max_dim", "long_side")
"""Options that decide shapes, and only where a side is long enough: another value need not matter."""

OF_THOR = {"damping", "momentum", "step"}
"""What the groups of every version have."""


def format_of(options: Options, block_size: BlockSize) -> dict[str, Any]:
    """The entry ``format`` of the groups of an optimizer, with the block size that it has come to."""
    values = {name: getattr(options, name) for name in (*DECIDES, *SHAPES)}
    named = {name: "a function" if callable(value) else value for name, value in values.items()}
    return {"version": VERSION, **named, "block_size": block_size}


class Format:
    """What the state of one optimizer is, as its groups of parameters say it.

    Attributes:
        differs: how its options differ from those of the state that was loaded, in words; nothing where none
            is known to.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.differs = ""

    def block_size(self, groups: Sequence[Mapping[str, Any]]) -> BlockSize:
        """The side of the blocks; ``"auto"`` as long as none has been chosen."""
        if self._options.block_size != "auto" or not groups:
            return self._options.block_size
        chosen: BlockSize = groups[0].get("block_size", "auto")
        return chosen

    def of(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The entry ``format`` of all groups."""
        return format_of(self._options, self.block_size(groups))

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Let every group say what its state is."""
        for group in groups:
            group["format"] = self.of(groups)

    def choose(self, groups: Sequence[dict[str, Any]], block_size: BlockSize) -> None:
        """The block size that was to be chosen is this one."""
        for group in groups:
            group["block_size"] = block_size
        self.note(groups)

    def loaded(self, groups: Sequence[dict[str, Any]]) -> None:
        """The groups are those of a state that was loaded just now."""
        saved = groups[0]["format"]
        if self._options.block_size != "auto":
            for group in groups:
                group.pop("block_size", None)  # was chosen; this time it was given
        self.note(groups)
        self.differs = other_shapes(saved, groups[0]["format"])


def accepted(saved: SavedState, own: Mapping[str, Any]) -> SavedState:
    """A state dict as this version saves it.

    Args:
        saved: any; is not changed.
        own: the ``format`` of the optimizer that loads it.

    Raises:
        ValueError: it is not that of a ``Thor``, of a later version, or holds what has another meaning under
            the options of this optimizer.
    """
    if not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            "state_dict must be what Thor.state_dict() returned, with 'state' and 'param_groups': it has "
            f"{_some(saved)}"
        )
    for group in saved["param_groups"]:
        if missing := sorted(OF_THOR - group.keys()):
            raise ValueError(
                f"state_dict is that of another optimizer: its groups have {_some(group)}, and no {missing}. "
                "Load what Thor.state_dict() returned; a Thor cannot continue what another optimizer began"
            )
    saved = migrated(saved, version_of(saved), OPTIMIZER, "state_dict")
    _check_options(saved, own)
    return saved


def _check_options(saved: SavedState, own: Mapping[str, Any]) -> None:
    held = {key for entry in saved["state"].values() for key in entry}
    for group in saved["param_groups"]:
        for name, keys in DECIDES.items():
            theirs = group["format"].get(name, own[name])
            concerned = [key for key in keys if key in held]
            if concerned and _meaning(name, theirs) != _meaning(name, own[name]):
                raise ValueError(
                    f"state_dict was saved with {name}={theirs!r}, and this Thor has {name}={own[name]!r}: "
                    f"use the {name}= that it was saved with, or take {concerned} out of every entry of its "
                    "'state' to start those anew"
                )


def _meaning(name: str, value: Any) -> Any:
    """Methods that keep the inverses of both sides go on with each other's."""
    return "inverses" if name == "inverse" and value in INVERTS_SIDES else value


def other_shapes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The options that may be why shapes differ, in words; nothing where none is known to differ."""
    found = [name for name in SHAPES if name in saved and saved[name] != own[name]]
    return ", ".join(f"{name}={saved[name]!r} then, {own[name]!r} now" for name in found)


def _some(names: Iterable[Any], most: int = 6) -> str:
    """The names, or the first of them."""
    known = list(names)
    return f"{known[:most]}" + (f" and {len(known) - most} more" if len(known) > most else "")
