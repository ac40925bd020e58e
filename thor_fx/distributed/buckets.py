"""Which tensors travel together: one collective for each bucket.

``split_indices`` are the last layers of the buckets, in the order of layers: ``[26, 53]`` of 54 layers are
two buckets, layers 0 to 26 and 27 to 53. Layers behind the last index form one more. Without them a bucket
is closed as soon as it holds 25 MiB, as in DistributedDataParallel; where tensors have one reader each, every
reader gets about as much of a bucket as the others.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")

BUCKET_BYTES = 25 * 2**20


def by_indices(names: Sequence[Name], split_indices: Sequence[int]) -> list[list[Name]]:
    """Buckets that end with the layers of these indices.

    Args:
        names: of all layers, in order.
        split_indices: sorted, without repetitions.

    Raises:
        ValueError: an index is that of no layer.

    Example:
        >>> [bucket[0] + "-" + bucket[-1] for bucket in by_indices("abcdefg", [1, 4])]
        ['a-b', 'c-e', 'f-g']
    """
    last = len(names) - 1
    if split_indices[-1] > last:
        raise ValueError(
            f"split_indices must be indices of layers, 0 to {last} for this model's {len(names)} layers with "
            f"factors, got {list(split_indices)}"
        )
    ends = [*(index + 1 for index in split_indices), len(names)]
    buckets = [list(names[start:end]) for start, end in itertools.pairwise([0, *ends])]
    return [bucket for bucket in buckets if bucket]


def by_bytes(sizes: Mapping[Name, int], limit: int = BUCKET_BYTES) -> list[list[Name]]:
    """Buckets that are closed when they hold ``limit`` bytes.

    Example:
        >>> by_bytes({"a": 3, "b": 1, "c": 4, "d": 1}, limit=4)
        [['a', 'b'], ['c'], ['d']]
    """
    buckets: list[list[Name]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held >= limit:
            buckets.append([])
            held = 0
        buckets[-1].append(name)
        held += size
    return [bucket for bucket in buckets if bucket]


def by_readers(
    sizes: Mapping[Name, int], readers: Mapping[Name, int], ranks: int, limit: int = BUCKET_BYTES
) -> list[list[Name]]:
    """Buckets of what one rank each reads: every rank has its part closed at its share of ``limit`` bytes.

    Args:
        sizes: in bytes.
        readers: the rank that reads it.
        ranks: how many there are.
        limit: of a bucket.

    Example:
        >>> by_readers({"a": 3, "b": 1, "c": 4, "d": 1}, {"a": 0, "b": 1, "c": 0, "d": 1}, 2, limit=4)
        [['a', 'b', 'd'], ['c']]
    """
    hands: dict[int, dict[Name, int]] = {}
    for name, size in sizes.items():
        hands.setdefault(readers[name], {})[name] = size
    parts = [by_bytes(hand, limit // ranks) for hand in hands.values()]
    return [list(itertools.chain(*bucket)) for bucket in itertools.zip_longest(*parts, fillvalue=[])]


def restricted(buckets: Iterable[Sequence[Name]], names: Iterable[Name]) -> list[list[Name]]:
    """The buckets with some of their members only, without those that are empty then."""
    wanted = set(names)
    kept = ([name for name in bucket if name in wanted] for bucket in buckets)
    return [bucket for bucket in kept if bucket]
