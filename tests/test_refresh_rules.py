"""``refresh=``: which inverses are recomputed, and after which step."""

import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import models
import oracle
import thor_fx
from averaged_thor import AveragedThor, slow_trajectory
from test_precondition import Run
from thor_fx import ByTrace, Every, Staggered, Transform
from thor_fx.kinds import Kind
from thor_fx.layers import Coverage
from thor_fx.precondition import precondition
from thor_fx.refresh_rules import inversion_costs, portion_due, portions
from thor_fx.schedule import Schedule
from thor_fx.skipping import skip_nonfinite
from thor_fx.trace_rule import NEVER, Watch, block_trace, decide
from thor_fx.transform import Signals, Taken, chain, partition, unscale
from training import (
    Batch,
    Parameters,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    identical,
    mlp,
    snapshot,
    train,
)

DECAY = 0.8
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
LAYERS = ["0.weight", "2.weight"]


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "arguments", "error", "text"),
    [
        (Every, (2.0,), TypeError, "steps must be an integer"),
        (Every, (0,), ValueError, "steps must be an integer >= 1"),
        (Staggered, (True,), TypeError, "parts must be an integer"),
        (Staggered, (0,), ValueError, "parts must be an integer >= 1"),
        (Staggered, (2, "4"), TypeError, "steps must be an integer >= 1 or None"),
        (Staggered, (5, 4), ValueError, "steps must be at least parts = 5, got 4"),
        (ByTrace, ("0.01",), TypeError, "w1 must be a number"),
        (ByTrace, (-0.01,), ValueError, "w1 must be finite and >= 0"),
        (ByTrace, (0.01, None), TypeError, "w2 must be a number"),
        (ByTrace, (0.01, 0.02), ValueError, r"w2 must be at most w1 = 0.01, got 0.02"),
        (ByTrace, (0.01, 0.0, "2"), TypeError, "growth must be a number"),
        (ByTrace, (0.01, 0.0, 0.5), ValueError, "growth must be >= 1, got 0.5"),
        (ByTrace, (0.01, 0.0, 2, 0), ValueError, "longest must be an integer >= 1 or None"),
    ],
)
def test_wrong_rules(rule, arguments, error, text):
    with pytest.raises(error, match=text):
        rule(*arguments)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Every(9), "refresh must have steps >= frequency = 10, got Every.*inverted more than once"),
        (Staggered(3, steps=9), "refresh must have steps >= frequency = 10"),
        (Staggered(11), "refresh must have an interval of at least 11 steps.*give it steps="),
        (ByTrace(longest=9), "refresh must not have longest < frequency = 10"),
    ],
)
def test_rules_that_do_not_go_with_the_frequency(rule, text):
    with pytest.raises(ValueError, match=text):
        thor_fx.thor(0.1, 0.1, 0.9, frequency=10, refresh=rule)


# --- when -----------------------------------------------------------------------------------------


def test_every_so_many_steps():
    due = [step for step in range(31) if portion_due(Every(7), step, frequency=3) is not None]
    assert due == [7, 14, 21, 28]


@pytest.mark.parametrize(("parts", "steps"), [(1, 5), (3, 10), (4, 4), (7, 20)])
def test_every_portion_has_its_own_step_in_every_interval(parts, steps):
    rule = Staggered(parts, steps)
    for first in (steps, 5 * steps):
        due = [portion_due(rule, step, frequency=1) for step in range(first, first + steps)]
        assert [portion for portion in due if portion is not None] == list(range(parts))
    assert all(portion_due(rule, step, 1) is None for step in range(steps)), "step 0 serves the first"


def test_without_steps_the_interval_is_that_of_the_factors():
    assert [portion_due(Staggered(2), step, frequency=4) for step in range(4, 8)] == [0, None, 1, None]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 40])
def test_portions_are_balanced(parts):
    generator = torch.Generator().manual_seed(parts)
    costs = {str(i): int(c) ** 3 for i, c in enumerate(torch.randint(1, 128, (30,), generator=generator))}
    found = portions(Staggered(parts, 100), costs)
    assert sorted(name for part in found for name in part) == sorted(costs)
    totals = [sum(costs[name] for name in part) for part in found]
    assert max(totals) - min(totals) <= max(costs.values())
    best = max(sum(costs.values()) / parts, *costs.values())
    assert max(totals) <= 4 / 3 * best + 1e-9
    assert found == portions(Staggered(parts, 100), costs), "the same in every process"


