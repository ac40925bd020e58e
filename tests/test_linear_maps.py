"""Weights that are linear functions of parameters: scaled, and low-rank adapters merged into them."""

import pytest
import torch
from torch import nn

import oracle
import thor_fx
from dense import assert_factors, case, close, solve, updates
from models import random
from training import IN, batches, build, by_both_doors

D = torch.float64
OUT, IN_, ROWS, RANK = 5, 4, 6, 2
W, X = random(1, D, OUT, IN_), random(2, D, ROWS, IN_)
ROW, COLUMN, MASK = random(3, D, IN_), random(4, D, OUT), (random(5, D, OUT, IN_) > 0).to(D)


def loss_of(s):
    return s.sin().sum(-1).mean()


# the function of the weight, and the same by its effect on activations and on what the weight makes
MAPS = {
    "times": (lambda w: 2.5 * w, lambda x: x, lambda s: 2.5 * s),
    "divided": (lambda w: w / 3, lambda x: x, lambda s: s / 3),
    "negative": (lambda w: -w, lambda x: x, lambda s: -s),
    "less": (lambda w: MASK - w, lambda x: x, lambda s: X @ MASK.T - s),
    "of a row": (lambda w: w * ROW, lambda x: x * ROW, lambda s: s),
    "of a column": (lambda w: w * COLUMN[:, None], lambda x: x, lambda s: s * COLUMN),
    "by a row": (lambda w: w / ROW, lambda x: x / ROW, lambda s: s),
    "by a column": (lambda w: w / COLUMN[:, None], lambda x: x, lambda s: s / COLUMN),
    "of both": (lambda w: -2 * (w * ROW) * COLUMN[:, None], lambda x: x * ROW, lambda s: -2 * s * COLUMN),
    "transposed": (lambda w: (w.T * COLUMN).T, lambda x: x, lambda s: s * COLUMN),
}
USES = {"linear": nn.functional.linear, "matmul": lambda x, w: (w @ x.T).T}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", MAPS)
def test_scaled_weights(how, use):
    of_weight, before, after = MAPS[how]

    def loss_fn(p, x):
        return loss_of(USES[use](x, of_weight(p["w"])))

    def forward(tap, p, x):
        a = before(x)
        return loss_of(after(tap("w", a, a @ p["w"].T)))

    expected = case(forward, {"w": W}, X, terms=ROWS)
    assert_factors(thor_fx.factors(loss_fn, {"w": W}, X), oracle.factors(expected))
    pair, gradient = oracle.factors(expected)["w"], oracle.loss_and_gradients(expected)[1]["w"]
    U = updates(loss_fn, {"w": W}, X, damping_rule="pi")["w"]
    close(U, solve(pair.A, pair.G, gradient, "pi"))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda w: w * MASK, "its gradient is mul <- "),
        (torch.tanh, "its gradient is tanh_backward <- "),
        (lambda w: w / w.norm(), "its gradient is "),
        (lambda w: w * w, "its gradient is "),
        (lambda w: w.cumsum(0), "its gradient is "),
    ],
)
def test_other_functions_say_why_they_have_no_factors(function, reason):
    def loss_fn(p, x):
        return loss_of(x @ function(p["w"]).T)

    report = thor_fx.explain(loss_fn, {"w": W}, X)
    assert not report.coverage.layers
    assert report.coverage.fallback["w"].startswith(reason)
    gradient = oracle.loss_and_gradients(case(lambda _, p, x: loss_fn(p, x), {"w": W}, X, terms=1))[1]["w"]
    close(updates(loss_fn, {"w": W}, X)["w"], gradient)


# --- low-rank adapters -----------------------------------------------------------------------------

A, B = random(6, D, RANK, IN_), random(7, D, OUT, RANK)


def check(loss_fn, forward, params, trained, terms=ROWS):
    """Of ``trained``; the others are frozen."""
    given = {name: nn.Parameter(p, requires_grad=name in trained) for name, p in params.items()}
    expected = case(forward, params, X, layers=trained, terms=terms)
    pairs = oracle.factors(expected)
    assert_factors(thor_fx.factors(loss_fn, given, X), pairs)
    _, gradients = oracle.loss_and_gradients(expected)
    found = thor_fx.compile_step(loss_fn, thor_fx.thor(1.0, 0.3, 0.0), backend="eager", donate=False)
    new, _, _ = found(given, found.init(given, X), X)
    for name in trained:
        U = given[name].detach() - new[name].detach()
        close(U, solve(pairs[name].A, pairs[name].G, gradients[name]))


def written_out(tap, p, x, scale):
    down = tap("a", x, x @ p["a"].T)
    return loss_of(tap("w", x, x @ p["w"].T) + scale * tap("b", down, down @ p["b"].T))


@pytest.mark.parametrize("trained", [("a", "b"), ("b",), ("a",), ("w", "a", "b")])
@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_merged_adapter_is_the_one_that_is_written_out(trained, scale):
    """The activation of ``B`` is ``A a``, and the cotangent of ``A`` is ``B^T g``."""

    def loss_fn(p, x):
        return loss_of(x @ (p["w"] + scale * (p["b"] @ p["a"])).T)

    params = {"w": W, "a": A, "b": B}
    check(loss_fn, lambda tap, p, x: written_out(tap, p, x, scale), params, trained)


