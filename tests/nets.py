"""Small nets with positions, for tests of estimators."""

import torch
import torch.nn.functional as F

import ggn
import oracle
import thor_fx

B, T, D, C = 3, 2, 4, 3


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


X = seeded(lambda: data(B, T, D))
LABELS = torch.tensor([[0, 2], [1, -100], [2, 0]])
IMAGES = seeded(lambda: data(2, 2, 4, 4))


def tokens(tap, p, x):
    """Two tokens that look at each other: (B, T, C)."""
    q, k, v = tap("qkv", x, x @ p["qkv"].T).chunk(3, -1)
    mixed = (q @ k.mT).softmax(-1) @ v
    return tap("head", mixed, mixed @ p["head"].T)


def tokens_params():
    return {"qkv": data(3 * D, D) / 2, "head": data(C, D)}


def flat_tokens(tap, p, x):
    return tokens(tap, p, x).flatten(0, 1)


def early_flat_tokens(tap, p, x):
    """Flattened before the head."""
    q, k, v = tap("qkv", x, x @ p["qkv"].T).chunk(3, -1)
    mixed = ((q @ k.mT).softmax(-1) @ v).reshape(-1, D)
    return tap("head", mixed, mixed @ p["head"].T)


def pooled(tap, p, x):
    """One row per datum; the tokens are positions of the first layer."""
    hidden = tap("w", x, x @ p["w"].T).tanh().mean(1)
    return tap("v", hidden, hidden @ p["v"].T)


def pooled_params():
    return {"w": data(5, D), "v": data(C, 5)}


def convolution(tap, p, x):
    """A convolution, as the product of its patches with the weight."""
    patches = F.unfold(x, 3, padding=1, stride=2).mT  # (B, positions, 18)
    made = tap("conv", patches, patches @ p["conv"].flatten(1).T)
    return _classify(tap, p, made.mT.flatten(1))


def real_convolution(p, x):
    return _classify(ggn.plain, p, F.conv2d(x, p["conv"], padding=1, stride=2).flatten(1))


def _classify(tap, p, flat):
    hidden = flat.tanh()
    return tap("fc", hidden, hidden @ p["fc"].T)


def convolution_params():
    return {"conv": data(3, 2, 3, 3) / 3, "fc": data(C, 12)}


def recurrent(tap, p, x):
    hidden = torch.zeros(len(x), 4, dtype=torch.float64)
    for t in range(x.shape[1]):
        hidden = (tap("in", x[:, t], x[:, t] @ p["in"].T) + tap("rec", hidden, hidden @ p["rec"].T)).tanh()
    return tap("out", hidden, hidden @ p["out"].T)


def recurrent_params():
    return {"in": data(4, D), "rec": data(4, 4), "out": data(C, 4)}


def cross_entropy(z):
    if z.dim() == 1:
        return F.cross_entropy(z.reshape(B, T), LABELS[:, 0].clamp(max=1))
    return F.cross_entropy(z.flatten(0, -2), LABELS.flatten()[: z.flatten(0, -2).shape[0]])


def mse(z):
    return (z - 0.3).square().mean()


def bce(z):
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.7))


def scalars(tap, p, x):
    """One number per token, flattened: (B T,)."""
    return tokens(tap, p, x).flatten()


def exact(net, params, loss, *inputs, **options):
    options = {"fisher": "exact", **options}
    return thor_fx.factors(lambda p, *x: loss(net(ggn.plain, p, *x)), params, *inputs, **options)


def assert_pairs(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert oracle.relative_error(found[name].A, pair.A) < tolerance, name
        assert oracle.relative_error(found[name].G, pair.G) < tolerance, name