def test_what_an_inversion_costs():
    layers = Run(models.mlp).coverage.layers
    for block in (None, 2):
        for name, cost in inversion_costs(layers, block).items():
            expected = 0
            for d in (layers[name].in_, layers[name].out):
                full, rest = divmod(d, block or d)
                expected += full * (block or d) ** 3 + rest**3
            assert cost == expected


# --- the trace rule -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "now", "before", "verdict"),
    [
        (ByTrace(0.01, 0.0), 101.5, 100.0, "refresh"),
        (ByTrace(0.01, 0.0), 98.5, 100.0, "refresh"),
        (ByTrace(0.01, 0.0), 100.9, 100.0, "keep"),
        (ByTrace(0.01, 0.0), 100.0, 100.0, "keep"),  # THOR freezes nothing
        (ByTrace(0.01, 0.001), 100.5, 100.0, "keep"),
        (ByTrace(0.5, 0.25), 150.0, 100.0, "keep"),  # both bounds belong to it
        (ByTrace(0.5, 0.25), 125.0, 100.0, "keep"),
        (ByTrace(0.01, 0.001), 100.05, 100.0, "freeze"),
        (ByTrace(0.0, 0.0), 100.0, 100.0, "keep"),
        (ByTrace(0.0, 0.0), 100.0001, 100.0, "refresh"),
        (ByTrace(0.01, 0.001), 1.0, 0.0, "refresh"),
        (ByTrace(0.01, 0.001), float("nan"), 1.0, "refresh"),
    ],
)
def test_the_three_branches(rule, now, before, verdict):
    assert rule.verdict(now, before) == verdict


def watching(seen: list[float], used: list[float], **others: Any) -> Watch:
    flags = {"fresh": [True] * len(seen), "frozen": [False] * len(seen), **others}
    count = torch.tensor(10), torch.tensor(0), torch.tensor(0)
    traces = (torch.tensor(values, dtype=torch.float64) for values in (seen, used))
    return Watch(*traces, torch.tensor(flags["fresh"]), torch.tensor(flags["frozen"]), *count)


def decided(
    rule: ByTrace,
    watch: Watch,
    lam: float = 0.0,
    ready: Iterable[str] | None = None,
    failing: Sequence[bool] = (False,) * 3,
):
    layers = Run(models.cross_attention).coverage.layers
    assert len(layers) == 3
    known = list(layers) if ready is None else ready
    return decide(rule, watch, layers, known, torch.tensor(lam), torch.tensor(failing), 50)


def test_known_traces():
    """One layer of each kind: 5%, 0.5% and 0.05% of change."""
    watch = watching([105.0, 100.5, 100.05], [100.0] * 3)
    refresh, new, due = decided(ByTrace(0.01, 0.001), watch)
    assert [name in refresh for name in Run(models.cross_attention).coverage.layers] == [True, False, False]
    assert new.used.tolist() == [105.0, 100.0, 100.0], "what is kept is compared with what it was made of"
    assert new.frozen.tolist() == [False, False, True]
    assert new.fresh.tolist() == [False] * 3
    assert (new.refreshed, new.kept, new.interval, due) == (1, 1, 10, 60)


def test_lambda_is_part_of_the_trace():
    """``tr(F + lambda I) = tr A tr G + lambda dim``: a large lambda hides a change."""
    dims = [layer.in_ * layer.out for layer in Run(models.cross_attention).coverage.layers.values()]
    lam = 100.0 / dims[0]  # 110 -> 210 against 100 -> 200: 5%
    refresh, _, _ = decided(ByTrace(0.06), watching([110.0] * 3, [100.0] * 3), lam)
    assert len(refresh) == sum(10 / (100 + lam * d) > 0.06 for d in dims) < 3


def test_who_is_not_judged():
    watch = watching([200.0] * 3, [100.0] * 3, fresh=[True, False, True], frozen=[True, False, False])
    layers = list(Run(models.cross_attention).coverage.layers)
    refresh, new, _ = decided(ByTrace(0.01), watch, ready=layers[:2])
    assert not refresh
    assert new.fresh.tolist() == [True, False, True]
    assert new.used.tolist() == [100.0] * 3
    assert (new.refreshed, new.kept) == (0, 0)


def test_the_interval_grows_while_all_are_kept():
    kept, moved = watching([100.0] * 3, [100.0] * 3), watching([100.0, 100.0, 200.0], [100.0] * 3)
    assert decided(ByTrace(0.01, growth=1.5), kept).due == 65
    assert decided(ByTrace(0.01, growth=1.5), kept).watch.interval == 15
    assert decided(ByTrace(0.01, growth=1.5), moved).due == 60
    assert decided(ByTrace(0.01, growth=4, longest=25), kept).due == 75
    assert [ByTrace(growth=1.1).grown(i) for i in (1, 10, 100)] == [2, 11, 111]


