"""The dense generalised Gauss-Newton matrix of a traced loss, by autograd: slow, independent of the passes.

``J^T H J`` with ``J = dz/dtheta`` and ``H = d^2 L/dz^2``, both differentiated from the forward nodes of a
step graph. Only *where* the output ``z`` is comes from the analysis of the graph. Parts of the loss that do
not depend on ``z`` are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.functional import hessian
from torch.utils import _pytree as pytree

from .parameters import trainable
from .passes import outputs
from .passes.nodes import downstream, upstream
from .passes.outputs import Loss

Values = dict[fx.Node, Any]


def curvature_rows(
    gm: fx.GraphModule, heads: Sequence[fx.Node], params: Mapping[str, Tensor], *batch: Any
) -> list[dict[str, Tensor]]:
    """Vectors whose outer products add up to the GGN of the loss.

    Args:
        gm: a step graph, as :func:`~thor_fx.trace.trace_step` makes it.
        heads: the nodes of the outputs ``z``.
        params: floating-point tensors by name.
        *batch: as it was traced.

    Returns:
        One vector for every element of the outputs, each by parameter and of its shape.
    """
    leaves = {n: p.detach().requires_grad_() if trainable(p) else p.detach() for n, p in params.items()}
    data = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), [*leaves.values(), *data], strict=True))
    loss = outputs.output_nodes(gm)[Loss()]
    assert loss is not None, "a step graph returns its loss"
    torch.manual_seed(0)
    with torch.enable_grad():
        known = _evaluate(gm, loss, inputs)
        z = torch.cat([known[head].flatten() for head in heads])
        h = hessian(_loss_of(gm, loss, heads, known), z.detach())
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        eigenvalues, vectors = torch.linalg.eigh((h + h.mT) / 2)
        rows = (vectors * eigenvalues.clamp(min=0).sqrt()).mT  # (numel, numel)
        return [_pulled_back(z, row, wanted) for row in rows]


def _loss_of(gm: fx.GraphModule, loss: fx.Node, heads: Sequence[fx.Node], known: Values) -> Any:
    """The loss as a function of all outputs in one vector."""
    below = downstream(heads)
    fixed = {n: v.detach() if isinstance(v, Tensor) else v for n, v in known.items() if n not in below}
    sizes = [known[head].numel() for head in heads]

    def function(z: Tensor) -> Tensor:
        parts = zip(heads, z.split(sizes), strict=True)
        given = {head: part.reshape(known[head].shape) for head, part in parts}
        value: Tensor = _evaluate(gm, loss, {**fixed, **given})[loss]
        return value

    return function


def _evaluate(gm: fx.GraphModule, wanted: fx.Node, given: Values) -> Values:
    """The values of all that ``wanted`` depends on, with those that are given."""
    known, needed = dict(given), upstream([wanted])
    for node in gm.graph.nodes:
        if node in known or node not in needed:
            continue
        if node.op == "get_attr":
            known[node] = getattr(gm, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


def _pulled_back(z: Tensor, direction: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(z, list(leaves.values()), direction, retain_graph=True, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}
