"""What every rank of a test of distributed training does: ``torchrun rank_runs.py FOLDER RUN...``.

Each run is a function that all ranks call together; what it returns on a rank, or the error that it raises,
is saved to ``FOLDER/RUN.RANK.pt``. :mod:`test_distributed` compares it with one process.
"""

import datetime
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thor_fx
from thor_fx.compile import collector_of
from thor_fx.distributed.collectives import world_of
from thor_fx.distributed.distribute import distribute
from thor_fx.distributed.factor_sums import Bucket, FactorSums
from thor_fx.distributed.work import WorkSharing
from thor_fx.distributed.wrappers import unwrapped
from thor_fx.factors import flat_moments, measure
from thor_fx.layers import Coverage
from thor_fx.options import Options
from thor_fx.parameter_groups import ParameterGroups
from thor_fx.passes.layout import Rules
from thor_fx.transform import Signals, Transform
from training import (
    CLASSES,
    HIDDEN,
    IN,
    MODELS,
    Batch,
    Parameters,
    batches,
    build,
    by_functional_door,
    classifier_loss,
    snapshot,
    train_by_closures,
)

SETTINGS: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 2}
STEPS, ROWS = 4, 12
EVERY_STEP = {**SETTINGS, "frequency": 1}
OTHER_WAY = (2, 3)
PASSES = dict(zip(("first", "second", "third", "fourth"), batches(4, ROWS), strict=True))
GROUPS = [{"params": ["0.weight", "1.weight"], "lr": 0.05, "damping": 0.2}]
ONE_GROUP = ParameterGroups({"": {}})
TIMEOUT = datetime.timedelta(seconds=60)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, IN)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
    )


class Encoder(nn.Module):
    """A transformer's layer over a sequence of three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(torch.stack([x, x.roll(1, -1), x.flip(-1)], dim=1))
        return self.head(self.layer(h).mean(1))


def wide() -> nn.Module:
    """More than one of the buckets in which DDP sends gradients."""
    return nn.Sequential(
        nn.Linear(IN, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(),
        nn.Linear(300, CLASSES),
    )  # fmt: skip


class Broken(nn.Module):
    """Three graphs; or, the other way, two, of other functions of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, other_way: bool = False, shows_middle: bool = True) -> Tensor:
        if not shows_middle:
            return self.head(torch._dynamo.disable(self.mid)(self.inp(x).tanh()).tanh())
        if other_way:
            h = self.inp(x).sin()
            torch._dynamo.graph_break()
            return self.head(self.mid(h).sigmoid())
        h = self.inp(x).tanh()
        torch._dynamo.graph_break()
        h = self.mid(h).tanh()
        torch._dynamo.graph_break()
        return self.head(h)


MODELS = {**MODELS, "cnn": cnn, "encoder": Encoder, "broken": Broken, "wide": wide}

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "split": {"split_indices": [0, 1]},
    "small_blocks": {"block_size": 2, "bias": "joint"},
    "batch_size": {"batch_size": ROWS},
    "averages": {"factor_decay": 0.5, "refresh": thor_fx.Every(4)},
    "pi": {"damping_rule": "pi", "use_nesterov": True},
    "eva": {"inverse": "eva"},
    "adaptive": {"damping": thor_fx.LevenbergMarquardt(0.1, interval=1)},
    "inverses": {"work_sharing": "inverse"},
    "inverses_averaged": {"work_sharing": "inverse", "factor_decay": 0.5, "refresh": thor_fx.Every(4)},
    "inverses_ekfac": {"work_sharing": "inverse", "inverse": "ekfac", "bias": "joint"},
    "gradients": {"work_sharing": "gradient"},
    "gradients_averaged": {"work_sharing": "gradient", "factor_decay": 0.5, "refresh": thor_fx.Every(4)},
    "gradients_clipped": {"work_sharing": "gradient", "kl_clip": 1e-4, "bias": "joint", "weight_decay": 0.1},
    "auto": {"work_sharing": "auto"},
    "recommended": {"preset": "recommended", "damping": 0.5},
    "rounded": {"reduce_dtype": torch.bfloat16},
    "half_of_rows": {"rows": 0.5},
    "groups": {"params": GROUPS},
    "groups_inverses": {"params": GROUPS, "work_sharing": "inverse"},
    "groups_gradients": {"params": GROUPS, "work_sharing": "gradient", "factor_decay": 0.5},
    "beside": {"refresh_async": True},
    "beside_gradients": {"refresh_async": True, "work_sharing": "gradient"},
    "sampled": {"fisher": "sampled", "likelihood": "categorical"},
    "auto_blocks": {"block_size": "auto"},
}
"""By name; ``batch_size`` is what one process is given, and every rank its share."""

