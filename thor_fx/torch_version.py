"""Which versions of torch this was written for.

Dynamo, AOTAutograd and Inductor promise no stable names: the adapter modules import what these versions have.
"""

import contextlib
import re
from collections.abc import Iterator

import torch

OLDEST, NEWEST = (2, 11), (2, 15)


@contextlib.contextmanager
def supported(version: str = torch.__version__) -> Iterator[None]:
    """Inside, our modules are imported; what fails for the version of torch says so.

    Raises:
        ImportError: torch is too old, or so new that a name has gone.
        AttributeError: something else is wrong.
    """
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    ours = f"thor_fx needs torch {_text(OLDEST)} to {_text(NEWEST)}, and this is torch {version}"
    if found < OLDEST:
        raise ImportError(f"{ours}: pip install 'torch>={_text(OLDEST)}'")
    try:
        yield
    except (ImportError, AttributeError) as error:
        if found <= NEWEST or "torch" not in str(error):
            raise
        raise ImportError(
            f"{ours}, which does not have a name that is used here ({error}): pip install a newer thor_fx, "
            f"or 'torch<{NEWEST[0]}.{NEWEST[1] + 1}'"
        ) from error


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