def test_when_all_are_frozen_no_factors_are_due_any_more():
    refresh, new, due = decided(ByTrace(0.01, 0.001), watching([100.0] * 3, [100.0] * 3))
    assert (refresh, new.frozen.tolist(), due) == (set(), [True] * 3, NEVER)


@pytest.mark.parametrize("make", [models.mlp, models.experts, models.embedding])
@pytest.mark.parametrize("block_size", [None, 2])
def test_the_trace_is_that_of_the_kronecker_product(make, block_size):
    step = Run(make)
    tx = precondition(
        Schedule("damping", 0.1), factor_decay=0.5, refresh_rule=ByTrace(), block_size=block_size
    )
    _, state = step.update(tx)
    for i, (name, pair) in enumerate(oracle.factors(step.case).items()):
        grouped = pair.A.dim() == 3
        pairs = zip(pair.A, pair.G, strict=True) if grouped else [(pair.A, pair.G)]
        expected = sum(oracle.kronecker(A, G).trace().item() for A, G in pairs)
        layer = step.coverage.layers[name]
        found = block_trace(state.memory.averages, layer, block_size)
        assert found.item() == pytest.approx(expected, rel=1e-10)
        place = list(step.coverage.layers).index(name)
        assert state.memory.watch.seen[place] == state.memory.watch.used[place] == found, i


# --- the kinds of step ----------------------------------------------------------------------------


def make_step(refresh: Any, donate: bool = True, **settings: Any) -> tuple[Any, Any, Any]:
    model = build(mlp)
    tx = thor_fx.thor(**{**SETTINGS, **settings}, refresh=refresh)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", donate=donate)
    params = snapshot(dict(model.named_parameters()))
    return step, params, step.init(params, *batches(1)[0])


def kinds_of(monkeypatch: pytest.MonkeyPatch, refresh: Any, data: list[Batch], **settings: Any) -> str:
    """The kind of every step, by its first letter."""
    seen: list[str] = []
    call = thor_fx.step._Call

    def spy(kind: Kind, extra: list[Tensor]) -> Any:
        seen.append(kind.factors[0])
        return call(kind, extra)

    monkeypatch.setattr("thor_fx.step._Call", spy)
    step, params, state = make_step(refresh, **settings)
    for batch in data:
        params, state, _ = step(params, state, *batch)
    return "".join(seen)


def test_a_measuring_step_inverts_nothing(monkeypatch):
    seen: dict[str, fx.GraphModule] = {}
    compile_kind = thor_fx.CompiledStep._compile_kind

    def spy(self: Any, graph: Any, captured: Any, kind: Kind) -> Any:
        run = compile_kind(self, graph, captured, kind)
        seen[kind.factors] = run.compiled
        return run

    monkeypatch.setattr(thor_fx.CompiledStep, "_compile_kind", spy)
    make_step(Every(4), factor_decay=DECAY)
    inversions = {kind: str(gm.graph).count("linalg_cholesky_ex") for kind, gm in seen.items()}
    averages = {kind: str(gm.graph).count(f"beta: {DECAY}") for kind, gm in seen.items()}
    assert list(seen) == ["plain", "measure", "refresh"]
    assert inversions["plain"] == inversions["measure"] == 0 < inversions["refresh"]
    assert averages == {"plain": 0, "measure": 4, "refresh": 4}


def test_a_plain_step_writes_what_it_changes(monkeypatch):
    """Parameters, momentum, the counter of skipped steps and the last words: no inverse, no average."""
    seen = []
    compile_graph = thor_fx.step.compile_graph
    monkeypatch.setattr(
        "thor_fx.step.compile_graph", lambda gm, *a, **k: seen.append(gm) or compile_graph(gm, *a, **k)
    )
    make_step(ByTrace(), factor_decay=DECAY)
    writes = [node for node in seen[0].graph.nodes if node.target is torch.ops.aten.copy_.default]
    assert len(writes) == 4 + 4 + 1 + 1


def test_kinds_of_steps(monkeypatch):
    assert kinds_of(monkeypatch, Every(4), batches(5)) == "rpmpm"
    nan = [(x * torch.nan, y) for x, y in batches(2)]
    assert kinds_of(monkeypatch, Every(4), [*nan, *batches(3)]) == "rrrpm", "until a step was not skipped"
    assert kinds_of(monkeypatch, Every(4), batches(3), frequency=1) == "rmm"


