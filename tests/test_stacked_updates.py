"""Small parameters that are updated together take the steps of single ones; the graph is shorter."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thor_fx
from thor_fx import stacked_updates
from thor_fx.inductor import inductor_decompositions
from thor_fx.passes.splice import inside
from thor_fx.passes.switches import without
from thor_fx.schedule import Schedule
from thor_fx.stack_ops import stacked, unstack_
from thor_fx.transform import Transform, chain, scale_by_learning_rate, stateless
from thor_fx.update import update_graph
from training import (
    Parameters,
    assert_moved,
    assert_same,
    batches,
    build,
    by_functional_door,
    classifier_loss,
    identical,
    snapshot,
    train,
)

THOR: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 2}
DEPTH, WIDTH = 3, 5


class Deep(nn.Module):
    """Layers of one shape, a norm between each two of them."""

    def __init__(self, depth: int = DEPTH, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + norm(layer(x).tanh())
        return self.last(x)


def by_drop_in(
    off=(), data=None, dtype=torch.float64, backend="aot_eager", model=Deep, **settings
) -> list[Parameters]:
    compiled = thor_fx.compile(build(model, dtype), backend=backend, disable_passes=off)
    return train(compiled, thor_fx.Thor(compiled, **THOR | settings), data or batches(3, dtype=dtype))


def by_function(
    off=(), data=None, dtype=torch.float64, backend="aot_eager", model=Deep, **settings
) -> list[Parameters]:
    data = data or batches(3, dtype=dtype)
    return by_functional_door(build(model, dtype), data, backend, disable_passes=off, **THOR | settings)


def one_by_one(door, **settings) -> list[Parameters]:
    return door(off=["stacked_updates"], **settings)


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    """Models are shallow here."""
    monkeypatch.setattr(stacked_updates, "FEWEST", DEPTH)


DOORS = pytest.mark.parametrize("door", [by_drop_in, by_function])


@pytest.fixture
def stacks(monkeypatch) -> list[int]:
    """How many parameters are in every stack that is made."""
    made: list[int] = []
    alike = stacked_updates._alike

    def seen(*args):
        groups = alike(*args)
        made.extend(len(group) for group in groups)
        return groups

    monkeypatch.setattr(stacked_updates, "_alike", seen)
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight decay of some": {"weight_decay": 0.1, "decay_filter": lambda name: "norms.1" not in name},
    "Nesterov": {"use_nesterov": True},
    "clipped": {"enable_clip_grad": True, "clip_norm": 0.1},
    "joint biases": {"bias": "joint"},
    "averages": {"factor_decay": 0.9},
    "AdamW": {"fallback": "adamw", "fallback_lr": 0.01},
    "momentum of gradients": {"momentum_on": "gradient"},
    "lengths of Adam": {"step_norm": "adam"},
    "rounded": {"update_dtype": torch.bfloat16, "dtype": torch.float32},
}


@DOORS
@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_single_parameters_bit_by_bit(door, settings, stacks):
    together = door(**settings)
    assert stacks, "nothing is stacked"
    assert all(map(identical, together, one_by_one(door, **settings)))
    assert_moved(
        together, snapshot(dict(build(Deep, settings.get("dtype", torch.float64)).named_parameters()))
    )


@DOORS
@pytest.mark.parametrize(
    "settings",
    [{"enable_clip_grad": True, "clip": "global", "clip_norm": 0.01}, {"kl_clip": 1e-5}],
    ids=["global clip", "KL clip"],
)
def test_sums_over_all_parameters_are_the_same_up_to_rounding(door, settings, stacks):
    together = door(**settings)
    assert stacks, "nothing is stacked"
    assert_same(together, one_by_one(door, **settings), rtol=1e-12)
    assert not identical(together[-1], door()[-1]), "nothing is clipped"


@DOORS
def test_low_precision_is_the_same_bit_by_bit(door):
    assert all(map(identical, door(dtype=torch.bfloat16), one_by_one(door, dtype=torch.bfloat16)))


class Scaled(Deep):
    """A number for every layer is trained, too."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for scale, layer in zip(self.scales, self.layers, strict=True):
            x = x + scale * layer(x).tanh()
        return self.last(x)


