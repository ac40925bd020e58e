"""Graphs of every stage, written as files that run on their own."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import fx

import models
import thor_fx
from graphs import step_graph, tiny
from thor_fx.passes import Loss, Param, accumulate, canonicalize, emit_factors, outputs, run
from thor_fx.runnable import NotRunnable, source_of, write_stage
from thor_fx.update import append_update


def run_file(path: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, path.name], cwd=path.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run_here(source: str, arguments=None) -> dict[str, tuple[int, ...]]:
    """What the file prints, without the price of a process."""
    space = {"__name__": "stage"}
    exec(compile(source, "stage.py", "exec"), space)
    arguments = [make() for make in space["ARGUMENTS"]] if arguments is None else arguments
    return dict(zip(space["RESULTS"], space["Graph"]()(*arguments), strict=True))


def expected(gm: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    return {str(d): tuple(node.meta["val"].shape) for d, node in outputs.output_nodes(gm).items()}


def test_a_file_runs_on_its_own_and_names_the_results(tmp_path):
    gm = run(tiny(), [canonicalize, emit_factors])
    path = write_stage(gm, tmp_path / "with_factors.py")
    lines = run_file(path)
    assert lines == [f"{name} {shape}" for name, shape in expected(gm).items()]
    assert lines[0] == "Loss() ()"
    assert path.read_text().startswith('"""A step graph of thor_fx that runs on its own: with_factors."""')


@pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)
def test_files_of_all_models_compute_the_shapes_of_the_graph(build):
    gm = run(step_graph(build), [canonicalize, emit_factors])
    with torch.no_grad():
        found = run_here(source_of(gm))
    assert {name: tuple(value.shape) for name, value in found.items()} == expected(gm)


def test_a_file_computes_what_the_graph_does():
    case = models.linear()
    gm = run(step_graph(models.linear), [canonicalize, emit_factors])
    arguments = [*(p.detach() for p in case.params.values()), *case.batch]
    with torch.no_grad():
        found = run_here(source_of(gm), arguments)
        for name, value in zip(expected(gm), gm(*arguments), strict=True):
            assert torch.equal(found[name], value), name


def test_a_whole_step_with_its_update_can_be_written():
    case = models.linear()
    tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9, frequency=1)
    gm = run(step_graph(models.linear), [canonicalize, partial(emit_factors, rules=tx.rules)])
    found = thor_fx.explain(case.loss_fn, case.params, *case.batch).coverage
    append_update(gm, tx, found, [name for name in case.params if name in found.trained])
    accumulate(gm)
    with torch.no_grad():
        assert run_here(source_of(gm))["Loss()"].dim() == 0


def branching() -> fx.GraphModule:
    def loss_fn(params, x):
        return torch.cond(x.sum() > 0, lambda y: y.tanh(), lambda y: y * 2, (x @ params["w"],)).mean()

    return thor_fx.trace_step(loss_fn, {"w": torch.ones(3, 2)}, torch.ones(5, 3))


def test_graphs_inside_of_graphs_are_classes_of_their_own():
    source = source_of(branching())
    assert source.count("(torch.nn.Module):") >= 3
    with torch.no_grad():
        assert run_here(source)["Loss()"].dim() == 0


def test_small_constants_are_written_out_and_large_ones_are_random():
    small, large = torch.tensor([[2.0], [3.0]]), torch.ones(100, 2)

    def loss_fn(params, x):
        return (x @ params["w"]).mean() * small.sum() + (large @ params["w"]).mean()

    source = source_of(thor_fx.trace_step(loss_fn, {"w": torch.ones(2, 1)}, torch.ones(5, 2)))
    assert "torch.tensor([[2.0], [3.0]], dtype=torch.float32, device='cpu')" in source
    assert "tensor([100, 2], [2, 1], torch.float32, 'cpu')" in source
    assert run_here(source)["Loss()"].dim() == 0


def holding(value) -> fx.GraphModule:
    graph = fx.Graph()
    graph.placeholder("w").meta["val"] = torch.ones(2)
    graph.output((graph.get_attr("held"),))
    root = torch.nn.Module()
    root.held = value
    gm = fx.GraphModule(root, graph)
    outputs.describe(gm, [Param("w")], [Loss()])
    return gm


def test_what_cannot_be_written_is_named():
    with pytest.raises(NotRunnable, match="constant 'held' is a dict: only tensors and graphs"):
        source_of(holding({}))
    gm = tiny()
    gm.graph.find_nodes(op="placeholder")[0].meta.pop("val")
    with pytest.raises(NotRunnable, match="has no value"):
        source_of(gm)


@torch.library.custom_op("foreign::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_operators_of_other_libraries_are_named():
    gm = tiny()
    out = outputs.output_node(gm.graph)
    with gm.graph.inserting_before(out):
        node = gm.graph.call_function(torch.ops.foreign.twice.default, (out.args[0][0],))
    out.args = ((node, *out.args[0][1:]),)
    with pytest.raises(NotRunnable, match=r"calls foreign\.twice\.default, an operator of another library"):
        source_of(gm)
