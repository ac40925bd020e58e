"""Adapter to AOTAutograd's descriptors: a joint graph says what its inputs and outputs are in our words.

The only module that knows what the descriptors of AOTAutograd mean. Written for torch 2.11, 2.13 and
2.15. A joint graph has tokens and tangents that a step graph has not; they are cleared away here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot

from .passes import outputs
from .passes.outputs import (
    Grad,
    Input,
    InputDescriptor,
    Loss,
    Mutation,
    Output,
    OutputDescriptor,
    Param,
    Tangent,
)


def describe_joint(joint: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> None:
    """Translate AOTAutograd's descriptors of a joint graph into ours.

    Args:
        joint: as AOTAutograd hands it to compilers.
        inputs: what the inputs of the forward graph are, in order.
    """
    placeholders = joint.graph.find_nodes(op="placeholder")
    results = outputs.output_node(joint.graph)
    described_inputs = [_describe_joint_input(i, node, inputs) for i, node in enumerate(placeholders)]
    described_outputs = [
        _describe_output(position, desc, inputs) for position, desc in enumerate(results.meta["desc"])
    ]
    outputs.describe(joint, described_inputs, described_outputs)
    for node in placeholders:
        if _is_zero_tangent(node):
            _leave_out_of_sums(node)


# NOTE: [Parameters that forward changes] ``nn.Embedding(max_norm=...)`` shrinks rows of its weight in
# forward, without gradient. AOTAutograd makes the changed weight an output with a tangent of its own,
# added to the gradient. Nobody can differentiate through what became of a leaf: that tangent is zero.
# The update then starts from the changed weight, as an optimizer does that runs after forward.


def _is_zero_tangent(node: fx.Node) -> bool:
    match node.meta["desc"]:
        case aot.TangentAOTInput(output=aot.InputMutationAOTOutput()):
            return True
    return False


def _leave_out_of_sums(zero: fx.Node) -> None:
    for total in list(zero.users):
        if total.target is torch.ops.aten.add.Tensor and not total.kwargs:
            (other,) = [node for node in total.all_input_nodes if node is not zero] or [zero]
            if other.meta["val"].shape == total.meta["val"].shape:
                total.replace_all_uses_with(other)
                total.graph.erase_node(total)


# NOTE: [Tensors inside of tensors] Of a DTensor the graph takes and returns the part of this rank.


def _inside(desc: Any) -> Any:
    """What an input or output is the inner tensor of, or is itself."""
    match desc:
        case aot.SubclassGetAttrAOTInput(base, "_local_tensor"):
            return base
        case aot.SubclassGetAttrAOTOutput(base, "_local_tensor"):
            return base
    return desc


def _describe_joint_input(position: int, node: fx.Node, inputs: Sequence[InputDescriptor]) -> InputDescriptor:
    match _inside(node.meta["desc"]):
        case aot.PlainAOTInput(idx=index):
            return inputs[index]
        case aot.TangentAOTInput(output=aot.PlainAOTOutput(idx=index)):
            return Tangent(index)
    return Input(-1 - position)  # a random seed, a tangent of an aliased output, ...


def _describe_output(position: int, desc: Any, inputs: Sequence[InputDescriptor]) -> OutputDescriptor:
    match _inside(desc):
        case aot.PlainAOTOutput(idx=index):
            return Output(index)
        case aot.InputMutationAOTOutput(mutated_input=aot.PlainAOTInput(idx=index)):
            return Mutation(index)
        case aot.GradAOTOutput(grad_of=aot.PlainAOTInput(idx=index)):
            source = inputs[index]
            return Grad(source.name if isinstance(source, Param) else index)
    return outputs.Opaque(f"output {position}")


def step_graph(joint: fx.GraphModule) -> fx.GraphModule:
    """Start the backward of a joint graph from the constant 1 instead of a tangent."""
    _unlift_tokens(joint)
    tangents = {d.index: n for d, n in outputs.input_nodes(joint).items() if isinstance(d, Tangent)}
    trained = [d for d in outputs.output_nodes(joint) if isinstance(d, Grad) and isinstance(d.param, str)]
    if not tangents or not trained:
        raise ValueError(
            "the loss does not depend on any of params: call the model with them, not with its own"
        )
    ((index, tangent),) = tangents.items()  # only the loss is differentiable
    described = [
        (Loss() if descriptor == Output(index) else descriptor, node)
        for descriptor, node in outputs.output_nodes(joint).items()
        if node is not None  # no gradient
    ]
    results = outputs.output_node(joint.graph)
    results.args = (tuple(node for _, node in described),)
    results.meta[outputs.KEY] = tuple(descriptor for descriptor, _ in described)
    value = outputs.output_nodes(joint)[Loss()].meta["val"]  # type: ignore[union-attr]
    if value.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar loss, got shape {tuple(value.shape)}: take its mean")
    for node in joint.graph.find_nodes(op="placeholder"):
        if _is_zero_tangent(node):
            _fold(node, 0.0)
    _fold(tangent, 1.0).meta[outputs.KEY] = Tangent(0)
    joint.recompile()
    return joint


def _fold(tangent: fx.Node, number: float) -> fx.Node:
    """Replace an input by a constant."""
    value = tangent.meta["val"]
    graph = tangent.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        constant = graph.call_function(
            torch.ops.aten.full.default,
            (list(value.shape), number),
            {"dtype": value.dtype, "device": value.device, "pin_memory": False},
        )
    constant.meta = {"val": value}
    tangent.replace_all_uses_with(constant)
    graph.erase_node(tangent)
    return constant


def _unlift_tokens(joint: fx.GraphModule) -> None:
    """Make the tokens that order effects (checks of ``linalg``, prints) inside, not arguments and results."""
    graph, out = joint.graph, outputs.output_node(joint.graph)
    placeholders = graph.find_nodes(op="placeholder")
    for node in placeholders:
        if isinstance(node.meta["desc"], TOKENS):
            with graph.inserting_after(placeholders[-1]):
                token = graph.call_function(torch.ops.prims._make_token.default)
            token.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(token)
            graph.erase_node(node)
    described = zip(out.meta["desc"], out.meta[outputs.KEY], outputs.results(joint), strict=True)
    kept = [(key, node) for desc, key, node in described if not isinstance(desc, TOKENS)]
    out.args = (tuple(node for _, node in kept),)
    out.meta[outputs.KEY] = tuple(key for key, _ in kept)


TOKENS = (
    aot.ForwardTokenAOTInput,
    aot.BackwardTokenAOTInput,
    aot.ForwardTokenAOTOutput,
    aot.BackwardTokenAOTOutput,
)
