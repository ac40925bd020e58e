"""What every rank of a test of dealt-out parameters does: ``torchrun sharded_runs.py FOLDER RUN...``.

As :mod:`rank_runs`; :mod:`test_sharded` compares with one process.
"""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import thor_fx
from rank_runs import SETTINGS, cnn, main
from thor_fx.compile import collector_of
from thor_fx.distributed import checkpoint
from thor_fx.passes.outputs import Factor
from training import (
    CLASSES,
    HIDDEN,
    IN,
    Batch,
    Parameters,
    batches,
    build,
    classifier_loss,
    mlp,
    snapshot,
)

STEPS, ROWS = 4, 12
HEADS, POSITIONS = 2, 3


class Rise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Block(nn.Module):
    """A transformer's, whose heads can be dealt out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.q, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.k = nn.Linear(HIDDEN, HIDDEN, bias=False)  # attention does not depend on one
        self.rise = Rise()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part(h).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.rise(x + self.out(mixed))


class Transformer(nn.Module):
    """Two blocks; no loop around them, in which Dynamo would give up where FSDP breaks its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.first, self.second = Block(), Block()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return self.first, self.second

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(torch.stack([x, x.roll(1, -1), x.flip(-1)], dim=1))
        return self.head(self.second(self.first(h)).mean(1))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.norm, self.rise = nn.LayerNorm(HIDDEN), Rise()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return (self.rise,)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rise(self.norm(self.inp(x))))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rise = nn.Linear(IN, HIDDEN), Rise()
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, CLASSES) for _ in range(2))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return (self.rise,)

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](self.rise(self.inp(x)))


class Words(nn.Module):
    """An embedding, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(9, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head, self.last = nn.Linear(HIDDEN, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table((x.abs() * 4).long().clamp(max=8)).mean(1)
        return self.last(self.head(self.mix(self.mix(h).tanh())))


class Around(nn.Module):
    """Dynamo compiles no method of ``nn.Sequential`` on its own, and FSDP's hooks leave it nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Around(mlp()),
    "perceptron": Perceptron,
    "cnn": lambda: Around(cnn()),
    "transformer": Transformer,
    "words": Words,
    "two heads": TwoHeads,
}

PLAN = {
    **{name: ColwiseParallel() for name in ("q", "k", "v", "up", "rise.up")},
    **{name: RowwiseParallel() for name in ("out", "down", "rise.down")},
}

BY_ROWS = SequenceParallel(sequence_dim=0)

OPTIONS: dict[str, dict[str, Any]] = {
    "small_blocks": {"block_size": 4, "bias": "joint", "weight_decay": 0.1},
    "averages": {"factor_decay": 0.5, "refresh": thor_fx.Every(4), "damping_rule": "pi"},
    "clipped": {"kl_clip": 1e-4, "enable_clip_grad": True, "clip": "global", "clip_norm": 0.05},
    "recommended": {"preset": "recommended", "damping": 0.5},
    "adamw": {"fallback": "adamw", "fallback_lr": 1e-2, "step_norm": "adam"},
    "eva": {"inverse": "eva"},
    "batch_size": {"batch_size": ROWS},
    "async": {"refresh_async": True, "factor_decay": 0.5},
    "split": {"split_indices": [0, 1]},
}


