"""What is said of a step before it is taken, and what is measured of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx.cost_model import Predicted, predicted
from thor_fx.costs import Cost
from thor_fx.kernels import Kernel
from thor_fx.passes.phases import PHASES, phases_of
from thor_fx.rates import Rates
from thor_fx.skipping import RECENT
from thor_fx.step_cost import PhaseCost, StepCost
from thor_fx.step_report import StepReport, step_report
from thor_fx.step_time import with_seconds

R, I, H, O = 32, 6, 5, 4  # noqa: E741 - rows, and the sides of two matrices
SETTINGS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 10}
RATES = Rates(flops=1e9, bytes=1e9)


def report_of(**settings: Any) -> StepReport:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, H), nn.GELU(), nn.Linear(H, O))

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    batch = torch.randn(R, I), torch.randint(O, (R,))
    tx = thor_fx.thor(**SETTINGS | settings)
    return step_report(loss_fn, dict(model.named_parameters()), batch, tx, rates=RATES)


@pytest.fixture(scope="module")
def report() -> StepReport:
    return report_of()


def test_both_kinds_of_step_by_phase(report):
    plain, factor = report.costs["plain"], report.costs["factor"]
    assert tuple(plain.phases) == ("forward", "backward", "update")
    assert tuple(factor.phases) == PHASES
    assert factor.phases["forward"].flops == plain.phases["forward"].flops == 2 * R * (I * H + H * O)
    assert factor.phases["update"].flops == plain.phases["update"].flops
    assert factor.phases["factors"].flops == 2 * R * (I**2 + 2 * H**2 + O**2)
    assert factor.peak >= plain.peak > plain.saved > 0


def test_the_update_reads_and_writes_parameters_momentum_and_inverses(report):
    parameters = I * H + H + H * O + O
    inverses = I**2 + 2 * H**2 + O**2
    moved = report.costs["plain"].phases["update"].bytes
    least = 4 * (5 * parameters + inverses + 2 * RECENT)
    assert least < moved < 3 * least, "and what a product leaves for the next"


@pytest.mark.parametrize(
    "settings", [{"inverse": "ekfac"}, {"inverse": "eva"}, {"factor_decay": 0.9}, {"fisher": "sampled"}, {}]
)
def test_every_node_of_every_whole_step_has_a_phase(settings):
    for gm in report_of(**settings).graphs.values():
        assert set(phases_of(gm)) == {node.name for node in gm.graph.nodes if node.op != "output"}


def test_what_is_foretold_is_made_of_the_costs_of_layers(report):
    found = report.predicted
    assert found.forward_backward == pytest.approx(
        sum(report.costs["plain"].phases[phase].floor for phase in ("forward", "backward")), rel=0.5
    ), "what is computed again is not known before the partitioner"
    assert found.cost.factor_bytes == 4 * (I**2 + 2 * H**2 + O**2)
    assert found.overhead == pytest.approx((found.factors + found.refresh) / found.plain_step)
    assert found.mean_overhead == pytest.approx(found.overhead / 10)


def test_a_prediction_in_words():
    text = str(Predicted(0.003, 0.001, 0.001, 0.002, Cost(), 10))
    assert text.splitlines() == [
        "a factor step takes 75.0% longer than a plain step (7 ms and 4 ms at best); with one in 10 steps, "
        "7.50% on average",
        "forward and backward 3 ms, update 1 ms, factors 1 ms, refresh 2 ms",
    ]


def test_a_transform_without_factors_has_no_overhead(report):
    tx = thor_fx.thor(**SETTINGS)._replace(frequency=None)
    with pytest.raises(ValueError, match="tx wants no factors"):
        predicted(report.graphs["plain"], report.coverage, tx, RATES)


def test_the_time_of_a_kernel_is_divided_among_its_phases(report):
    gm = report.graphs["factor"]
    phases = phases_of(gm)
    names = {
        phase: next(name for name, p in phases.items() if p == phase) for phase in ("forward", "factors")
    }
    one = Kernel("one", False, (names["forward"],), ("forward",), seconds=2.0)
    both = Kernel("both", False, tuple(names.values()), ("forward", "factors"), seconds=1.0)
    cost = StepCost("factor", {phase: PhaseCost(0, 0, 0.0) for phase in names}, 0, 0)
    timed = with_seconds(cost, gm, [one, both]).phases
    assert timed["forward"].seconds + timed["factors"].seconds == pytest.approx(3.0)
    assert 2.0 < timed["forward"].seconds < 3.0
    assert with_seconds(cost, gm, [one, replace(both, seconds=None)]) == cost


def test_an_unknown_kind_is_refused(report):
    with pytest.raises(ValueError, match=r"kind must be one of \['plain', 'factor'\]"):
        report.kernels("refresh")


def fit_matrix(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x @ params["w"]).tanh().square().mean()


@pytest.mark.inductor
def test_a_measured_factor_step():
    """Kernels of every phase, all of them seen; nothing of the caller's is written to."""
    tx, rows, matrix = thor_fx.thor(**SETTINGS), torch.randn(R, I), torch.randn(I, O)
    report = step_report(fit_matrix, {"w": matrix.clone()}, [rows], tx, rates=RATES)
    measured = report.measured("factor")
    assert torch.equal(report._arguments[0], matrix) or torch.equal(report._arguments[1], matrix)
    assert {phase for kernel in measured.kernels for phase in kernel.phases} == set(PHASES)
    costs = measured.cost.phases.values()
    assert sum(kernel.flops for kernel in measured.kernels) == sum(cost.flops for cost in costs)
    assert all(cost.seconds > 0 for cost in costs)
    seconds = sum(kernel.seconds for kernel in measured.kernels)
    assert sum(cost.seconds for cost in costs) == pytest.approx(seconds)
    untimed = [replace(kernel, start=None, seconds=None) for kernel in measured.kernels]
    assert report.kernels("factor") == untimed, "compiled once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_measured_step_on_a_gpu():
    batch, params = [torch.randn(128, 64, device="cuda")], {"w": torch.randn(64, 64, device="cuda")}
    measured = step_report(fit_matrix, params, batch, thor_fx.thor(**SETTINGS)).measured("factor")
    assert all(kernel.seconds is not None for kernel in measured.kernels)
    assert all(cost.seconds > 0 for cost in measured.cost.phases.values())
