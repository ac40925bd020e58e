"""Find every use of a weight from its gradient.

NOTE: [Why gradients, not forwards] The gradient of a weight that is used linearly is one
contraction, ``dW = sum_r g_r a_r^T``, and its two operands are the Kronecker samples. Forward
spellings are many (``F.linear``, ``x @ W``, ``einsum``, a module, a function); the gradient ends in
``mm`` or ``bmm`` for all of them. So the walk starts at the gradient output and goes back through
views, casts and sums. It either reaches contractions, one site each, or says where it stopped.
"""

import math
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .biases import Bias, find_biases
from .contractions import WEIGHTS
from .gathered import whole
from .heads import Head
from .members import by_member
from .nodes import CASTS, PERMUTES, RESHAPES, arguments, downstream, shape, target, upstream, use_of
from .norms import is_norm
from .outputs import KEY, Frozen, Grad, Input, Loss, Output, Param, Tangent, input_nodes, output_nodes
from .reindex import Path, Permute, disjoint, simplify, take
from .walk import SUMS, SWAP, SWAP_GROUPED, NoSite, Site, Walk

aten = torch.ops.aten

UNUSED = "the loss does not depend on it"
VECTORS = "a vector for every matrix of a layer"
"""How the reason begins for the biases of an ensemble, which have two axes and are no weight."""


@dataclass(frozen=True)
class SiteReport:
    """Where every parameter of a step graph went.

    Attributes:
        sites: the uses of weights.
        norms: scales and shifts of normalisation layers.
        reasons: for every parameter with neither, why.
        nearest: the site nearest the loss; its rows are the terms that the loss averages over.
        biases: the bias that is added to what a layer makes, by layer.
        lines: the line of Python that uses a parameter, by parameter, as far as it is known.
        heads: the outputs whose likelihood the cotangents come from; () for those of the loss itself.
    """

    sites: tuple[Site, ...]
    norms: tuple[str, ...]
    reasons: dict[str, str]
    nearest: Site | None
    biases: Mapping[str, Bias] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[Head, ...] = ()

    @property
    def layers(self) -> dict[str, tuple[Site, ...]]:
        """Sites by layer: a weight that is used several times has several."""
        found: dict[str, tuple[Site, ...]] = {}
        for site in self.sites:
            found[site.layer] = (*found.get(site.layer, ()), site)
        return found


def find_sites(gm: fx.GraphModule) -> SiteReport:
    """Walk back from the gradient of every parameter.

    Args:
        gm: a step graph, or the joint graph of AOTAutograd with descriptors.

    Returns:
        Every parameter, in exactly one of the report's three places.
    """
    walk = Walk("", downstream(seeds(gm)), downstream(_data(gm)), WEIGHTS)
    outputs = output_nodes(gm)
    sites: list[Site] = []
    norms: list[str] = []
    reasons: dict[str, str] = {}
    gradients: dict[str, fx.Node] = {}
    lines: dict[str, str] = {}
    for descriptor, node in [(d, n) for d, n in input_nodes(gm).items() if isinstance(d, Param)]:
        name = descriptor.name
        gradient = outputs.get(Grad(name))
        if gradient is None:
            reasons[name] = UNUSED
            continue
        lines[name] = use_of(gradient)
        if is_norm(gradient, walk.backward):
            norms.append(name)
        else:
            try:
                sites += whole(_sites_of(node, gradient, replace(walk, param=name)), descriptor.split)
            except NoSite as reason:
                reasons[name] = f"a vector: {reason}" if len(shape(gradient)) < 2 else str(reason)
                gradients[name] = gradient
    report = SiteReport(tuple(sites), tuple(norms), reasons, nearest(gm, sites))
    biases = find_biases(report.layers, gradients, walk)
    for name in {bias.param for bias in biases.values() if len(shape(gradients[bias.param])) > 1}:
        reasons[name] = f"{VECTORS}: {reasons[name]}"
    return replace(report, biases=biases, lines=lines)


def _data(gm: fx.GraphModule) -> list[fx.Node]:
    """The inputs, and the captured tensors, that are no parameters."""
    captured = [n for n in gm.graph.find_nodes(op="get_attr") if not isinstance(n.meta.get(KEY), Frozen)]
    return [*captured, *(node for d, node in input_nodes(gm).items() if isinstance(d, Input))]


