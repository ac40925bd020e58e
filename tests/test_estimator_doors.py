"""``fisher=`` in both doors: the same parameters, scalers, accumulation, draws, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import thor_fx
from thor_fx.compile import collector_of
from thor_fx.factors import kronecker
from thor_fx.passes.likelihoods import LikelihoodError

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
BOTH = pytest.mark.parametrize("likelihood", LOSSES)


class WithLoss(nn.Module):
    """A model that returns its loss and its logits, as those of ``transformers`` do."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, y):
        z = self.net(x)
        return self.loss(z, y), z


def functional(model, loss, data, **settings):
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = thor_fx.compile_step(
        lambda p, x, y: loss(functional_call(model, p, (x,)), y),
        thor_fx.thor(**PLAIN, **settings),
        backend="eager",
    )
    state = step.init(params, *data[0])
    for batch in data:
        torch.manual_seed(7)
        params, state, _ = step(params, state, *batch)
    return params


def drop_in(model, loss, data, scale=1.0, **settings):
    compiled = thor_fx.compile(model, backend="eager")
    optimizer = thor_fx.Thor(compiled, **PLAIN, **settings)
    for x, y in data:
        torch.manual_seed(7)
        value = compiled(x, y)[0] if isinstance(model, WithLoss) else loss(compiled(x), y)
        (value * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("net."): p.detach() for name, p in compiled.named_parameters()}


def assert_same(one, other, tolerance=1e-10):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert oracle.relative_error(value, other[name]) < tolerance, name


@BOTH
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_both_doors_compute_the_same(fisher, likelihood):
    loss, data = LOSSES[likelihood], batches()
    expected = functional(make(), loss, data, fisher=fisher)
    assert_same(drop_in(make(), loss, data, fisher=fisher, likelihood=likelihood), expected)
    assert_same(drop_in(WithLoss(make(), loss), loss, data, fisher=fisher), expected)
    empirical = functional(make(), loss, data)
    assert oracle.relative_error(empirical["0.weight"], expected["0.weight"]) > 1e-3, "fisher= does something"


@BOTH
def test_a_constant_loss_scale_cancels(likelihood):
    loss, data = LOSSES[likelihood], batches()
    expected = functional(make(), loss, data, fisher="exact")
    options = {"fisher": "exact", "loss_scale": 32.0}
    assert_same(functional(make(), lambda z, y: 32 * loss(z, y), data, **options), expected)
    assert_same(drop_in(make(), loss, data, scale=32, likelihood=likelihood, **options), expected)
    assert_same(drop_in(WithLoss(make(), loss), loss, data, scale=32, **options), expected)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@BOTH
def test_a_gradient_scaler_cancels(likelihood, inside, unscale):
    """Gradients carry its scale, factors do not: so nobody has to tell the optimizer about ``unscale_``."""
    loss, data = LOSSES[likelihood], batches()
    expected = functional(make(), loss, data, fisher="exact")
    model = thor_fx.compile(WithLoss(make(), loss) if inside else make(), backend="eager")
    optimizer = thor_fx.Thor(model, **PLAIN, fisher="exact", likelihood=None if inside else likelihood)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in data:
        value = model(x, y)[0] if inside else loss(model(x), y)
        scaler.scale(value).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_same({n.removeprefix("net."): p.detach() for n, p in model.named_parameters()}, expected)


# --- what one step collects --------------------------------------------------------------------------


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


@BOTH
def test_micro_batches_are_one_batch(likelihood):
    """NOTE: why cotangents are those of single terms: sums over micro-batches need no factor of their own."""
    x, y = batches(1)[0]
    y = y.clamp(min=0)
    loss, model = LOSSES[likelihood], watched(likelihood)
    for part in (slice(0, 2), slice(2, N)):
        share = (part.stop - part.start) / N
        (share * loss(model(x[part]), y[part])).backward()
    assert_pairs(collected(model), whole(loss, x, y))


@BOTH
def test_two_forward_calls_in_one_backward(likelihood):
    (x, y), (x2, y2) = batches(2)
    y, y2 = y.clamp(min=0), y2.clamp(min=0)
    loss, model = LOSSES[likelihood], watched(likelihood)
    ((loss(model(x), y) + loss(model(x2), y2)) / 2).backward()
    assert_pairs(collected(model), whole(loss, torch.cat([x, x2]), torch.cat([y, y2])))


