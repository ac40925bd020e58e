"""Small parameters of one shape are updated together: one chain of operators, over a stack of them.

Most parameters of a deep model are small: biases, scales and shifts of norms. The few loops of an update that
each of them is take far longer to compile, and on a GPU to launch, than to run. Parameters of which an update
makes the same, operator by operator, are stacked, and so are their gradients and their parts of the state;
``torch.func.vmap`` makes of every operator one over the stack, and the results are written back in one call.
What is stacked is copied: large parameters are left as they are.

A value is *of* a parameter if it is computed of that parameter, its gradient and its state, and of
values that are of none. What is computed of several (are all of them finite?) is of none.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import vmap

from .passes.nodes import CASTS, RESHAPES, arguments, is_pointwise, is_random, shape, source, target
from .passes.splice import in_mode, put, splice, trace
from .stack_ops import stacked, unstack_

aten = torch.ops.aten

LARGEST = 8192
"""Elements of a parameter, at most: of such a one, a loop takes longer to launch than its copies take."""

FEWEST = 8
"""Parameters in a stack, at least."""

Role = tuple[Any, ...]
"""What an input is of its parameter: itself, its gradient, or which part of its state."""

Stacked = tuple[list[fx.Node], fx.Node]
"""Inputs, and the stack of their new values."""

_GATHERS = (aten.stack.default, aten.cat.default)
_VIEWS = (aten.slice.Tensor, *RESHAPES)
_SUMS = (aten.sum, aten.all, aten.any, aten.amax)


@dataclass
class Part:
    """The part of an update that is about one parameter.

    Attributes:
        leaves: its inputs, by role; among them what the rest of the update gives to this part alone.
        nodes: what is computed of them, in order.
        written: the new values, as places in ``nodes``, by the role of the input that they are written to.
    """

    leaves: dict[Role, fx.Node]
    nodes: list[fx.Node] = field(default_factory=list)
    written: dict[Role, int] = field(default_factory=dict)


class Member(NamedTuple):
    """A value that has become an entry of a stack."""

    stack: fx.Node
    entry: int


def stack_alike(
    graph: fx.Graph,
    appended: Sequence[fx.Node],
    leaves: Mapping[str, Mapping[Role, fx.Node]],
    written: Mapping[fx.Node, fx.Node],
) -> tuple[dict[fx.Node, fx.Node], list[Stacked]]:
    """Update small parameters together, in place.

    Args:
        graph: of a step with an update.
        appended: the operations of the update, in order.
        leaves: the inputs of the update that are of one parameter, by its name and by what they are of it.
        written: the new value of every input that changes.

    Returns:
        What of ``written`` is left; and inputs with the stacks of their new values.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    left, stacks = dict(written), list[Stacked]()
    members: dict[fx.Node, Member] = {}
    for alike in _alike(_parts(appended, leaves, written), order, _numbers(appended)):
        values = _over_stacks(alike, order, members)
        for role, place in alike[0].written.items():
            targets = [part.leaves[role] for part in alike]
            stacks.append((targets, values[place]))
            for node in targets:
                del left[node]
    instead = _lead_to_stacks(appended, members, left.values())
    return {node: instead.get(new, new) for node, new in left.items()}, stacks


def write_stack(out: fx.Node, targets: Sequence[fx.Node], stack: fx.Node) -> None:
    """Write the entries of a stack to the inputs that they go to, in front of ``out``."""
    with out.graph.inserting_before(out):
        out.graph.call_function(unstack_, (list(targets), stack)).meta["val"] = None


# --- what is of which parameter ----------------------------------------------------------------------


def _parts(
    appended: Sequence[fx.Node],
    leaves: Mapping[str, Mapping[Role, fx.Node]],
    written: Mapping[fx.Node, fx.Node],
) -> list[Part]:
    """The parts of small parameters, in the order of the parameters."""
    found: dict[str, Part] = {}
    owners: dict[fx.Node, str] = {}
    for name, own in leaves.items():
        if all(map(_is_small, own.values())) and owners.keys().isdisjoint(own.values()):
            found[name] = Part(dict(own))
            owners |= dict.fromkeys(own.values(), name)
    for node in appended:
        names = {owners[source] for source in node.all_input_nodes if source in owners}
        if len(names) == 1 and _can_be_stacked(node):
            (owners[node],) = names
            found[owners[node]].nodes.append(node)
    for part in found.values():
        places = {node: place for place, node in enumerate(part.nodes)}
        given = (source for node in part.nodes for source in node.all_input_nodes if source not in owners)
        alone = [source for source in dict.fromkeys(given) if _is_for(source, places)]
        part.leaves |= {("given", number): source for number, source in enumerate(alone)}
        new = {role: written.get(leaf) for role, leaf in part.leaves.items()}
        part.written = {role: places[node] for role, node in new.items() if node in places}
    return list(found.values())


