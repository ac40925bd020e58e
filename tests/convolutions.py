"""Factors of convolutions by autograd: the gradient of one output pixel is the patch that it sees."""

import torch
import torch.nn.functional as F

CONVOLUTIONS = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
CHANNELS, OUT, BATCH = 4, 8, 2


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patches(convolve, weight, groups, transposed):
    """What every output pixel sees: (groups, pixels, in) in the order of the weight, by autograd."""
    leaf = weight.clone().requires_grad_()
    out = convolve(leaf)  # linear in the weight: its gradient at one pixel of one channel is the patch
    per_group = out.shape[1] // groups
    found = []
    for e in range(groups):
        rows = []
        for pixel in out[:, e * per_group].flatten():
            (g,) = torch.autograd.grad(pixel, leaf, retain_graph=True)
            own = (
                g[e * CHANNELS // groups : (e + 1) * CHANNELS // groups, 0]
                if transposed
                else g[e * per_group]
            )
            rows.append(own.flatten())
        found.append(torch.stack(rows))
    return torch.stack(found)


def expected(convolve, weight, groups, transposed):
    """``A``, ``G`` and the rows for the loss ``mean(sin(output))``."""
    a = patches(convolve, weight, groups, transposed)  # (groups, rows, in)
    out = convolve(weight).detach().requires_grad_()
    (g,) = torch.autograd.grad(out.sin().mean(), out)
    g = g.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # (groups, rows, out)
    rows = a.shape[1]
    A = torch.stack([sum(torch.outer(r, r) for r in e) / rows for e in a])
    G = torch.stack([rows * sum(torch.outer(r, r) for r in e) for e in g])
    return (A, G, rows) if groups > 1 else (A[0], G[0], rows)


def case(axes, kernel, stride, padding, dilation, groups, transposed):
    """The input, the weight and the convolution as a function of the weight; None where it has no output."""
    convolution = CONVOLUTIONS[axes, transposed]
    x = random(BATCH, CHANNELS, *((5 if axes < 3 else 3) + i % 2 for i in range(axes)))
    sides = (CHANNELS, OUT // groups) if transposed else (OUT, CHANNELS // groups)
    weight = random(*sides, *[kernel] * axes, seed=1)

    def convolve(w, x=x):
        return convolution(x, w, None, stride=stride, padding=padding, dilation=dilation, groups=groups)

    try:
        convolve(weight)
    except RuntimeError:
        return None
    return x, weight, convolve
