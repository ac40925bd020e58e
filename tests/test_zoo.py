"""Real architectures: what is preconditioned, whether the factors are right, whether they train.

The models of :mod:`zoo` are tiny and have random weights. Those of timm need torchvision, whose wheels
fit one torch only: at present they run on torch 2.15, and are skipped elsewhere.
"""

import functools
import math
import re

import pytest
import torch
from torch import Tensor

import thor_fx
from hooks import factors_by_hooks, uses_by_hooks
from oracle import relative_error
from zoo import TIMM, TRANSFORMERS, Specimen

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
SETTINGS = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 4, "damping_rule": "pi"}
STEPS = 6

REASONS = {
    "a table that is added to every example": r"^its gradient is (\w+ <- )*sum <- ",
    "rows that are picked by an index": r"^its gradient is index_put <- new_zeros",
    "a table that is normalised before it is used": r"^its gradient is getitem <- native_layer_norm_backward",
    "weight norm": r"^its gradient is getitem <- _weight_norm_interface_backward",
    "the decay rates of Mamba": r"^its gradient is mul <- neg <- ",
}

DROP_IN = {
    "BertForMaskedLM",
    "AlbertForMaskedLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "ResNetForImageClassification",
}


class Trained:
    """A specimen in the functional door; it is traced when it is first asked for."""

    def __init__(self, specimen: Specimen) -> None:
        torch._dynamo.reset()
        self.specimen, self.model, self.batch = specimen, specimen.build(), specimen.batch()
        self.loss_fn = specimen.loss_fn(self.model)

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @functools.cached_property
    def step(self) -> thor_fx.step.CompiledStep:
        """The compiled step; it knows the coverage."""
        step = thor_fx.compile_step(self.loss_fn, thor_fx.thor(**SETTINGS), backend="eager")
        self.state = step.init(self.params, self.batch)
        return step

    @functools.cached_property
    def losses(self) -> list[float]:
        """The losses of a few steps on one batch."""
        step, losses = self.step, []
        params, state = {name: p.detach().clone() for name, p in self.params.items()}, self.state
        for _ in range(STEPS):
            params, state, out = step(params, state, self.batch)
            losses.append(out.loss.item())
        return losses


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> Trained:
    specimen = request.param
    if specimen in TIMM:
        pytest.importorskip("timm", reason="timm needs torchvision, whose wheels fit the newest torch only")
    pytest.importorskip("transformers")
    return Trained(specimen)


every_specimen = pytest.mark.parametrize(
    "trained", [*TRANSFORMERS, *TIMM], indirect=True, ids=lambda specimen: specimen.name
)


@every_specimen
def test_every_parameter_has_a_place(trained):
    found, params = trained.step.coverage, trained.params
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
def test_factors_are_those_of_hooks(trained):
    specimen = trained.specimen
    model, tolerance = specimen.build(), TOLERANCES[specimen.dtype]
    uses = uses_by_hooks(model, lambda: specimen.run(model, trained.batch))
    found = thor_fx.factors(trained.loss_fn, trained.params, trained.batch)
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
def test_a_few_steps_lower_the_loss(trained):
    assert all(map(math.isfinite, trained.losses))
    assert trained.losses[-1] < 0.98 * trained.losses[0]


@pytest.mark.parametrize(
    "trained",
    [specimen for specimen in TRANSFORMERS if specimen.name in DROP_IN],
    indirect=True,
    ids=lambda specimen: specimen.name,
)
def test_both_doors_take_the_same_steps(trained):
    specimen = trained.specimen
    model = thor_fx.compile(specimen.build(), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    losses = []
    for _ in range(STEPS):
        loss = specimen.run(model, trained.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(trained.losses, rel=1e-8)
    assert optimizer.coverage == trained.step.coverage
