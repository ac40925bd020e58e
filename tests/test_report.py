"""What a report shows beyond its table: networks of steps, costs, a picture, a page."""

import json
from pathlib import Path

import pytest
import torch

import command_targets
import thor_fx
from thor_fx.__main__ import main
from thor_fx.report import Report

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><title>mine</title></svg>'


@pytest.fixture(scope="module")
def report() -> Report:
    return thor_fx.explain(*command_targets.build_loss())


def phases(report: Report, step: str) -> set[str | None]:
    return {phase for _, phase in report.network(step).nodes(data="phase")} - {None}


def test_networks_of_both_steps_say_phases_and_sites(report):
    assert phases(report, "plain") == {"forward", "backward"}
    assert phases(report, "factor") == {"forward", "backward", "factors"}
    assert phases(report, "factor") == {p for _, p in report.graph.nodes(data="phase")} - {None}
    sites = {name for _, site in report.graph.nodes(data="site") for name in site or ()}
    assert sites == {"0.weight", "2.weight"}
    plain, factor = report.network("plain"), report.network("factor")
    new = {name for name, phase in factor.nodes(data="phase") if phase == "factors"}
    assert set(factor) - new == set(plain), "and nothing else is new"


def test_an_unknown_step_is_refused(report):
    with pytest.raises(ValueError, match=r"step must be one of \['plain', 'factor'\], got 'refresh'"):
        report.network("refresh")


def test_the_report_is_that_of_what_trains():
    rounded = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9, layer_filter=lambda name: name != "0.weight")
    report = thor_fx.explain(*command_targets.build_loss(), tx=rounded)
    sites = {name for _, site in report.graph.nodes(data="site") for name in site or ()}
    assert sites == {"2.weight"}
    assert set(report.steps.coverage.layers) == {"2.weight"}


def test_steps_are_traced_once_and_say_what_they_cost(report):
    steps = report.steps
    assert steps is report.steps
    names = [stage.name for stage in steps.stages["factor"]]
    assert names[:3] == ["canonicalize", "mark", "emit_factors"]
    assert names[-1] == "return_forward"
    assert "emit_factors" not in [stage.name for stage in steps.stages["plain"]]
    lines = str(steps).splitlines()
    assert "longer than a plain step" in lines[0]
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["plain", "forward"],
        ["plain", "backward"],
        ["plain", "update"],
    ]
    assert json.loads(json.dumps(steps.to_dict()))["factor"]["phases"]["factors"]["flops"] > 0


def test_the_picture_and_the_page(report, tmp_path: Path):
    report.draw(tmp_path / "step.svg")
    assert "A 8\N{MULTIPLICATION SIGN}8, G 6\N{MULTIPLICATION SIGN}6" in (tmp_path / "step.svg").read_text()
    report.html(tmp_path / "step.html", plots={"My plot": SVG}, title="mine")
    text = (tmp_path / "step.html").read_text()
    for part in ("<title>mine</title>", "My plot", "emit_factors", "0.weight", "refresh"):
        assert part in text


def test_figures_are_plots_of_the_page(report, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from thor_fx.plots import factor_spectra

    figure = factor_spectra(thor_fx.factors(*command_targets.build_loss()))
    report.html(tmp_path / "step.html", plots={"Spectra": figure})
    assert "Spectra" in (tmp_path / "step.html").read_text()


def test_a_report_made_by_hand_has_no_steps(report):
    made = Report(report.coverage, report.sites, report.terms, report.step, report.shapes)
    with pytest.raises(ValueError, match=r"made by hand: thor_fx\.explain makes one"):
        made.steps  # noqa: B018 - raises


def test_the_command_writes_both_and_prints_costs(tmp_path: Path, capsys):
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    arguments = ["command_targets:build_loss", "--html", str(page), "--svg", str(picture), "--step", "plain"]
    assert main(["explain", *arguments, "--costs"]) == 0
    assert "at best ms" in capsys.readouterr().out
    assert page.stat().st_size > 1000
    assert "A 8" not in picture.read_text(), "a plain step has no factors"
    assert main(["explain", "command_targets:build_loss", "--costs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]
    assert set(found) == {"predicted", "rates", "plain", "factor"}
    assert found["factor"]["saved"] == found["plain"]["saved"] > 0


@pytest.mark.inductor
def test_the_command_compiles_and_measures(tmp_path: Path, capsys):
    page = tmp_path / "measured.html"
    assert main(["explain", "command_targets:build_loss", "--measure", "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("plain: ")
    assert lines[-2].endswith(" 0 of them for factors")
    assert lines[-1].startswith("factor: ")
    assert int(lines[-1].split(", ")[-1].split()[0]) > 0
    assert "as measured" in page.read_text()


def test_targets_are_moved_to_the_device():
    """A factory may nest tensors in its arguments."""
    from thor_fx.commands.target import _moved

    nested = ({"a": torch.ones(2)}, [torch.ones(1), 3])
    moved = _moved(nested, torch.device("meta"))
    assert moved[0]["a"].device.type == moved[1][0].device.type == "meta"
    assert moved[1][1] == 3
