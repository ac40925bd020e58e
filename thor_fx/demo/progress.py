"""A progress bar, where tqdm is installed and somebody watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]
"""``advance(steps, what)``: so many steps more, and what comes next."""


@contextmanager
def progress(name: str, steps: int) -> Iterator[Advance]:
    """Show how far a task is; the bar is removed at the end."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _steps, _what: None
        return
    with tqdm(desc=name, total=steps, unit=" steps", leave=False, dynamic_ncols=True, disable=None) as bar:

        def advance(steps: int, what: str) -> None:
            bar.set_postfix_str(what)
            bar.update(steps)

        yield advance
