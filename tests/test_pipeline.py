"""``run``: one copy, checks in between, the culprit named."""

from functools import partial

import pytest
import torch

from graphs import negate_loss, tiny
from thor_fx.passes import PassError, SpecError, emit_factors, pipeline, run


def forget_values(gm):
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def crash(gm, *, message):
    raise KeyError(message)


class Renamer:
    def __call__(self, gm):
        raise ValueError("no name")


def test_the_graph_is_left_as_it_is_and_the_copy_is_recompiled():
    gm = tiny()
    text, arguments = str(gm.graph), (torch.ones(4, 3), torch.ones(6, 4))
    result = run(gm, [negate_loss])
    assert str(gm.graph) == text
    assert result(*arguments)[0] == -gm(*arguments)[0] == -72


def test_without_passes_it_is_a_copy():
    gm = tiny()
    result = run(gm, [])
    assert result is not gm
    assert str(result.graph) == str(gm.graph)


def test_passes_run_in_order():
    seen = []
    run(tiny(), [lambda gm: seen.append((1, gm)), lambda gm: seen.append((2, gm))])
    (first, one), (second, two) = seen
    assert (first, second) == (1, 2)
    assert one is two, "copied once"


def test_an_error_names_the_pass_and_those_before_it():
    failing = partial(crash, message="boom")
    with pytest.raises(
        PassError, match=r"pass 'crash' failed \(after emit_factors, negate_loss\): 'boom'"
    ) as e:
        run(tiny(), [emit_factors, negate_loss, failing, forget_values])
    assert isinstance(e.value.__cause__, KeyError)


def test_the_first_pass_has_no_other_before_it():
    with pytest.raises(PassError, match=r"pass 'crash' failed \(after no other pass\)"):
        run(tiny(), [partial(crash, message="")])


def test_a_pass_that_breaks_the_rules_is_named():
    with pytest.raises(
        PassError, match=r"pass 'forget_values' failed \(after negate_loss\): node .* no value"
    ):
        run(tiny(), [negate_loss, forget_values])


def test_a_graph_that_breaks_the_rules_is_no_fault_of_a_pass():
    gm = tiny()
    forget_values(gm)
    with pytest.raises(SpecError):
        run(gm, [negate_loss])


def test_in_place_and_after_others():
    gm = tiny()
    pipeline.apply(gm, [negate_loss], after=["emit_factors"])
    assert "neg" in str(gm.graph)
    with pytest.raises(PassError, match=r"pass 'crash' failed \(after emit_factors, negate_loss\)"):
        pipeline.apply(gm, [partial(crash, message="")], after=["emit_factors", "negate_loss"])


def test_names():
    nested = partial(partial(crash, message="a"), message="b")
    names = [pipeline.name_of(p) for p in (emit_factors, nested, Renamer())]
    assert names == ["emit_factors", "crash", "Renamer"]