EXACT = {
    "ddp": [name for name in OPTIONS if name not in {"rounded", "sampled", "auto_blocks"}],
    "functional": ["defaults", "batch_size", "averages", "adaptive", "inverses", "gradients_averaged"],
}
"""By door; the update is the same in both."""


def world() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def shard(batch: Batch, sizes: list[int] | None = None) -> Batch:
    """The rows of this rank: its equal share, or as many as ``sizes`` says."""
    rank, size = world()
    sizes = sizes or [len(batch[0]) // size] * size
    return tuple(part.split(sizes)[rank] for part in batch)  # type: ignore[return-value]


def settings(options: str) -> dict[str, Any]:
    own = {**SETTINGS, **OPTIONS[options]}
    if "batch_size" in own:
        own["batch_size"] //= world()[1]
    return own


def steps(options: str) -> int:
    """Inverses that are computed beside the steps act late."""
    return 7 if options.startswith("beside") else STEPS


def wrapped(make: str, backend: str = "aot_eager", around: bool = False, **how: Any) -> nn.Module:
    """A compiled model inside of DistributedDataParallel, or around it."""
    model = build(MODELS[make])
    if around:
        return thor_fx.compile(DistributedDataParallel(model), backend=backend)
    return DistributedDataParallel(thor_fx.compile(model, backend=backend), **how)


def by_ddp(make: str, options: str = "defaults", **how: Any) -> list[Parameters]:
    model = wrapped(make, **how)
    data = [shard(batch) for batch in batches(steps(options), ROWS)]
    return train_by_closures(model, thor_fx.Thor(model, **settings(options)), data)


def by_functional(
    make: str, options: str = "defaults", backend: str = "eager", disable_passes: Sequence[str] = ()
) -> list[Parameters]:
    data = [shard(batch) for batch in batches(STEPS, ROWS)]
    more = {"process_group": dist.group.WORLD, "disable_passes": disable_passes}
    return by_functional_door(build(MODELS[make]), data, backend, **settings(options), **more)


def unequal(loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[Parameters]:
    """Seven rows, of which the first rank has the most."""
    _, size = world()
    sizes = [7 - (size - 1) * (6 // size), *[6 // size] * (size - 1)]
    model = wrapped("mlp")
    optimizer, trajectory = thor_fx.Thor(model, **SETTINGS), []
    for batch in batches(STEPS, 7):
        x, y = shard(batch, sizes)
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.module.named_parameters())))
    return trajectory


def weighted(logits: Tensor, y: Tensor) -> Tensor:
    """Every row weighs the same, whichever rank has it."""
    return F.cross_entropy(logits, y, reduction="sum") * world()[1] / 7


def accumulated() -> list[Parameters]:
    """Two micro-batches a step; gradients and factors are averaged after the second."""
    model = wrapped("mlp")
    optimizer, trajectory = thor_fx.Thor(model, **SETTINGS), []
    data = [shard(batch) for batch in batches(2 * STEPS, ROWS)]
    for first, second in zip(data[::2], data[1::2], strict=True):
        with model.no_sync():
            (F.cross_entropy(model(first[0]), first[1]) / 2).backward()
        (F.cross_entropy(model(second[0]), second[1]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.module.named_parameters())))
    return trajectory


def beside() -> tuple[list[Parameters], list[list[str]]]:
    """The second of every step's results: in what order gradients are made, and sums of factors started."""
    model = wrapped("broken")
    optimizer, trajectory, events = thor_fx.Thor(model, **EVERY_STEP), [], []
    for name, parameter in model.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events[-1].append(f"made {name}"))
    start = FactorSums.start

    def started(sums: FactorSums, factors: Any, buckets: Sequence[Bucket]) -> Any:
        events[-1] += ["sum " + " ".join(sorted({d.layer for d in bucket})) for bucket in buckets]
        return start(sums, factors, buckets)

    with patch.object(FactorSums, "start", started):
        for x, y in map(shard, batches(STEPS, ROWS)):
            events.append([])
            F.cross_entropy(model(x), y).backward()
            events[-1].append("over")
            take_step(model, optimizer, trajectory)
    return trajectory, events


