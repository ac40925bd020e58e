"""Draws: scores of the user's own, frequencies under every backend; and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import thor_fx
from estimators import (
    C,
    assert_pairs,
    batches,
    collected,
    factors_of,
    make,
    watched,
    whole,
)
from thor_fx.compile import collector_of
from thor_fx.passes.likelihoods import LikelihoodError


def scores(z):
    """Of a categorical distribution, by other means than ours."""
    p = z.softmax(-1)
    label = torch.searchsorted(p.cumsum(-1), torch.rand_like(p[..., :1])).clamp(max=C - 1)
    return p - F.one_hot(label.squeeze(-1), C)


def draws_of(backend, count):
    """The head's weight gradient of one datum per draw shows the label: G is ``(p - e_y)(p - e_y)^T``."""
    torch.manual_seed(0)
    model = nn.Linear(2, C, bias=False)
    compiled = watched("categorical", model, backend=backend, fisher="sampled")
    p = model(torch.ones(1, 2)).softmax(-1)[0].detach()
    labels = []
    for _ in range(count):
        F.cross_entropy(compiled(torch.ones(1, 2)), torch.tensor([0])).backward()
        g = collected(compiled)["weight"].G
        collector_of(compiled).wanted = True
        labels.append(_label(g, p))
    return torch.tensor(labels), p


def _label(g, p):
    expected = [torch.outer(p - e, p - e) for e in torch.eye(C)]
    errors = [float((g - e).abs().max()) for e in expected]
    assert min(errors) < 1e-5
    return errors.index(min(errors))


@pytest.mark.parametrize("door", ["functional", "drop-in"])
def test_a_callable_draws_scores(door):
    x, y = batches(1)[0]
    y = y.clamp(min=0)
    exact, total = whole(F.cross_entropy, x, y), 0
    model, net = watched(scores, fisher="sampled"), make()
    params = dict(net.named_parameters())
    torch.manual_seed(0)
    draws = 150 if door == "drop-in" else 8
    for _ in range(draws):
        if door == "drop-in":
            F.cross_entropy(model(x), y).backward()
            total = total + collected(model)["2.weight"].G / draws
            collector_of(model).wanted = True
        else:
            found = thor_fx.factors(
                lambda p, x, y: F.cross_entropy(functional_call(net, p, (x,)), y), params, x, y,
                fisher="sampled", likelihood=scores,
            )  # fmt: skip
            total = total + found["2.weight"].G / draws
    assert float((total - exact["2.weight"].G).norm() / exact["2.weight"].G.norm()) < (
        0.15 if draws > 99 else 0.6
    )


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_labels_are_drawn_anew_in_every_step_with_the_model_s_frequencies(backend):
    count = 300
    labels, p = draws_of(backend, count)
    seen = torch.bincount(labels, minlength=C) / count
    assert ((seen - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()
    same = (labels[1:] == labels[:-1]).double().mean()
    assert abs(same - (p**2).sum()) < 0.15, "no draw repeats the one before"


@pytest.mark.inductor
def test_the_functional_door_draws_anew_in_every_step_under_inductor():
    x, y = batches(1)[0]
    model = make()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    tx = thor_fx.thor(lr=0.0, damping=0.1, momentum=0.0, frequency=1, fisher="sampled")
    step = thor_fx.compile_step(lambda p, x, y: F.cross_entropy(functional_call(model, p, (x,)), y), tx)
    state = step.init(params, x, y)
    inverses = []
    for _ in range(4):
        params, state, _ = step(params, state, x, y)
        leaves = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(state.inner)]
        inverses.append(torch.cat([leaf.flatten().double() for leaf in leaves if leaf.dim() > 1]))
    assert all(not torch.equal(a, b) for i, a in enumerate(inverses) for b in inverses[:i])


def test_a_loss_outside_of_the_model_needs_a_name():
    model = watched(None)
    with pytest.raises(
        LikelihoodError, match="computed outside of the compiled model: pass likelihood='categ"
    ):
        model(batches(1)[0][0])


def test_a_model_of_two_graphs_is_refused():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.net(x)

    model = watched("categorical", Broken())
    with pytest.raises(Exception, match="graph_break") as caught:
        model(batches(1)[0][0])
    assert "must be one graph" in "".join(caught.value.__notes__)


def test_exact_is_refused_where_it_is_large():
    x, y = batches(1)[0]
    net = make(last=65)
    with pytest.raises(LikelihoodError, match=r"65 for shape \(6, 65\); at most 64 .*fisher='sampled'"):
        factors_of(net, F.cross_entropy, x, y, fisher="exact")


def test_exact_needs_a_likelihood_by_name():
    model = watched(scores)
    with pytest.raises(LikelihoodError, match="a callable only draws"):
        model(batches(1)[0][0])


@pytest.mark.parametrize("wrong", [lambda z: z.sum(), lambda z: 1.0])
def test_a_callable_must_return_scores(wrong):
    x, y = batches(1)[0]
    net = make()
    with pytest.raises(Exception, match=r"likelihood\(z\) must return scores of the shape of z, \(6, 3\)"):
        factors_of(net, F.cross_entropy, x, y, fisher="sampled", likelihood=wrong)


def test_a_name_finds_the_output_of_a_loss_that_is_not_recognised():
    """In the functional door it is what the layer nearest the loss computes, bias included."""
    x, y = batches(1)[0]
    y = y.clamp(min=0)
    net = make()

    def focal(z, y):
        p = F.log_softmax(z, -1).gather(-1, y[:, None])
        return -((1 - p.exp()).square() * p).mean()

    params = dict(net.named_parameters())
    found = thor_fx.factors(
        lambda p, x, y: focal(functional_call(net, p, (x,)), y),
        params,
        x,
        y,
        fisher="exact",
        likelihood="categorical",
    )
    assert_pairs(found, whole(F.cross_entropy, x, y))
    with pytest.raises(LikelihoodError, match="neg <- mean <- mul"):
        thor_fx.factors(lambda p, x, y: focal(functional_call(net, p, (x,)), y), params, x, y, fisher="exact")
