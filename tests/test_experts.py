"""Weights that hold one matrix for every expert: a factor pair for each, over its own rows."""

import pytest
import torch
from torch import nn

import oracle
import thor_fx
from dense import case, close, solve, updates
from models import random
from training import IN, assert_moved, batches, build, by_both_doors, snapshot

D = torch.float64
E, ROWS, WIDTH, OUT = 3, 6, 4, 5
OUT_IN, IN_OUT = random(1, D, E, OUT, WIDTH), random(2, D, E, WIDTH, OUT)
X, EACH = random(3, D, ROWS, WIDTH), random(4, D, E, ROWS, WIDTH)
ROUTES = torch.tensor([0, 2, 2, 0, 2, 0])  # nobody asks the second expert


def loss_of(s):
    return s.sin().sum(-1).mean()


def pairs(forward, w, *batch, terms):
    """``A`` (E, in, in) and ``G`` (E, out, out), expert by expert; zero for an expert without rows."""
    uses = oracle.uses(case(forward, {"w": w}, *batch, layers=[str(e) for e in range(E)], terms=terms))
    A, G = [], []
    for e in range(E):
        a, g = uses[str(e)][0]
        A.append(
            sum((torch.outer(r, r) for r in a), start=torch.zeros(WIDTH, WIDTH, dtype=D)) / max(1, len(a))
        )
        G.append(terms * sum((torch.outer(r, r) for r in g), start=torch.zeros(OUT, OUT, dtype=D)))
    return torch.stack(A), torch.stack(G)


def by_slices(matrix):
    """Expert ``e`` multiplies slice ``e`` of the input."""

    def forward(tap, p, x):
        return loss_of(torch.stack([tap(str(e), x[e], x[e] @ matrix(p["w"][e]).T) for e in range(E)]))

    return forward


def by_routes(matrix):
    """Expert ``e`` multiplies the rows that ask for it."""

    def forward(tap, p, x, routes):
        total = 0
        for e in range(E):
            mine = x[routes == e]
            total = total + tap(str(e), mine, mine @ matrix(p["w"][e]).T).sin().sum()
        return total / len(x)

    return forward


def same(m):
    return m


def turned(m):
    return m.mT


EVERY = {
    "bmm": (IN_OUT, turned, lambda w, x: torch.bmm(x, w)),
    "bmm of the transpose": (OUT_IN, same, lambda w, x: torch.bmm(x, w.mT)),
    "the weight on the left": (OUT_IN, same, lambda w, x: torch.bmm(w, x.mT).mT),
    "matmul": (IN_OUT, turned, lambda w, x: x @ w),
    "einsum": (IN_OUT, turned, lambda w, x: torch.einsum("ebi,eio->ebo", x, w)),
    "einsum, rows first": (OUT_IN, same, lambda w, x: torch.einsum("bei,eoi->beo", x.transpose(0, 1), w)),
    "per head": (
        IN_OUT,
        turned,
        lambda w, x: torch.einsum("bthd,hdk->bthk", x.transpose(0, 1).unflatten(0, (2, 3)), w),
    ),
}
ROUTED = {
    "bmm": (OUT_IN, same, lambda w, x, r: torch.bmm(w[r], x[:, :, None])[:, :, 0]),
    "row times matrix": (IN_OUT, turned, lambda w, x, r: torch.bmm(x[:, None], w[r])[:, 0]),
    "matmul": (OUT_IN, same, lambda w, x, r: (w[r] @ x[:, :, None])[:, :, 0]),
    "index_select": (OUT_IN, same, lambda w, x, r: torch.bmm(w.index_select(0, r), x[:, :, None])[:, :, 0]),
    "einsum": (OUT_IN, same, lambda w, x, r: torch.einsum("soi,si->so", w[r], x)),
    "einsum of the transpose": (IN_OUT, turned, lambda w, x, r: torch.einsum("si,sio->so", x, w[r])),
}


def check(w, matrix, loss_fn, forward, batch, terms):
    """Factors, and the update against a dense solve of every expert."""
    A, G = pairs(forward, w, *batch, terms=terms)
    found = thor_fx.factors(loss_fn, {"w": w}, *batch)["w"]
    assert (found.groups, found.n) == (E, terms)
    assert found.A.shape == (E, WIDTH, WIDTH)
    close(found.A, A)
    close(found.G, G)
    gradient = oracle.loss_and_gradients(case(forward, {"w": w}, *batch, terms=terms))[1]["w"]
    for rule in ("factor", "sqrt"):
        U = updates(loss_fn, {"w": w}, *batch, damping_rule=rule)["w"]
        expected = [matrix(solve(A[e], G[e], matrix(gradient[e]), rule)) for e in range(E)]
        close(U, torch.stack(expected))
    return found


@pytest.mark.parametrize("how", EVERY)
def test_every_expert_has_a_slice_of_the_input(how):
    w, matrix, multiply = EVERY[how]
    batch, terms = (EACH,), E * ROWS

    def loss_fn(p, x):
        return loss_of(multiply(p["w"], x))

    # the terms are read as the rows of one slice: what the loss averages over besides the slices
    found = thor_fx.factors(loss_fn, {"w": w}, *batch)["w"]
    A, G = pairs(by_slices(matrix), w, *batch, terms=terms)
    assert found.A.shape == (E, WIDTH, WIDTH)
    close(found.A, A)
    close(found.G * (terms / found.n), G)
    given = thor_fx.factors(loss_fn, {"w": w}, *batch, batch_size=terms)["w"]
    assert given.n == terms
    close(given.A, A)
    close(given.G, G)
    gradient = oracle.loss_and_gradients(case(by_slices(matrix), {"w": w}, *batch, terms=1))[1]["w"]
    U = updates(loss_fn, {"w": w}, *batch, batch_size=terms, damping_rule="pi")["w"]
    close(U, torch.stack([matrix(solve(A[e], G[e], matrix(gradient[e]), "pi")) for e in range(E)]))