@DOORS
def test_numbers_of_low_precision_are_the_same_bit_by_bit(door, monkeypatch):
    """A number beside a wider one takes its dtype, which an entry of a list would not."""
    settings = {"dtype": torch.bfloat16, "model": Scaled}
    values: list[tuple[Any, Any]] = []
    over_stack = stacked_updates._over_stack

    def seen(anchor, node, known):
        made = over_stack(anchor, node, known)
        values.append((node.meta["val"], made.meta["val"][0]))
        return made

    monkeypatch.setattr(stacked_updates, "_over_stack", seen)
    assert all(map(identical, door(**settings), one_by_one(door, **settings)))
    assert any(value.dim() == 0 and value.dtype == torch.float32 for value, _ in values)
    assert all(value.dtype == entry.dtype and value.shape == entry.shape for value, entry in values)


@DOORS
def test_a_batch_with_nan_changes_nothing(door):
    (x, y), *others = batches(3)
    trajectory = door(data=[(x, y), (x * torch.nan, y), *others])
    assert identical(trajectory[0], trajectory[1])
    assert not identical(trajectory[1], trajectory[2])


@pytest.mark.parametrize("name", ["norms.2.weight", "layers.1.bias", "first.bias"])
def test_one_number_that_is_not_finite_skips_the_step_wherever_it_is(name):
    model = thor_fx.compile(build(Deep), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **THOR)
    for batch in batches(2):
        train(model, optimizer, [batch])
    before = snapshot(dict(model.named_parameters()))
    (x, y), *_ = batches(1)
    F.cross_entropy(model(x), y).backward()
    dict(model.named_parameters())[name].grad[1] = torch.inf
    optimizer.step()
    assert identical(before, snapshot(dict(model.named_parameters())))
    assert optimizer.metrics()["skipped_steps"] == 1


@DOORS
def test_compiled_steps_are_the_same(door):
    assert_same(door(backend="inductor", data=batches(3)), one_by_one(door, data=batches(3)), rtol=1e-11)


def test_a_state_is_what_it_is_without():
    states = []
    for off in ([], ["stacked_updates"]):
        model = thor_fx.compile(build(Deep), backend="aot_eager", disable_passes=off)
        optimizer = thor_fx.Thor(model, **THOR, factor_decay=0.9)
        train(model, optimizer, batches(3))
        states.append(torch.utils._pytree.tree_flatten(optimizer.state_dict()["state"]))
    (values, structure), (others, same) = states
    assert structure == same
    assert all(torch.equal(one, other) for one, other in zip(values, others, strict=True))


# --- what is stacked -------------------------------------------------------------------------------------


def test_depth_adds_few_nodes_to_an_update():
    """What a layer adds to a graph: stacking its tensors, and its part of the products."""
    counts = {}
    for off in ([], ["stacked_updates"]):
        lengths = []
        for depth in (4, 8):
            lengths.append(len(plain_update(depth=depth, off=off).graph.nodes))
        counts[bool(off)] = lengths[1] - lengths[0]
    assert counts[True] > 3 * counts[False]


def plain_update(depth=DEPTH, width=WIDTH, off=(), tx: Transform | None = None):
    """The update of a plain step, as a graph."""
    model = Deep(depth, width)
    params = {name: p.detach() for name, p in model.named_parameters()}
    if tx is None:
        tx = thor_fx.thor(**THOR)
    step = thor_fx.trace_step(classifier_loss(model), params, *batches(1, dtype=torch.float32)[0])
    found = thor_fx.layers.coverage(thor_fx.passes.survey.survey(step, tx.rules), tx.rules)
    with without(off):
        return update_graph(tx, found, params, params, {}, None, {})


def calls(gm) -> Counter[Any]:
    return Counter(node.target for node in gm.graph.nodes)