def test_a_growing_interval(monkeypatch):
    same = batches(1) * 15
    rule = ByTrace(0.01, 0.0, growth=2)
    assert kinds_of(monkeypatch, rule, same, lr=0.0) == "rpmpppmpppppppm"


def test_frozen_layers_need_no_factors(monkeypatch):
    assert kinds_of(monkeypatch, ByTrace(0.01, 0.001), batches(1) * 8, lr=0.0) == "rpmppppp"


def test_the_device_is_read_in_factor_steps_only(monkeypatch):
    decisions = []
    monkeypatch.setattr("thor_fx.renewal.decide", lambda *args: decisions.append(args[-1]) or decide(*args))
    kinds_of(monkeypatch, ByTrace(), batches(7))
    assert decisions == [2, 4, 6]


@pytest.mark.parametrize("rule", [Every(4), Staggered(2, 4), ByTrace(0.0)], ids=str)
def test_the_state_is_renewed_in_place(rule):
    step, params, state = make_step(rule)
    leaves = pytree.tree_leaves(state.inner)
    inverses = []
    for batch in batches(7):
        params, state, _ = step(params, state, *batch)
        inverses.append(leaves[0].clone())
        assert all(one is other for one, other in zip(leaves, pytree.tree_leaves(state.inner), strict=True))
    assert not torch.equal(inverses[0], inverses[-1])


def test_without_donation_a_step_is_pure():
    step, params, state = make_step(Every(2), donate=False)
    for batch in batches(5):
        before = pytree.tree_map(torch.clone, state.inner)
        new_params, new_state, _ = step(params, state, *batch)
        again, _, _ = step(params, state, *batch)
        assert all(map(torch.equal, pytree.tree_leaves(before), pytree.tree_leaves(state.inner)))
        assert identical(new_params, again)
        params, state = new_params, new_state
    donated = by_functional_door(build(mlp), batches(5), **SETTINGS, refresh=Every(2))
    assert identical(params, donated[-1])


# --- whole trainings, by hand ---------------------------------------------------------------------


def both_doors(data: list[Batch], **settings: Any) -> list[Parameters]:
    functional = by_functional_door(build(mlp), data, **{**SETTINGS, **settings})
    assert_same(by_drop_in_door(build(mlp), data, **{**SETTINGS, **settings}), functional)
    assert_moved(functional, snapshot(dict(build(mlp).named_parameters())))
    return functional


SCHEDULES = {
    Every(5): {5: LAYERS, 10: LAYERS},
    # 6^3 + 5^3 before 3^3 + 6^3
    Staggered(2, steps=4): {4: ["0.weight"], 6: ["2.weight"], 8: ["0.weight"], 10: ["2.weight"]},
}


@pytest.mark.parametrize("rule", SCHEDULES, ids=str)
def test_the_schedule_by_hand(rule):
    data = batches(12)
    schedule = SCHEDULES[rule]
    expected = slow_trajectory(
        build(mlp), data, decay=DECAY, after=lambda step: schedule.get(step, []), **SETTINGS
    )
    assert_same(both_doors(data, refresh=rule, factor_decay=DECAY), expected, rtol=1e-10)


def test_a_rule_without_averages_inverts_the_last_batch():
    data = batches(9)
    expected = slow_trajectory(
        build(mlp), data, decay=0.0, after=lambda step: LAYERS if step % 4 == 0 else [], **SETTINGS
    )
    found = by_functional_door(build(mlp), data, **SETTINGS, refresh=Every(4))
    assert_same(found, expected, rtol=1e-10)


class TraceThor(AveragedThor):
    """The trace rule on dense Kronecker products."""

    def __init__(self, model: nn.Module, w1: float, w2: float, **settings: Any) -> None:
        super().__init__(model, after=self.judge, **settings)
        self.w1, self.w2 = w1, w2
        self.used: dict[str, float] = {}
        self.verdicts: list[str] = []
        self.frozen: set[str] = set()

    def traced(self, name: str) -> float:
        A, G = (s / (1 - self.decay ** self.counts[name]) for s in self.sums[name])
        dense = oracle.kronecker(A, G)
        return (dense + self.damping * torch.eye(len(dense), dtype=dense.dtype)).trace().item()

    def renew(self, names: Iterable[str]) -> None:
        super().renew(names := list(names))
        self.used |= {name: self.traced(name) for name in names}

    def judge(self, step: int) -> list[str]:
        if step % self.frequency:
            return []
        moved = []
        for name in set(self.used) - self.frozen:
            delta = abs(abs(self.traced(name)) - abs(self.used[name])) / abs(self.used[name])
            verdict = "refresh" if delta > self.w1 else "keep" if delta >= self.w2 else "freeze"
            self.verdicts.append(verdict)
            if verdict == "refresh":
                moved.append(name)
            elif verdict == "freeze":
                self.frozen.add(name)
        return moved


