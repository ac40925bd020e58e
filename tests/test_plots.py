"""Plots of factors, block sizes, traces and damping."""

import sys

import pytest
import torch

import thor_fx
from thor_fx.factors import Kronecker
from thor_fx.plots import block_size_curves, damping_history, factor_spectra, spectrum, trace_history

matplotlib = pytest.importorskip("matplotlib")

HISTORY = [
    {"step": 0, "damping": 0.1, "loss": 2.0},
    {"step": 5, "damping": torch.tensor(0.05), "trace": {"fc": 3.0, "head": 1.0}},
    {"step": 10, "loss": 1.0, "trace": {"fc": 2.0}},
]


def points(line):
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_spectra_of_dense_diagonal_and_grouped_factors():
    pair = Kronecker(torch.tensor([1.0, 4.0]), torch.eye(3).expand(2, 3, 3) * 2, rows=4, n=4, groups=2)
    single = Kronecker(torch.diag(torch.tensor([9.0, 0.0])), torch.eye(2), rows=4, n=4)
    panels = factor_spectra({"embed.weight": pair, "fc.weight": single}).axes
    diagonal, dense = panels[0].get_lines()
    assert points(diagonal) == [(0.5, 4.0), (1.0, 1.0)]
    assert points(dense) == [(0.5, 9.0)]  # 0 has no place on a logarithmic axis
    assert len(panels[1].get_lines()) == 3  # two groups, and one
    names = [text.get_text() for text in panels[0].figure.legends[0].get_texts()]
    assert names == ["embed.weight", "fc.weight"]


def test_spectra_of_a_model(tmp_path):
    def loss_fn(p, x):
        return (torch.tanh(x @ p["w1"]) @ p["w2"]).square().mean()

    params = {"w1": torch.randn(5, 4), "w2": torch.randn(4, 2)}
    found = thor_fx.factors(loss_fn, params, torch.randn(20, 5))
    factor_spectra(found, tmp_path / "spectra.svg")
    assert (tmp_path / "spectra.svg").read_text().lstrip().startswith("<?xml")
    assert spectrum(found["w1"].A).shape == (1, 5)


def test_a_legend_names_some_of_many_layers():
    pair = Kronecker(torch.eye(2), torch.eye(2), rows=1, n=1)
    figure = factor_spectra({f"layers.{i}": pair for i in range(50)})
    assert len(figure.legends[0].get_texts()) <= 12


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_block_size_curves(tmp_path, suffix):
    def loss_fn(p, x):
        return (x @ p["w"]).square().mean()

    report = thor_fx.block_size_report(loss_fn, {"w": torch.randn(20, 3)}, torch.randn(30, 20))
    figure = block_size_curves(report, tmp_path / f"curves{suffix}")
    assert (tmp_path / f"curves{suffix}").stat().st_size > 0
    assert figure.axes[0].get_xlabel() == "block size"
    assert block_size_curves(report).axes[0].get_legend() is not None


def test_damping_over_steps_skips_steps_without_it():
    (line,) = damping_history(HISTORY).axes[0].get_lines()
    assert points(line) == [(0.0, 0.1), (5.0, pytest.approx(0.05))]


def test_traces_over_steps_by_layer():
    figure = trace_history(HISTORY)
    lines = {line.get_label(): points(line) for line in figure.axes[0].get_lines()}
    assert lines == {"fc": [(5, 3), (10, 2)], "head": [(5, 1)]}
    assert figure.axes[0].get_yscale() == "log"


def test_one_trace_of_all_layers_and_steps_without_numbers():
    figure = trace_history([{"trace": 1.0}, {"trace": 0.0}])
    assert points(figure.axes[0].get_lines()[0]) == [(0, 1), (1, 0)]
    assert (figure.axes[0].get_yscale(), figure.legends) == ("linear", [])


@pytest.mark.parametrize("plot", [trace_history, damping_history])
def test_a_history_without_the_number(plot):
    with pytest.raises(
        ValueError, match=r"history has no '(trace|damping)' in any of its 1 steps: see what metrics"
    ):
        plot([{"step": 0, "loss": 1.0}])


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.png, \.svg, \.pdf, got 'damping\.txt'"):
        damping_history(HISTORY, "damping.txt")
    with pytest.raises(ValueError, match="factors is empty"):
        factor_spectra({})


def test_no_plot_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib: pip install "thor-fx\[examples\]"'):
        damping_history(HISTORY)
