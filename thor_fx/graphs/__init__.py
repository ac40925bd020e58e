"""The graph of a step to look at: as a network, with analyses of it, and as a picture."""

from .critical_path import CriticalPath, critical_path, floor
from .cut import Cut, forward_backward_cut
from .dependencies import Dependencies, dependencies, factor_dependencies
from .fusible import Region, fusible_regions
from .live_ranges import LiveRange, LiveRanges, live_ranges
from .networks import Facts, to_networkx
from .picture import draw, picture

__all__ = [
    "CriticalPath",
    "Cut",
    "Dependencies",
    "Facts",
    "LiveRange",
    "LiveRanges",
    "Region",
    "critical_path",
    "dependencies",
    "draw",
    "factor_dependencies",
    "floor",
    "forward_backward_cut",
    "fusible_regions",
    "live_ranges",
    "picture",
    "to_networkx",
]
