"""Train on ranks of which the last is lost before a step: ``torchrun losing_ranks.py DOOR HOW``."""

import datetime
import os
import signal
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import thor_fx
from rank_runs import SETTINGS, shard, world
from training import MODELS, Batch, batches, build, classifier_loss, snapshot

EXIT_CODE, LOST_BEFORE, STEPS = 17, 3, 6
TIMEOUT = datetime.timedelta(seconds=5)
FOREVER = 600


def data(how: str) -> Iterator[Batch]:
    """The batches of this rank, as long as it is there."""
    rank, size = world()
    for step, batch in enumerate(batches(STEPS, 12)):
        if (step, rank) == (LOST_BEFORE, size - 1):
            if how == "ends":
                os._exit(EXIT_CODE)
            time.sleep(FOREVER)
        yield shard(batch)


def functional(how: str) -> None:
    model, (first, *_) = build(MODELS["mlp"]), batches(1, 12)
    tx = thor_fx.thor(**SETTINGS, process_group=dist.group.WORLD)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    params = snapshot(dict(model.named_parameters()))
    state = step.init(params, *shard(first))
    for batch in data(how):
        params, state, _ = step(params, state, *batch)


def drop_in(how: str, wraps: bool) -> None:
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager")
    if wraps:
        model = DistributedDataParallel(model)
    optimizer = thor_fx.Thor(model, **SETTINGS, process_group=dist.group.WORLD)
    for x, y in data(how):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    door, how = sys.argv[1:]
    dist.init_process_group("gloo", timeout=TIMEOUT)
    if world()[0] == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others at once: let it speak before
    if door == "functional":
        functional(how)
    else:
        drop_in(how, wraps=door == "ddp")