def test_the_trace_rule_by_hand():
    data, w1, w2 = batches(14), 0.15, 0.05
    model = build(mlp)
    slow, expected = TraceThor(model, w1, w2, decay=DECAY, **SETTINGS), []
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        slow.step(len(x))
        slow.zero_grad()
        expected.append(snapshot(dict(model.named_parameters())))
    assert set(slow.verdicts) == {"refresh", "keep", "freeze"}, "all three occur"
    settings = {**SETTINGS, "refresh": ByTrace(w1, w2), "factor_decay": DECAY}
    assert_same(by_functional_door(build(mlp), data, **settings), expected, rtol=1e-10)
    compiled = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(compiled, **settings)
    assert_same(train(compiled, optimizer, data), expected, rtol=1e-10)
    reported = optimizer.metrics()
    counts = {name: reported[name] for name in ("refreshed", "kept", "frozen")}
    wanted = {"refreshed": "refresh", "kept": "keep", "frozen": "freeze"}
    assert counts == {name: slow.verdicts.count(verdict) for name, verdict in wanted.items()}


def test_a_skipped_step_freezes_nothing():
    """It leaves the traces as they were: that is no sign of rest."""
    data = batches(5)
    data[2] = data[2][0] * torch.nan, data[2][1]
    found = by_drop_in_door(build(mlp), data, **SETTINGS, refresh=ByTrace(0.0001, 0.0001))
    assert_same(found, by_functional_door(build(mlp), data, **SETTINGS, refresh=ByTrace(0.0001, 0.0)))


# --- programs -------------------------------------------------------------------------------------


def drop_in(rule: Any, make: Any = mlp, **settings: Any) -> tuple[nn.Module, thor_fx.Thor]:
    model = thor_fx.compile(build(make), backend="aot_eager")
    return model, thor_fx.Thor(model, **{**SETTINGS, "factor_decay": DECAY, **settings}, refresh=rule)


def test_micro_batches():
    data = batches(7, rows=8)
    settings = {**SETTINGS, "factor_decay": DECAY}
    expected = by_functional_door(build(mlp), data, **settings, refresh=Every(4))
    model, optimizer = drop_in(Every(4))
    found = []
    for x, y in data:
        for rows in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(snapshot(dict(model.named_parameters())))
    assert_same(found, expected, rtol=1e-10)


@pytest.mark.parametrize("rule", [Every(4), ByTrace(1e6, 1e6)], ids=["every", "frozen"])
def test_a_layer_that_is_unfrozen_later(rule):
    """Its first inverses come with its first factors, also when all other layers are frozen for good."""
    model, optimizer = drop_in(rule)
    model[0].requires_grad_(False)
    optimizer = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY, refresh=rule)
    data = batches(12)
    train(model, optimizer, data[:5])
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    before = snapshot(dict(model.named_parameters()))
    trajectory = train(model, optimizer, data[5:7])
    assert not torch.equal(trajectory[-1]["0.weight"], before["0.weight"])
    inverses = optimizer.state[model[0].weight]["inverses"]["0.weight"]["input"][0].clone()
    train(model, optimizer, data[7:])
    now = optimizer.state[model[0].weight]["inverses"]["0.weight"]["input"][0]
    assert torch.equal(now, inverses) == isinstance(rule, ByTrace)
    if isinstance(rule, ByTrace):
        assert optimizer.metrics()["frozen"] == 2


def test_groups_of_parameters():
    data = batches(9)
    expected = by_functional_door(build(mlp), data, **SETTINGS, factor_decay=DECAY, refresh=Every(4))
    params = [{"params": ["2.weight", "2.bias"]}]
    model, optimizer = drop_in(Every(4), params=params)
    assert_same(train(model, optimizer, data), expected)


# --- saving and loading ---------------------------------------------------------------------------

RULES = [Staggered(2, steps=4), ByTrace(0.05, 0.02, growth=2)]


