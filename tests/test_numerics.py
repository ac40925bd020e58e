"""Numbers that go wrong: what is spoilt, in every way, through both doors, with every method.

No parameter and no state is ever NaN or infinite; what was caught is counted; training goes on.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import thor_fx
from stacks import Stacked
from thor_fx.alarm import NumericsWarning
from thor_fx.factors import Moments
from thor_fx.inverses.attempts import FAILED, GOOD, MOST, NOT_FINITE, bounds, first_order, in_a_row, strength
from thor_fx.layers import Coverage
from thor_fx.skipping import skip_nonfinite
from thor_fx.transform import Signals, Transform, stateless, unscale

SETTINGS: dict[str, Any] = {"lr": 0.01, "damping": 0.1, "momentum": 0.9, "frequency": 2}
METHODS = ["cholesky", "eigen", "ekfac", "newton_schulz", "eva"]
Loss = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Returns its loss, times a scale; ``poison`` reaches the gradient of the shift alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(4, 5, generator=draws).to(dtype) / 2)
        self.head = nn.Parameter(torch.randn(3, 4, generator=draws).to(dtype) / 2)
        self.shift = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, x: Tensor, scale: Tensor, poison: Tensor) -> Tensor:
        hidden = torch.relu(x @ self.first.T)
        return ((hidden @ self.head.T + self.shift).square().mean() + (self.shift * poison).sum()) * scale


class Run:
    """One training by either door."""

    def __init__(
        self, door: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any
    ) -> None:
        self.dtype, self.device = dtype, device
        model = Net(dtype).to(device)
        self.good = self.batch()
        settings = {**SETTINGS, **settings}
        if door == "drop-in":
            self.model = thor_fx.compile(model, backend="aot_eager")
            self.optimizer: Any = thor_fx.Thor(self.model, **settings)
            self.params: Any = dict(model.named_parameters())
        else:
            self.optimizer = None
            self.params = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.compiled = thor_fx.compile_step(
                lambda params, *batch: torch.func.functional_call(model, params, batch),
                thor_fx.thor(**settings),
                backend="eager",
            )
            self.state_ = self.compiled.init(self.params, *self.good)

    def batch(self, x: float = 1.0, scale: float = 1.0, poison: float = 0.0, seed: int = 1) -> Any:
        draws = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        numbers = (torch.tensor(number, dtype=self.dtype, device=self.device) for number in (scale, poison))
        return (draws * x).to(self.device, self.dtype), *numbers

    def step(self, *batch: Tensor) -> float:
        batch = batch or self.good
        if self.optimizer is None:
            self.params, self.state_, out = self.compiled(self.params, self.state_, *batch)
            return float(out.loss)
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @property
    def state(self) -> Any:
        return self.state_.inner if self.optimizer is None else self.optimizer._built.state

    @property
    def metrics(self) -> dict[str, float]:
        return self.compiled.metrics(self.state_) if self.optimizer is None else self.optimizer.metrics()

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def tensors(self) -> Iterator[Tensor]:
        yield from (p.detach() for p in self.params.values())
        yield from (leaf for leaf in pytree.tree_leaves(self.state) if torch.is_tensor(leaf))

    def check_finite(self) -> None:
        for tensor in self.tensors():
            assert tensor.isfinite().all()


DOORS = pytest.mark.parametrize("door", ["drop-in", "functional"])

SPOILT: dict[str, dict[str, float]] = {
    "inputs 1e-30": {"x": 1e-30},
    "inputs 1e-15": {"x": 1e-15},
    "inputs 1e15": {"x": 1e15},
    "inputs 1e30": {"x": 1e30},
    "squares of inputs overflow": {"x": 1e20, "scale": 1e-38},
    "loss 1e-30": {"scale": 1e-30},
    "loss 1e15": {"scale": 1e15},
    "loss 1e30": {"scale": 1e30},
    "dead inputs": {"x": 0.0},
    "dead cotangents": {"scale": 0.0},
    "a NaN input": {"x": math.nan},
    "an infinite loss": {"scale": math.inf},
    "one gradient NaN": {"poison": math.nan},
    "one gradient infinite": {"poison": math.inf},
    "one gradient huge": {"poison": 1e30},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"inverse": name} for name in METHODS},
    "no damping": {"damping": 0.0},
    "clips": {"enable_clip_grad": True, "clip": "global", "kl_clip": 1e-3, "fallback": "adamw"},
    "averages": {"factor_decay": 0.9, "refresh": thor_fx.Staggered(2, 2), "damping_rule": "relative"},
    "async": {"factor_decay": 0.9, "refresh_async": True, "step_norm": "adam"},
    "by trace": {"refresh": thor_fx.ByTrace(), "damping_rule": "pi", "enable_clip_grad": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize(
    ("door", "variant"),
    [
        *(("functional", name) for name in VARIANTS),
        *(("drop-in", name) for name in ("cholesky", "averages", "float16")),
    ],
)
def test_whatever_a_batch_is_numbers_stay_finite_and_training_goes_on(door, variant):
    """Every kind of bad batch, in a factor step and in a plain one, amid good ones."""
    run = Run(door, **VARIANTS[variant])
    for _ in range(3):
        run.step()
    for name, how in SPOILT.items():
        before = run.snapshot()
        for _ in range(2):
            run.step(*run.batch(**how))
            run.check_finite()
        if not math.isfinite(sum(how.values())):
            assert all(torch.equal(p, before[n]) for n, p in run.params.items()), name
        with torch.no_grad():  # the next case begins where this one did: with the same weights
            for n, p in run.params.items():
                p.copy_(before[n])
    before = run.snapshot()
    run.step()
    run.step()
    assert all(p.isfinite().all() for p in run.params.values())
    counted = run.metrics
    assert counted["skipped_steps"] >= 8, "four that are NaN or infinite, twice each"
    if variant not in {"no damping"}:
        assert any(not torch.equal(p, before[n]) for n, p in run.params.items())


@pytest.mark.parametrize(
    ("door", "inverse"), [*(("functional", name) for name in METHODS), ("drop-in", "cholesky")]
)
def test_a_bad_first_batch_stops_no_layer(door, inverse):
    run = Run(door, inverse=inverse)
    for how in ("a NaN input", "squares of inputs overflow"):  # one is skipped, the other fails
        run.step(*run.batch(**SPOILT[how]))
    before = run.snapshot()
    for _ in range(4):
        run.step()
    run.check_finite()
    for name, p in run.params.items():
        assert not torch.equal(p, before[name]), name
    assert run.metrics["skipped_steps"] == 1
    assert run.metrics["failed_inverses"] >= 1


# --- what a block without an inverse does --------------------------------------------------------------


def rank_one(scale: float, **settings: Any) -> tuple[Any, Any, Any]:
    """A layer whose input has one direction, with hardly any damping."""
    x = torch.full((6, 40), scale, dtype=torch.float64)
    step = thor_fx.compile_step(
        lambda params, x: (x @ params["w"] * 1e-3).square().mean(),
        thor_fx.thor(**{**SETTINGS, "frequency": 1, "momentum": 0.0, **settings}),
        backend="eager",
    )
    params = {"w": torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    return step, params, x


@pytest.mark.parametrize("inverse", ["cholesky", "newton_schulz"])
def test_the_second_attempt_has_more_damping_and_succeeds(inverse):
    """Before it, the layer steps along the gradient; behind it, nothing is left of the failure."""
    step, params, x = rank_one(1e4, damping=1e-12, inverse=inverse)
    state, seen = step.init(params, x), []
    for _ in range(4):
        before = params["w"].clone()
        params, state, _ = step(params, state, x)
        assert params["w"].isfinite().all()
        assert not torch.equal(params["w"], before)
        counted = step.metrics(state)
        seen.append([counted[name] > 0 for name in ("boosted_blocks", "first_order_blocks")])
    assert seen[0] == [True, True]
    assert [False, False] in seen
    assert step.metrics(state)["skipped_steps"] == 0


def test_a_damping_of_nothing_grows_and_is_bounded():
    parts, never = torch.diag_embed(torch.tensor([[3.0, 1.0]])), torch.zeros(1, dtype=torch.int64)
    found, failing = [], never
    for _ in range(7):
        found.append(float(strength(parts, torch.zeros(1), failing)))
        failing = in_a_row(failing, torch.full_like(failing, FAILED))
    assert found[0] == 0
    assert found[1:6] == pytest.approx([4e-6, 4e-5, 4e-4, 4e-3, 4e-3], rel=1e-5)
    assert float(strength(parts, torch.tensor([0.5]), failing)) == 5000
    assert int(in_a_row(failing, torch.full_like(failing, NOT_FINITE))) == MOST, "no matter of damping"
    assert int(in_a_row(failing, torch.zeros_like(failing))) == MOST, "there was no attempt"
    assert int(in_a_row(failing, torch.full_like(failing, GOOD))) == 0


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_the_first_order_step_is_never_longer_than_the_natural_one(shift):
    x = torch.randn(5, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m = x @ x.mT + shift * torch.eye(6, dtype=torch.float64)  # indefinite where shifted
    damping = torch.full((5,), 0.1, dtype=torch.float64)
    inverse = first_order(bounds(m), damping)
    above = torch.diag_embed(1 / inverse) - m - 0.1 * torch.eye(6, dtype=torch.float64)
    assert (torch.linalg.eigvalsh(above) > -1e-12).all()


def test_what_has_no_bound_stands_still():
    parts = torch.diag_embed(torch.tensor([[1.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]]))
    inverse = first_order(bounds(parts), torch.zeros(3))
    assert inverse.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["cholesky", "eigen", "newton_schulz", "ekfac"])
def test_blocks_fail_one_by_one(name):
    """An indefinite block without history steps along the gradient; with one, it keeps what it has."""
    case = Stacked(name, "dense")
    a, g = (factor.clone() for factor in case.stack.factors)
    a[1] -= 100 * torch.eye(a.shape[-1], dtype=a.dtype)
    spoilt = case.stack._replace(factors=(a, g))
    state, outcomes = case.attempt(spoilt)
    assert (outcomes == FAILED).sum() == (outcomes[1] == FAILED).sum() > 0
    moved = case.apply(state)
    assert moved[1].any()
    assert moved[1].norm() <= case.gradients[1].norm() / 0.04, "it is damped"
    clean, _ = case.refresh()
    torch.testing.assert_close(moved[0], case.apply(clean)[0], rtol=1e-12, atol=1e-12)
    kept, _ = case.attempt(spoilt._replace(before=clean))
    torch.testing.assert_close(case.apply(kept)[1], case.apply(clean)[1], rtol=1e-12, atol=1e-12)


def test_a_layer_that_fails_is_recomputed_whatever_its_trace():
    """Its factors do not change, so the trace rule alone would keep the failure for good."""
    step, params, x = rank_one(1e4, damping=1e-12, refresh=thor_fx.ByTrace(0.5, 0.4))
    state = step.init(params, x)
    for _ in range(4):
        params, state, _ = step(params, state, x)
    assert step.metrics(state)["boosted_blocks"] == 0


# --- what overflows on the way to a parameter ---------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 3e38), (torch.float16, 6e4), (torch.bfloat16, 3e38)]
)
def test_a_finite_update_may_be_too_much(dtype, large):
    params = {"w": torch.full((2,), large, dtype=dtype), "b": torch.ones(1, dtype=dtype)}
    guarded = skip_nonfinite(stateless(lambda updates, _params, _signals: updates))
    nothing = Coverage({}, (), {})
    state = guarded.init(params, nothing)
    updates = {"w": torch.full((2,), large / 2, dtype=dtype), "b": torch.ones(1, dtype=dtype)}
    new, state = guarded.update(updates, state, params, Signals(nothing))
    assert not any(update.any() for update in new.values())
    assert state.skipped == 1


@pytest.mark.parametrize("step_norm", [None, "adam"])
@pytest.mark.parametrize(
    "options", [{}, {"enable_clip_grad": True}, {"kl_clip": 1e-3}, {"fallback": "adamw"}]
)
def test_squares_that_overflow_skip_the_step_and_stop_nothing(options, step_norm):
    """Gradients of 1e25 are finite; a norm of them is not, nor is an average of their squares."""
    run = Run("functional", step_norm=step_norm, **options)
    run.step()
    before = run.snapshot()
    run.step(*run.batch(scale=1e25))
    run.check_finite()
    if options or step_norm:
        assert run.metrics["skipped_steps"] == 1
        assert all(torch.equal(p, before[name]) for name, p in run.params.items())
        run.step()
        assert not any(torch.equal(p, before[name]) for name, p in run.params.items())


def test_a_large_gradient_scale_leaves_the_factors_right():
    """Its square is infinite in float32."""
    scales: list[Tensor] = []

    def look(updates: Any, state: Any, _params: Any, signals: Signals) -> Any:
        assert signals.moments is not None
        scales.append(signals.moments["w"].cotangents)
        return updates, state

    scale = torch.tensor(2.0**70)
    inner = Transform(lambda _params, _coverage: (), look)
    ones = Moments(torch.ones(2, 2), torch.full((2, 2), 2.0**100) * 2.0**20, torch.tensor(1.0))
    signals = Signals(Coverage({}, (), {}), moments={"w": ones}, loss_scale=scale, gradient_scale=scale)
    unscale(inner).update({"w": torch.ones(2)}, (), {"w": torch.ones(2)}, signals)
    assert torch.equal(scales[0], torch.full((2, 2), 2.0**-20))


# --- a skipped step is no step --------------------------------------------------------------------------


@DOORS
@pytest.mark.parametrize("at", [2, 3], ids=["factor step", "plain step"])
def test_a_skipped_step_does_not_count(door, at):
    """Schedules and factors of the next step are those that it would have had."""
    table = torch.tensor([0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003])
    settings = {"lr": table, "damping": lambda step: 0.1 / (1 + step), "factor_decay": 0.5}
    spoilt, clean = Run(door, **settings), Run(door, **settings)
    for step in range(5):
        if step == at:
            spoilt.step(*spoilt.batch(x=math.nan))
            assert spoilt.metrics["step"] == at
        batch = clean.batch(seed=step)
        spoilt.step(*batch)
        clean.step(*batch)
    one, other = spoilt.metrics, clean.metrics
    assert one.pop("skipped_steps") == 1
    assert other.pop("skipped_steps") == 0
    assert one == other
    assert all(torch.equal(spoilt.params[name], p) for name, p in clean.params.items())


def test_an_overflow_of_a_gradient_scaler_does_not_count():
    run = Run("drop-in", lr=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    lrs, steps = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an overflow is how a scaler finds its scale
        for scale in (1.0, 1.0, math.inf, 1.0):
            scaler.scale(run.model(*run.batch(scale=scale))).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            lrs.append(run.metrics["lr"])
            steps.append(run.metrics["step"])
    assert steps == [1, 2, 2, 3]
    assert lrs == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert run.metrics["refreshes"] == 2, "the factor step that was skipped was taken again"


# --- spikes ----------------------------------------------------------------------------------------------


def losses_after_a_spike(at: int, **settings: Any) -> tuple[float, float, float]:
    """The loss before a batch whose loss is 1e6 times as large; the worst after it; the last."""
    run = Run("functional", factor_decay=0.5, lr=0.02, momentum=0.5, **settings)
    for _ in range(at):
        before = run.step()
    run.step(*run.batch(scale=1e6))
    after = [run.step() for _ in range(150)]
    run.check_finite()
    return before, max(after), after[-1]


def test_training_recovers_from_a_spike_in_a_factor_step():
    """The factors of the spike leave the average, and the layers move again."""
    before, worst, last = losses_after_a_spike(at=40)
    assert worst > 100 * before
    assert last < 1e-2 * worst


@pytest.mark.parametrize("at", [40, 41], ids=["factor step", "plain step"])
def test_a_bound_on_all_updates_protects_from_a_spike(at):
    settings = {"enable_clip_grad": True, "clip": "global", "clip_norm": 0.1}
    before, worst, last = losses_after_a_spike(at=at, **settings)
    assert worst < 1.05 * before
    assert last < before


# --- told once -------------------------------------------------------------------------------------------


@DOORS
def test_trouble_is_told_once(door):
    run = Run(door, frequency=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step()
        run.metrics  # noqa: B018
    with pytest.warns(NumericsWarning, match=r"1 step\(s\) so far changed nothing"):
        run.step(*run.batch(x=math.nan))
    with pytest.warns(NumericsWarning, match=r"\d factor block\(s\) so far had no finite inverse"):
        run.step(*run.batch(**SPOILT["squares of inputs overflow"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(*run.batch(x=math.nan))
        assert run.metrics["skipped_steps"] == 2
