"""Numbers in a unit that fits."""


def scaled(count: float, unit: str) -> str:
    """A number of bytes or operations.

    Example:
        >>> scaled(999, "B"), scaled(2_560_000, "B"), scaled(3e10, "FLOP")
        ('999 B', '2.56 MB', '30 GFLOP')
    """
    prefix = ""
    for larger in ("k", "M", "G", "T", "P"):
        if count < 999.5:
            break
        count, prefix = count / 1000, larger
    return f"{count:.3g} {prefix}{unit}"


def times(shape: tuple[int, ...] | None) -> str:
    """A shape in words: its sizes with crosses between."""
    return "\N{MULTIPLICATION SIGN}".join(map(str, shape or ())) or "scalar"


def counted(count: int, noun: str) -> str:
    """How many of something.

    Example:
        >>> counted(1, "value"), counted(1200, "value")
        ('1 value', '1,200 values')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