def through_a_file(state: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_drop_in_door_continues_bitwise(rule):
    data = batches(14)
    model, optimizer = drop_in(rule)
    first = train(model, optimizer, data[:7])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(model, optimizer, data[7:])
    fresh, resumed = drop_in(rule)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(identical, train(fresh, resumed, data[7:]), expected))
    assert resumed.metrics() == optimizer.metrics()
    assert_moved(expected, first[-1])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_functional_door_continues_bitwise(rule):
    data, ends = batches(14), []
    for halves in ([data], [data[:7], data[7:]]):
        params, state = None, None
        for part in halves:
            step, fresh, start = make_step(rule, factor_decay=DECAY)
            params, state = (fresh, start) if state is None else (params, state)
            for batch in part:
                params, state, _ = step(params, state, *batch)
            params, state = through_a_file((params, state), weights_only=False)
        ends.append((params, state))
    (one, state), (other, resumed) = ends
    assert identical(one, other)
    assert (state.step, state.due, state.ready) == (resumed.step, resumed.due, resumed.ready)
    assert thor_fx.metrics(state) == thor_fx.metrics(resumed)


# --- transforms that contain others ---------------------------------------------------------------


def counting(due: int | None) -> Transform:
    """Counts what happens between steps, and asks for factors ``due`` steps later."""

    def between(state: Tensor, params: Any, signals: Signals, taken: Taken) -> tuple[Tensor, int | None]:
        assert set(signals.hyper) == {"damping"}
        return state + len(params), None if due is None else taken.step + due

    base = precondition(Schedule("damping", 0.1), frequency=3)
    return base._replace(init=lambda *_: torch.zeros(()), update=lambda u, s, *_: (u, s), between=between)


def run_hook(tx: Transform, names: Iterable[str] = ("a", "b")) -> tuple[Any, int | None]:
    params = {name: torch.ones(2) for name in names}
    found = Coverage({}, (), dict.fromkeys(params, "a test"))
    signals = Signals(found, dict.fromkeys(tx.schedules, torch.tensor(0.1)))
    return tx.between(tx.init(params, found), params, signals, Taken(7, frozenset(), frozenset(params)))


def test_the_hook_of_an_inner_transform_is_called():
    lonely = precondition(Schedule("damping", 0.1))
    assert lonely.between is None
    assert skip_nonfinite(chain(lonely)).between is None
    assert unscale(partition({"x": lonely}, {})).between is None
    state, due = run_hook(skip_nonfinite(unscale(chain(counting(5)))))
    assert (state.inner, state.skipped, due) == ((torch.tensor(2.0),), 0, 12)


def test_of_several_the_earliest_step_counts():
    parts = {"x": counting(5), "y": counting(2), "z": counting(None)}
    state, due = run_hook(partition(parts, {"a": "x", "b": "y", "c": "z"}), ["a", "b", "c"])
    assert (due, {label: int(count) for label, count in state.items()}) == (9, {"x": 1, "y": 1, "z": 1})
    assert run_hook(chain(counting(None)))[1] is None


def test_beside_a_transform_without_a_rule(monkeypatch):
    """It inverts in every factor step and gets its factors at its frequency, whatever the rule wants."""
    own = {"damping": 0.1, "momentum": 0.9, "lr": 0.0, "frequency": 2}
    parts = {"x": thor_fx.thor(**own, refresh=ByTrace(0.1, 0.1)), "y": thor_fx.thor(**own)}
    groups = {name: "x" if name.startswith("0") else "y" for name in dict(build(mlp).named_parameters())}
    model = build(mlp)
    step = thor_fx.compile_step(classifier_loss(model), partition(parts, groups), backend="eager")
    params, data = snapshot(dict(model.named_parameters())), batches(1)
    state, inverses = step.init(params, *data[0]), []
    for batch in [*data * 4, *batches(5)]:
        params, state, _ = step(params, state, *batch)
        inverses.append([leaf.clone() for leaf in pytree.tree_leaves(state.inner["y"].inner)][:2])
    changed = [not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(inverses)]
    assert thor_fx.metrics(state)["frozen"] == 1
    assert [i + 1 for i, new in enumerate(changed) if new] == [6, 8]


@pytest.mark.inductor
def test_compiled_by_inductor():
    data = batches(7, dtype=torch.float32)
    settings = {**SETTINGS, "refresh": Staggered(2), "factor_decay": DECAY}
    found = by_functional_door(build(mlp, torch.float32), data, backend="inductor", **settings)
    assert_same(found, by_functional_door(build(mlp, torch.float32), data, **settings), rtol=1e-4)
