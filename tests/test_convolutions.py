"""Factors of convolutions, against patches that are found one output pixel at a time by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import thor_fx
from convolutions import BATCH, CHANNELS, OUT, case, expected, patches, random
from thor_fx.passes import few_images, panels
from thor_fx.passes import patch_gram as gram_module
from thor_fx.passes.geometry import Geometry
from thor_fx.passes.shifts import shifts_pay
from training import assert_same, batches, by_drop_in_door, by_functional_door
from training import build as build_model

GRID = [
    setting
    for axes, transposed in ((1, False), (2, False), (1, True), (2, True))
    for setting in itertools.product([axes], (1, 2, 3), (1, 2), (0, 1), (1, 2), (1, 2, 4), [transposed])
    if case(*setting) is not None
]
SPACE = [
    (3, 2, 1, 1, 1, 1, False),
    (3, 2, 2, 0, 1, 2, False),
    (3, 2, 2, 0, 1, 2, True),
    (3, 3, 1, 1, 1, 4, False),
]


def assert_factors(setting):
    """(axes, kernel, stride, padding, dilation, groups, transposed)"""
    x, weight, convolve = case(*setting)
    found = thor_fx.factors(lambda p, x: convolve(p["w"], x).sin().mean(), {"w": weight}, x)["w"]
    A, G, rows = expected(convolve, weight, setting[5], setting[6])
    assert (found.rows, found.n, found.groups) == (rows, rows, setting[5])
    assert found.kind == ("transposed convolution" if setting[6] else "convolution")
    assert found.A.shape == A.shape
    assert found.G.shape == G.shape
    assert oracle.relative_error(found.A, A) < 1e-10
    assert oracle.relative_error(found.G, G) < 1e-10


def test_every_mix_of_settings():
    """Kernel, stride, padding, dilation, groups, transposed; in one test, since every one is tiny."""
    assert len(GRID) > 200
    for setting in GRID[:: len(GRID) // 24]:
        assert_factors(setting)


@pytest.mark.parametrize("setting", SPACE)
def test_three_axes(setting):
    assert_factors(setting)


def factors_of(module, x):
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_fn(p, x):
        return functional_call(module, p, (x,)).sin().mean()

    return thor_fx.factors(loss_fn, params, x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_padding_modes(mode, padding, kernel):
    """The convolution without padding of the input that has been padded by hand."""
    module = nn.Conv2d(CHANNELS, OUT, kernel, padding=padding, padding_mode=mode).double()
    x = random(BATCH, CHANNELS, 4, 5)
    before = (kernel - 1) // 2 if padding == "same" else 1
    after = kernel - 1 - before if padding == "same" else 1
    padded = F.pad(x, [before, after] * 2, mode="constant" if mode == "zeros" else mode)
    weight, bias = module.weight.detach(), module.bias.detach()[:, None, None]
    A, G, rows = expected(lambda w: F.conv2d(padded, w) + bias, weight, 1, transposed=False)
    found = factors_of(module, x)["weight"]
    assert found.rows == rows
    assert oracle.relative_error(found.A, A) < 1e-10
    assert oracle.relative_error(found.G, G) < 1e-10


@pytest.mark.parametrize("padding", ["valid", [0], [1]])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 1)])
def test_one_number_in_a_list_is_for_all_axes(kernel, padding):
    """As in the graph of ``padding="valid"``, where the nightly draws failed on it."""
    x, weight = random(BATCH, CHANNELS, 6, 6), random(OUT, CHANNELS // 2, *kernel, seed=1)

    def convolve(w):
        return F.conv2d(x, w, None, stride=[1], padding=padding, dilation=[1], groups=2)

    found = thor_fx.factors(lambda p: convolve(p["w"]).sin().mean(), {"w": weight})["w"]
    A, G, rows = expected(convolve, weight, 2, transposed=False)
    assert found.rows == rows
    assert oracle.relative_error(found.A, A) < 1e-10
    assert oracle.relative_error(found.G, G) < 1e-10


def test_output_padding():
    x, weight = random(BATCH, CHANNELS, 3, 3), random(CHANNELS, OUT // 2, 3, 3, seed=1)

    def convolve(w, x=x):
        return F.conv_transpose2d(x, w, None, stride=2, padding=1, output_padding=1, groups=2)

    found = thor_fx.factors(lambda p, x: convolve(p["w"], x).sin().mean(), {"w": weight}, x)["w"]
    A, G, rows = expected(convolve, weight, 2, transposed=True)
    assert found.rows == rows
    assert oracle.relative_error(found.A, A) < 1e-10
    assert oracle.relative_error(found.G, G) < 1e-10


def test_channels_last():
    module = nn.Conv2d(CHANNELS, OUT, 3, padding=1).double()
    x = random(BATCH, CHANNELS, 5, 6)
    plain = factors_of(module, x)["weight"]
    module = module.to(memory_format=torch.channels_last)
    found = factors_of(module, x.to(memory_format=torch.channels_last))["weight"]
    assert oracle.relative_error(found.A, plain.A) < 1e-12
    assert oracle.relative_error(found.G, plain.G) < 1e-12


def test_depthwise_layers_have_one_pair_for_every_channel():
    module = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS).double()
    found = factors_of(module, random(BATCH, CHANNELS, 5, 6))["weight"]
    assert (found.A.shape, found.G.shape) == ((CHANNELS, 9, 9), (CHANNELS, 1, 1))


def test_an_input_without_a_batch():
    module = nn.Conv1d(CHANNELS, OUT, 3).double()
    x = random(CHANNELS, 7)
    alone, batched = factors_of(module, x)["weight"], factors_of(module, x[None])["weight"]
    assert oracle.relative_error(alone.A, batched.A) < 1e-12
    assert alone.rows == batched.rows == 5


# --- the bias, and positions that are reduced ------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_joint_bias_is_a_patch_of_ones(groups, transposed, kernel):
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = make(CHANNELS, OUT, kernel, groups=groups).double()
    x, params = random(BATCH, CHANNELS, 4, 5), dict(module.named_parameters())

    def loss_fn(p, x):
        return functional_call(module, p, (x,)).sin().mean()

    joint = thor_fx.factors(loss_fn, params, x, bias="joint")["weight"]
    a = patches(
        lambda w: functional_call(module, {"weight": w}, (x,)), params["weight"].detach(), groups, transposed
    )
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    A = a.mT @ a / a.shape[1]
    assert oracle.relative_error(joint.A, A if groups > 1 else A[0]) < 1e-10


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_reduced_positions(kernel, groups):
    x, weight, convolve = case(2, kernel, 1, 0, 1, groups, False)

    def loss_fn(p, x):
        return convolve(p["w"], x).mean((2, 3)).sin().mean()

    found = thor_fx.factors(loss_fn, {"w": weight}, x, sharing="reduce", batch_size=BATCH)["w"]
    a = patches(convolve, weight, groups, transposed=False).unflatten(1, (BATCH, -1)).mean(2)
    out = convolve(weight).detach().requires_grad_()
    (g,) = torch.autograd.grad(out.mean((2, 3)).sin().mean(), out)
    g = g.sum((2, 3)).unflatten(1, (groups, -1)).movedim(1, 0)  # (groups, batch, out)
    A, G = a.mT @ a / BATCH, BATCH * (g.mT @ g)
    assert found.rows == BATCH
    assert oracle.relative_error(found.A, A if groups > 1 else A[0]) < 1e-10
    assert oracle.relative_error(found.G, G if groups > 1 else G[0]) < 1e-10


# --- exact where K-FAC is exact --------------------------------------------------------------------


def one_position(groups, dilation, stride, mode):
    """A convolution whose output is one pixel, whatever its settings."""
    size = 2 * dilation + 1 - (2 if mode != "none" else 0)
    padding = 1 if mode != "none" else 0
    settings = {"groups": groups, "dilation": dilation, "stride": stride, "padding": padding}
    kind = mode if mode != "none" else "zeros"
    return nn.Conv2d(CHANNELS, OUT, 3, padding_mode=kind, **settings).double(), random(
        1, CHANNELS, size, size
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["none", "zeros", "reflect", "circular"])
def test_one_datum_with_one_output_position_is_exact(groups, dilation, stride, mode):
    if mode in {"reflect", "circular"} and dilation == 1:
        dilation = 2  # these need an input larger than the padding
    module, x = one_position(groups, dilation, stride, mode)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_fn(p, x):
        return functional_call(module, p, (x,)).sin().sum()

    pair = thor_fx.factors(loss_fn, params, x)["weight"]
    assert pair.rows == pair.n == 1
    leaf = params["weight"].clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn({**params, "weight": leaf}, x), leaf)
    rows = g.reshape(groups, -1)
    fisher = rows[:, :, None] * rows[:, None, :]
    A, G = (pair.A, pair.G) if groups > 1 else (pair.A[None], pair.G[None])
    for e in range(groups):
        assert oracle.relative_error(oracle.kronecker(G[e], A[e]), fisher[e]) < 1e-10


# --- memory ----------------------------------------------------------------------------------------


def plain(kernel, stride, padding, dilation, axes):
    return Geometry(*((size,) * axes for size in (kernel, stride, padding, dilation, 0)), transposed=False)


def test_patches_of_a_few_images_at_a_time_are_written_down_on_a_cpu(monkeypatch):
    """Of a strided 3 x 3 kernel that doubles the channels, and never more than the input has."""
    written = []

    def spy(padded, groups, g):
        written.append(patches_of(padded, groups, g))
        return written[-1]

    patches_of = few_images._patches
    monkeypatch.setattr(few_images, "_patches", spy)
    x = random(16, CHANNELS, 8, 8)
    factors_of(nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, 2, padding=1).double(), x)
    assert len(written) == 8  # two images each
    assert max(patches.numel() for patches in written) <= x.numel()


def test_patches_of_one_image_that_are_too_large_are_never_written_down(monkeypatch):
    """Then slices are made, of one tap each, and as large as the output at most."""
    largest = []
    seen_by = gram_module.seen_by

    def spy(padded, geometry, taps, groups):
        found = seen_by(padded, geometry, taps, groups)
        largest.append(found.numel() / padded.numel())
        return found

    monkeypatch.setattr(gram_module, "seen_by", spy)
    factors_of(nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, 2, padding=1).double(), random(2, CHANNELS, 8, 8))
    assert len(largest) == 3 * 2  # taps at once, one example at a time
    assert max(largest) <= 1


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_patches_of_a_few_images_give_what_pairs_of_taps_give(
    axes, transposed, stride, dilation, groups, images, monkeypatch
):
    monkeypatch.setattr(panels, "PANEL", 5)
    g = Geometry(*((size,) * axes for size in (3, stride, 1, dilation, 0)), transposed)
    x = random(3, CHANNELS, *(6, 7, 5)[:axes])
    by_taps = gram_module._mirrored(gram_module.gram_by_taps(x, groups, g, 1), g)
    by_patches = few_images.gram_by_patches(x, groups, g, images).triu()
    assert torch.allclose(by_patches, by_taps.triu(), rtol=0, atol=1e-12 * by_taps.abs().max())


# --- shifts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_shifts_give_what_pairs_of_taps_give(axes, kernel, padding, dilation, groups):
    g = plain(kernel, 1, padding, dilation, axes)
    x = random(3, CHANNELS, *(5, 7, 6)[:axes])
    by_taps = gram_module.gram_by_taps(x, groups, g, 1)
    by_shifts = gram_module.gram_by_shifts(x, groups, g)
    assert torch.allclose(by_shifts, by_taps, rtol=0, atol=1e-12 * by_taps.abs().max())


def test_shifts_of_a_kernel_that_is_longer_along_one_axis():
    g = Geometry((1, 5), (1, 1), (0, 2), (1, 1), (0, 0), transposed=False)
    x = random(3, CHANNELS, 4, 9)
    by_taps = gram_module.gram_by_taps(x, 1, g, 1)
    by_shifts = gram_module.gram_by_shifts(x, 1, g)
    assert torch.allclose(by_shifts, by_taps, rtol=0, atol=1e-12 * by_taps.abs().max())


def test_a_convolution_that_sees_nothing_but_zeros_has_no_a():
    """One pixel between two taps; it is no sum over shifts, because no tap sees a pixel."""
    assert not shifts_pay((BATCH, CHANNELS, 1, 1), plain(2, 1, 1, 2, 2))
    layer = nn.Conv2d(CHANNELS, OUT, 2, padding=1, dilation=2).double()
    pair = factors_of(layer, random(BATCH, CHANNELS, 1, 1))["weight"]
    assert not pair.A.any()
    assert pair.G.any()


def test_shifts_are_taken_where_they_save_half_the_products():
    assert shifts_pay((8, 64, 8, 8), plain(3, 1, 1, 1, 2))
    assert shifts_pay((8, 3, 64, 64), plain(7, 1, 3, 1, 2))
    assert not shifts_pay((8, 64, 8, 8), plain(3, 2, 1, 1, 2))  # most pairs of taps see different pixels
    assert not shifts_pay((8, 64, 8, 8), plain(1, 1, 0, 1, 2))  # there are none
    assert shifts_pay((8, 64, 2, 2), plain(3, 1, 1, 1, 2))  # four pixels, each seen by four taps
    assert not shifts_pay((8, 64, 8, 8, 8), plain(3, 1, 0, 1, 3))  # without zeros around, 125 sets of pixels


# --- both doors ------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(),
            nn.Conv1d(4, 4, 3, groups=2, stride=2), nn.Tanh(),
            nn.ConvTranspose1d(4, 4, 2, groups=4), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x[:, None]).mean(-1))


@pytest.mark.parametrize("bias", ["raw", "joint"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_both_doors_take_the_same_steps(bias, sharing):
    settings = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2, "bias": bias, "sharing": sharing}
    data = batches(4)
    functional = by_functional_door(build_model(SmallNet).eval(), data, **settings)
    model = build_model(SmallNet)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    assert_same(by_drop_in_door(model, data, **settings), functional, rtol=1e-9)
