"""``thor_fx.verify``: what its certificate says of models whose factors are known."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx

B = 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


class TiedLM(nn.Module):
    """One table for words that come in and words that go out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(random(9, 4))
        self.mix = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.mix(F.embedding(ids, self.table)).tanh() @ self.table.T).mT


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), random(B, 5), targets(3, B)


def conv() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    return model, random(B, 2, 4, 4), targets(4, B)


def tied_lm() -> tuple[nn.Module, Tensor, Tensor]:
    return TiedLM(), targets(9, B, 5), targets(9, B, 5).flip(1)


def loss_of(model: nn.Module) -> Any:
    def loss_fn(params, x, y):
        return F.cross_entropy(functional_call(model, dict(params), (x,)), y)

    return loss_fn


def certificate(make: Any, **settings: Any) -> thor_fx.Certificate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model, *batch = make()
    return thor_fx.verify(loss_of(model), dict(model.named_parameters()), *batch, **settings)


LAYERS = {mlp: {"0.weight", "2.weight"}, conv: {"0.weight", "3.weight"}, tied_lm: {"table", "mix.weight"}}


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": "joint"}, {"sharing": "reduce"}, {"bias": "joint", "sharing": "reduce"}],
    ids=str,
)
def test_invariances_hold_for_independent_examples(make, settings):
    found = certificate(make, **settings)
    assert set(found.layers) == LAYERS[make]
    for name, errors in found.layers.items():
        zero = [errors.gradient, errors.repeated, errors.order, errors.summed, errors.split]
        assert max(zero) == errors.invariance < 1e-12, name
        assert 0 < errors.fisher < 5
        assert 0 < errors.cosine <= 1 + 1e-12
    assert found.worst == max(e.invariance for e in found.layers.values())


def squares(forward: Any) -> Any:
    def loss_fn(params, x):
        return forward(params, x).square().mean(0).sum()

    return loss_fn


def test_the_fisher_block_is_exact_with_one_output_and_residuals_of_one_size():
    """``g_i`` is the same number up to its sign, so ``E[g^2 a a^T] = E[g^2] E[a a^T]``."""

    def loss_fn(params, x, y):
        return (y * (x @ params["w"])).mean()

    y = torch.tensor([1.0, -1, 1, 1, -1, -1])[:, None]
    (errors,) = thor_fx.verify(loss_fn, {"w": random(4, 1)}, random(B, 4), y).layers.values()
    assert errors.fisher < 1e-12
    assert errors.cosine == pytest.approx(1, abs=1e-12)


def test_the_fisher_blocks_of_a_deep_linear_net_on_one_datum_are_exact():
    """All examples are one datum: an expectation over one value is that value."""
    loss_fn = squares(lambda p, x: x @ p["a"] @ p["b"] @ p["c"])
    params = {"a": random(4, 5), "b": random(5, 3, seed=1), "c": random(3, 2, seed=2)}
    found = thor_fx.verify(loss_fn, params, random(1, 4).repeat(B, 1))
    assert set(found.layers) == {"a", "b", "c"}
    for errors in found.layers.values():
        assert errors.fisher < 1e-12
        assert errors.cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("bias", ["raw", "joint"])
def test_with_its_bias_too(bias):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    loss_fn = squares(lambda p, x: functional_call(model, dict(p), (x,)))
    params = dict(model.named_parameters())
    found = thor_fx.verify(loss_fn, params, random(1, 4).repeat(B, 1), bias=bias)
    assert max(errors.fisher for errors in found.layers.values()) < 1e-12
    assert found.worst < 1e-12


def test_reduced_positions_are_exact_where_expanded_ones_are_not():
    """One datum of several positions: ``dW = T mean(a) g^T``, with one gradient for all positions."""

    def loss_fn(params, x):
        return (x @ params["w"]).mean(1).square().mean(0).sum()

    params, x = {"w": random(4, 3)}, random(1, 5, 4).repeat(B, 1, 1)
    errors = {
        sharing: thor_fx.verify(loss_fn, params, x, sharing=sharing).layers["w"]
        for sharing in ("expand", "reduce")
    }
    assert errors["reduce"].fisher < 1e-12
    assert errors["expand"].fisher > 1e-2


def test_batch_norm_couples_examples():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    model = model.double()  # its buffers are no arguments
    batch = random(B, 3, 4), targets(2, B)
    params = dict(model.named_parameters())
    found = thor_fx.verify(loss_of(model), params, *batch)
    assert found.worst > 1e-2
    assert found.layers["0.weight"].split == found.layers["0.weight"].invariance
    assert max(errors.gradient for errors in found.layers.values()) < 1e-12
    model.eval()
    assert thor_fx.verify(loss_of(model), params, *batch).worst < 1e-12


