"""Checkpoints through ``torch.distributed.checkpoint`` that any number of ranks can load.

``torch.distributed.checkpoint`` (DCP) fills tensors that exist. An optimizer that has not stepped has none,
and neither has a step whose ``init`` was not called; DCP also turns numbers that are keys into texts, and
takes a tuple for one value. So the tensors are given to DCP one by one, named by their paths in the nest that
holds them, and the nest without them, with its seal (:mod:`thor_fx.distributed.sealed`), as two values more.
What is in a folder is DCP's format: its own tools read it, and
``dcp.load({"model": net.state_dict()}, checkpoint_id=folder)`` takes only the weights out.

Every rank writes a share of the tensors and reads all of them, in folders that all ranks can see.
"""

import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils import _pytree as pytree

from ..state_versions import CHECKPOINT, VERSION, migrated
from .one_state import joined_by_ranks
from .sealed import Seal, damage, opened, sealed

Folder = str | os.PathLike[str]

NEST, SEAL = "__nest__", "__seal__"
METADATA = ".metadata"  # DCP writes it last, under another name first


@dataclass(frozen=True)
class _Place:
    """Where a tensor was.

    Attributes:
        name: of the tensor.
        parameter: whether it was an ``nn.Parameter``.
        requires_grad: whether it was trained.
    """

    name: str
    parameter: bool
    requires_grad: bool

    def filled(self, tensor: Tensor) -> Tensor:
        """The tensor as what was there."""
        if self.parameter:
            return nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class _Nest:
    """A nest with a :class:`_Place` for every tensor; DCP does not look into it."""

    value: Any


CLASSES: list[type] = [_Nest, _Place]


def save(folder: Folder, state: Any, *, process_group: Any = None) -> None:
    """Save a nest of dicts, lists, tuples and named tuples; all ranks call this with the same.

    A checkpoint is there as a whole or not at all: :func:`load` and :func:`newest` do not see one that was
    not written to its end, and the next ``save`` into its folder replaces it.

    Args:
        folder: of this checkpoint alone, e.g. ``"checkpoints/12"``; is made. All ranks must see it.
        state: tensors, which must be equal on all ranks that have one of a name, and values that
            ``torch.load(weights_only=True)`` loads: numbers, texts, types of torch, and those given to
            ``torch.serialization.add_safe_globals``; e.g.
            ``{"model": net.state_dict(), "optimizer": opt.state_dict()}``, or the ``params`` and ``state`` of
            a functional step.
        process_group: the ranks; None: all of them, or this process where there are no others.

    Raises:
        FileExistsError: the folder holds a checkpoint.
        TypeError: ``state`` has something in it that keeps its tensors to itself, e.g. a module, or that
            would not be loaded again.
        ValueError: two tensors have one name: a key contains a dot; or ranks have different tensors of one
            name, as a functional step with ``work_sharing="gradient"`` has. All ranks raise.
        CheckpointException: of ``torch.distributed.checkpoint.api``, on all ranks: one could not write.

    Example:
        >>> save("checkpoints/1", {"weight": torch.ones(2), "epoch": 1})
        >>> load("checkpoints/1")
        {'weight': tensor([1., 1.]), 'epoch': 1}
    """
    if _is_complete(folder):
        raise FileExistsError(
            f"{str(folder)!r} holds a checkpoint: give every checkpoint a folder of its own"
        )
    tensors, nest = _parted(state)
    joined, sums = joined_by_ranks(nest.value, tensors, process_group)
    content, seal = sealed(_Nest(joined), sums, CLASSES)
    saved = {**tensors, NEST: content, SEAL: json.dumps(seal)}  # DCP would look into a dict
    with _without_ranks():
        dcp.save(saved, storage_writer=dcp.FileSystemWriter(folder), process_group=process_group)


