"""The model of many devices: numbers by hand, known models, and the report."""

import doctest
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import thor_fx
from thor_fx.distributed.packing import packed_numel
from thor_fx.passes.sides import Side

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(BENCHMARKS)
    import scaling
    import scaling_models as models

TINY = models.Model(
    "tiny",
    (models.Shape("blocks.*.weight", in_=6, out=2, rows=5, count=2),),
    first_order=4,
    published=28,
    batch=3,
    datum="row",
)
NETWORK = scaling.Network("by hand", bandwidth=100.0, latency=0.5)
SETTING = scaling.Setting(frequency=10, bucket=100, flops=8.0, model_flops=16.0)
LLAMA = next(model for model in models.MODELS if model.name == "Llama 7B")


# --- numbers by hand ---------------------------------------------------------------------------------


def test_examples_of_the_module():
    assert doctest.testmod(scaling).failed == 0


@pytest.mark.parametrize(
    ("side", "numbers"),
    [
        (Side(6), 21),
        (Side(6, "blocks", 2), 9),
        (Side(5, "blocks", 2), 9),  # the last block is padded
        (Side(6, "diagonal"), 6),
        (Side(6, "mean"), 6),
        (Side(6, "identity"), 0),
        (Side(4, groups=3), 30),
        (Side(4, "blocks", 2, groups=3), 18),
    ],
)
def test_a_triangle_of_a_factor_is_sent(side: Side, numbers: int):
    assert packed_numel(side) == numbers
    assert scaling.bytes_of_factors([side, side], itemsize=2) == 4 * numbers


def test_a_ring_by_hand():
    assert NETWORK.all_reduce(400, 4) == 6 * 0.5 + 1.5 * 400 / 100
    assert NETWORK.all_reduce(400, 4, collectives=3) == 18 * 0.5 + 1.5 * 400 / 100
    assert NETWORK.broadcast(400, 4, collectives=3) == 9 * 0.5 + 400 / 100
    assert NETWORK.all_reduce(400, 1) == NETWORK.broadcast(400, 1) == 0


def test_a_tiny_model_by_hand():
    """Two weights (2, 6), 15 rows: ``A`` in three blocks of 2, ``G`` whole."""
    layers = models.layers(TINY, 2)
    assert [layer.name for layer in layers] == ["blocks.0.weight", "blocks.1.weight"]
    assert scaling.sides_of(layers) == 2 * [Side(6, "blocks", 2), Side(2)]
    assert scaling.bytes_of_factors(scaling.sides_of(layers)) == 2 * 4 * (3 * 3 + 3)
    assert scaling.bytes_of_counts(layers) == 3 * 8
    # multiplied on either side by blocks of 2: 2 * 2 operations for each of the 12 numbers
    assert scaling.work_of(layers[0], 2) == scaling.Work(
        gradient=4 * 12,
        inverses=4 * 16,
        sent=4 * 12,
        measure=2 * 15 * 16,
        refresh=4 * 2**3,
        precondition=2 * 2 * 2 * 12,
    )
    assert TINY.parameters == 28
    assert TINY.flops == 6 * 15 * 24


def test_a_tiny_step_by_hand():
    [case] = scaling.cases(TINY, 2, [2])
    assert (case.total, case.busiest) == (
        scaling.Work(96, 128, 96, 960, 64, 192),
        scaling.Work(48, 64, 48, 480, 32, 96),
    )
    none, inverse, gradient = (scaling.times(case, way, NETWORK, SETTING) for way in scaling.SHARINGS)
    first_order = 2160 / 16 + (1.0 + 112 / 100)
    # 96 bytes of factors fill one bucket, and the 24 of the counts are one more collective
    reduce = 2 * 1.0 + 120 / 100
    assert none == scaling.Times(first_order, 24.0, 120.0, pytest.approx(reduce), refresh=8.0, broadcast=0.0)
    assert inverse == replace(none, refresh=4.0, broadcast=0.5 + 96 / 100)  # one bucket
    to_owners = (0.5 + 48 / 100) + (1.0 + 24 / 100)  # each rank adds up the 48 bytes of its own layer
    assert gradient == replace(
        none, refresh=4.0, precondition=12.0 + (0.5 + 96 / 100), reduce=pytest.approx(to_owners)
    )
    assert none.step == first_order + 24
    assert none.factor_step == pytest.approx(none.step + 120 + reduce + 8)
    assert none.amortised(10) == pytest.approx(none.step + (120 + reduce + 8) / 10)
    assert scaling.choose({"none": none, "inverse": inverse, "gradient": gradient}, 10) == "gradient"