def test_a_model_that_mixes_examples_in_their_order_is_found_out():
    def loss_fn(params, x):
        return ((x * torch.arange(1, len(x) + 1)[:, None]) @ params["w"]).square().mean()

    errors = thor_fx.verify(loss_fn, {"w": random(4, 2)}, random(B, 4)).layers["w"]
    assert errors.order > 1e-2
    assert errors.split > 1e-2


# --- input and output --------------------------------------------------------------------------------


def test_blocks_too_large_are_not_compared():
    found = certificate(conv, max_size=50)
    assert math.isnan(found.layers["0.weight"].fisher)
    assert math.isnan(found.layers["0.weight"].cosine)
    assert found.layers["3.weight"].fisher > 0
    assert found.worst < 1e-12
    first = str(found).split("\n")[1].split()
    assert first[:1] == ["0.weight"]
    assert first[2:4] == ["-", "-"]


def test_the_table():
    found = certificate(mlp)
    header, *rows, last = str(found).split("\n")
    titles = ["layer", "gradient", "fisher", "cosine", "repeated", "order", "summed", "split"]
    assert header.split() == titles
    assert [row.split()[0] for row in rows] == list(found.layers)
    assert {len(row) for row in rows} == {len(header)}
    assert last == f"largest error of an invariance: {found.worst:.1e}"


def test_a_loss_with_aux_and_a_batch_with_tensors_of_its_own():
    def loss_fn(params, batch, offset):
        x, y = batch["x"], batch["y"]
        error = (x @ params["w"] + offset - y).square().mean()
        return error, {"error": error.detach()}

    batch = {"x": random(B, 3), "y": random(B, 2)}
    assert thor_fx.verify(loss_fn, {"w": random(3, 2)}, batch, torch.tensor(0.5)).worst < 1e-12


def test_a_model_without_layers_has_an_empty_certificate():
    found = thor_fx.verify(lambda p, x: (x * p["v"]).mean(), {"v": random(3)}, random(B, 3))
    assert found.layers == {}
    assert found.worst == 0


def test_frozen_parameters_are_not_compared():
    params = {"w": random(3, 4).requires_grad_(), "frozen": nn.Parameter(random(4, 2), requires_grad=False)}
    loss_fn = squares(lambda p, x: x @ p["w"] @ p["frozen"])
    assert set(thor_fx.verify(loss_fn, params, random(B, 3)).layers) == {"w"}


def test_arguments_are_left_alone():
    model, x, y = mlp()
    params = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    thor_fx.verify(loss_of(model), params, x, y)
    assert x.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad is None for p in params.values())
    assert all(torch.equal(p, before[name]) for name, p in params.items())


def test_dtypes():
    seen = []

    def loss_fn(params, x):
        seen.append((params["w"].dtype, x.dtype))
        return (x @ params["w"]).square().mean()

    params, x = {"w": random(3, 2)}, random(B, 3)
    single = thor_fx.verify(loss_fn, params, x, dtype=None)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert 0 < single.worst < 1e-5
    seen.clear()
    assert thor_fx.verify(loss_fn, params, x).worst < 1e-12
    assert set(seen) == {(torch.float64, torch.float64)}


W = {"w": torch.ones(3, 2)}


def plain(params, x):
    return (x @ params["w"]).mean()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: thor_fx.verify(plain, W, torch.ones(1, 3)), ValueError, "two examples"),
        (lambda: thor_fx.verify(plain, W), ValueError, "two examples"),
        (lambda: thor_fx.verify(plain, W, torch.tensor(1.0)), ValueError, "two examples"),
        (lambda: thor_fx.verify(plain, [torch.ones(3, 2)], torch.ones(4, 3)), TypeError, "params"),
        (lambda: thor_fx.verify(plain, {"w": torch.ones(3, 2).int()}, torch.ones(4, 3)), TypeError, "w"),
        (lambda: thor_fx.verify(plain, W, torch.ones(4, 3), sharing="none"), ValueError, "sharing"),
        (lambda: thor_fx.verify(plain, W, torch.ones(4, 3), sharing=3), TypeError, "sharing"),
        (lambda: thor_fx.verify(plain, W, torch.ones(4, 3), bias="both"), ValueError, "bias"),
        (lambda: thor_fx.verify(plain, W, torch.ones(4, 3), bias=None), TypeError, "bias"),
        (lambda: thor_fx.verify(plain, W, torch.ones(4, 3), max_size=0), ValueError, "max_size"),
        (lambda: thor_fx.verify(plain, W, torch.ones(4, 3), max_size=2.5), TypeError, "max_size"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
