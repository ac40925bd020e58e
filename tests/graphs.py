"""Graphs of the cases of :mod:`models`, traced in three ways, and how to run them."""

import copy
import functools
from typing import Any

import torch
from functorch import make_fx
from torch import Tensor, fx

import thor_fx
from models import Build, Case
from thor_fx.capture import Captured, LossCapture, Runner, export_joint
from thor_fx.passes import Grad, Input, Loss, Param, outputs


def step_graph(build: Build, dtype: torch.dtype = torch.float64) -> fx.GraphModule:
    """The step graph that users get; a fresh copy."""
    return copy.deepcopy(_step_graph(build, dtype))


@functools.cache
def _step_graph(build: Build, dtype: torch.dtype) -> fx.GraphModule:
    case = build(dtype)
    return thor_fx.trace_step(case.loss_fn, case.params, *case.batch)


@functools.cache
def joint_graph(build: Build) -> fx.GraphModule:
    """The joint graph of AOTAutograd, whose backward starts at a tangent; not to be changed."""
    case = build()

    def handler(captured: Captured) -> Runner:
        raise _Exported(export_joint(captured.forward, captured.inputs))

    try:
        LossCapture(case.loss_fn, handler, dynamic=False)(case.params, *case.batch)
    except _Exported as exported:
        return exported.joint
    raise AssertionError("nothing was captured")


class _Exported(Exception):
    def __init__(self, joint: fx.GraphModule) -> None:
        self.joint = joint


@functools.cache
def plain_graph(build: Build, tracing_mode: str = "fake") -> fx.GraphModule:
    """Loss and gradients through ``make_fx``, described by hand; not to be changed.

    No input says where its backward starts.
    """
    case = build()

    def step(*flat: Tensor) -> list[Tensor | None]:
        leaves = [p.detach().requires_grad_() for p in flat[: len(case.params)]]
        params = dict(zip(case.params, leaves, strict=True))
        out = case.loss_fn(params, *flat[len(leaves) :])
        loss = out[0] if isinstance(out, tuple) else out
        return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]

    trace = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)  # buffers are captured
    gm = trace(*(p.detach() for p in case.params.values()), *case.batch)
    inputs = [Param(name) for name in case.params] + [Input(i) for i in range(len(case.batch))]
    outputs.describe(gm, inputs, [Loss(), *(Grad(name) for name in case.params)])
    return gm


def values(gm: fx.GraphModule, case: Case) -> dict[Any, Tensor]:
    """What a step graph computes, by descriptor, node by node."""
    torch.manual_seed(0)
    arguments = [p.detach() for p in case.params.values()]
    with torch.no_grad():
        results = fx.Interpreter(gm).run(*arguments, *case.batch)
    return dict(zip(outputs.output_nodes(gm), results, strict=True))


def added(gm: fx.GraphModule, before: fx.GraphModule) -> list[str]:
    """The nodes that ``gm`` has and ``before`` has not, one line each."""
    old = {node.name for node in before.graph.nodes}
    return [_line(node) for node in gm.graph.nodes if node.name not in old]


def _line(node: fx.Node) -> str:
    arguments = [*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())]
    return f"{node.name} = {node.target}({', '.join(arguments)})"


def tiny() -> fx.GraphModule:
    """A described step graph of a handful of nodes: ``loss = sum(x @ w)``."""

    def step(w: Tensor, x: Tensor) -> list[Tensor]:
        w = w.detach().requires_grad_()
        loss = (x @ w).sum()
        return [loss, *torch.autograd.grad(loss, w)]

    gm = make_fx(step, tracing_mode="fake")(torch.ones(4, 3), torch.ones(6, 4))
    outputs.describe(gm, [Param("w"), Input(0)], [Loss(), Grad("w")])
    return gm


def negate_loss(gm):
    """A pass that changes what the graph returns first."""
    out = outputs.output_node(gm.graph)
    with gm.graph.inserting_before(out):
        node = gm.graph.call_function(torch.ops.aten.neg.default, (out.args[0][0],))
    node.meta["val"] = out.args[0][0].meta["val"]
    out.args = ((node, *out.args[0][1:]),)
