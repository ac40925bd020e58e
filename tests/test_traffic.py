"""What ranks send is what the model of many devices says, byte by byte."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(BENCHMARKS)
    import traffic


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_counted_bytes_are_those_of_the_model():
    rows = traffic.on_ranks(["tiny"], 2)
    assert [row["sharing"] for row in rows] == list(traffic.SHARINGS)
    for row in rows:
        for kind in ("plain", "factor"):
            assert row[kind]["measured"] == row[kind]["expected"] > 0, (row["sharing"], kind)
        assert row["factor"]["measured"] > row["plain"]["measured"]
    text = traffic.markdown(rows)
    assert text.count("| tiny | 2 |") == len(rows)
