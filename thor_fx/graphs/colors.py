"""One colour for every phase of a step: Okabe and Ito's, which colour-blind readers tell apart."""

from collections.abc import Mapping

from ..passes.phases import Phase

COLORS: Mapping[Phase, str] = {
    "forward": "#0072B2",
    "backward": "#D55E00",
    "factors": "#009E73",
    "refresh": "#CC79A7",
    "update": "#E69F00",
}
UNMARKED = "#7A7A7A"


def color(phase: Phase | None) -> str:
    """The colour of a phase, or of a node without."""
    return UNMARKED if phase is None else COLORS[phase]