def cut() -> tuple[list[Parameters], int]:
    """A model that Dynamo cuts where DDP's buckets end, and its graphs."""
    model = wrapped("wide", bucket_cap_mb=1)
    data = [shard(batch) for batch in batches(STEPS, ROWS)]
    trajectory = train_by_closures(model, thor_fx.Thor(model, **SETTINGS), data)
    return trajectory, len(collector_of(model).graphs)


def branches() -> list[Parameters]:
    """From the third step on the last rank runs graphs that no other rank has, and compiles alone."""
    model, last = wrapped("broken"), world()[0] == world()[1] - 1
    optimizer, trajectory = thor_fx.Thor(model, **EVERY_STEP, work_sharing="inverse"), []
    for step, (x, y) in enumerate(map(shard, batches(STEPS, ROWS))):
        F.cross_entropy(model(x, other_way=last and step in OTHER_WAY), y).backward()
        take_step(model, optimizer, trajectory)
    return trajectory


def late_layer() -> tuple[list[Parameters], list[str]]:
    """From the third step on graphs show one more layer; and the layers that this rank owns then."""
    model, trajectory = wrapped("broken"), []
    optimizer = thor_fx.Thor(model, **EVERY_STEP, work_sharing="gradient")
    for step, (x, y) in enumerate(map(shard, batches(STEPS + 1, ROWS))):
        F.cross_entropy(model(x, shows_middle=step >= 2), y).backward()
        take_step(model, optimizer, trajectory)
    names = dict(model.module.named_parameters())
    return trajectory, [name for name, p in names.items() if "inverses" in optimizer.state[p]]


def passes() -> list[Parameters]:
    """Every step has other backward passes."""
    model, (rank, size) = wrapped("mlp"), world()
    optimizer, trajectory = thor_fx.Thor(model, **EVERY_STEP), []

    def backward(name: str) -> None:
        x, y = shard(PASSES[name])
        (F.cross_entropy(model(x), y) / 2).backward()

    backward("first")
    take_step(model, optimizer, trajectory)
    with model.no_sync():  # one rank has more of them than the others
        for name in ("second", "third")[: 2 if rank == 0 else 1]:
            backward(name)
    backward("fourth")
    take_step(model, optimizer, trajectory)
    backward("first")  # averaged twice
    backward("second")
    take_step(model, optimizer, trajectory)
    backward("first")  # in vain
    optimizer.zero_grad()
    with model.no_sync():  # averaged by hand
        backward("third")
        backward("fourth")
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= size
    take_step(model, optimizer, trajectory)
    return trajectory


def take_step(model: nn.Module, optimizer: thor_fx.Thor, trajectory: list[Parameters]) -> None:
    optimizer.step()
    optimizer.zero_grad()
    trajectory.append(snapshot(dict(unwrapped(model).named_parameters())))


def sampled() -> list[Parameters]:
    """Labels are drawn by every rank for itself."""
    torch.manual_seed(world()[0])
    return by_ddp("normalised", "sampled")


def auto_blocks() -> list[Parameters]:
    """The block size that rank 0 has chosen, too."""
    model = wrapped("normalised")
    optimizer = thor_fx.Thor(model, **settings("auto_blocks"))
    found = train_by_closures(model, optimizer, [shard(batch) for batch in batches(STEPS, ROWS)])
    return [*found, {"block size": torch.tensor(optimizer.block_size)}]