def test_layers_are_dealt_out_the_longest_first():
    works = [scaling.Work(refresh=n) for n in (3, 7, 1, 5, 4)]
    assert [work.refresh for work in scaling.deal(works, 2)] == [10, 10]
    assert sorted(work.refresh for work in scaling.deal(works, 8)) == [0, 0, 0, 1, 3, 4, 5, 7]


# --- what must hold of any numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [128, None])
def test_more_devices_take_longer_to_agree_and_share_more(block_size: int | None):
    network = scaling.NETWORKS[0]
    same = scaling.cases(LLAMA, block_size, [2, 8, 64, 512])
    for fewer, more in pairwise(same):
        one, two = (scaling.times(case, "inverse", network, scaling.Setting()) for case in (fewer, more))
        assert one.reduce < two.reduce
        assert one.first_order < two.first_order
        assert one.refresh >= two.refresh
        assert fewer.busiest.inverses >= more.busiest.inverses
        assert fewer.busiest.inverses * fewer.ranks >= fewer.total.inverses


def test_larger_blocks_and_larger_numbers_are_more_bytes():
    sent = []
    for block_size in (64, 128, 1024, None):
        sides = scaling.sides_of(models.layers(LLAMA, block_size))
        assert scaling.bytes_of_factors(sides, 2) * 2 == scaling.bytes_of_factors(sides)
        sent.append(scaling.bytes_of_factors(sides))
    assert sent == sorted(set(sent))


def test_rarer_factor_steps_cost_less():
    [case] = scaling.cases(LLAMA, 128, [64])
    steps = scaling.times(case, "none", scaling.NETWORKS[1], scaling.Setting())
    means = [steps.amortised(frequency) for frequency in (1, 10, 100)]
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(steps.factor_step)


# --- known models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_models_have_as_many_parameters_as_published(model):
    assert model.parameters == model.published


def test_numbers_of_layers():
    counts = {model.name: len(models.layers(model, None)) for model in models.MODELS}
    assert counts["ResNet-50"] == 54
    assert (counts["GPT-2 124M"], counts["Llama 7B"], counts["Llama 70B"]) == (12 * 4, 32 * 7, 80 * 7)


def test_grouped_heads_have_short_keys():
    large = models.MODELS[-1]
    keys = next(
        layer
        for layer in models.layers(large, None)
        if layer.name == "model.layers.79.self_attn.k_proj.weight"
    )
    assert (keys.in_, keys.out) == (8192, 1024)


def test_layers_are_those_that_thor_fx_finds():
    """A convolution of 3 x 3 and a linear layer, traced, and by their shapes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 40))

    def loss_fn(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    batch = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    tx = thor_fx.thor(lr=0.1, damping=0.03, momentum=0.9, block_size=16)
    found = thor_fx.explain(loss_fn, dict(model.named_parameters()), *batch, tx=tx).coverage.layers.values()
    shapes = models.Shape("0.weight", 27, 8, 16), models.Shape("2.weight", 128, 40, 1)
    ours = models.layers(replace(TINY, shapes=shapes, batch=2), 16)
    assert scaling.sides_of(found) == scaling.sides_of(ours)
    assert scaling.bytes_of_counts(found) == scaling.bytes_of_counts(ours)
    assert [scaling.work_of(layer, 16) for layer in found] == [scaling.work_of(layer, 16) for layer in ours]


# --- the report --------------------------------------------------------------------------------------------


def test_the_report_has_every_model_and_is_the_one_in_the_readme():
    result = scaling.report()
    shown = scaling.markdown(result)
    rows = 1 + 1 + 2 + 2 * 4  # memory, traffic, and for both networks means and details
    for model in models.MODELS:
        for blocks in ("128", "whole"):
            assert shown.count(f"| {model.name} | {blocks} |") == rows
    assert "A model, not a measurement." in shown
    assert (
        f"<!-- scaling -->\n{scaling.summary(result)}<!-- end -->" in (BENCHMARKS / "README.md").read_text()
    )
    assert (BENCHMARKS / "results" / "scaling.md").read_text() == shown


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("<!-- scaling -->\n<!-- end -->\n")
    given = [
        "--devices",
        "8",
        "--block-size",
        "64",
        "--bandwidth",
        "50",
        "--latency",
        "5",
        "--factor-dtype-bytes",
        "2",
    ]
    where = ["--results", str(tmp_path / "results")]
    scaling.main([*given, *where, "--print"])
    assert not list((tmp_path / "results").iterdir())
    scaling.main([*given, *where])
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"scaling.md", "scaling.json"}
    assert "as given (50 GB/s per device, 5 microseconds)" in (tmp_path / "README.md").read_text()
    assert "2 bytes for a number" in capsys.readouterr().out


def test_a_network_is_given_whole(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        scaling.main(["--bandwidth", "50", "--print"])
    assert "give --bandwidth and --latency together" in capsys.readouterr().err
