"""One rule per operator that a gradient may end in, on gradients written by hand."""

import re

import pytest
import torch
from functorch import make_fx
from torch import fx

from thor_fx.passes import (
    Factor,
    Grad,
    Input,
    Output,
    Param,
    Tangent,
    canonicalize,
    emit_factors,
    find_sites,
    outputs,
    run,
)
from thor_fx.passes.reindex import Narrow, Permute

OUT, IN, ROWS = 3, 4, 6
aten = torch.ops.aten


def traced(gradient, *arguments):
    """A graph in which the gradient of ``w`` is ``gradient(x, t)``, of rows (R, in) and (R, out)."""

    def step(w, x, t):
        return [w.sum() + x.sum(), gradient(x, t)]

    gm = make_fx(step, tracing_mode="fake")(*arguments)
    outputs.describe(gm, [Param("w"), Input(0), Tangent(0)], [Output(0), Grad("w")])
    return gm


def report(gradient, *shape):
    """What is found in it."""
    arguments = torch.ones(shape or (OUT, IN)), torch.ones(ROWS, IN), torch.ones(ROWS, OUT)
    gm = traced(gradient, *arguments)
    found, canonical = find_sites(gm), find_sites(run(gm, [canonicalize]))
    assert found.reasons.keys() == canonical.reasons.keys()
    assert [(s.layer, s.dims, s.path) for s in found.sites] == [
        (s.layer, s.dims, s.path) for s in canonical.sites
    ]
    return found


def layers(gradient, *shape):
    found = report(gradient, *shape)
    assert found.reasons == {}
    return [(site.layer, site.dims, site.path) for site in found.sites]


def reason(gradient, *shape):
    found = report(gradient, *shape)
    assert found.sites == ()
    return found.reasons["w"]


def product(x, t):
    return t.T @ x


WHOLE = ("w", (OUT, IN), ())


@pytest.mark.parametrize(
    ("gradient", "uses"),
    [
        (product, 1),
        (lambda x, t: (t * 2).T @ x.tanh(), 1),
        (lambda x, t: (x.T @ t).T, 1),
        (lambda x, t: (t.T @ x).clone().detach(), 1),
        (lambda x, t: (t.T @ x).double(), 1),
        (lambda x, t: (t.T @ x).view(-1).view(OUT, IN), 1),
        (lambda x, t: torch.bmm(t.T[None], x[None]).squeeze(0), 1),
        (lambda x, t: torch.bmm(x.T[None], t[None]).squeeze(0).T, 1),
        (lambda x, t: t.T @ x + (x.T @ t).T, 2),
        (lambda x, t: (t.T @ x + t.T @ x) + t.T @ x, 3),
        (lambda x, t: torch.addmm(t.T @ x, t.T, x), 2),
        (lambda x, t: t.T @ x + torch.zeros(OUT, IN), 1),
        (lambda x, t: t.T @ x + torch.zeros_like(x[:OUT]), 1),
        (lambda x, t: t.T @ x + x.new_zeros(OUT, IN), 1),
        (lambda x, t: t.T @ x + torch.full((OUT, IN), 0.0), 1),
        (lambda x, t: t.T @ x + x.new_full((OUT, IN), 0.0), 1),
        (lambda x, t: torch.bmm(t.view(2, 3, OUT).mT, x.view(2, 3, IN)).sum(0), 1),
        (lambda x, t: torch.bmm(x.view(2, 3, IN).mT, t.view(2, 3, OUT)).mT.sum(0), 1),
        (lambda x, t: torch.bmm(x.view(2, 3, IN).mT, t.view(2, 3, OUT)).sum(0).T, 1),
        (lambda x, t: t[0].unsqueeze(-1) * x[0], 1),
        (lambda x, t: x[0] * t[0].unsqueeze(-1), 1),
        (lambda x, t: t[:1].T * x[:1], 1),
        (lambda x, t: (x[0].unsqueeze(-1) * t[0]).T, 1),
    ],
)
def test_one_site_for_every_contraction(gradient, uses):
    assert layers(gradient) == [WHOLE] * uses


def test_the_transpose_of_a_product_is_a_weight_that_is_stored_as_in_by_out():
    assert layers(lambda x, t: x.T @ t, IN, OUT) == [("w", (OUT, IN), (Permute((1, 0)),))]


def test_operands_are_told_apart_by_where_they_come_from():
    (site,) = report(lambda x, t: t.sin().T @ x.cos()).sites
    assert site.activation.node.target is aten.cos.default
    assert site.cotangent.node.target is aten.sin.default
    assert (site.activation.rows, site.cotangent.rows) == (ROWS, ROWS)


def parts(*slices, axis=0):
    return [Narrow(axis, start, stop) for start, stop in slices]


def test_pieces_that_are_joined_are_layers_of_their_own():
    first, second = parts((0, OUT), (OUT, 2 * OUT))
    assert layers(lambda x, t: torch.cat([t.T @ x, t.T @ x]), 2 * OUT, IN) == [
        ("w[0:3]", (OUT, IN), (first,)),
        ("w[3:6]", (OUT, IN), (second,)),
    ]


def test_pieces_may_be_joined_along_another_axis():
    for axis in (1, -1):
        got = layers(lambda x, t, axis=axis: torch.cat([t.T @ x, t.T @ x], axis), OUT, 2 * IN)
        assert [name for name, _, _ in got] == ["w[:, 0:4]", "w[:, 4:8]"]


