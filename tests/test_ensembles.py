"""Ensembles: under ``vmap`` every member has the factors, and takes the steps, that it has alone."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

import oracle
import thor_fx
from models import random

D = torch.float64
MEMBERS, BATCH, CLASSES, WORDS = 3, 7, 4, 11


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 2, groups=2, stride=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh().mean((2, 3)))


class Lookups(nn.Module):
    """With ``tied``, the table is that of the classes, too."""

    def __init__(self, tied=False):
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.mix = nn.Linear(5, 5)
        self.head = None if tied else nn.Linear(5, CLASSES)

    def forward(self, ids):
        h = self.mix(self.words(ids)).tanh().mean(1)
        return h @ self.words.weight.T if self.head is None else self.head(h)


def dense():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def numbers(*sizes):
    return lambda *front: random(len(front), D, *front, BATCH, *sizes)


def words(*front):
    return torch.randint(WORDS, (*front, BATCH, 3), generator=torch.Generator().manual_seed(1))


NETS = {
    "dense": (dense, numbers(5)),
    "positions": (lambda: nn.Sequential(dense(), nn.Flatten(1)), numbers(2, 5)),
    "convolutions": (Convolutions, numbers(2, 6, 6)),
    "lookups": (Lookups, words),
    "tied lookups": (lambda: Lookups(tied=True), words),
}
JOINT = {"damping": 0.1, "momentum": 0.9, "frequency": 2, "bias": "joint"}


class Ensemble:
    """Its members, and the losses of one and of all of them."""

    def __init__(self, name, own_data=False, dtype=D):
        torch.manual_seed(0)
        make, data = NETS[name]
        front = [MEMBERS] if own_data else []
        self.net, *others = (make().to(dtype) for _ in range(MEMBERS))
        self.params = [{n: p.detach() for n, p in net.named_parameters()} for net in (self.net, *others)]
        self.stacked = {n: torch.stack([p[n] for p in self.params]) for n in self.params[0]}
        x, y = data(*front), torch.randint(CLASSES, (*front, BATCH))
        self.batch = x.to(dtype) if x.is_floating_point() else x, y
        self.batches = [[part[m] for part in self.batch] if own_data else self.batch for m in range(MEMBERS)]
        self.axes = (0, 0, 0) if own_data else (0, None, None)

    def one(self, params, x, y):
        return cross_entropy(functional_call(self.net, params, x), y)

    def summed(self, params, x, y):
        return vmap(self.one, in_dims=self.axes)(params, x, y).sum()

    def averaged(self, params, x, y):
        return vmap(self.one, in_dims=self.axes)(params, x, y).mean()


def trained(loss_fn, starts, batches, **settings):
    """Parameters after three steps of one compiled function from every start."""
    step = thor_fx.compile_step(loss_fn, thor_fx.thor(lr=0.05, **settings), backend="eager", donate=False)
    for start, batch in zip(starts, batches, strict=True):
        params, state = start, step.init(start, *batch)
        for _ in range(3):
            params, state, _ = step(params, state, *batch)
        yield params


def assert_trained_alike(ensemble, loss_fn, tolerance, settings, **of_all):
    (together,) = trained(loss_fn, [ensemble.stacked], [ensemble.batch], **settings, **of_all)
    for m, alone in enumerate(trained(ensemble.one, ensemble.params, ensemble.batches, **settings)):
        for name, weights in alone.items():
            assert (weights - ensemble.params[m][name]).abs().max() > 1e-4, f"{name} did not move"
            assert oracle.relative_error(together[name][m], weights) < tolerance, (name, m)


@pytest.mark.parametrize("own_data", [False, True], ids=["same data", "own data"])
@pytest.mark.parametrize("name", NETS)
def test_factors_are_those_of_each_member_alone(name, own_data):
    ensemble = Ensemble(name, own_data)
    found = thor_fx.factors(ensemble.summed, ensemble.stacked, *ensemble.batch, bias="joint")
    for m in range(MEMBERS):
        alone = thor_fx.factors(ensemble.one, ensemble.params[m], *ensemble.batches[m], bias="joint")
        assert found.keys() == alone.keys()
        for layer, pair in alone.items():
            for side, expected in (("A", pair.A), ("G", pair.G)):
                got = getattr(found[layer], side).unflatten(0, (MEMBERS, -1))[m].reshape(expected.shape)
                assert oracle.relative_error(got, expected) < 1e-12, (layer, side)


@pytest.mark.parametrize("name", ["convolutions", "tied lookups"])
def test_steps_are_those_of_each_member_alone(name):
    ensemble = Ensemble(name)
    assert_trained_alike(ensemble, ensemble.summed, 1e-10, JOINT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-10), (torch.float32, 1e-5)])
def test_recommended_steps_are_those_of_each_member_alone(dtype, tolerance):
    ensemble = Ensemble("dense", own_data=True, dtype=dtype)
    assert_trained_alike(ensemble, ensemble.summed, tolerance, {"preset": "recommended"})


def test_a_mean_over_members_needs_its_loss_scale():
    ensemble = Ensemble("dense")
    assert_trained_alike(ensemble, ensemble.averaged, 1e-10, JOINT, loss_scale=1 / MEMBERS)


def test_biases_of_members_are_no_weights():
    ensemble = Ensemble("dense")
    tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9)
    step = thor_fx.compile_step(ensemble.summed, tx, backend="eager", strict=True)
    step.init(ensemble.stacked, *ensemble.batch)
    report = thor_fx.explain(ensemble.summed, ensemble.stacked, *ensemble.batch, tx=tx)
    assert "a vector for every matrix of a layer" in report.why("0.bias")


@pytest.mark.parametrize("flat", [(0, 1), (1, 2)])
def test_a_table_of_more_axes_is_no_ensemble(flat):
    """``(a, b, width)`` with one index for a and b, or ``(words, a, b)`` with rows of a times b features."""

    def loss_fn(params, ids):
        return nn.functional.embedding(ids, params["table"].flatten(*flat)).sin().sum(-1).mean()

    table, ids = random(1, D, 3, 4, 5), torch.tensor([0, 2, 1, 2])
    found = thor_fx.factors(loss_fn, {"table": table}, ids)["table"]
    assert (found.groups, found.A.numel() * found.G.shape[0]) == (1, table.numel())
