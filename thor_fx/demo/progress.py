"""A progress bar, where tqdm is installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int, str], None]
"""``advance(done, total, what)``"""


@contextmanager
def progress(name: str) -> Iterator[Advance]:
    """Show how far a task is, and remove the bar at the end."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done, total, what: None
        return
    with tqdm(desc=name, unit="step", leave=False, dynamic_ncols=True) as bar:

        def advance(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        yield advance