def seeds(gm: fx.GraphModule) -> list[fx.Node]:
    """Where backward starts: the tangents or, in a graph without, the ones that the loss does not need."""
    inputs, outputs = input_nodes(gm), output_nodes(gm)
    tangents = [node for descriptor, node in inputs.items() if isinstance(descriptor, Tangent)]
    loss = outputs.get(Loss())
    if tangents or loss is None:
        return tangents
    results = [n for d, n in outputs.items() if isinstance(d, Loss | Output) and n is not None]
    forward = upstream(results)
    return [n for n in gm.graph.nodes if _is_one(n) and shape(n) == shape(loss) and n not in forward]


def _is_one(node: fx.Node) -> bool:
    """Whether a node is a tensor of ones, whatever its shape was taken from."""
    if target(node) in {aten.full.default, aten.full_like.default}:
        return bool(arguments(node)[1] == 1)
    return target(node) in {aten.ones.default, aten.ones_like.default, aten.new_ones.default}


def _sites_of(parameter: fx.Node, gradient: fx.Node, walk: Walk) -> list[Site]:
    sites: list[Site] = list(walk.visit(gradient, ()))
    if not sites:
        raise NoSite("its gradient is zero")
    if _is_added(parameter, walk):
        raise NoSite("it is added to activations, no factor of a product")
    sizes = tuple(int(size) for size in shape(gradient))
    sites = [by_member(site, sizes) for site in sites]
    sites = _one_orientation([replace(site, path=simplify(site.path, sizes)) for site in sites], sizes)
    if not disjoint(list({site.path for site in sites}), sizes):
        raise NoSite("its uses are of parts that overlap, so no part has one factor pair")
    return sites


# NOTE: [What is added is no weight] Without a batch axis the gradient of a table that is added to activations
# is the cotangent itself, and that may end in a product too: of the next layer, or of attention scores.


def _is_added(node: fx.Node, walk: Walk) -> bool:
    """Whether what is made of a parameter by views and casts alone is added to data."""
    for user in node.users:
        if user in walk.backward:
            continue
        if target(user) in SUMS and any(other in walk.data for other in user.all_input_nodes[:2]):
            return True
        if (target(user) in CASTS or target(user) in RESHAPES | PERMUTES) and _is_added(user, walk):
            return True
    return False


def _one_orientation(sites: list[Site], sizes: tuple[int, ...]) -> list[Site]:
    """Where a matrix is used both ways, let all uses speak of it as it is stored; mark the others."""
    paths = {site.path for site in sites}
    result = []
    for site in sites:
        other = simplify((*site.path, _swap(site.path, sizes)), sizes)
        flipped = other in paths and len(other) < len(site.path)
        result.append(replace(site, path=other, flipped=True) if flipped else site)
    return result


def _swap(path: Path, sizes: tuple[int, ...]) -> Permute:
    return SWAP_GROUPED if take(path, torch.empty(sizes, device="meta")).dim() == 3 else SWAP


def nearest(gm: fx.GraphModule, sites: list[Site]) -> Site | None:
    """The site whose cotangent is the fewest operations away from where backward of the loss starts.

    What only moves numbers is no operation: a head that turns its input is no farther than one that does
    not. A model that returns its loss may return more (the keys that it caches): the loss is the scalar.
    """
    starts = seeds(gm)
    for frontier in ([node for node in starts if shape(node) == ()], starts):
        computed, all_ = _distances(frontier, CASTS | RESHAPES | PERMUTES), _distances(frontier, set())
        reached = [site for site in sites if site.cotangent.node in computed]
        if reached:
            return min(reached, key=lambda s: (computed[s.cotangent.node], all_[s.cotangent.node]))
    return None


def _distances(frontier: list[fx.Node], free: Set[Any]) -> dict[fx.Node, int]:
    """How many operations, ``free`` ones left out, it takes from ``frontier`` to all that depends on it."""
    distance = dict.fromkeys(frontier, 0)
    todo = deque(frontier)
    while todo:
        node = todo.popleft()
        for user in node.users:
            counts = target(user) not in free
            if distance[node] + counts < distance.get(user, math.inf):
                distance[user] = distance[node] + counts
                todo.append(user) if counts else todo.appendleft(user)
    return distance
