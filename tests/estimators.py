"""Models, losses and collected factors for tests of estimators."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import thor_fx
from thor_fx.compile import collector_of
from thor_fx.factors import kronecker

N, D, C = 6, 4, 3
PLAIN = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}


def make(last=C):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, last)).double()


def batches(steps=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, N, D, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (steps, N), generator=generator)
    y[:, 1] = -100
    return list(zip(x, y, strict=True))


def onehot(y):
    return F.one_hot(y.clamp(min=0), C).double()


LOSSES = {
    "categorical": F.cross_entropy,
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, onehot(y)),
    "gaussian": lambda z, y: F.mse_loss(z, onehot(y)),
}


class WithLoss(nn.Module):
    """A model that returns its loss and its logits, as those of ``transformers`` do."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, y):
        z = self.net(x)
        return self.loss(z, y), z


def collected(model):
    """The factors that have arrived, by layer."""
    collector = collector_of(model)
    moments, terms = collector.take()
    return kronecker(moments, collector.coverage.layers, terms, 1 / terms)


def watched(likelihood, model=None, backend="eager", fisher="exact"):
    compiled = thor_fx.compile(model or make(), backend=backend)
    thor_fx.Thor(compiled, **PLAIN, fisher=fisher, likelihood=likelihood)
    return compiled


def factors_of(net, loss, x, y, **options):
    params = dict(net.named_parameters())
    return thor_fx.factors(lambda p, x, y: loss(functional_call(net, p, (x,)), y), params, x, y, **options)


def whole(loss, x, y, fisher="exact"):
    return factors_of(make(), loss, x, y, fisher=fisher)


def assert_pairs(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert oracle.relative_error(found[name].A, pair.A) < tolerance, name
        assert oracle.relative_error(found[name].G, pair.G) < tolerance, name


def assert_same(one, other, tolerance=1e-10):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert oracle.relative_error(value, other[name]) < tolerance, name
