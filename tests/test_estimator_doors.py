"""``fisher=`` in both doors: the same parameters, whatever scales the loss; other batch sizes; saving."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import oracle
import thor_fx
from estimators import (
    LOSSES,
    PLAIN,
    C,
    D,
    WithLoss,
    assert_pairs,
    assert_same,
    batches,
    collected,
    make,
    watched,
    whole,
)
from thor_fx.compile import collector_of

BOTH = pytest.mark.parametrize("likelihood", LOSSES)
ABSOLUTE = pytest.mark.parametrize("likelihood", ["gaussian"])  # its weights carry the scale of the loss


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


@BOTH
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_both_doors_compute_the_same(fisher, likelihood):
    loss, data = LOSSES[likelihood], batches()
    expected = functional(make(), loss, data, fisher=fisher)
    assert_same(drop_in(make(), loss, data, fisher=fisher, likelihood=likelihood), expected)
    assert_same(drop_in(WithLoss(make(), loss), loss, data, fisher=fisher), expected)
    empirical = functional(make(), loss, data)
    assert oracle.relative_error(empirical["0.weight"], expected["0.weight"]) > 1e-3, "fisher= does something"


@ABSOLUTE
def test_a_constant_loss_scale_cancels(likelihood):
    loss, data = LOSSES[likelihood], batches()
    expected = functional(make(), loss, data, fisher="exact")
    options = {"fisher": "exact", "loss_scale": 32.0}
    assert_same(functional(make(), lambda z, y: 32 * loss(z, y), data, **options), expected)
    assert_same(drop_in(make(), loss, data, scale=32, likelihood=likelihood, **options), expected)
    assert_same(drop_in(WithLoss(make(), loss), loss, data, scale=32, **options), expected)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@ABSOLUTE
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
