"""What ranks send is what the model of many devices says, byte by byte; and what that costs is measured."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(BENCHMARKS)
    import sending
    import traffic

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")


def test_counted_bytes_are_those_of_the_model():
    rows = traffic.on_ranks(["tiny"], 2)
    assert [row["sharing"] for row in rows] == list(traffic.SHARINGS)
    for row in rows:
        for kind in ("plain", "factor"):
            assert row[kind]["measured"] == row[kind]["expected"] > 0, (row["sharing"], kind)
        assert row["factor"]["measured"] > row["plain"]["measured"]
    text = traffic.markdown(rows)
    assert text.count("| tiny | 2 |") == len(rows)


def test_steps_are_timed_with_and_without_sending_factors():
    width, layers, rounds = 8, 2, 2
    found = sending.on_two_ranks(width, layers, 4, rounds)
    assert {variant: len(seconds) for variant, seconds in found["seconds"].items()} == dict.fromkeys(
        sending.VARIANTS, rounds
    )
    triangle = width * (width + 1) // 2
    assert found["factors_mb"] == pytest.approx(4e-6 * layers * 2 * triangle)
    assert found["gradients_mb"] == pytest.approx(4e-6 * layers * width * (width + 1))
    table = sending.markdown(found)
    assert all(f"| {variant} |" in table for variant in sending.VARIANTS)
