"""What every rank of a test of checkpoints does: ``torchrun checkpoint_runs.py FOLDER RUN...``.

The checkpoints are beside ``FOLDER``, so that runs on other numbers of ranks find them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thor_fx
from rank_runs import ROWS, SETTINGS, main, shard
from thor_fx.distributed import checkpoint
from training import MODELS, Batch, Parameters, batches, build, classifier_loss, snapshot

STEPS, SAVED_AFTER = 7, 3
"""Factors are measured in steps 0, 2, 4 and 6, inverses renewed in 0 and 4: what is saved is in use."""

AVERAGES: dict[str, Any] = {**SETTINGS, "factor_decay": 0.5, "refresh": thor_fx.Every(4)}

DOORS = ["ddp", "group", "functional", "gradient"]
"""Ranks of DistributedDataParallel, of ``process_group=``, of a functional step, and that share the work."""


def data() -> list[Batch]:
    batch = batches(STEPS, ROWS)
    return [shard(each) for each in batch] if dist.is_initialized() else batch


def fresh(unlike: bool) -> nn.Module:
    """A model; ``unlike`` that of others, so that it has to be loaded."""
    model = build(MODELS["normalised"])
    if unlike:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    return model


def drop_in(wraps: bool, folder: Path, resumes: bool, **options: Any) -> list[Parameters]:
    """Train from the start and save, or resume; the parameters after every step."""
    group = dist.group.WORLD if dist.is_initialized() and not wraps else None
    net = thor_fx.compile(fresh(unlike=resumes), backend="aot_eager")
    model = DistributedDataParallel(net) if dist.is_initialized() and wraps else net
    optimizer = thor_fx.Thor(model, **AVERAGES, **options, process_group=group)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    first, trajectory = 0, []
    if resumes:
        saved = checkpoint.load(folder)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["steps"]
    for taken, (x, y) in enumerate(data()[first:], start=first + 1):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(net.named_parameters())))
        if taken == SAVED_AFTER:
            state = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
            state = {name: each.state_dict() for name, each in state.items()}
            checkpoint.save(folder, {**state, "steps": taken})
    return trajectory


def functional(folder: Path, resumes: bool, **options: Any) -> list[Parameters]:
    """The same as a compiled step; where it resumes, nothing is initialised."""
    group = dist.group.WORLD if dist.is_initialized() else None
    settings = {**AVERAGES, "lr": lambda step: 0.02 * 0.7 ** (step // 2), **options}
    tx = thor_fx.thor(**settings, process_group=group)
    model, trajectory = fresh(unlike=resumes), []
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    if resumes:
        params, state = checkpoint.load(folder)
    else:
        params = snapshot(dict(model.named_parameters()))
        state = step.init(params, *data()[0])
    for batch in data()[state.step :]:
        params, state, _ = step(params, state, *batch)
        trajectory.append(snapshot(params))
        if state.step == SAVED_AFTER:
            checkpoint.save(folder, (params, state))
    return trajectory


def trained(door: str, checkpoints: Path, resumes: bool) -> list[Parameters]:
    if door == "functional":
        return functional(checkpoints / door, resumes)
    sharing = "gradient" if door == "gradient" else "none"
    return drop_in(door == "ddp", checkpoints / door, resumes, work_sharing=sharing)


def runs(checkpoints: Path) -> dict[str, Callable[[], Any]]:
    def run(door: str, resumes: bool) -> Callable[[], Any]:
        return lambda: trained(door, checkpoints, resumes)

    def own_state() -> None:
        functional(checkpoints / "own", resumes=False, work_sharing="gradient")

    whole: dict[str, Callable[[], Any]] = {"own state": own_state}
    whole |= {f"whole {door}": run(door, resumes=False) for door in DOORS}
    return whole | {f"resumed {door}": run(door, resumes=True) for door in DOORS}


if __name__ == "__main__":
    main(runs(Path(sys.argv[1]).parent / "checkpoints"), *sys.argv[1:])
