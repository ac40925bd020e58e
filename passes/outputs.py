"""What every input and output of a step graph is.

A step graph that trains one Linear layer reads, from its descriptors alone::

    inputs   Param("fc.weight"), Param("fc.bias"), Input(0), Input(1)
    outputs  Loss(), Grad("fc.weight"), Grad("fc.bias")

and after :func:`~thor_fx.passes.emit_factors.emit_factors` also::

    Factor("fc.weight", "A"), Factor("fc.weight", "G"), Rows("fc.weight"), Terms()

The descriptor of a placeholder, and the tuple of descriptors of the output node, live in
``node.meta[KEY]``; they survive copies of the graph.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

KEY = "thor_fx"

Side = Literal["A", "G"]


@dataclass(frozen=True)
class Split:
    """How a parameter is dealt out along an axis over ranks, each of which has one chunk of it.

    Attributes:
        axis: of the parameter.
        length: of the whole parameter there.
        size: how many ranks.
        group: the name of their process group, in the order of chunks.
    """

    axis: int
    length: int
    size: int
    group: str


@dataclass(frozen=True)
class Param:
    """An input: the trainable tensor called ``name``, or the part of it that this rank has."""

    name: str
    split: Split | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Frozen:
    """An input: the parameter called ``name`` (or a matrix that a model holds), which is not trained."""

    name: str


@dataclass(frozen=True)
class Input:
    """An input that is no parameter: data, a size, a buffer, a captured constant."""

    index: int


@dataclass(frozen=True)
class Tangent:
    """Where backward starts: the gradient of the loss in output ``index``."""

    index: int


@dataclass(frozen=True)
class Loss:
    """The scalar that is differentiated."""


@dataclass(frozen=True)
class Output:
    """Another result of the forward pass."""

    index: int


@dataclass(frozen=True)
class Mutation:
    """The value that input ``index`` has to take when the step is over (a running mean, say)."""

    index: int


@dataclass(frozen=True)
class Grad:
    """``dL/dparam``; ``param`` is a name, or the position of an input that is no parameter."""

    param: str | int


@dataclass(frozen=True)
class Factor:
    """The sum of ``a_r a_r^T`` (side ``"A"``) or ``g_r g_r^T`` (side ``"G"``) over the rows of a layer."""

    layer: str
    side: Side


@dataclass(frozen=True)
class Rows:
    """How many rows the factors of a layer sum over, as a 0-D tensor."""

    layer: str


@dataclass(frozen=True)
class Terms:
    """How many terms the loss averages over, read off the graph, as a 0-D tensor."""


@dataclass(frozen=True)
class Statistic:
    """What a pass of the user's measures: ``name`` of the parameter ``param``."""

    name: str
    param: str


@dataclass(frozen=True)
class Opaque:
    """An output that means something to the caller only."""

    text: str


InputDescriptor = Param | Frozen | Input | Tangent
OutputDescriptor = Loss | Output | Mutation | Grad | Factor | Rows | Terms | Statistic | Opaque


def output_node(graph: fx.Graph) -> fx.Node:
    """The one output node, whose first argument is the flat list of results."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def results(gm: fx.GraphModule) -> list[fx.Node | None]:
    """What a graph returns. ``None`` where it returns nothing."""
    flat: Any = output_node(gm.graph).args[0]
    return list(flat)


def describe(
    gm: fx.GraphModule, inputs: Sequence[InputDescriptor], outputs: Sequence[OutputDescriptor]
) -> None:
    """Attach one descriptor to every placeholder and one to every output of ``gm``."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, descriptor in zip(placeholders, inputs, strict=True):
        node.meta[KEY] = descriptor
    if len(outputs) != len(results(gm)):
        raise ValueError(f"{len(outputs)} descriptors for {len(results(gm))} outputs")
    output_node(gm.graph).meta[KEY] = tuple(outputs)


def input_nodes(gm: fx.GraphModule) -> dict[InputDescriptor, fx.Node]:
    """Every described input, in order; a backward start that was folded to a constant counts too."""
    return {
        node.meta[KEY]: node
        for node in gm.graph.nodes
        if node.op != "output" and isinstance(node.meta.get(KEY), InputDescriptor)
    }


def output_nodes(gm: fx.GraphModule) -> dict[OutputDescriptor, fx.Node | None]:
    """Every output with its descriptor, in order. ``None`` where the graph returns nothing."""
    return dict(zip(output_node(gm.graph).meta[KEY], results(gm), strict=True))


def append(gm: fx.GraphModule, new: Iterable[tuple[OutputDescriptor, fx.Node]]) -> None:
    """Add outputs after the existing ones; a descriptor that is already there is refused."""
    out = output_node(gm.graph)
    descriptors, nodes = list(out.meta[KEY]), results(gm)
    for descriptor, node in new:
        if descriptor in descriptors:
            raise ValueError(f"the graph already returns {descriptor}")
        descriptors.append(descriptor)
        nodes.append(node)
    _set(out, descriptors, nodes)


def select(gm: fx.GraphModule, keep: Callable[[OutputDescriptor], bool]) -> None:
    """Keep the outputs whose descriptor satisfies ``keep``. Dead code is left to the caller."""
    kept = [(d, n) for d, n in output_nodes(gm).items() if keep(d)]
    _set(output_node(gm.graph), [d for d, _ in kept], [n for _, n in kept])


def _set(out: fx.Node, descriptors: list[OutputDescriptor], nodes: list[fx.Node | None]) -> None:
    out.args = (tuple(nodes),)
    out.meta[KEY] = tuple(descriptors)