def load(folder: Folder, *, device: torch.device | str = "cpu", process_group: Any = None) -> Any:
    """Load what :func:`save` was given, on any number of ranks; all ranks call this.

    Nothing has to exist before. What was saved besides tensors is read with ``weights_only=True``; the list
    of what is where (``.metadata``) is unpickled by DCP, so load only what you trust, all the same.

    Args:
        folder: of the checkpoint.
        device: where the tensors go. ``load_state_dict`` moves them to the parameters' device itself; the
            functional door needs them where they were.
        process_group: the ranks that load; None: all of them, or this process where there are no others.

    Returns:
        The nest, with new tensors; what was one tensor in two places is one again.

    Raises:
        FileNotFoundError: the folder holds no checkpoint that was written to its end.
        ValueError: the checkpoint was not written by :func:`save`, or by that of a later thor_fx; or it is
            damaged: something is missing, or not what was saved.
        CheckpointException: of ``torch.distributed.checkpoint.api``, on all ranks: a file could not be read.
    """
    if not _is_complete(folder):
        raise FileNotFoundError(
            f"{str(folder)!r} holds no complete checkpoint: newest(...) finds one that is"
        )
    reader = dcp.FileSystemReader(folder)
    with _told_as_damage(folder):
        saved = reader.read_metadata().state_dict_metadata
    if NEST not in saved:
        raise ValueError(
            f"{str(folder)!r} was not written by thor_fx.distributed.checkpoint.save: read it with "
            "torch.distributed.checkpoint.load"
        )
    with _told_as_damage(folder):
        found: dict[str, Any] = {
            name: torch.empty(about.size, dtype=about.properties.dtype, device=device)
            for name, about in saved.items()
            if isinstance(about, TensorStorageMetadata)
        }
        found |= dict.fromkeys({NEST, SEAL} & saved.keys())
        with _without_ranks():
            dcp.load(found, storage_reader=reader, process_group=process_group, planner=_Planner())
    with _told_as_damage(folder):
        content, seal = found.pop(NEST), json.loads(found.pop(SEAL, "null"))
    nest, version = _unsealed(folder, content, seal, found)
    return migrated(nest, version, CHECKPOINT, f"the checkpoint in {str(folder)!r}")


def _unsealed(
    folder: Folder, content: Any, seal: Seal | None, tensors: Mapping[str, Tensor]
) -> tuple[Any, int]:
    """What was saved, and the version that it was saved in."""
    if seal is None:  # version 0
        return _joined(content, tensors), 0
    if seal["version"] <= VERSION:
        if found := damage(content, seal, tensors):
            raise _damaged(folder, found)
        content = _joined(opened(content, CLASSES), tensors)
    return content, seal["version"]


class _Planner(dcp.DefaultLoadPlanner):
    """Reads values as ``torch.load(weights_only=True)`` does."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = opened(value.getvalue(), CLASSES)


@contextmanager
def _told_as_damage(folder: Folder) -> Iterator[None]:
    """Files that can be read, and do not hold what they should: torch says so in many ways."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError) and not isinstance(first, FileNotFoundError):
            raise
        raise _damaged(folder, f"{type(first).__name__}: {first}") from error
    except OSError:
        raise
    except Exception as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def _damaged(folder: Folder, why: str) -> ValueError:
    return ValueError(
        f"the checkpoint in {str(folder)!r} is damaged, or not of thor_fx.distributed.checkpoint.save "
        f"({why}): load another one"
    )


def newest(parent: Folder, *, process_group: Any = None) -> Path | None:
    """The checkpoint with the highest number at the end of its name, as rank 0 sees it.

    Args:
        parent: the folder of checkpoints such as ``12`` or ``step-12``.
        process_group: the ranks; None: all of them, or this process where there are no others.

    Returns:
        Its folder; None where no checkpoint was written to its end.
    """
    folders = Path(parent).iterdir() if Path(parent).is_dir() else ()
    numbered = [(int(n[0]), path) for path in folders if (n := re.search(r"\d+\Z", path.name))]
    found = max(((n, path) for n, path in numbered if _is_complete(path)), default=(0, None))[1]
    if not (dist.is_available() and dist.is_initialized()):
        return found
    shared = [found]
    dist.broadcast_object_list(shared, group=process_group, group_src=0)
    return shared[0]


def _is_complete(folder: Folder) -> bool:
    return (Path(folder) / METADATA).exists()


def _parted(state: Any) -> tuple[dict[str, Tensor], _Nest]:
    """The tensors by their names, and the nest around them."""
    tensors: dict[str, Tensor] = {}
    places: dict[int, _Place] = {}

    def place(path: Any, leaf: Any) -> Any:
        name = ".".join(map(_key, path))
        if hasattr(leaf, "state_dict"):
            raise TypeError(f"state: {name!r} is a {type(leaf).__name__}: save its state_dict()")
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in places:
            if name in tensors or name == NEST:
                raise ValueError(f"state: two tensors are called {name!r}: use keys without dots")
            tensors[name] = leaf.detach()
            places[id(leaf)] = _Place(name, isinstance(leaf, nn.Parameter), leaf.requires_grad)
        return places[id(leaf)]

    return tensors, _Nest(pytree.tree_map_with_path(place, state))


def _joined(nest: _Nest, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_parted`."""
    filled: dict[str, Tensor] = {}

    def fill(place: _Place) -> Tensor:
        if place.name not in filled:
            filled[place.name] = place.filled(tensors[place.name])
        return filled[place.name]

    return pytree.tree_map_only(_Place, fill, nest.value)


def _key(entry: Any) -> str:
    """An entry of a path, as it is written between dots."""
    match entry:
        case pytree.MappingKey(key) | pytree.SequenceKey(key) | pytree.GetAttrKey(key):
            return str(key)
    return str(entry)


@contextmanager
def _without_ranks() -> Iterator[None]:
    """One process is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