def test_three_reads_and_two_writes_for_every_class_of_parameters():
    """Weights, biases, and what belongs to norms; the last layer and its bias are alone."""
    made = calls(plain_update())
    assert made[unstack_] == 2 * 3  # parameter and momentum
    assert made[stacked] == 3 * 3  # and gradient
    assert made[torch.ops.aten.copy_.default] == 2 * 2 + 2  # and two counters
    assert made[torch.ops.aten.bmm.default] == 2 * 2


@pytest.mark.parametrize("decompositions", [{}, inductor_decompositions()], ids=["as it is", "taken apart"])
def test_whether_all_is_finite_is_asked_of_stacks(decompositions):
    """Not of their entries, one by one."""
    with inside(decompositions):
        gm = plain_update()
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.select.int)


def test_a_list_that_is_kept_has_its_order():
    """The norms of all gradients, in the order of the parameters, as a part of the state."""

    def update(updates, state, params, signals):
        return updates, {"norms": torch.stack([u.square().sum() for u in updates.values()])}

    def init(params, found):
        return {"norms": torch.zeros(len(params))}

    tx = chain(Transform(init, update), scale_by_learning_rate(Schedule("lr", 0.1)))
    params, gm = dict(Deep().named_parameters()), plain_update(tx=tx)
    assert unstack_ in calls(gm)
    gradients = [torch.randn_like(p) for p in params.values()]
    kept = torch.zeros(len(params))
    with torch.no_grad():
        gm(*[p.detach().clone() for p in params.values()], *gradients, kept, torch.tensor(0.1))
    torch.testing.assert_close(kept, torch.stack([g.square().sum() for g in gradients]))


def test_few_parameters_are_left_alone():
    assert unstack_ not in calls(plain_update(depth=1))


def test_large_parameters_are_left_alone(monkeypatch):
    monkeypatch.setattr(stacked_updates, "LARGEST", WIDTH)
    made = calls(plain_update())
    assert made[unstack_] == 2 * 2
    monkeypatch.setattr(stacked_updates, "LARGEST", WIDTH - 1)
    assert unstack_ not in calls(plain_update())


@pytest.mark.parametrize(
    "rule",
    [lambda u, number, _: u * number, lambda u, number, lr: u * (lr + number)],
    ids=["a number", "one computed of a rate"],
)
def test_a_parameter_with_a_rule_of_its_own_is_left_alone(rule):
    """The same shape, the same operators, another number."""
    tx = chain(
        stateless(
            lambda updates, _params, signals: {
                name: rule(u, 2 if name == "layers.1.bias" else 3, signals.hyper["lr"])
                for name, u in updates.items()
            }
        ),
        scale_by_learning_rate(Schedule("lr", 0.1)),
    )
    gm = plain_update(tx=tx)
    single = [
        node.args[0] for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    ]
    inputs = {getattr(d, "name", None): node for d, node in thor_fx.passes.outputs.input_nodes(gm).items()}
    assert inputs["layers.1.bias"] in single
    assert inputs["layers.2.bias"] not in single


def test_a_size_that_is_not_known_leaves_a_parameter_alone():
    """A node may read a number that is no tensor: the size of a batch, say."""
    gm = plain_update()
    appended = [node for node in gm.graph.nodes if node.op == "call_function"]
    scale = next(node for node in appended if node.target is torch.ops.aten.mul.Tensor)
    assert stacked_updates._can_be_stacked(scale)
    scale.all_input_nodes[0].meta["val"] = 3
    assert not stacked_updates._can_be_stacked(scale)


def test_the_operators_are_sound():
    tensors = [torch.randn(3, 2) for _ in range(4)]
    torch.library.opcheck(stacked, (tensors,))
    torch.library.opcheck(unstack_, ([t.clone() for t in tensors], torch.randn(4, 3, 2)))
    stack = stacked(tensors)
    assert torch.equal(stack, torch.stack(tensors))
    targets = [torch.zeros(2, 3).T for _ in range(4)]  # of any strides
    unstack_(targets, stack)
    assert all(torch.equal(one, other) for one, other in zip(targets, tensors, strict=True))