@pytest.mark.parametrize("how", ROUTED)
def test_terms_that_are_given_scale_the_cotangents_of_every_expert(how):
    w, matrix, multiply = ROUTED[how]
    A, G = pairs(by_routes(matrix), w, X, ROUTES, terms=50)
    found = thor_fx.factors(
        lambda p, x, r: loss_of(multiply(p["w"], x, r)), {"w": w}, X, ROUTES, batch_size=50
    )["w"]
    assert found.n == 50
    close(found.A, A)
    close(found.G, G)


@pytest.mark.parametrize("how", ROUTED)
def test_every_row_gathers_the_matrix_of_its_expert(how):
    w, matrix, multiply = ROUTED[how]

    def loss_fn(p, x, routes):
        return loss_of(multiply(p["w"], x, routes))

    found = check(w, matrix, loss_fn, by_routes(matrix), (X, ROUTES), ROWS)
    assert found.kind == "expert"
    assert found.A[1].count_nonzero() == 0


def test_an_expert_without_rows_does_not_move():
    w, _, multiply = ROUTED["bmm"]
    U = updates(lambda p, x, r: loss_of(multiply(p["w"], x, r)), {"w": w}, X, ROUTES)["w"]
    assert U[1].count_nonzero() == 0
    assert U[0].count_nonzero() == U[2].count_nonzero() == OUT * WIDTH


@pytest.mark.parametrize("how", ["unbind", "index"])
def test_matrices_that_are_taken_one_by_one_are_layers(how):
    def loss_fn(p, x):
        each = p["w"].unbind() if how == "unbind" else [p["w"][e] for e in range(E)]
        return loss_of(torch.stack([x[e] @ m.T for e, m in enumerate(each)]))

    A, G = pairs(by_slices(same), OUT_IN, EACH, terms=ROWS)
    found = thor_fx.factors(loss_fn, {"w": OUT_IN}, EACH, batch_size=ROWS)
    assert set(found) == {f"w[{e}:{e + 1}]" for e in range(E)}
    for e in range(E):
        close(found[f"w[{e}:{e + 1}]"].A, A[e])
        close(found[f"w[{e}:{e + 1}]"].G, G[e])


def test_matrices_that_are_stacked_first_say_why_they_have_no_factors():
    def loss_fn(p, x):
        return loss_of(torch.bmm(x, torch.stack([p["a"], p["b"]])))

    params = {"a": IN_OUT[0], "b": IN_OUT[1]}
    fallback = thor_fx.explain(loss_fn, params, EACH[:2]).coverage.fallback
    assert {name: "select <- bmm" in reason for name, reason in fallback.items()} == {"a": True, "b": True}


BEFORE_2_15 = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 15)
DTYPES = [
    pytest.param(torch.bfloat16, 0.01, id="bfloat16"),  # rounding is that of eight bits
    pytest.param(
        torch.float32,
        1e-5,
        id="float32",
        marks=pytest.mark.skipif(BEFORE_2_15, reason="fake tensors know _grouped_mm for bfloat16 only"),
    ),
]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("turn", [False, True])
def test_grouped_products_of_sorted_rows(turn, dtype, tolerance):
    """Torch 2.11 and 2.13 cannot trace this operator in float32, although it runs."""
    sizes, offsets = [2, 0, 4], torch.tensor([2, 2, 6], dtype=torch.int32)
    x, w = random(5, dtype, ROWS, 8), random(6, dtype, E, 8, 16)
    w = w.mT.contiguous() if turn else w

    def loss_fn(p, x, offsets):
        s = torch._grouped_mm(x, p["w"].mT if turn else p["w"], offs=offsets)
        return loss_of(s.float())

    found = thor_fx.factors(loss_fn, {"w": w}, x, offsets)["w"]
    assert (found.A.shape, found.G.shape, found.n) == ((E, 8, 8), (E, 16, 16), ROWS)
    m = (w.mT if turn else w).to(D)
    for e, rows in enumerate(x.to(D).split(sizes)):
        s = (rows @ m[e]).to(dtype).to(D)
        g = s.cos() / ROWS
        assert oracle.relative_error(found.A[e].to(D), rows.T @ rows / max(1, len(rows))) < tolerance
        assert oracle.relative_error(found.G[e].to(D), ROWS * g.T @ g) < 2 * tolerance


class Experts(nn.Module):
    """Rows are sent to experts by the sign of a feature; every slice of the second weight sees all rows."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, WIDTH, IN) / 2)
        self.heads = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 2)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x):
        routes = (x[:, 0] > 0).long()
        h = torch.bmm(self.up[routes], x[:, :, None])[:, :, 0].tanh()
        return self.out(torch.einsum("bi,hio->bho", h, self.heads).tanh().sum(1))


@pytest.mark.parametrize("rule", ["factor", "pi"])
def test_both_doors_take_the_same_steps(rule):
    settings = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2, "damping_rule": rule}
    data = batches(4)
    trajectory = by_both_doors(lambda: build(Experts), data, 1e-10, **settings)
    assert_moved(trajectory, snapshot(dict(build(Experts).named_parameters())))
