"""Kernels know which part of a step they are, from the nodes that they compute."""

from collections import Counter
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

import thor_fx
from thor_fx.inductor_kernels import Event
from thor_fx.kernels import Generated, Kernel, assigned, generate, timed_kernels
from thor_fx.passes import canonicalize, emit_factors, run
from thor_fx.passes.layout import Rules
from thor_fx.passes.phases import mark, phases_of

pytestmark = pytest.mark.inductor
ROWS, IN, HIDDEN, OUT = 7, 6, 5, 4


class Both(NamedTuple):
    """A graph with factors, and both compiled: with factors and without."""

    graph: fx.GraphModule
    factor: Generated
    plain: Generated


def compiled(rules: Rules) -> Both:
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, params, (x,)), y, reduction="sum")

    x, y = torch.randn(ROWS, IN), torch.randn(ROWS, OUT)
    step = thor_fx.trace_step(loss_fn, dict(model.named_parameters()), x, y)
    graph = run(step, [canonicalize, partial(emit_factors, rules=rules), mark])
    return Both(graph, generate(graph), generate(run(step, [canonicalize, mark])))


@pytest.fixture(scope="module")
def both() -> Both:
    return compiled(Rules())


def without_factors(kernels: list[Kernel], graph: fx.GraphModule) -> Counter[tuple[str, ...]]:
    """The nodes of every kernel that are left when there are no factors."""
    phases = phases_of(graph)
    left = [kernel for kernel in kernels if not set(kernel.phases) <= {"factors"}]
    return Counter(tuple(name for name in kernel.nodes if phases[name] != "factors") for kernel in left)


def test_the_kernels_of_factors_alone_are_those_that_a_plain_step_does_not_have(both):
    plain = Counter(kernel.nodes for kernel in both.plain.kernels)
    assert without_factors(both.factor.kernels, both.graph) == plain
    gone = [kernel for kernel in both.factor.kernels if set(kernel.phases) <= {"factors"}]
    assert sum(kernel.extern for kernel in gone) == 4, "A and G of two layers"


def test_phases_of_a_kernel_are_those_of_its_nodes(both):
    phases = phases_of(both.graph)
    for kernel in both.factor.kernels:
        assert set(kernel.phases) <= {phases[name] for name in kernel.nodes}
        assert kernel.phases


def test_kernels_that_also_round_rows_are_mixed():
    """Rounding for the products of factors is fused with what makes the rows; all else is as it was."""
    both = compiled(Rules(dtype=torch.bfloat16))
    mixed = [kernel for kernel in both.factor.kernels if {"backward", "factors"} <= set(kernel.phases)]
    assert mixed
    assert not any(kernel.extern for kernel in mixed)
    assert all(any("_to_copy" in name for name in kernel.nodes) for kernel in mixed)
    left = {name for nodes in without_factors(both.factor.kernels, both.graph) for name in nodes}
    assert left == {name for kernel in both.plain.kernels for name in kernel.nodes}


def test_operations_and_bytes_of_calls_of_libraries(both):
    by_nodes = {kernel.nodes[-1]: kernel for kernel in both.plain.kernels if kernel.extern}
    assert both.plain.kernels[0].phases == ("forward",)
    first = by_nodes["addmm"]
    assert first.flops == 2 * ROWS * IN * HIDDEN
    assert first.bytes == 4 * (ROWS * IN + IN * HIDDEN + HIDDEN + ROWS * HIDDEN)
    total = sum(kernel.flops for kernel in both.factor.kernels)
    assert total == thor_fx.flops.count_flops(both.graph)


def test_a_value_that_stays_inside_does_not_count(both):
    """The derivative of GELU, and the gradient of the bias that is summed right behind it."""
    kernel = next(k for k in both.plain.kernels if "gelu_backward" in k.nodes and not k.extern)
    assert kernel.bytes == 4 * (3 * ROWS * HIDDEN + HIDDEN)
    assert kernel.phases == ("backward",)


def test_every_kernel_is_seen_by_a_profiler_in_order(both):
    arguments = [
        torch.zeros(value.shape, dtype=value.dtype)
        for value in (node.meta["val"] for node in both.graph.graph.find_nodes(op="placeholder"))
    ]
    timed = timed_kernels(both.factor, arguments)
    starts = [kernel.start for kernel in timed]
    assert None not in starts
    assert starts == sorted(starts)
    assert all(kernel.seconds > 0 for kernel in timed)


def test_times_end_where_a_kernel_is_missing(both):
    assert both.plain.calls[0].name == "extern_kernels.addmm"
    events = [Event("aten::empty", 0.0, 0.1), Event("aten::addmm", 0.25, 0.5), Event("aten::addmm", 1.0, 0.5)]
    first, *others = assigned(both.plain, events)
    assert (first.start, first.seconds) == (0.25, 0.5)
    assert {kernel.seconds for kernel in others} == {None}


def test_nothing_is_left_patched(both):
    from torch._inductor import config, debug

    assert debug.set_kernel_post_grad_provenance_tracing.__module__ == "torch._inductor.debug"
    assert not config.cpp.enable_kernel_profile