def test_masked_rows_are_those_whose_tangent_is_zero():
    x, y = batches(1)[0]
    model = watched("categorical")
    F.cross_entropy(model(x), y).backward()
    assert_pairs(collected(model), whole(F.cross_entropy, x, y))
    assert int((y == -100).sum()) == 1


def test_a_language_model_with_its_loss_outside():
    """Logits (B, T, V), flattened by the loss."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 5)

        def forward(self, ids):
            h = self.embed(ids)
            return self.head((h @ h.mT).softmax(-1) @ h)

    ids, labels = torch.tensor([[1, 2], [3, 1], [6, 0]]), torch.tensor([[0, 4], [-100, 1], [2, 2]])

    def loss(z, labels):
        return F.cross_entropy(z.flatten(0, 1), labels.flatten())

    model = watched("categorical", Tokens().double())
    loss(model(ids), labels).backward()
    plain = Tokens().double()
    expected = thor_fx.factors(
        lambda p, i, y: loss(functional_call(plain, p, (i,)), y), dict(plain.named_parameters()), ids, labels,
        fisher="exact",
    )  # fmt: skip
    assert_pairs(collected(model), expected)


def test_images_with_their_loss_outside():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randint(C, (2, 2, 2))
    net = nn.Conv2d(2, C, 2, bias=False).double()
    expected = thor_fx.factors(
        lambda p, x, y: F.cross_entropy(functional_call(net, p, (x,)), y), dict(net.named_parameters()), x, y,
        fisher="exact",
    )  # fmt: skip
    model = watched("categorical", net)
    F.cross_entropy(model(x), y).backward()
    assert_pairs(collected(model), expected)


# --- callables ---------------------------------------------------------------------------------------


def scores(z):
    """Of a categorical distribution, by other means than ours."""
    p = z.softmax(-1)
    label = torch.searchsorted(p.cumsum(-1), torch.rand_like(p[..., :1])).clamp(max=C - 1)
    return p - F.one_hot(label.squeeze(-1), C)


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


# --- draws under every backend -----------------------------------------------------------------------


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


# --- errors ------------------------------------------------------------------------------------------


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


def test_the_optimizer_saves_and_loads_with_an_estimator():
    data = batches()
    model = thor_fx.compile(make(), backend="eager")
    optimizer = thor_fx.Thor(model, **PLAIN, fisher="exact", likelihood="categorical")
    for x, y in data[:2]:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved, weights = (
        copy.deepcopy(optimizer.state_dict()),
        {n: p.detach().clone() for n, p in model.state_dict().items()},
    )
    other = thor_fx.compile(make(), backend="eager")
    other.load_state_dict(weights)
    again = thor_fx.Thor(other, **PLAIN, fisher="exact", likelihood="categorical")
    again.load_state_dict(saved)
    for x, y in data[2:]:
        for net, opt in ((model, optimizer), (other, again)):
            F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_another_batch_size_recompiles_once_and_is_right(fisher):
    """Rows (data x positions, classes): the positions stay a number where the batch is a symbol."""

    def net(p, x):
        return (((x @ x.mT).softmax(-1) @ x).flatten(0, 1)) @ p["w"].T

    def loss_fn(p, x, y):
        return F.cross_entropy(net(p, x), y.flatten())

    torch.manual_seed(0)
    params = {"w": torch.randn(C, D, dtype=torch.float64)}
    tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.0, frequency=1, fisher=fisher)
    step = thor_fx.compile_step(loss_fn, tx, backend="eager", donate=False)
    first = torch.randn(3, 2, D, dtype=torch.float64), torch.randint(C, (3, 2))
    state = step.init(params, *first)
    for size in (3, 5, 4):
        x, y = torch.randn(size, 2, D, dtype=torch.float64), torch.randint(C, (size, 2))
        torch.manual_seed(5)
        new, _, _ = step(params, state, x, y)
        static = thor_fx.compile_step(loss_fn, tx, backend="eager", donate=False, dynamic=False)
        static_state = static.init(params, x, y)
        torch.manual_seed(5)
        expected, _, _ = static(params, static_state, x, y)
        assert_same(new, expected)


def test_another_batch_size_in_the_drop_in_door():
    model = watched("categorical")
    for size in (6, 4, 5):
        x, y = torch.randn(size, D, dtype=torch.float64), torch.randint(C, (size,))
        F.cross_entropy(model(x), y).backward()
        assert_pairs(collected(model), whole(F.cross_entropy, x, y))
        collector_of(model).wanted = True
