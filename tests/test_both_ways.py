"""A weight that is used as W and as W.T: two sites, one factor pair."""

import torch
from torch.nn import functional as F

import thor_fx
from thor_fx.passes import canonicalize, find_sites, pipeline


def _auto_encoder(params, x):
    return (torch.tanh(F.linear(x, params["w"])) @ params["w"] - x).square().mean()


def _case():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return {"w": w}, x


def _samples(w, x):
    """Rows and their cotangents of both uses, by hand."""
    s = (x @ w.T).requires_grad_()
    h = torch.tanh(s)
    y = (h @ w).requires_grad_()
    g_y = torch.autograd.grad((y - x).square().mean(), y, retain_graph=True)[0]
    g_s = (g_y @ w.T) * (1 - h**2)
    return x, g_s.detach(), h.detach(), g_y.detach()


def test_both_uses_are_sites_of_one_layer():
    params, x = _case()
    report = find_sites(pipeline.run(thor_fx.trace_step(_auto_encoder, params, x), [canonicalize]))
    assert {name: len(sites) for name, sites in report.layers.items()} == {"w": 2}
    assert [site.dims for site in report.sites] == [(3, 5), (3, 5)]
    assert sorted(site.flipped for site in report.sites) == [False, True]


def test_the_factors_are_the_nearest_product_to_the_sum_of_two():
    params, x = _case()
    a, g, a_flipped, g_flipped = (rows.T @ rows for rows in _samples(params["w"], x))
    n = len(x)
    a, g, a_flipped, g_flipped = a / n, n * g, a_flipped / n, n * g_flipped
    pi = ((g.trace() * g_flipped.trace()) / (a.trace() * a_flipped.trace())) ** 0.5
    found = thor_fx.factors(_auto_encoder, params, x)["w"]
    torch.testing.assert_close(found.A, a + g_flipped / pi, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.G, g + pi * a_flipped, rtol=1e-10, atol=0)
    assert (found.rows, found.n) == (2 * n, n)

    def cross_terms(scale):
        extra = torch.kron(g, g_flipped) / scale + scale * torch.kron(a_flipped, a)
        return torch.trace(extra)

    assert cross_terms(pi) < min(cross_terms(0.9 * pi), cross_terms(1.1 * pi))


class _TiedAutoEncoder(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(w.clone())

    def forward(self, x):
        return torch.tanh(F.linear(x, self.w)) @ self.w


def test_both_doors_agree():
    params, x = _case()
    model = thor_fx.compile(_TiedAutoEncoder(params["w"]), backend="aot_eager")
    opt = thor_fx.Thor(model, lr=0.02, damping=0.1, momentum=0.9, frequency=2)
    tx = thor_fx.thor(lr=0.02, damping=0.1, momentum=0.9, frequency=2)
    step = thor_fx.compile_step(_auto_encoder, tx, backend="eager")
    state = step.init(params, x)
    first = None
    for _ in range(5):
        params, state, out = step(params, state, x)
        first = out.loss if first is None else first
        (model(x) - x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(model.w.detach(), params["w"], rtol=1e-12, atol=0)
    assert out.loss < first
