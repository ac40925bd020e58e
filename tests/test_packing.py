"""What is sent of factors, and the buckets in which it travels."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import thor_fx
from thor_fx.compile import collector_of
from thor_fx.distributed.averaging import Averaging
from thor_fx.distributed.buckets import by_bytes, by_indices, by_readers, restricted
from thor_fx.distributed.collectives import World
from thor_fx.distributed.inverse_packing import packed, packed_numbers, unpacked
from thor_fx.distributed.packing import pack, packed_numel, unpack
from thor_fx.inverses import METHODS, Stack
from thor_fx.inverses.attempts import GOOD
from thor_fx.layers import Layer
from thor_fx.passes.sides import Side
from training import build

SIDES = [
    (Side(5), 15),
    (Side(1), 1),
    (Side(5, "blocks", 2), 9),
    (Side(4, groups=3), 30),
    (Side(5, "blocks", 2, groups=2), 18),
    (Side(7, "diagonal"), 7),
    (Side(7, "mean"), 7),
    (Side(7, "identity"), 0),
]


@pytest.mark.parametrize(("side", "numbers"), SIDES, ids=str)
def test_one_triangle_is_sent_and_the_whole_comes_back(side, numbers):
    assert packed_numel(side) == numbers
    if side.kind == "identity":
        return
    factor = torch.randn(side.shape, dtype=torch.float64)
    if side.kind in {"dense", "blocks"}:
        factor = factor + factor.mT
    flat = pack(factor, side)
    assert flat.shape == (numbers,)
    assert torch.equal(unpack(flat, side), factor)


@pytest.mark.parametrize(
    ("inverse", "halves"), [("cholesky", True), ("eigen", True), ("newton_schulz", False), ("ekfac", False)]
)
def test_one_triangle_of_an_inverse_is_sent_where_it_is_symmetric(inverse, halves):
    layer, method = Layer("w", "w", Side(5), Side(3), (), (), 1, "1"), METHODS[inverse]
    a, g = (m @ m.mT for m in (torch.randn(1, 5, 5, dtype=torch.float64), torch.ones(1, 3, 3).double()))
    before = method.init(1, (layer.input, layer.output), 2, a)
    never = torch.zeros(len(a), method.units((layer.input, layer.output), 2), dtype=torch.int64)
    (state,), (ended,) = method.refresh([Stack(layer, (a, g), before, never)], lambda *_: (0.1, 0.1), 2)
    assert (ended == GOOD).all()
    sent = packed(method, {"some": state})
    leaves = pytree.tree_leaves(sent)
    assert sum(leaf.numel() for leaf in leaves) == packed_numbers(method, layer, 2)
    assert (packed_numbers(method, layer, 2) < method.work(layer, 2).numbers) == halves
    pairs = zip(*map(pytree.tree_leaves, (unpacked(method, sent, {"some": state}), state)), strict=True)
    for arrived, part in pairs:
        torch.testing.assert_close(arrived, part, rtol=1e-13, atol=1e-13)
        assert not halves or torch.equal(arrived, arrived.mT)


def test_what_arrives_is_symmetric_whatever_was_measured():
    arrived = unpack(pack(torch.arange(16.0).reshape(4, 4), Side(4)), Side(4))
    assert torch.equal(arrived, arrived.mT)
    assert torch.equal(arrived.triu(), torch.arange(16.0).reshape(4, 4).triu())


def test_indices_are_the_last_layers_of_buckets():
    layers = [f"layer{i}" for i in range(54)]
    assert by_indices(layers, [26, 53]) == [layers[:27], layers[27:]]
    assert by_indices(layers, [26]) == [layers[:27], layers[27:]]
    assert by_indices(layers, [53]) == [layers]
    with pytest.raises(ValueError, match=r"0 to 53 for this model's 54 layers .* got \[26, 54\]"):
        by_indices(layers, [26, 54])


def test_every_reader_gets_its_part_of_every_bucket():
    sizes, readers = dict.fromkeys(range(8), 10), {i: i % 2 for i in range(8)}
    assert by_readers(sizes, readers, 2, limit=40) == [[0, 2, 1, 3], [4, 6, 5, 7]]
    alone = by_readers(sizes, dict.fromkeys(range(8), 1), 2, limit=40)
    assert alone == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert by_readers({}, {}, 2) == []


def test_buckets_by_bytes_hold_every_tensor_once_and_in_order():
    sizes = dict.fromkeys(range(7), 10)
    assert by_bytes(sizes, limit=25) == [[0, 1, 2], [3, 4, 5], [6]]
    assert by_bytes({}) == []
    assert by_bytes({0: 1000, 1: 1}, limit=25) == [[0], [1]]
    assert restricted([[0, 1], [2], [3]], [1, 3]) == [[1], [3]]


def resnet50() -> nn.Module:
    """The 53 convolutions and the last layer of ResNet-50, a sixteenth as wide, for small images.

    He et al. 2016, table 1; every block's shortcut of another width is a convolution behind its three.
    """

    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False), nn.ReLU(),
                nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.ReLU(),
                nn.Conv2d(width, 4 * width, 1, bias=False),
            )  # fmt: skip
            short = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.short = nn.Identity() if inputs == 4 * width and stride == 1 else short

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.body(x) + self.short(x))

    blocks, inputs = [], 4
    for width, count, stride in ((4, 3, 1), (8, 4, 2), (16, 6, 2), (32, 3, 2)):
        for place in range(count):
            blocks.append(Bottleneck(inputs, width, stride if place == 0 else 1))
            inputs = 4 * width
    stem = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
    return nn.Sequential(
        stem, nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5)
    )


def test_the_reference_example_of_resnet50_is_two_buckets():
    model = thor_fx.compile(build(resnet50, torch.float32), backend="aot_eager")
    optimizer = thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9, block_size=16)
    nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    found = collector_of(model).coverage
    assert found is not None
    world = World("any", 2, 0, None)
    buckets = Averaging(world, split_indices=[26, 53]).buckets(found)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert len(names) == 54
    assert buckets == [names[:27], names[27:]], "layers are counted in the order of the model"
    assert Averaging(world).buckets(found) == [names], "these few bytes travel together"
    assert optimizer.coverage is not None


def test_one_process_is_no_world():
    tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9, split_indices=[7])
    assert tx.world is None, "indices are compared with layers only where there is something to send"
