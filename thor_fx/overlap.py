"""``refresh_async=True``: factors are inverted beside the steps that follow, with a delay that is fixed.

Factors that are measured in step ``t``, a multiple of ``frequency`` other than 0, are inverted while the
next ``lag`` steps run. After step ``t + lag`` the new inverses are installed, so that they act from step
``t + lag + 1`` on, with::

    lag = frequency // 2

whether or not they were ready earlier: when they act depends on no clock. What is inverted is what is
remembered of the factors, with the damping of the step in which they entered; both are part of the
state, and nothing overwrites them until then. So the inverses are a pure function of a state that can be
saved in any step, and computing them beside the steps is only a way to have them in time
(:mod:`thor_fx.ahead`).

Step 0 inverts in the step itself, and so does, for its layers, the first step that a layer has factors in.
"""

from dataclasses import dataclass
from typing import Literal

from .inverses import Inverse
from .refresh_rules import RefreshRule

Phase = Literal["invert", "install", "rest"]


@dataclass(frozen=True)
class Overlap:
    """When inverses are computed, and when they are installed.

    Attributes:
        frequency: steps between factor steps, at least 2.

    Example:
        >>> [Overlap(4).phase(step) for step in range(4, 8)]
        ['invert', 'invert', 'install', 'rest']
        >>> {Overlap(4).phase(step) for step in range(4)}
        {'rest'}
    """

    frequency: int

    @property
    def lag(self) -> int:
        """How many steps an inversion may take."""
        return self.frequency // 2

    def phase(self, step: int) -> Phase:
        """What follows on step ``step``: the inversion may run, or has to be over, or there is none."""
        place = step % self.frequency
        if step < self.frequency or place > self.lag:
            return "rest"
        return "install" if place == self.lag else "invert"


def check_overlap(refresh: RefreshRule | None, inverse: Inverse, frequency: int) -> None:
    """Refuse what ``refresh_async=True`` cannot go with.

    Raises:
        ValueError: there is a refresh rule, or nothing to invert, or no step to do it beside.
    """
    if refresh is not None:
        raise ValueError(
            f"refresh_async=True says itself when inverses are recomputed: leave out refresh={refresh}, or "
            "refresh_async"
        )
    if inverse == "eva":
        raise ValueError("refresh_async=True needs something to invert, and inverse='eva' inverts nothing")
    if frequency == 1:
        raise ValueError(
            "refresh_async=True needs a plain step between two factor steps: frequency must be at least 2, "
            "got 1"
        )