def _is_for(node: fx.Node, users: Collection[fx.Node]) -> bool:
    """Whether a small tensor is for these users alone."""
    return node.meta["val"].dim() > 0 and _is_small(node) and all(user in users for user in node.users)


def _is_small(node: fx.Node) -> bool:
    value = node.meta["val"]
    return all(isinstance(size, int) for size in value.shape) and value.numel() <= LARGEST


def _can_be_stacked(node: fx.Node) -> bool:
    """Whether a node makes one tensor of tensors, always the same of the same, and ``vmap`` knows how."""
    known = getattr(node.target, "namespace", "") == "aten" or target(node) in CASTS
    in_lists = [one for argument in arguments(node) if isinstance(argument, list | tuple) for one in argument]
    listed = any(isinstance(one, fx.Node) for one in in_lists)
    tensors = all(isinstance(one.meta.get("val"), Tensor) for one in (node, *node.all_input_nodes))
    return known and tensors and not listed and not is_random(node)


def _numbers(appended: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Of every number, the name of the first node that computes it: rates and constants come many times."""
    first: dict[Any, str] = {}
    names: dict[fx.Node, str] = {}
    for node in appended:
        if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == 0 and not is_random(node):
            args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Named(names.get(n, n.name)))
            names[node] = first.setdefault((node.target, repr(args)), node.name)
    return names


def _alike(
    parts: Iterable[Part], order: Mapping[fx.Node, int], numbers: Mapping[fx.Node, str]
) -> list[list[Part]]:
    """The parts that do the same, where there are enough of them."""
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        if part.nodes:
            groups.setdefault(_signature(part, numbers), []).append(part)
    return [group for group in groups.values() if len(group) >= FEWEST and _in_time(group, order)]


def _in_time(alike: Sequence[Part], order: Mapping[fx.Node, int]) -> bool:
    """Whether what all parts read at some place is there before the first of them is at that place."""
    leaves = [set(part.leaves.values()) for part in alike]
    for nodes in zip(*(part.nodes for part in alike), strict=True):
        first = min(order[node] for node in nodes)
        for node, own in zip(nodes, leaves, strict=True):
            if any(order[leaf] > first for leaf in own.intersection(node.all_input_nodes)):
                return False
    return True


def _signature(part: Part, numbers: Mapping[fx.Node, str]) -> Any:
    """Equal for parts that do the same with inputs of the same shapes."""
    known: dict[fx.Node, Any] = {**numbers}
    known |= {leaf: role for role, leaf in part.leaves.items()}
    known |= {node: place for place, node in enumerate(part.nodes)}

    def named(argument: Any) -> Any:
        return repr(fx.map_arg(argument, lambda node: _Named(known.get(node, node.name))))

    values = {role: leaf.meta["val"] for role, leaf in part.leaves.items()}
    inputs = tuple((role, value.shape, value.dtype, value.device) for role, value in values.items())
    steps = tuple((node.target, named(node.args), named(node.kwargs)) for node in part.nodes)
    return inputs, steps, tuple(part.written.items())


class _Named(NamedTuple):
    """In place of a node: its place in the part, its role, or if it is of none, a name."""

    name: Any


# --- one chain for all -------------------------------------------------------------------------------


def _over_stacks(
    alike: Sequence[Part], order: Mapping[fx.Node, int], members: dict[fx.Node, Member]
) -> list[fx.Node]:
    """What stands for the nodes of alike parts, place by place; and in ``members``, for every single node."""
    known: dict[fx.Node, fx.Node] = {}  # the stack that stands for an input or a node of any of the parts
    values = []
    for nodes in zip(*(part.nodes for part in alike), strict=True):
        first = min(nodes, key=order.__getitem__)
        for role in _roles(nodes[0], alike[0]):
            leaves = [part.leaves[role] for part in alike]
            if leaves[0] not in known:
                known |= dict.fromkeys(leaves, _stack_of(leaves, first.prev))
        values.append(_over_stack(first.prev, first, known))
        known |= dict.fromkeys(nodes, values[-1])
        members |= {node: Member(values[-1], entry) for entry, node in enumerate(nodes)}
    return values


def _roles(node: fx.Node, part: Part) -> list[Role]:
    """What a node reads of the inputs of its part."""
    return [role for role, leaf in part.leaves.items() if leaf in node.all_input_nodes]


def _stack_of(nodes: Sequence[fx.Node], anchor: fx.Node) -> fx.Node:
    whole = _cut_into(nodes)
    if whole is not None:
        stack = (len(nodes), *shape(nodes[0]))
        return _one(splice(anchor, lambda value: value.reshape(stack), whole))
    with anchor.graph.inserting_after(anchor):
        made = anchor.graph.call_function(stacked, (list(nodes),))
    values = [node.meta["val"] for node in nodes]
    with (mode := values[0].fake_mode):
        made.meta["val"] = torch.stack([in_mode(mode, value) for value in values])
    return made


def _cut_into(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """What these nodes are the entries of, all of them and in order; None: nothing."""
    cuts = [source(node) if target(node) in RESHAPES else node for node in nodes]
    if any(target(cut) is not aten.slice.Tensor for cut in cuts):
        return None
    whole = source(cuts[0])
    entries = [(whole, 0, place, place + 1) for place in range(shape(whole)[0])]
    return whole if [arguments(cut) for cut in cuts] == entries else None


def _one(made: Any) -> fx.Node:
    assert isinstance(made, fx.Node)
    return made


def _over_stack(anchor: fx.Node, node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Behind ``anchor``: what ``node`` does, for every entry of the stacks in place of its inputs."""
    inputs = node.all_input_nodes
    operands = [known.get(source, source) for source in inputs]

    def one(*values: Tensor) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        return target(node)(*args, **kwargs)

    over = (
        one if _is_elementwise(node, known) else vmap(one, tuple(0 if i in known else None for i in inputs))
    )
    return _one(put(anchor, trace(over, *operands), *operands))


def _is_elementwise(node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether an operator is the same for stacks: its inputs are stacks of one shape, and numbers.

    Entries that are numbers are left to ``vmap``: beside other numbers they have a say in the dtype.
    """
    entries = {shape(i) for i in node.all_input_nodes if i in known}
    others = [shape(i) for i in node.all_input_nodes if i not in known]
    return _pointwise(node) and len(entries) == 1 and not any(others) and (not others or all(entries))


def _pointwise(node: fx.Node) -> bool:
    return is_pointwise(node) or target(node) in CASTS


# --- the way back ------------------------------------------------------------------------------------


def _lead_to_stacks(
    appended: Sequence[fx.Node], members: Mapping[fx.Node, Member], returned: Iterable[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Let the rest of the graph read the stacks, and drop what they stand for.

    Returns:
        What stands for those of ``returned`` that are dropped.
    """
    needed, instead = frozenset(returned), {}
    for node in appended:
        if target(node) in _GATHERS and node not in needed:
            _gather_stacks(node, members, needed)
    for node in appended:
        if node in members and (node in needed or any(user not in members for user in node.users)):
            stack, entry = members[node]
            instead[node] = _one(splice(stack, partial(torch.select, dim=0, index=entry), stack))
            node.replace_all_uses_with(instead[node], lambda user: user not in members)
    for node in reversed(appended):
        unread = not node.users and node not in needed and target(node) in _VIEWS
        if node in members or unread:
            node.graph.erase_node(node)
    return instead


def _in_any_order(gather: fx.Node, needed: frozenset[fx.Node]) -> bool:
    """Whether a list of numbers is only asked for what does not depend on its order.

    What is computed of it entry by entry is such a list, too.
    """
    lists = dict.fromkeys([gather])
    for one in (todo := [gather]):
        users = [user for user in one.users if getattr(user.target, "overloadpacket", None) not in _SUMS]
        todo += [user for user in users if user not in lists]
        lists |= dict.fromkeys(users)
    computed = [node for node in lists if node is not gather]
    if not all(map(_pointwise, computed)) or not needed.isdisjoint(lists):
        return False
    others = [i for node in computed for i in node.all_input_nodes if i not in lists]
    return all(other.meta["val"].dim() == 0 for other in others)


def _gather_stacks(gather: fx.Node, members: Mapping[fx.Node, Member], needed: frozenset[fx.Node]) -> None:
    """Let a list of values be, or begin with, the stacks that are a part of it."""
    entries: list[fx.Node] = list(arguments(gather)[0])
    found = Counter(members[entry].stack for entry in dict.fromkeys(entries) if entry in members)
    whole = [stack for stack, count in found.items() if count == shape(stack)[0]]
    rest = [entry for entry in entries if entry not in members or members[entry].stack not in whole]
    if not whole or len(set(entries)) < len(entries) or arguments(gather)[1:] not in {(), (0,)}:
        return
    in_order = [members[entry].entry for entry in entries if entry in members] == list(range(len(entries)))
    result = shape(gather)

    def joined(*values: Tensor) -> Tensor:
        if in_order:
            return values[0].reshape(result)
        lists = [stack.reshape(-1) for stack in values[: len(whole)]]
        others = values[len(whole) :]
        return torch.cat([*lists, target(gather)(list(others))] if others else lists)

    if in_order or (result == (len(entries),) and _in_any_order(gather, needed)):
        gather.replace_all_uses_with(splice(gather.prev, joined, *whole, *rest))
        gather.graph.erase_node(gather)