def overflow(wraps: bool) -> list[Parameters]:
    """The second step has an overflow on the last rank."""
    rank, size = world()
    model = (
        wrapped("normalised") if wraps else thor_fx.compile(build(MODELS["normalised"]), backend="aot_eager")
    )
    group = {} if wraps else {"process_group": dist.group.WORLD}
    optimizer, trajectory = thor_fx.Thor(model, **SETTINGS, **group), []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step, batch in enumerate(batches(STEPS, ROWS)):
        x, y = shard(batch)
        loss = F.cross_entropy(model(x), y) * (torch.inf if step == 1 and rank == size - 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = {"skipped": torch.tensor(optimizer.metrics()["skipped_steps"])}
        trajectory.append(snapshot(dict(unwrapped(model).named_parameters())) | skipped)
    return trajectory


def not_finite() -> None:
    """A batch on which the last rank can choose no block size."""
    rank, size = world()
    tx = thor_fx.thor(**SETTINGS, block_size="auto", process_group=dist.group.WORLD)
    model, ((x, y),) = build(MODELS["mlp"]), batches(1)
    params = snapshot(dict(model.named_parameters()))
    x = x * (torch.nan if rank == size - 1 else 1.0)
    thor_fx.compile_step(classifier_loss(model), tx, backend="eager").init(params, x, y)


def factors_read(sharing: WorkSharing) -> Parameters:
    """The sums of all ranks that this rank gets, by what they are."""
    model, batch = build(MODELS["encoder"]), shard(batches(1, ROWS)[0])
    params = snapshot(dict(model.named_parameters()))
    layers, moments, terms = measure(classifier_loss(model), params, *batch, rules=Rules())
    read: Parameters = {}

    def update(updates: Any, state: Any, _: Any, signals: Signals) -> Any:
        read.update({str(what): value for what, value in flat_moments(signals.moments or {}).items()})
        return updates, state

    options = Options(work_sharing=sharing, split_indices=[0, 3])
    ranks = world_of(dist.group.WORLD)
    tx = distribute(Transform(lambda *_: (), update), options, ONE_GROUP, ranks, gradients=False)
    tx.update({}, (), params, Signals(Coverage(layers, (), {}), moments=moments, terms=terms))
    return read


def different_settings() -> None:
    tx = thor_fx.thor(**{**SETTINGS, "frequency": 2 + world()[0]}, process_group=dist.group.WORLD)
    model, (batch,) = build(MODELS["mlp"]), batches(1)
    params = snapshot(dict(model.named_parameters()))
    thor_fx.compile_step(classifier_loss(model), tx, backend="eager").init(params, *batch)


def different_values() -> None:
    tx = thor_fx.thor(**SETTINGS, process_group=dist.group.WORLD)
    model, (batch,) = build(MODELS["mlp"]), batches(1)
    params = {name: p + world()[0] for name, p in snapshot(dict(model.named_parameters())).items()}
    thor_fx.compile_step(classifier_loss(model), tx, backend="eager").init(params, *batch)


def different_models() -> None:
    model = wrapped("mlp")
    filters = [None, lambda name: name != "0.weight"]
    optimizer = thor_fx.Thor(model, **SETTINGS, layer_filter=filters[min(1, world()[0])])
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def index_out_of_range() -> None:
    model = wrapped("mlp")
    optimizer = thor_fx.Thor(model, **SETTINGS, split_indices=[0, 2])
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def late() -> list[Parameters]:
    """Collectives start behind the whole backward, as the update has them."""
    return by_functional("normalised", "split", disable_passes=["start_early"])


DOORS: dict[str, Callable[..., list[Parameters]]] = {"ddp": by_ddp, "functional": by_functional}

RUNS: dict[str, Callable[[], Any]] = {
    **{f"ddp {make}": lambda make=make: by_ddp(make) for make in ("mlp", "cnn", "encoder", "tied")},
    **{f"functional {make}": lambda make=make: by_functional(make) for make in ("mlp", "cnn", "encoder")},
    **{
        f"{door} with {name}": partial(DOORS[door], "normalised", name)
        for door, names in EXACT.items()
        for name in names
    },
    "around": lambda: by_ddp("mlp", around=True),
    "early": lambda: by_functional("normalised", "split"),
    "late": late,
    "rounded": lambda: by_functional("mlp", "rounded"),
    "inductor ddp": lambda: by_ddp("mlp", "gradients", backend="inductor"),
    "inductor functional": lambda: by_functional("mlp", backend="inductor"),
    "weighted": lambda: unequal(weighted),
    "unweighted": lambda: unequal(F.cross_entropy),
    "accumulated": accumulated,
    "beside": beside,
    "cut": cut,
    "branches": branches,
    "passes": passes,
    "late layer": late_layer,
    "unused": lambda: by_ddp("mlp", find_unused_parameters=True),
    "sampled": sampled,
    "auto blocks": auto_blocks,
    "overflow wrapped": lambda: overflow(True),
    "overflow group": lambda: overflow(False),
    "not finite": not_finite,
    "factors of all": lambda: factors_read("none"),
    "factors of owners": lambda: factors_read("gradient"),
    "different settings": different_settings,
    "different values": different_values,
    "different models": different_models,
    "index out of range": index_out_of_range,
}


def main(runs: Mapping[str, Callable[[], Any]], folder: str, *names: str) -> None:
    """Call runs by name, and save what they return, or the text of the error that they raise."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, _ = world()
    for name in names:
        torch._dynamo.reset()
        try:
            result: Any = runs[name]()
        except Exception as error:
            result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        torch.save(result, Path(folder) / f"{name}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # on the usual way out a thread of torch's may abort, rarely: "terminate called without ..."


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(RUNS, *sys.argv[1:])
