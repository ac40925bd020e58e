"""``thor_fx.compile``: the module stays what it was, and its backward can deliver factors."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import thor_fx
from thor_fx import factor_graphs
from thor_fx.compile import collector_of
from thor_fx.factors import Kronecker, kronecker
from thor_fx.passes import Factor, Terms
from training import (
    CLASSES,
    HIDDEN,
    IN,
    MODELS,
    Batch,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    compiled,
    identical,
    mlp,
    snapshot,
    train,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 3}


def thor(model: nn.Module, **settings: Any) -> thor_fx.Thor:
    return thor_fx.Thor(model, **{**SETTINGS, **settings})


def collected(model: nn.Module) -> bool:
    """Whether the model's slots hold anything; empties them."""
    moments, _ = collector_of(model).take()
    return bool(moments)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the module stays what it was -----------------------------------------------------------------------


def test_the_same_object_with_the_same_names():
    model = build(mlp)
    names = list(model.state_dict())
    assert thor_fx.compile(model, backend="aot_eager") is model
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "2"]
    twin = build(mlp)
    twin.load_state_dict(model.state_dict())
    x, _ = batches(1)[0]
    assert torch.equal(model(x), twin(x))


def test_saving_and_copying(tmp_path):
    model = compiled()
    x, _ = batches(1)[0]
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "weights")
    twin = build(mlp)
    twin.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (twin, copy.deepcopy(model), torch.load(whole, weights_only=False)):
        assert torch.equal(other(x), expected)
        other[0].weight.detach().zero_()
        assert torch.equal(model(x), expected), "they share nothing"
        with pytest.raises(TypeError, match=r"call model = thor_fx\.compile"):
            thor(other)
        thor(thor_fx.compile(other, backend="aot_eager"))


def test_casting_before_and_after_the_first_step():
    model = compiled()
    model.float()
    narrow = batches(2, dtype=torch.float32)
    train(model, thor(model), narrow)
    model.to(torch.float64)
    trajectory = train(model, thor(model), batches(4))
    assert {p.dtype for p in trajectory[-1].values()} == {torch.float64}
    twin = build(mlp)
    expected = train(thor_fx.compile(twin.float(), backend="aot_eager"), thor(twin), narrow)
    twin = build(mlp)
    twin.load_state_dict(expected[-1])
    assert_same(trajectory, by_drop_in_door(twin, batches(4), **SETTINGS), rtol=1e-9)


