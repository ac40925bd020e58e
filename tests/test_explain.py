"""What ``thor_fx.explain`` says of every parameter of a model."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx.units import scaled

SETTINGS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9}
WORDS, WIDTH, CHANNELS, LENGTH, BATCH = 50, 8, 12, 6, 4


class Net(nn.Module):
    """One of each: layers, a normalisation, vectors, a positional table, frozen and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.conv = nn.Conv1d(WIDTH, CHANNELS, 3, padding=1)
        self.norm = nn.GroupNorm(3, CHANNELS)
        self.position = nn.Parameter(torch.zeros(LENGTH, CHANNELS))
        self.head = nn.Linear(CHANNELS, WORDS)
        self.spare = nn.Linear(2, 2)
        self.fixed = nn.Parameter(torch.ones(CHANNELS), requires_grad=False)

    def forward(self, ids: Tensor, gain: float = 1.0) -> Tensor:
        features = self.conv(self.embed(ids).mT)
        features = self.norm(features).mT + self.position
        return self.head(features * self.fixed) * gain


def ids() -> Tensor:
    return torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % WORDS


def report(**settings: Any) -> thor_fx.Report:
    tx = thor_fx.thor(**SETTINGS, **settings) if settings else None
    return thor_fx.explain(Net(), ids(), tx=tx)


def line_of(method: Any, code: str) -> str:
    """``test_explain.py:31 in forward: code``, from the source of a method."""
    lines, first = inspect.getsourcelines(method)
    number = next(i for i, line in enumerate(lines, start=first) if line.strip() == code)
    return f"{Path(__file__).name}:{number} in {method.__name__}: {code}"


CONV_LINE = "features = self.conv(self.embed(ids).mT)"
NORM_LINE = "features = self.norm(features).mT + self.position"
HEAD_LINE = "return self.head(features * self.fixed) * gain"

TREATMENTS = {
    "embed.weight": ("preconditioned: embedding, A diagonal of 50, G 8x8, rows 24", CONV_LINE),
    "conv.weight": ("preconditioned: convolution, A 24x24, G 12x12, rows 24", CONV_LINE),
    "conv.bias": ("first-order rule: a vector: its gradient is ", CONV_LINE),
    "norm.weight": ("elementwise rule: scale or shift of a normalisation layer", NORM_LINE),
    "norm.bias": ("elementwise rule: scale or shift of a normalisation layer", NORM_LINE),
    "position": ("first-order rule: its gradient is sum <- ", NORM_LINE),
    "head.weight": ("preconditioned: linear, A 12x12, G 50x50, rows 24", HEAD_LINE),
    "head.bias": ("first-order rule: a vector: its gradient is sum <- ", HEAD_LINE),
    "spare.weight": ("not trained: the loss does not depend on it", None),
    "spare.bias": ("not trained: the loss does not depend on it", None),
    "fixed": ("frozen", None),
}


def test_why_names_the_treatment_and_the_line_of_the_user():
    found = report()
    assert set(found.shapes) == set(TREATMENTS)
    for name, (treatment, code) in TREATMENTS.items():
        first, *rest = found.why(name).split("\n")
        assert first.startswith(treatment), name
        assert rest == ([f"  used at {line_of(Net.forward, code)}"] if code else []), name


def test_a_reason_ends_with_what_is_missing():
    assert report().why("position").split("\n")[0].endswith("no product of matrices")


def test_an_unknown_name_is_a_key_error_that_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"no parameter 'head'; there are \['conv\.bias', .*'head\.weight'"):
        report().why("head")


def test_the_table_has_one_row_for_every_parameter():
    found = report()
    header, *rows = str(found).split("\n")
    assert header.split() == ["parameter", "shape", "bytes", "MFLOP", "treatment"]
    assert "\n".join(rows[-2:]) == found.summary
    assert [row.split()[0] for row in rows[:-2]] == list(found.shapes) == [n for n, _ in named(Net())]
    row = next(row for row in rows if row.startswith("head.weight "))
    assert "50x12  10.6 kB" in row
    assert row.endswith("preconditioned: linear, A 12x12, G 50x50, rows 24")
    start = header.index("treatment")
    assert all(row[start - 2 : start] == "  " for row in rows[:-2])


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def test_the_summary_counts_numbers_terms_and_costs():
    found = report()
    layers = WORDS * WIDTH + CHANNELS * WIDTH * 3 + WORDS * CHANNELS
    total = sum(p.numel() for _, p in named(Net()))
    assert found.preconditioned == layers
    assert found.terms == BATCH * LENGTH
    assert found.coverage.terms == "head.weight"
    assert f"{layers / total:.1%} of {total:,} parameters preconditioned" in found.summary
    assert f"loss terms n = {BATCH * LENGTH} (rows of head.weight)" in found.summary
    assert f"a factor step adds {scaled(found.cost.factor_bytes, 'B')} of factors" in found.summary
    assert f"({found.cost.factor_flops / found.plain_flops:+.0%})" in found.summary
    assert set(found.costs) == set(found.coverage.layers)


def test_joint_biases_are_the_last_column_of_their_weights():
    found = report(bias="joint")
    assert found.why("head.bias").startswith("preconditioned: last column of head.weight\n  used at ")
    assert found.why("conv.bias").startswith("preconditioned: last column of conv.weight\n  used at ")
    assert "linear, A 13x13 with bias, G 50x50" in found.why("head.weight")
    assert "convolution, A 25x25 with bias, G 12x12" in found.why("conv.weight")
    assert found.preconditioned == report().preconditioned + WORDS + CHANNELS


