"""What passes did to a graph, as values, in a log, and for nothing where nobody listens."""

import logging
from functools import partial

import pytest
import torch

from graphs import negate_loss, tiny
from thor_fx.passes import PassError, drop_factors, emit_factors, observe, pipeline, run, stages
from thor_fx.passes.stages import LOG, Stage, operator_of


def swap_first_computations(gm):
    first, *_, last = [node for node in gm.graph.nodes if node.op == "call_function"][:2]
    assert first not in last.all_input_nodes
    last.append(first)


def nothing(gm):
    pass


def operators(gm):
    return [operator_of(node) for node in gm.graph.nodes]


def test_every_pass_has_a_stage_with_what_it_added_and_removed():
    result, (first, second, third) = observe(tiny(), [emit_factors, negate_loss, drop_factors])
    assert [s.name for s in (first, second, third)] == ["emit_factors", "negate_loss", "drop_factors"]
    assert first.added["aten.mm.default"] == 2
    assert (dict(first.removed), first.moved) == ({}, 0)
    assert (dict(second.added), dict(second.removed)) == ({"aten.neg.default": 1}, {})
    assert (dict(third.added), dict(third.removed)) == ({}, dict(first.added))
    assert operators(result) == operators(run(tiny(), [negate_loss]))
    assert first.after == second.before
    assert all(s.seconds > 0 for s in (first, second, third))


def test_the_code_is_python_without_what_frees_memory():
    _, (stage,) = observe(tiny(), [negate_loss])
    assert "torch.ops.aten.neg.default(" in stage.after
    assert "torch.ops.aten.neg.default(" not in stage.before
    assert "= None" not in stage.after
    compile(stage.after, "stage", "exec")


def test_a_node_that_changes_places_has_moved():
    gm = tiny()
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op == "call_function")):
        gm.graph.call_function(torch.ops.aten.neg.default, (gm.graph.find_nodes(op="placeholder")[0],))
    for node in gm.graph.nodes:
        node.meta.setdefault("val", torch.zeros(4, 3))
    _, (stage,) = observe(gm, [swap_first_computations])
    assert (dict(stage.added), dict(stage.removed), stage.moved) == ({}, {}, 1)


def test_a_stage_prints_the_difference_of_operators():
    stage = Stage("a_pass", 0.0125, "", "", {"aten.mm.default": 2, "aten.t": 1}, {"aten.t": 3}, 4)
    assert str(stage).splitlines() == [
        "a_pass: +3 -3 nodes, 4 moved, 12.5 ms",
        "       +2  aten.mm.default",
        "    +1 -3  aten.t",
    ]


def test_a_pass_that_fails_is_named_as_ever_and_those_before_it_were_seen():
    seen = []
    with pytest.raises(PassError, match=r"pass 'nothing' failed \(after negate_loss\)"):
        run(tiny(), [negate_loss, partial(nothing, 3)], watch=lambda stage, gm: seen.append(stage.name))
    assert seen == ["negate_loss"]


def test_watchers_see_the_graph_of_every_stage():
    sizes = []
    result = run(tiny(), [emit_factors, nothing], watch=lambda _, gm: sizes.append(len(gm.graph.nodes)))
    assert sizes == [len(result.graph.nodes)] * 2


@pytest.fixture
def lines():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    LOG.addHandler(handler)
    yield messages
    LOG.removeHandler(handler)
    LOG.setLevel(logging.NOTSET)


def test_the_log_has_the_operators_and_at_debug_the_code(lines):
    run(tiny(), [negate_loss])
    assert lines == []
    LOG.setLevel(logging.INFO)
    run(tiny(), [negate_loss])
    ((level, text),) = lines
    assert level == "INFO"
    assert text.startswith("negate_loss: +1 -0 nodes")
    LOG.setLevel(logging.DEBUG)
    run(tiny(), [negate_loss])
    assert [level for level, _ in lines] == ["INFO", "INFO", "DEBUG"]
    assert "def forward" in lines[-1][1]


def test_where_nobody_listens_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(stages, "_Seen", None)
    assert "neg" in str(pipeline.run(tiny(), [negate_loss]).graph)
