"""The update as nodes of a graph: Python that is spliced behind the gradients.

What it changes is written into the tensors that came in, so nothing is kept twice.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .capture import fake_mode
from .factors import Moments, flat_moments, moments_of
from .hyper import HyperTensors
from .layers import Coverage
from .passes import outputs
from .passes.outputs import (
    Grad,
    Input,
    InputDescriptor,
    Loss,
    Mutation,
    Opaque,
    Output,
    OutputDescriptor,
    Param,
    Statistic,
    Terms,
)
from .passes.phases import mark, mark_update
from .passes.splice import splice
from .passes.stages import run_watched
from .passes.switches import is_on
from .scaling import SCALES
from .stacked_updates import Role, Stacked, stack_alike, write_stack
from .trace_log import tracer
from .transform import Signals, Transform, apply_updates

aten = torch.ops.aten

FIXED = "fixed"
"""In the meta data of an argument: every call gets the same tensor, a parameter or a part of the state."""


def append_update(
    gm: fx.GraphModule,
    tx: Transform,
    found: Coverage,
    trained: Sequence[str],
    *,
    refreshes: frozenset[str] | None = None,
    compares: bool = False,
) -> None:
    """Append ``tx`` to a graph that returns gradients, in place.

    The graph gets the leaves of the transform's state and its hyper-parameters (sorted by name) as
    further inputs, and writes the new values into parameters, state and mutated inputs. Its own
    results stay. A parameter that forward itself changes is updated from its changed value. All nodes get
    their phase (:mod:`thor_fx.passes.phases`).

    Args:
        gm: a step graph, with or without factors.
        tx: what to do with the gradients.
        found: the coverage of the model.
        trained: names of all parameters that the state is about, in the order that the state was made
            with; a step may have gradients for some.
        refreshes: of the layers that the graph measures, those to invert; None: all.
        compares: whether the update says what it should change (``Signals.compares``).
    """
    mark(gm)
    step_nodes = set(gm.graph.nodes)
    returned = outputs.output_nodes(gm)
    inputs = gm.graph.find_nodes(op="placeholder")
    mutated = {inputs[d.index]: node for d, node in returned.items() if isinstance(d, Mutation)}
    inputs_by_name = {d.name: n for d, n in outputs.input_nodes(gm).items() if isinstance(d, Param)}
    params = {name: inputs_by_name[name] for name in trained if name in inputs_by_name}
    gradients = {name: returned[Grad(name)] for name in params if Grad(name) in returned}
    state, hyper = _add_inputs(gm, tx, found, params)
    terms = [returned[Terms()]] if Terms() in returned else []
    after_forward = {name: mutated.get(node, node) for name, node in params.items()}
    scales = {d.text: n for d, n in returned.items() if isinstance(d, Opaque) and d.text in SCALES}
    operands = (gradients, after_forward, state, hyper, flat_moments(moments_of(returned)), terms, scales)
    leaves, structure = pytree.tree_flatten(operands)

    def step(*values: Tensor) -> Any:
        grads, old_params, old, rates, moments, terms, scales = pytree.tree_unflatten(list(values), structure)
        measured = moments_of(moments) or None
        known = {"moments": measured, "terms": next(iter(terms), None), **scales}
        signals = Signals(found, rates, **known, refreshes=refreshes, compares=compares)
        updates, new = tx.update(grads, old, old_params, signals)
        return apply_updates(old_params, updates), new

    for node in (*params.values(), *pytree.tree_leaves(state)):
        node.meta[FIXED] = True
    out = outputs.output_node(gm.graph)
    new_params, new_state = splice(out.prev, step, *leaves)
    written = mutated | {params[name]: node for name, node in new_params.items()}
    written |= dict(zip(pytree.tree_leaves(state), pytree.tree_leaves(new_state), strict=True))
    unchanged = {name: node for name, node in params.items() if after_forward[name] is node}
    appended = [node for node in gm.graph.nodes if node not in step_nodes and node.op == "call_function"]
    _write_all(out, appended, _by_param(unchanged, gradients, state), written)
    mark_update(gm, [node for node in gm.graph.nodes if node not in step_nodes])
    gm.recompile()


def fixed_arguments(gm: fx.GraphModule) -> set[fx.Node]:
    """The parameters and the state of a graph with an update: tensors that stay where they are."""
    return {node for node in gm.graph.find_nodes(op="placeholder") if node.meta.get(FIXED)}


def return_forward(gm: fx.GraphModule, results: int) -> None:
    """Return what the forward graph returned, ``results`` values in its order, and statistics behind them."""
    returned = outputs.output_nodes(gm)
    order: list[OutputDescriptor] = [Output(i) if Output(i) in returned else Loss() for i in range(results)]
    order += [descriptor for descriptor in returned if isinstance(descriptor, Statistic)]
    out = outputs.output_node(gm.graph)
    out.args = (tuple(returned[descriptor] for descriptor in order),)
    out.meta[outputs.KEY] = tuple(order)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def loss_alone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a step graph that computes the loss, and changes nothing."""
    alone = copy.deepcopy(gm)
    outputs.select(alone, lambda descriptor: descriptor == Loss())
    alone.graph.eliminate_dead_code()
    alone.recompile()
    return alone


