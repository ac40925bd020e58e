"""``mode="reduce-overhead"``: accepted by both doors for every kind of step, and the same training."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import thor_fx
from training import assert_same, batches, build, by_functional_door, classifier_loss, mlp, snapshot

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
Trajectory = list[dict[str, Tensor]]


def drop_in(data: Any, device: str) -> Trajectory:
    model = thor_fx.compile(build(mlp).to(device), mode="reduce-overhead")
    optimizer, trajectory = thor_fx.Thor(model, **SETTINGS), []
    for x, y in data:
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.named_parameters())))
    return trajectory


def functional(data: Any, device: str) -> Trajectory:
    model, trajectory = build(mlp).to(device), []
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), mode="reduce-overhead")
    params: Any = snapshot(dict(model.named_parameters()))
    state = step.init(params, *(part.to(device) for part in data[0]))
    for batch in data:
        params, state, _ = step(params, state, *(part.to(device) for part in batch))
        trajectory.append(snapshot(params))
    return trajectory


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arguments of every inference graph Inductor takes for the same tensors in every call."""
    module, counts = importlib.import_module("torch._inductor.compile_fx"), []
    original = module.get_static_input_idxs

    def counted(number: int) -> list[int]:
        found = original(number)
        counts.append(len(found))
        return found

    monkeypatch.setattr(module, "get_static_input_idxs", counted)
    return counts


PARAMETERS, INVERSES = 4, 4  # two layers
COUNTERS = 5 + 2  # n, failures, refreshes, skipped and recent steps; failures in a row of either layer


@pytest.mark.inductor
@pytest.mark.parametrize("train", [drop_in, functional])
def test_it_trains_as_the_default_does(fixed, train: Callable[[Any, str], Trajectory]):
    data = batches(3)
    with torch._functorch.config.patch(enable_autograd_cache=False):  # or nobody asks what is fixed
        found = train(data, "cpu")
    assert_same(found, by_functional_door(build(mlp), data, **SETTINGS))
    state = INVERSES + PARAMETERS + COUNTERS  # one momentum per parameter
    assert fixed.count(PARAMETERS + state) == 2, "both kinds of step write in place"


@pytest.mark.gpu
@pytest.mark.inductor
@pytest.mark.parametrize("train", [drop_in, functional])
def test_cuda_graphs_are_used(train: Callable[[Any, str], Trajectory]):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from torch._dynamo.utils import counters

    counters.clear()
    data = batches(8)
    found = [{name: p.cpu() for name, p in params.items()} for params in train(data, "cuda")]
    assert_same(found, by_functional_door(build(mlp), data, **SETTINGS), rtol=1e-9)
    assert counters["inductor"]["cudagraph_skips"] == 0
