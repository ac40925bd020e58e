"""What thor_fx says of itself while it works: nothing, unless it is asked.

``THOR_FX_LOGS=passes,sites python train.py`` prints to stderr, as ``TORCH_LOGS`` does for torch. A ``+``
before a name prints more. In a program these are loggers, ``logging.getLogger("thor_fx.passes")`` and so on.
"""

import logging
from collections.abc import Iterator

from .layers import Coverage

ARTIFACTS: dict[str, str] = {
    "passes": "what every pass added to a graph, removed and moved, and its time; with +, the code after it",
    "sites": "which weights of a graph have factors, and why the others have none; with +, all parameters",
}
"""What may be asked for: its name, and what it says."""

_SITES = logging.getLogger("thor_fx.sites")


def configure(wanted: str) -> None:
    """Print what is asked for to stderr.

    Args:
        wanted: names of :data:`ARTIFACTS` with commas between, each with or without a ``+``; or nothing.

    Raises:
        ValueError: a name is unknown.
    """
    words = [word for part in wanted.split(",") if (word := part.strip())]
    for word in words:
        if word.removeprefix("+") not in ARTIFACTS:
            raise ValueError(f"THOR_FX_LOGS must name some of {list(ARTIFACTS)}, got {word!r}")
    for word in words:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger = logging.getLogger(f"thor_fx.{word.removeprefix('+')}")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if word.startswith("+") else logging.INFO)
        logger.propagate = False


def log_coverage(graph: str, found: Coverage) -> None:
    """Say what has factors in a graph, where somebody listens.

    Args:
        graph: what it is called.
        found: its coverage.
    """
    if _SITES.isEnabledFor(logging.INFO):
        lines = [*_of_layers(found), *(f"  {name}: {reason}" for name, reason in found.fallback.items())]
        _SITES.info("%s: %s layers\n%s", graph, len(found.layers), "\n".join(lines))
    if _SITES.isEnabledFor(logging.DEBUG):
        rest = {"elementwise": found.norms, "unused": found.unused, "frozen": found.frozen}
        _SITES.debug("%s", "\n".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in rest.items()))


def _of_layers(found: Coverage) -> Iterator[str]:
    for name, layer in found.layers.items():
        sides = f"A {layer.input}, G {layer.output}"
        yield f"  {name}: {layer.kind}, {sides}, rows {layer.rows}, uses {layer.uses}"