def update_graph(
    tx: Transform,
    found: Coverage,
    params: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    terms: Tensor | None,
    scales: Mapping[str, Tensor],
    *,
    refreshes: frozenset[str] | None = None,
    compares: bool = False,
) -> fx.GraphModule:
    """The update alone, as a graph of flat arguments.

    The arguments are: parameters, gradients, moments, terms, scales, leaves of the state,
    hyper-parameters. ``scales`` are those of :data:`~thor_fx.scaling.SCALES` that there are.
    All are tensors; the values given here tell shapes only. ``refreshes`` and ``compares`` are no
    arguments: :func:`append_update`.
    """
    values: dict[Any, Tensor] = {Grad(name): g for name, g in gradients.items()}
    values |= flat_moments(moments)
    if terms is not None:
        values[Terms()] = terms
    values |= {Opaque(name): scale for name, scale in scales.items()}
    graph = fx.Graph()
    mode = fake_mode()

    def add(name: str, value: Tensor, descriptor: InputDescriptor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta = {"val": mode.from_tensor(value.detach(), static_shapes=True), outputs.KEY: descriptor}
        return node

    for i, (name, value) in enumerate(params.items()):
        add(f"param_{i}", value, Param(name))
    nodes = [add(f"value_{i}", v, Input(len(params) + i)) for i, v in enumerate(values.values())]
    graph.output(tuple(nodes)).meta[outputs.KEY] = tuple(values)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    how: dict[str, Any] = {"tx": tx, "found": found, "refreshes": refreshes, "compares": compares}
    append = partial(append_update, trained=list(params), **how)
    run_watched(append, gm, append_update.__name__, tracer("update"))
    outputs.select(gm, lambda _: False)
    gm.recompile()
    return gm


def _add_inputs(
    gm: fx.GraphModule, tx: Transform, found: Coverage, trained: Mapping[str, fx.Node]
) -> tuple[Any, dict[str, fx.Node]]:
    fakes = {name: node.meta["val"] for name, node in trained.items()}
    some = next(iter(fakes.values()))
    with some.fake_mode:
        state = tx.init(fakes, found)
        rates = {name: torch.empty((), dtype=HyperTensors.dtype(fakes)) for name in sorted(tx.schedules)}
        rates = {name: rate.to(some.device) for name, rate in rates.items()}
    inputs = gm.graph.find_nodes(op="placeholder")
    last, position = inputs[-1], itertools.count(len(inputs))

    def add(value: Tensor) -> fx.Node:
        nonlocal last
        index = next(position)
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"state_{index}")
        last.meta = {"val": value, outputs.KEY: Input(index)}
        return last

    return pytree.tree_map(add, state), {name: add(rate) for name, rate in rates.items()}


def _by_param(
    params: Mapping[str, fx.Node], gradients: Mapping[str, fx.Node | None], state: Any
) -> dict[str, dict[Role, fx.Node]]:
    """The inputs of the update that are about one parameter, and what they are of it."""
    found: dict[str, dict[Role, fx.Node]] = {
        name: {("param",): node, ("gradient",): gradient}
        for name, node in params.items()
        if (gradient := gradients.get(name)) is not None
    }
    for path, node in pytree.tree_flatten_with_path(state)[0]:
        keys: list[Any] = [getattr(entry, "key", entry) for entry in path]
        names = [key for key in keys if key in found]
        if len(names) == 1:
            found[names[0]]["state", *(None if key in names else key for key in keys)] = node
    return found


def _write_all(
    out: fx.Node,
    appended: Sequence[fx.Node],
    by_param: Mapping[str, Mapping[Role, fx.Node]],
    written: Mapping[fx.Node, fx.Node],
) -> None:
    """Write the new value of every input, those of small parameters together: :func:`stack_alike`."""
    stacks: list[Stacked] = []
    if is_on("stacked_updates"):
        written, stacks = stack_alike(out.graph, appended, by_param, written)
    for target, value in written.items():
        _write(out, target, value)
    for targets, stack in stacks:
        write_stack(out, targets, stack)


def _write(out: fx.Node, target: fx.Node, value: fx.Node) -> None:
    if value is target:
        return
    with out.graph.inserting_before(out):
        copied = out.graph.call_function(aten.copy_.default, (target, value))
    copied.meta["val"] = target.meta["val"]