class Keywords(nn.Module):
    """A forward with keywords, a nested result, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor, *, targets: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        scores = scale * self.fc(x)
        loss = None if targets is None else F.cross_entropy(scores, targets)
        return {"scores": scores, "loss": loss, "scale": scale}


def test_keywords_and_nested_results():
    model, (x, y) = compiled(Keywords), batches(1)[0]
    twin, optimizer = build(Keywords), thor(model)
    for keywords in ({"targets": y}, {"targets": y, "scale": 2.0}, {}):
        found, expected = model(x, **keywords), twin(x, **keywords)
        assert list(found) == ["scores", "loss", "scale"]
        assert found["scale"] == expected["scale"]
        torch.testing.assert_close(found["scores"], expected["scores"])
        torch.testing.assert_close(found["loss"], expected["loss"])
    model(x, targets=y)["loss"].backward()
    optimizer.step()
    assert list(optimizer.coverage.layers) == ["fc.weight"]


def test_hooks_run():
    model, seen = compiled(), []
    thor(model)
    model[0].register_forward_hook(lambda *_: None)
    model.register_forward_hook(lambda module, _args, output: seen.append(output.shape))
    x, _ = batches(1)[0]
    model(x)
    assert seen == [(len(x), CLASSES)]


# --- what is collected, and when --------------------------------------------------------------------------


def test_factors_arrive_when_they_are_wanted():
    model, data = compiled(), batches(7)
    optimizer = thor(model)
    for step, (x, y) in enumerate(data):
        F.cross_entropy(model(x), y).backward()
        graph = collector_of(model).graphs[0]
        filled = [slot.grad is not None for d, slot in graph.slots.items() if d != Terms()]
        assert filled == [step % 3 == 0] * len(filled)
        optimizer.step()
        optimizer.zero_grad()
        assert all(slot.grad is None for slot in graph.slots.values())


def test_nothing_is_collected_in_evaluation():
    model, (x, y) = compiled(), batches(1)[0]
    thor(model)
    with torch.no_grad():
        model(x)
    assert not collector_of(model).graphs
    with torch.inference_mode():
        model(x)
    assert not collector_of(model).graphs
    model.eval()
    F.cross_entropy(model(x), y).backward()
    assert not collector_of(model).graphs
    model.train()
    F.cross_entropy(model(x), y).backward()
    assert collected(model)
    assert not collected(model), "taken"


def test_evaluation_between_forward_and_step_changes_nothing():
    """Validation in the middle of an epoch."""
    data = batches(7)
    expected = by_drop_in_door(build(mlp), data, **SETTINGS)
    model = compiled()
    optimizer = thor(model)
    for (x, y), reference in zip(data, expected, strict=True):
        loss = F.cross_entropy(model(x), y)
        model.eval()
        with torch.no_grad():
            model(3 * x)
        model.train()
        loss.backward()
        with torch.no_grad():
            model(3 * x)
        optimizer.step()
        optimizer.zero_grad()
        assert identical(snapshot(dict(model.named_parameters())), reference)


def test_a_forward_without_backward_leaves_no_trace():
    data = batches(7)
    expected = by_drop_in_door(build(mlp), data, **SETTINGS)
    model = compiled()
    optimizer = thor(model)
    for (x, y), reference in zip(data, expected, strict=True):
        model(5 * x)
        assert identical(train(model, optimizer, [(x, y)])[0], reference)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_the_factor_graph_are_those_of_the_plain_one(name):
    model, (x, y) = compiled(MODELS[name]), batches(1)[0]
    thor(model)
    collector = collector_of(model)
    results = []
    for wanted in (True, False):
        collector.wanted = wanted
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert collected(model) == wanted
        results.append({"loss": loss.detach(), **gradients(model)})
        model.zero_grad()
    assert identical(*results)
    assert len(results[0]) == 1 + len(list(model.parameters()))


def test_the_input_gets_its_gradient():
    model, (x, y) = compiled(), batches(1)[0]
    twin, found = build(mlp), []
    thor(model)
    for module in (model, twin):
        leaf = x.clone().requires_grad_()
        F.cross_entropy(module(leaf), y).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


# --- sums over micro-batches -------------------------------------------------------------------------------


def factors_of(model: nn.Module, parts: list[Batch]) -> dict[str, Kronecker]:
    for x, y in parts:
        (F.cross_entropy(model(x), y) / len(parts)).backward()
    moments, terms = collector_of(model).take()
    return kronecker(moments, collector_of(model).coverage.layers, terms)


def test_half_batches_add_up_to_the_batch():
    model, (x, y) = compiled(), batches(1, rows=8)[0]
    thor(model)
    whole = factors_of(model, [(x, y)])
    model.zero_grad()
    halves = factors_of(model, list(zip(x.chunk(2), y.chunk(2), strict=True)))
    reference = thor_fx.factors(_loss_of(build(mlp)), dict(build(mlp).named_parameters()), x, y)
    assert list(whole) == list(halves) == list(reference) == ["0.weight", "2.weight"]
    for name, pair in reference.items():
        for other in (whole[name], halves[name]):
            torch.testing.assert_close(other.A, pair.A, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(other.G, pair.G, rtol=1e-12, atol=1e-14)
            assert (other.rows, other.n) == (8, 8)


def _loss_of(model: nn.Module) -> Callable[..., Tensor]:
    def loss_fn(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    return loss_fn


def test_accumulated_steps_equal_whole_steps():
    data = batches(7, rows=8)
    expected = by_drop_in_door(build(mlp), data, **SETTINGS)
    model = compiled()
    optimizer = thor(model)
    for (x, y), reference in zip(data, expected, strict=True):
        for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
            (F.cross_entropy(model(part_x), part_y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same([snapshot(dict(model.named_parameters()))], [reference])


# --- graph breaks -------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Three graphs; the second one only when the batch is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.third = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        torch._dynamo.graph_break()
        h = self.second(h).tanh()
        torch._dynamo.graph_break()
        return self.third(h)


class Whole(Broken):
    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


# plain torch.compile, too, makes torch 2.13 warn about the tensors between two graphs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_model_in_several_graphs_trains_as_one():
    data = batches(8)
    model = compiled(Broken)
    optimizer = thor(model)
    trajectory = train(model, optimizer, data)
    assert len(collector_of(model).graphs) == 3
    assert sorted(optimizer.coverage.layers) == ["first.weight", "second.weight", "third.weight"]
    assert optimizer.coverage.terms == "third.weight"
    assert_same(trajectory, by_drop_in_door(build(Whole), data, **SETTINGS))


class Twice(nn.Module):
    """One weight in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Linear(IN, IN), nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(x).tanh()
        torch._dynamo.graph_break()
        return self.head(self.both(h).tanh())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_graphs_that_make_one_factor_share_its_slot():
    (batch,) = batches(1)
    model, told = compiled(Twice), list[float]()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    one, two = (graph.slots[Factor("both.weight", "A")] for graph in collector_of(model).graphs)
    assert one is two
    whole = one.grad.trace()
    one.grad = None
    one.register_post_accumulate_grad_hook(lambda slot: told.append(float(slot.grad.trace())))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    assert told == [float(whole)], "once, when both graphs have made their part"