@pytest.mark.parametrize(
    "gradient",
    [
        lambda x, t: torch.cat([torch.zeros(2, IN), t.T @ x, torch.zeros(1, IN)]),
        lambda x, t: aten.slice_backward(t.T @ x, [6, IN], 0, 2, 5, 1),
        lambda x, t: aten.slice_backward(t.T @ x, [6, IN], 0, -4, -1, 1),
        lambda x, t: aten.slice_scatter(torch.zeros(6, IN), t.T @ x, 0, 2, 5),
        lambda x, t: aten.slice_scatter(torch.zeros(6, IN), t.T @ x, -2, -4, -1, 1),
    ],
)
def test_a_piece_among_zeros(gradient):
    assert layers(gradient, 6, IN) == [("w[2:5]", (OUT, IN), (Narrow(0, 2, 5),))]


def test_pieces_without_an_end():
    assert layers(lambda x, t: aten.slice_scatter(torch.zeros(6, IN), t.T @ x, 0, 3), 6, IN) == [
        ("w[3:6]", (OUT, IN), (Narrow(0, 3, 6),))
    ]
    assert layers(lambda x, t: aten.slice_backward(t.T @ x, [6, IN], 0, 3, 2**63 - 1, 1), 6, IN) == [
        ("w[3:6]", (OUT, IN), (Narrow(0, 3, 6),))
    ]


@pytest.mark.parametrize(
    ("gradient", "text"),
    [
        (lambda x, t: torch.zeros(OUT, IN), "its gradient is zero"),
        (lambda x, t: t.T @ x + torch.ones(OUT, IN), "ones"),
        (lambda x, t: t.T @ x + x.new_full((OUT, IN), 2.0), "new_full"),
        (lambda x, t: torch.addmm(t.T @ x, t.T, x, alpha=2), "addmm .*with a factor"),
        (lambda x, t: torch.addmm(t.T @ x, t.T, x, beta=2), "addmm .*with a factor"),
        (lambda x, t: t.T @ x + t.sum(0, keepdim=True).T, "add <- mm"),
        (lambda x, t: t.T @ x + 1.0, "add <- mm"),
        (lambda x, t: t.T @ (x * t.sum()), "both or none of its operands"),
        (lambda x, t: x[:, :OUT].T @ x, "both or none of its operands"),
        (lambda x, t: torch.bmm(t.view(2, 3, OUT).mT, x.view(2, 3, IN)).sum(0) * t.sum(), "mul <- sum"),
        (lambda x, t: (t.T @ x) * torch.eye(OUT, IN), "mul <- mm"),
        (lambda x, t: (t.T @ x).tanh(), "tanh <- mm"),
        (lambda x, t: t[:OUT, :1] * x[0, 0].expand(OUT, IN), "(mul|expand) <- "),
        (lambda x, t: t[:OUT, :1].expand(OUT, IN) * x[0], "(mul|expand) <- "),
    ],
)
def test_whatever_is_no_contraction_is_named(gradient, text):
    assert_matches(reason(gradient), text)


def assert_matches(got, pattern):
    assert re.search(pattern, got), got


@pytest.mark.parametrize(
    ("gradient", "shape", "text"),
    [
        (lambda x, t: aten.slice_backward(t.T @ x, [6, IN], 0, 0, 6, 2), (6, IN), "with a stride"),
        (lambda x, t: aten.slice_scatter(torch.ones(6, IN), t.T @ x, 0, 0, 3), (6, IN), "slice_scatter"),
        (lambda x, t: t.sum(0), (OUT,), "a vector: its gradient is sum <- "),
        (lambda x, t: torch.bmm(t.view(2, 3, OUT).mT, x.view(2, 3, IN)).sum(1), (2, IN), "sum <- bmm"),
    ],
)
def test_other_shapes_that_are_no_contraction(gradient, shape, text):
    assert_matches(reason(gradient, *shape), text)


def test_one_piece_that_is_no_contraction_spoils_the_parameter():
    assert "tanh" in reason(lambda x, t: torch.cat([t.T @ x, (t.T @ x).tanh()]), 2 * OUT, IN)


@pytest.mark.parametrize(
    ("gradient", "squares"),
    [
        (lambda a, b: torch.add(a, b, alpha=3), 1 + 9),
        (lambda a, b: torch.sub(a, b, alpha=3), 1 + 9),
        (lambda a, b: 2 * torch.sub(a, torch.add(b, a, alpha=2), alpha=3), 4 * (1 + 9 + 36)),
        (lambda a, b: (a - b) / 2, (1 + 1) / 4),
    ],
)
def test_every_summand_has_its_factor(gradient, squares):
    random = torch.Generator().manual_seed(0)
    x, t = torch.randn(ROWS, IN, generator=random), torch.randn(ROWS, OUT, generator=random)
    arguments = torch.ones(OUT, IN), x, t
    gm = traced(lambda x, t: gradient(t.T @ x, t.T @ x.tanh()), *arguments)
    emit_factors(gm)
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.run(*arguments)
    found = interpreter.env[outputs.output_nodes(gm)[Factor("w", "G")]]
    torch.testing.assert_close(found, squares * t.T @ t)
