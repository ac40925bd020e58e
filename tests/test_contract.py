"""What holds of every pass, on every case: passes are found, not listed."""

import importlib
import inspect
import pkgutil
import typing

import pytest
import torch
from torch import fx

import models
import thor_fx.passes
from graphs import step_graph, values
from thor_fx.passes import Factor, Rows, Terms, check, emit_factors, outputs, run
from thor_fx.passes.pipeline import PassError


def is_pass(function) -> bool:
    """Whether a function takes a graph, and options by keyword only, and returns nothing."""
    if not inspect.isfunction(function) or function.__name__.startswith("_"):
        return False
    first, *options = inspect.signature(function).parameters.values() or [None]
    hints = typing.get_type_hints(function)
    return (
        first is not None
        and hints.get(first.name) is fx.GraphModule
        and hints.get("return") is type(None)
        and all(option.kind is option.KEYWORD_ONLY for option in options)
    )


EXPORTED = {name: getattr(thor_fx.passes, name) for name in thor_fx.passes.__all__}
PASSES = {name: function for name, function in EXPORTED.items() if is_pass(function)}
STATISTICS = (Factor, Rows, Terms)

# What a pass may take away, and what running it on its own result does.
MAY_DROP = {"drop_factors": STATISTICS}
TWICE = {
    "accumulate": "nothing",
    "canonicalize": "nothing",
    "check": "nothing",
    "drop_factors": "nothing",
    "emit_factors": "refused",
    "mark": "nothing",
}

EVERY_PASS = pytest.mark.parametrize("name", sorted(PASSES))
BUILDS = pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)


def graphs(build, name) -> list[fx.GraphModule]:
    """The graphs that a pass has to cope with: as traced and, unless it refuses them, with factors."""
    kinds = [[]] if TWICE[name] == "refused" else [[], [emit_factors]]
    return [run(step_graph(build), passes) for passes in kinds]


def test_the_passes_are_found():
    assert {"canonicalize", "emit_factors", "drop_factors"} <= set(PASSES)


def test_every_pass_of_the_package_is_exported():
    found = set()
    for info in pkgutil.iter_modules(thor_fx.passes.__path__):
        if info.name == "symmetric_kernel":
            continue  # a kernel for symmetric.py; it cannot be imported without Triton
        module = importlib.import_module(f"thor_fx.passes.{info.name}")
        own = (f for f in vars(module).values() if getattr(f, "__module__", None) == module.__name__)
        found |= {f.__name__ for f in own if is_pass(f)}
    assert found == set(PASSES)


@EVERY_PASS
@BUILDS
def test_the_contract_of_a_pass(name, build):
    case = build()
    for before in graphs(build, name):
        text, old = str(before.graph), values(before, case)
        after = run(before, [PASSES[name]])
        check(after)

        check(before)
        assert str(before.graph) == text, "the graph that came in is untouched"
        known = list(outputs.output_nodes(before))
        assert list(outputs.input_nodes(after)) == list(outputs.input_nodes(before))

        new = values(after, case)
        gone = [descriptor for descriptor in known if descriptor not in new]
        assert all(isinstance(descriptor, MAY_DROP.get(name, ())) for descriptor in gone)
        assert [d for d in new if d in old] == [d for d in known if d not in gone], "the same order"
        assert all(torch.equal(new[d], old[d]) for d in new if d in old), "bit for bit"

        torch.manual_seed(0)
        compiled = after(*(p.detach() for p in case.params.values()), *case.batch)
        assert all(map(torch.equal, compiled, new.values())), "its code is that of its graph"

        if TWICE[name] == "refused" and case.layers:
            with pytest.raises(PassError, match=f"pass '{name}' failed .* already returns"):
                run(after, [PASSES[name]])
        else:
            assert str(run(after, [PASSES[name]]).graph) == str(after.graph)