class Rise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 6), nn.Linear(6, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Loop(nn.Module):
    """Dynamo gives up on a loop with a break inside, and compiles the method that is called there."""

    breaks = True

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.blocks = nn.ModuleList(Rise() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            if self.breaks:
                torch._dynamo.graph_break()
            x = block(x)
        return self.head(x)


class WholeLoop(Loop):
    breaks = False


IN_BLOCKS = [f"blocks.{i}.{name}.weight" for i in range(3) for name in ("up", "down")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("left_out", [(), ("blocks.1.up.weight",)])
def test_modules_of_one_class_have_factors_of_their_own(left_out, monkeypatch):
    compilations: list[str | None] = []
    compile_differentiable = factor_graphs.compile_differentiable

    def counted(*args: Any, key: str | None, **kwargs: Any) -> Any:
        compilations.append(key)
        return compile_differentiable(*args, key=key, **kwargs)

    monkeypatch.setattr(factor_graphs, "compile_differentiable", counted)
    wanted = [name for name in IN_BLOCKS if name not in left_out]
    data = batches(5)
    model = compiled(Loop)
    optimizer = thor(model, layer_filter=wanted.__contains__)
    trajectory = train(model, optimizer, data)
    assert sorted(optimizer.coverage.layers) == sorted(wanted)
    assert len(compilations) == 1 + bool(left_out)  # what is alike is compiled once
    whole = by_drop_in_door(build(WholeLoop), data, **SETTINGS, layer_filter=wanted.__contains__)
    assert_same(trajectory, whole)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(IN, HIDDEN)
        self.left, self.right = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, side: str) -> Tensor:
        return getattr(self, side)(self.body(x).tanh())


def test_a_head_that_was_not_used_stays():
    model = compiled(TwoHeads)
    optimizer = thor(model, momentum=0.0)
    before = snapshot(dict(model.named_parameters()))
    for side, other in (("left", "right"), ("right", "left")) * 4:
        x, y = batches(1)[0]
        F.cross_entropy(model(x, side), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = snapshot(dict(model.named_parameters()))
        assert torch.equal(before[f"{other}.weight"], after[f"{other}.weight"])
        before = after
    assert sorted(optimizer.coverage.layers) == ["body.weight", "left.weight", "right.weight"]


# --- when it compiles ---------------------------------------------------------------------------------------


class Recorder:
    """A backend that keeps the text of every ATen graph it is given."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        def keep(graph: fx.GraphModule, _: Any) -> Any:
            self.graphs.append(graph.code)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, inputs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands in for the backend ``aot_eager`` wherever ``torch.compile`` is asked for it."""
    made, original = Recorder(), torch.compile

    def recorded(*args: Any, backend: Any, **kwargs: Any) -> Any:
        return original(*args, backend=made if backend == "aot_eager" else backend, **kwargs)

    monkeypatch.setattr(torch, "compile", recorded)
    return made


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_the_plain_step_is_that_of_torch_compile(recorder, name):
    torch._dynamo.reset()  # or the stock model's code, which others share, has seen other batch sizes
    (x, y), found = batches(1)[0], []
    ours = compiled(MODELS[name])
    collector_of(ours).wanted = False
    for model in (ours, torch.compile(build(MODELS[name]), backend="aot_eager")):
        F.cross_entropy(model(x), y).backward()
        found.append(list(recorder.graphs))
        recorder.graphs.clear()
    assert found[0] == found[1]
    assert len(found[0]) == 2  # forward and backward


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_a_new_batch_size_compiles_at_most_once(recorder, monkeypatch, name):
    compilations = []
    differentiable = factor_graphs.compile_differentiable

    def counted(*args: Any, **kwargs: Any) -> Any:
        compilations.append(1)
        return differentiable(*args, **kwargs)

    monkeypatch.setattr(factor_graphs, "compile_differentiable", counted)
    model = compiled(MODELS[name])
    optimizer = thor(model)
    counts = []
    for rows in (7, 7, 9, 12, 7):
        train(model, optimizer, batches(3, rows))
        counts.append((len(compilations), len(recorder.graphs)))
    assert counts[0] == counts[1] == (1, 2)
    assert counts[2] == counts[3] == counts[4] == (2, 4)
    for graph in collector_of(model).graphs:
        assert graph.coverage.layers == optimizer.coverage.layers


def test_batch_sizes_do_not_disturb_the_values():
    data = [batch for rows in (7, 9, 12, 7) for batch in batches(4, rows)]
    found = by_drop_in_door(build(mlp), data, **SETTINGS)
    model = compiled(dynamic=False)
    assert_same(found, train(model, thor(model), data))


class Caching(nn.Module):
    """Returns its loss over 4 positions, and keys of 6 positions that a decoder would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.head = (nn.Linear(IN, size) for size in (IN, IN, CLASSES))

    def forward(self, memory: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        key = self.key(memory)
        mixed = (self.query(x) @ key.mT).softmax(-1) @ memory
        return nn.functional.cross_entropy(self.head(mixed).flatten(0, 1), y.flatten()), key


def test_terms_are_those_of_the_loss_that_a_model_returns():
    model = thor_fx.compile(Caching(), backend="aot_eager")
    optimizer = thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9)
    loss, _ = model(torch.randn(2, 6, IN), torch.randn(2, 4, IN), torch.zeros(2, 4, dtype=torch.long))
    loss.backward()
    optimizer.step()
    assert optimizer.coverage.terms == "head.weight"
    assert optimizer.param_groups[0]["terms"] == 2 * 4
