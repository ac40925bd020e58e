"""Real architectures: what is preconditioned, whether the factors are right, whether they train.

The models of :mod:`zoo` are tiny and have random weights. Those of timm need torchvision, whose wheels
fit one torch only: at present they run on torch 2.15, and are skipped elsewhere.
"""

import functools
import math
import re
from typing import NamedTuple

import pytest
import torch

import thor_fx
from hooks import factors_by_hooks, uses_by_hooks
from oracle import relative_error
from thor_fx.layers import Coverage
from zoo import TIMM, TRANSFORMERS, Specimen

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "damping_rule": "pi"}
STEPS = 6

pytestmark = [
    # what Dynamo says of transformers' code; not ours to change
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

REASONS = {
    "a table that is added to every example": r"^its gradient is (view <- )?sum <- ",
    "rows that are picked by an index": r"^its gradient is index_put <- new_zeros",
    "a table that is normalised before it is used": r"^its gradient is getitem <- native_layer_norm_backward",
    "weight norm": r"^its gradient is getitem <- _weight_norm_interface_backward",
    "the decay rates of Mamba": r"^its gradient is mul <- neg <- ",
}

BOTH_DOORS = {
    "AlbertForMaskedLM",  # one layer, used twice
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",  # one table, used three times
    "ViTForImageClassification",
    "ResNetForImageClassification",  # running means
}


class Run(NamedTuple):
    """Losses of a few steps on one batch, and what was preconditioned."""

    losses: list[float]
    coverage: Coverage


class Traced:
    """A specimen in the functional door; it is traced when it is first asked for.

    Every step is a factor step, so that there is one graph to compile.
    """

    def __init__(self, specimen: Specimen) -> None:
        torch._dynamo.reset()
        self.specimen, self.model, self.batch = specimen, specimen.build(), specimen.batch()
        self.params = dict(self.model.named_parameters())
        self.loss_fn = specimen.loss_fn(self.model)

    @functools.cached_property
    def run(self) -> Run:
        return by_functional_door(self.specimen, frequency=1)


def by_functional_door(specimen: Specimen, frequency: int) -> Run:
    model, batch = specimen.build(), specimen.batch()
    tx = thor_fx.thor(**SETTINGS, frequency=frequency)
    step = thor_fx.compile_step(specimen.loss_fn(model), tx, backend="eager")
    params, losses = dict(model.named_parameters()), []
    state = step.init(params, batch)
    for _ in range(STEPS):
        params, state, out = step(params, state, batch)
        losses.append(out.loss.item())
    return Run(losses, step.coverage)


def by_drop_in_door(specimen: Specimen, frequency: int) -> Run:
    model, batch = thor_fx.compile(specimen.build(), backend="aot_eager"), specimen.batch()
    optimizer = thor_fx.Thor(model, **SETTINGS, frequency=frequency)
    losses = []
    for _ in range(STEPS):
        loss = specimen.run(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Run(losses, optimizer.coverage)


@pytest.fixture(scope="module")
def traced(request: pytest.FixtureRequest) -> Traced:
    specimen = request.param
    if specimen in TIMM:
        pytest.importorskip("timm", reason="timm needs torchvision, whose wheels fit the newest torch only")
    else:
        pytest.importorskip("transformers")
    return Traced(specimen)


every_specimen = pytest.mark.parametrize(
    "traced", [*TRANSFORMERS, *TIMM], indirect=True, ids=lambda specimen: specimen.name
)


@every_specimen
def test_every_parameter_has_a_place(traced):
    found, params = traced.run.coverage, traced.params
    layers = dict.fromkeys(layer.param for layer in found.layers.values())
    places = [*layers, *found.norms, *found.fallback, *found.unused, *found.frozen]
    assert sorted(places) == sorted(params)
    assert layers
    reasons = {name: why for name, why in found.fallback.items() if params[name].dim() > 1}
    unknown = {name: why for name, why in reasons.items() if not _known(why)}
    assert not unknown, "\n".join(f"{name}: {why}" for name, why in unknown.items())


def _known(reason: str) -> bool:
    return any(re.search(pattern, reason) for pattern in REASONS.values())


@every_specimen
def test_factors_are_those_of_hooks(traced):
    specimen = traced.specimen
    model, tolerance = specimen.build(), TOLERANCES[specimen.dtype]
    uses = uses_by_hooks(model, lambda: specimen.run(model, traced.batch))
    found = thor_fx.factors(traced.loss_fn, traced.params, traced.batch)
    assert uses
    for name, seen in uses.items():
        gradient = model.get_parameter(name).grad.flatten(1)
        assert relative_error(sum(use.gradient() for use in seen), gradient) <= tolerance, name
    assert uses.keys() <= found.keys(), f"no site: {sorted(uses.keys() - found.keys())}"
    for name, seen in uses.items():
        got, expected = found[name], factors_by_hooks(seen, specimen.terms)
        assert (got.rows, got.n, got.groups) == (expected.rows, specimen.terms, len(seen[0].groups)), name
        assert (got.A.shape, got.G.shape) == (expected.A.shape, expected.G.shape), name
        assert relative_error(got.A, expected.A) <= tolerance, name
        assert relative_error(got.G, expected.G) <= tolerance, name


@every_specimen
def test_a_few_steps_lower_the_loss(traced):
    losses = traced.run.losses
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.998 * losses[0]


@pytest.mark.parametrize("specimen", [s for s in TRANSFORMERS if s.name in BOTH_DOORS], ids=lambda s: s.name)
def test_both_doors_take_the_same_steps(specimen):
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    functional, drop_in = by_functional_door(specimen, frequency=4), by_drop_in_door(specimen, frequency=4)
    assert drop_in.losses == pytest.approx(functional.losses, rel=1e-8)
    assert drop_in.coverage.layers == functional.coverage.layers
    assert drop_in.coverage.terms == functional.coverage.terms
    assert set(drop_in.coverage.norms) == set(functional.coverage.norms)
    assert drop_in.coverage.fallback.keys() == functional.coverage.fallback.keys()