@pytest.mark.parametrize(
    ("long_side", "side"),
    [("blocks", "50 in blocks of 16"), ("diagonal", "diagonal of 50"), ("identity", "none of 50")],
)
def test_a_step_down_has_a_note(long_side, side):
    found = report(max_dim=30, long_side=long_side, block_size=16)
    first, note, used = found.why("head.weight").split("\n")
    assert first == f"preconditioned: linear, A 12x12, G {side}, rows 24"
    assert note == f"  the output side is longer than max_dim=30: {side}"
    assert used.startswith("  used at ")
    assert "max_dim" not in found.why("embed.weight")  # a diagonal by nature, and no step down
    assert f"G {side}, rows 24; the output side is longer than max_dim=30: {side}" in str(found)


def test_a_bias_beside_a_long_input_side_is_on_its_own():
    found = report(bias="joint", max_dim=10, long_side="diagonal")
    assert "the bias is on its own" in found.why("head.weight")
    assert found.why("head.bias").startswith("first-order rule: a vector")


def test_reduced_layers_say_so_and_others_say_why_not():
    found = report(sharing="reduce")
    assert "rows 4, reduced over positions" in found.why("conv.weight")
    assert "rows are not grouped by datum, so they are not reduced" in found.why("embed.weight")


def test_a_weight_in_several_uses_and_in_parts():
    def loss_fn(params, x):
        h = (x @ params["w"]).tanh() @ params["w"]
        return (h[:, :2] @ params["parts"][:2] + h @ params["parts"][2:]).square().mean()

    params = {"w": torch.eye(3), "parts": torch.ones(5, 4)}
    found = thor_fx.explain(loss_fn, params, torch.randn(7, 3))
    assert "in 2 uses" in found.why("w")
    text = found.why("parts").split("\n")[0]
    assert "[0:2] linear, A 2x2" in text
    assert "[2:5] linear, A 3x3" in text
    assert f"{Path(__file__).name}:" in found.why("parts")


# --- what a module returns ---------------------------------------------------------------------------


class Returns(nn.Module):
    """A model that returns whatever it is told to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = nn.Linear(3, 5), nn.Linear(5, 2), how

    def forward(self, x: Tensor, *, y: Tensor | None = None) -> Any:
        hidden = self.body(x).tanh()
        scores = self.head(hidden)
        loss = F.cross_entropy(scores, y) if y is not None else scores.mean()
        outputs = {
            "tensor": scores,
            "mapping": {"hidden": hidden, "loss": loss},
            "tuple": (loss, scores),
            "scores": {"scores": scores, "count": torch.tensor(3)},
            "hidden": hidden,
        }
        return outputs[self.how]


@pytest.mark.parametrize("how", ["tensor", "mapping", "tuple", "scores"])
def test_keyword_arguments_and_losses_of_a_module(how):
    found = thor_fx.explain(Returns(how), torch.randn(7, 3), y=torch.zeros(7, dtype=torch.long))
    assert set(found.coverage.layers) == {"body.weight", "head.weight"}
    assert (found.terms, found.coverage.terms) == (7, "head.weight")
    trained_by_labels = "log_softmax" in str(found.step.graph)
    assert trained_by_labels == (how in {"mapping", "tuple"})  # the loss, and not the sum of all outputs


def test_a_loss_does_not_depend_on_what_else_a_model_returns():
    class Extra(Returns):
        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            return {"loss": self.body(x).square().mean(), "extra": self.head(self.body(x))}

    found = thor_fx.explain(Extra("mapping"), torch.randn(7, 3))
    assert set(found.coverage.unused) == {"head.weight", "head.bias"}


def test_a_module_and_its_loss_function_have_the_same_report():
    model, x, y = Returns("tuple"), torch.randn(7, 3), torch.zeros(7, dtype=torch.long)

    def loss_fn(params, x, y):
        return functional_call(model, dict(params), (x,), {"y": y})[0]

    of_module = thor_fx.explain(model, x, y=y)
    of_function = thor_fx.explain(loss_fn, dict(model.named_parameters()), x, y)
    assert str(of_module) == str(of_function)
    assert of_module.coverage == of_function.coverage


def test_the_report_is_that_of_the_optimizer():
    model, x = Returns("tensor"), torch.randn(7, 3)
    settings = {**SETTINGS, "bias": "joint", "max_dim": 4, "long_side": "diagonal"}
    found = thor_fx.explain(model, x, tx=thor_fx.thor(**settings)).coverage
    model = thor_fx.compile(model, backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings)
    model(x).square().mean().backward()
    optimizer.step()
    shapes = {name: (layer.input, layer.output, layer.bias) for name, layer in found.layers.items()}
    assert shapes == {n: (la.input, la.output, la.bias) for n, la in optimizer.coverage.layers.items()}
    assert found.fallback.keys() == optimizer.coverage.fallback.keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: thor_fx.explain(3), "takes a module or a loss function, got int"),
        (lambda: thor_fx.explain(lambda params: 0), "needs params"),
        (lambda: thor_fx.explain(lambda params: 0, [torch.ones(2)]), "params"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_model_without_layers_has_no_terms():
    found = thor_fx.explain(lambda p, x: (p["v"] * x).sum(), {"v": torch.ones(3)}, torch.ones(4, 3))
    assert found.terms is None
    assert "0.0% of 3 parameters preconditioned; loss terms n = unknown (no site)" in found.summary
    assert "MFLOP;" in found.summary  # nothing to compare with: no percentage


def test_the_graph_of_a_report():
    graph = report().network("plain")
    assert graph.number_of_nodes() == len(report().step.graph.nodes)
    assert any(facts.get("shape") == (WORDS, CHANNELS) for _, facts in graph.nodes(data=True))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_560_000, "2.56 MB"), (3e12, "3 TB")]
)
def test_bytes_in_a_unit_that_fits(count, text):
    assert scaled(count, "B") == text
