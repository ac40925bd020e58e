"""Which ``nn.Module`` a node comes from."""

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile

from torch import fx

STACKS = ("nn_module_stack", "fwd_nn_module_stack")
"""Where a node says it: for a node of backward, the module whose gradient it computes."""

_GETATTR = re.compile(r"getattr\(((?:[^()]|\([^()]*\))*), '([^']+)'\)")
_INDEX = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")


def modules(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The path of its module, by node, as ``named_modules`` spells it: ``""`` for the model itself.

    Nodes that no module computes are left out.
    """
    stacks = {node: found for node in gm.graph.nodes if (found := stack_of(node))}
    root = common(stack[0] for stack in stacks.values())
    return {node: ".".join(stack[-1][len(root) :]) for node, stack in stacks.items()}


def stack_of(node: fx.Node) -> list[tuple[str, ...]]:
    """The paths of the modules that a node lies in, outermost first."""
    stack: Mapping[str, tuple[str, type]] = next((node.meta[key] for key in STACKS if node.meta.get(key)), {})
    return [parts(path) for path, _ in stack.values()]


def parts(path: str) -> tuple[str, ...]:
    """The names in an expression for a module.

    Example:
        >>> parts("getattr(L['model'].body.layers, '0').self_attn")
        ('model', 'body', 'layers', '0', 'self_attn')
        >>> parts("L['fn'].__closure__[1].cell_contents._modules['head']")
        ('fn', 'head')
    """
    while _GETATTR.search(path):
        path = _GETATTR.sub(r"\1.\2", path)
    path = path.removeprefix("L").replace(".__closure__[", "[").replace(".cell_contents", "")
    path = re.sub(r"^(\['\w+'\])\[\d+\]", r"\1", path).replace("._modules[", "[")
    path = _INDEX.sub(lambda match: "." + next(filter(None, match.groups()), ""), path)
    return tuple(name for name in path.split(".") if name)


def common(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """What all paths start with; for one path, all of it.

    Example:
        >>> common([("a", "b", "c"), ("a", "b"), ("a", "bc")])
        ('a',)
    """
    names = zip(*set(paths), strict=False)
    return tuple(same[0] for same in takewhile(lambda at_depth: len(set(at_depth)) == 1, names))