@pytest.mark.parametrize("trained", [("a", "b"), ("a",), ("b",)])
@pytest.mark.parametrize("scale", [1, 0.5])
def test_what_an_adapter_captures_is_a_frozen_weight(trained, scale):
    """Plain tensors and no parameters: read as data, a matrix of the adapter would have rows of its own."""

    def loss_fn(p, x):
        p = {"w": W, "a": A, "b": B, **p}
        return loss_of(x @ (p["w"] + scale * (p["b"] @ p["a"])).T)

    def forward(tap, p, x):
        return written_out(tap, {"w": W, "a": A, "b": B, **p}, x, scale)

    check(loss_fn, forward, {name: {"a": A, "b": B}[name] for name in trained}, trained)


@pytest.mark.parametrize("frozen", ["a", "b"])
@pytest.mark.parametrize("how", ["buffers of the step", "buffer", "attribute"])
def test_an_adapter_in_a_module_is_a_frozen_weight(frozen, how):
    trained = "b" if frozen == "a" else "a"
    params = {trained: {"a": A, "b": B}[trained]}
    expected = oracle.factors(
        case(lambda tap, p, x: written_out(tap, {"w": W, "a": A, "b": B, **p}, x, 1), params, X, terms=ROWS)
    )[trained]
    gradient = oracle.loss_and_gradients(
        case(lambda _, p, x: loss_of(x @ (W + p["b"] @ p["a"]).T), {"a": A, "b": B}, X, terms=ROWS)
    )[1][trained]
    U = solve(expected.A, expected.G, gradient)
    if how == "buffers of the step":

        def loss_fn(p, buffers, x):
            p = {**p, **buffers}
            return loss_of(x @ (W + p["b"] @ p["a"]).T), (buffers, None)

        buffers = {frozen: {"a": A, "b": B}[frozen].clone()}
        step = thor_fx.compile_step(loss_fn, thor_fx.thor(1.0, 0.3, 0.0), backend="eager", donate=False)
        new, _, _ = step(params, step.init(params, X, buffers=buffers), X)
        close(params[trained] - new[trained], U)
        return
    module = nn.Module()
    for name, value in (("w", W), ("a", A), ("b", B)):
        kept = nn.Buffer(value.clone()) if how == "buffer" else value.clone()
        setattr(module, name, nn.Parameter(value.clone()) if name == trained else kept)
    module.forward = lambda x: x @ (module.w + module.b @ module.a).T
    model = thor_fx.compile(module, backend="aot_eager")
    optimizer = thor_fx.Thor(model, lr=1.0, damping=0.3, momentum=0.0)
    loss_of(model(X)).backward()
    optimizer.step()
    close(params[trained] - getattr(module, trained).detach(), U)


def test_where_a_loss_closes_over_all_of_its_data_they_are_data():
    found = thor_fx.factors(lambda p: loss_of((X @ p["w"].T).tanh() @ p["v"].T), {"w": W, "v": B.T})
    assert (found["w"].rows, found["v"].rows) == (ROWS, ROWS)
    close(found["w"].A, X.T @ X / ROWS)


@pytest.mark.parametrize("order", ["left", "right"])
def test_a_product_of_three(order):
    c = random(8, D, OUT, 3)
    params = {"a": A, "b": random(9, D, 3, RANK), "c": c}

    def loss_fn(p, x):
        product = (p["c"] @ p["b"]) @ p["a"] if order == "left" else p["c"] @ (p["b"] @ p["a"])
        return loss_of(nn.functional.linear(x, W + product))

    def forward(tap, p, x):
        first = tap("a", x, x @ p["a"].T)
        second = tap("b", first, first @ p["b"].T)
        return loss_of(x @ W.T + tap("c", second, second @ p["c"].T))

    check(loss_fn, forward, params, ("a", "b", "c"))


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Buffer(torch.randn(OUT, IN))
        self.a, self.b = nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.randn(OUT, RANK))
        self.scale = nn.Buffer(torch.randn(3))
        self.head = nn.Parameter(torch.randn(3, OUT))

    def forward(self, x):
        weight = self.frozen + 0.5 * (self.b @ self.a)
        h = nn.functional.linear(x, weight).tanh()
        return nn.functional.linear(h, self.head * self.scale[:, None])


def test_both_doors_take_the_same_steps():
    settings = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2, "damping_rule": "pi"}
    model = thor_fx.compile(build(Merged), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings)
    (x, y) = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    layers = optimizer.coverage.layers
    assert {name: (layer.out, layer.in_) for name, layer in layers.items()} == {
        "a": (RANK, IN), "b": (OUT, RANK), "head": (3, OUT),
    }  # fmt: skip
    data = batches(4)
    by_both_doors(lambda: build(Merged), data, 1e-10, **settings)
