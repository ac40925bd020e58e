"""All matrices of one size in one call, whatever layer and side they belong to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..passes import switches

Job = tuple[Tensor, ...]
"""Tensors with N matrices in front; the first tells the size."""


def in_batches(jobs: Sequence[Job], function: Callable[..., Job]) -> list[Job]:
    """Call a function once for every size.

    Args:
        jobs: whose tensors are joined along the first axis where their sizes are equal.
        function: of the joined tensors; returns tensors with the same first axis.

    Returns:
        What the function returned, cut up by job.
    """
    alike: dict[tuple[int, int, torch.dtype, int], list[int]] = {}
    batched = switches.is_on("batched_inverses")
    for index, (first, *_) in enumerate(jobs):
        apart = 0 if batched else index
        alike.setdefault((first.dim(), first.shape[-1], first.dtype, apart), []).append(index)
    results: dict[int, Job] = {}
    for members in alike.values():
        given = zip(*(jobs[i] for i in members), strict=True)
        found = function(*(torch.cat(tensors) for tensors in given))
        lengths = [len(jobs[i][0]) for i in members]
        pieces = zip(*(tensor.split(lengths) for tensor in found), strict=True)
        results |= dict(zip(members, pieces, strict=True))
    return [results[i] for i in range(len(jobs))]