def shard(model: nn.Module, mesh: DeviceMesh, *, by_block: bool = True) -> None:
    for block in getattr(model, "blocks", ()) if by_block else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallelize(model: Any, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        here = {name for name, _ in block.named_modules()}
        parallelize_module(block, mesh, {name: style for name, style in PLAN.items() if name in here})
        if "q" in here:
            assert HEADS % mesh.size() == 0


def dealt(make: str, how: str) -> tuple[nn.Module, int, int]:
    """The model in parts, the index of the data that this rank sees, and into how many they are parted."""
    model, size, rank = build(MODELS[make]), dist.get_world_size(), dist.get_rank()
    if how == "fsdp":
        shard(model, init_device_mesh("cpu", (size,)), by_block=True)
        return model, rank, size
    if how == "fsdp at once":
        shard(model, init_device_mesh("cpu", (size,)), by_block=False)
        return model, rank, size
    if how == "tp":
        parallelize(model, init_device_mesh("cpu", (size,)))
        return model, 0, 1
    if how == "hsdp":
        shard(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
        return model, rank, size
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize(model, mesh["tp"])
    shard(model, mesh["dp"])
    return model, rank // 2, size // 2


def whole(model: nn.Module) -> Parameters:
    named = {name: p.detach() for name, p in model.named_parameters()}
    return snapshot({name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named.items()})


def prepared(
    make: str, how: str, backend: str = "aot_eager", **settings: Any
) -> tuple[nn.Module, thor_fx.Thor, Callable[[Batch], Batch]]:
    model, mine, parts = dealt(make, how)
    model = thor_fx.compile(model, backend=backend)
    own = {**SETTINGS, **settings}
    if "batch_size" in own:
        own["batch_size"] //= parts

    def seen(batch: Batch) -> Batch:
        return tuple(part.chunk(parts)[mine] for part in batch)  # type: ignore[return-value]

    return model, thor_fx.Thor(model, **own), seen


def steps(
    model: nn.Module,
    optimizer: thor_fx.Thor,
    data: Iterable[Batch],
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[Parameters]:
    """Whole parameters after every step."""
    trajectory = []
    for x, y in data:
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(whole(model))
    return trajectory


def trained(
    make: str, how: str, options: str = "", backend: str = "aot_eager", **settings: Any
) -> list[Parameters]:
    model, optimizer, seen = prepared(make, how, backend, **OPTIONS.get(options, {}), **settings)
    return steps(model, optimizer, map(seen, batches(STEPS, ROWS)))


GROUPS = [{"params": ["inp.weight", "rise.up.weight"], "lr": 0.05, "damping": 0.3}]
"""Two groups with settings of their own: this one, and the rest."""


def by_heads(model: nn.Module, optimizer: thor_fx.Thor, data: Iterable[Batch]) -> list[Parameters]:
    """The second head is first used in a later factor step."""
    trajectory = []
    for step, (x, y) in enumerate(data):
        F.cross_entropy(model(x, step // 2), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(whole(model))
    return trajectory


def late() -> list[Parameters]:
    model, optimizer, seen = prepared("two heads", "fsdp")
    return by_heads(model, optimizer, map(seen, batches(STEPS, ROWS)))


def of_seven_rows(logits: Tensor, y: Tensor) -> Tensor:
    """Each row has the same weight, whichever rank has it."""
    return F.cross_entropy(logits, y, reduction="sum") * dist.get_world_size() / 7


def unequal() -> list[Parameters]:
    model, optimizer, seen = prepared("perceptron", "fsdp")
    return steps(model, optimizer, map(seen, batches(STEPS, 7)), of_seven_rows)


def accumulated() -> list[Parameters]:
    """Two micro-batches a step; FSDP reduces gradients after the second only."""
    model, optimizer, seen = prepared("perceptron", "fsdp")
    trajectory, data = [], list(map(seen, batches(2 * STEPS, ROWS)))
    for first, second in zip(data[::2], data[1::2], strict=True):
        for last, (x, y) in enumerate((first, second)):
            model.set_requires_gradient_sync(bool(last))  # type: ignore[operator]
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(whole(model))
    return trajectory


def skipped() -> tuple[list[Parameters], dict[str, int]]:
    """One rank has a NaN among its data in the second step."""
    model, optimizer, seen = prepared("perceptron", "fsdp")
    data = list(map(seen, batches(STEPS, ROWS)))
    if dist.get_rank() == 1:
        data[1] = data[1][0] / 0, data[1][1]
    return steps(model, optimizer, data), optimizer.metrics()


def kept() -> tuple[dict[str, set[str]], dict[str, tuple[int, ...]], set[str]]:
    """By parameter, what this rank keeps, and the shape of its part; the factors it has after backward."""
    model, optimizer, seen = prepared("perceptron", "fsdp", factor_decay=0.5, frequency=1)
    collector = collector_of(model)
    factors: set[str] = set()
    for x, y in map(seen, batches(2, ROWS)):
        F.cross_entropy(model(x), y).backward()
        here = {d for graph in collector.graphs for d, s in graph.slots.items() if s.grad is not None}
        for graph in collector.graphs:
            graph.sent = [partial(dict, awaited()) for awaited in graph.sent]
        here |= {d for graph in collector.graphs for awaited in graph.sent for d in awaited()}
        factors = {d.layer for d in here if isinstance(d, Factor)}
        optimizer.step()
        optimizer.zero_grad()
    state = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    return state, {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}, factors


def continued() -> list[Parameters]:
    """Saved after two steps, and loaded into a new model and optimizer."""
    data, saved = batches(STEPS, ROWS), None
    trajectory: list[Parameters] = []
    for part in (data[:2], data[2:]):
        model, optimizer, seen = prepared("perceptron", "fsdp", factor_decay=0.5)
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        trajectory += steps(model, optimizer, map(seen, part))
        saved = model.state_dict(), optimizer.state_dict()
    return trajectory


def saved() -> list[Parameters]:
    """Saved in parts after two steps, and dealt out to a new model and optimizer."""
    data, folder = batches(STEPS, ROWS), Path(sys.argv[1]) / "checkpoint"
    trajectory: list[Parameters] = []
    for part in (data[:2], data[2:]):
        model, optimizer, seen = prepared("perceptron", "fsdp", factor_decay=0.5)
        if trajectory:
            known = checkpoint.load(folder)
            set_model_state_dict(model, known["model"], options=StateDictOptions(full_state_dict=True))
            optimizer.load_state_dict(known["optimizer"])
        trajectory += steps(model, optimizer, map(seen, part))
        if len(trajectory) == 2:
            checkpoint.save(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return trajectory


class SharedWeight(nn.Module):
    """Ranks have the same first weight and other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).full_tensor())


def other_rows(**settings: Any) -> Parameters:
    model = build(SharedWeight)
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"up": BY_ROWS})
    model = thor_fx.compile(model, backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, **settings)
    x, y = batches(1, ROWS)[0]
    F.cross_entropy(model(x.chunk(2)[dist.get_rank()]), y).backward()
    optimizer.step()
    return whole(model)


def refused(**settings: Any) -> None:
    prepared("mlp", "fsdp at once", **settings)


def alone() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    trained("perceptron", "fsdp", process_group=groups[dist.get_rank()])


def functional() -> None:
    model, _, _ = dealt("perceptron", "fsdp")
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), backend="eager")
    step.init(dict(model.named_parameters()), *batches(1, ROWS)[0])


RUNS: dict[str, Callable[[], Any]] = {
    "mlp fsdp at once": partial(trained, "mlp", "fsdp at once"),
    "cnn fsdp at once": partial(trained, "cnn", "fsdp at once"),
    "words fsdp at once": partial(trained, "words", "fsdp at once"),
    "perceptron fsdp": partial(trained, "perceptron", "fsdp"),
    "transformer fsdp": partial(trained, "transformer", "fsdp"),
    "perceptron tp": partial(trained, "perceptron", "tp"),
    "transformer tp": partial(trained, "transformer", "tp"),
    "transformer fsdp and tp": partial(trained, "transformer", "fsdp and tp"),
    "perceptron fsdp and tp": partial(trained, "perceptron", "fsdp and tp"),
    "perceptron hsdp": partial(trained, "perceptron", "hsdp"),
    **{f"fsdp with {name}": partial(trained, "perceptron", "fsdp", name) for name in OPTIONS},
    **{
        f"tp with {name}": partial(trained, "perceptron", "tp", name)
        for name in ("small_blocks", "clipped", "eva", "batch_size")
    },
    "inductor": partial(trained, "perceptron", "tp", backend="inductor"),
    "grouped": partial(trained, "perceptron", "fsdp", params=GROUPS),
    "accumulated": accumulated,
    "skipped": skipped,
    "kept": kept,
    "continued": continued,
    "late": late,
    "unequal": unequal,
    "saved": saved,
    "other rows": other_rows,
    "other rows left out": partial(other_rows, layer_filter=lambda name: name.startswith("head")),
    "alone": alone,
    "functional": functional,
    "inverse": partial(refused, work_sharing="inverse"),
    "adaptive": partial(refused, damping=thor_fx.LevenbergMarquardt(0.1)),
}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(RUNS, *sys.argv[1:])
