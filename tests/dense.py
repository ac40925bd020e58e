"""Updates of one step by a dense solve, from factors of :mod:`oracle`."""

import math

import torch
from torch import Tensor

import oracle
import thor_fx
from models import Case


def updates(loss_fn, params, *batch, damping: float = 0.3, **settings) -> dict[str, Tensor]:
    """``U`` of every parameter: a step of the functional door with ``lr=1`` and no momentum."""
    plain = {name: p.detach().clone() for name, p in params.items()}
    tx = thor_fx.thor(lr=1.0, damping=damping, momentum=0.0, **settings)
    step = thor_fx.compile_step(loss_fn, tx, backend="eager", donate=False)
    new, _, _ = step(plain, step.init(plain, *batch), *batch)
    return {name: params[name].detach() - new[name] for name in params}


def kept(matrix: Tensor, how: str | None, block: int = 0) -> Tensor | None:
    """A factor with zeros where it is dropped; None where nothing of it is kept."""
    if how == "identity":
        return None
    place = torch.arange(len(matrix)) // ({"blocks": block, "diagonal": 1}.get(how) or len(matrix))
    return matrix * (place[:, None] == place[None, :])


def solve(
    A: Tensor | None, G: Tensor | None, gradient: Tensor, rule: str = "factor", damping: float = 0.3
) -> Tensor:
    """``vec U = (G_d (x) A_d)^-1 vec gradient``; a factor that is None is left out."""
    a, g = (1.0 if m is None else m.trace().item() / len(m) for m in (A, G))
    pi, root = math.sqrt(a / g) if a > 0 < g else 1.0, math.sqrt(damping)
    damp_a, damp_g = {
        "factor": (damping, damping),
        "sqrt": (root, root),
        "pi": (pi * root, root / pi),
        "relative": (damping * (a or 1), damping * (g or 1)),
    }[rule]
    out, in_ = gradient.shape
    A = torch.eye(in_, dtype=torch.float64) if A is None else oracle.damped(A, damp_a)
    G = torch.eye(out, dtype=torch.float64) if G is None else oracle.damped(G, damp_g)
    return torch.linalg.solve(oracle.kronecker(G, A), gradient.flatten()).view_as(gradient)


def case(forward, params, *batch, layers=(), terms, groups=None, loss_fn=None) -> Case:
    """What the oracle needs to know; only names of layers matter to it."""
    names = dict.fromkeys(layers or params, (0, 0))
    return Case("", loss_fn or forward, forward, dict(params), batch, names, terms, None, groups=groups or {})


def assert_factors(found, expected: dict[str, oracle.Pair], tolerance: float = 1e-10) -> None:
    """Every layer has the pair that is expected of it, and there are no others."""
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        A = oracle.kept(pair.A, found[name].A)
        assert found[name].A.shape == A.shape, name
        assert found[name].G.shape == pair.G.shape, name
        assert oracle.relative_error(found[name].A, A) < tolerance, name
        assert oracle.relative_error(found[name].G, pair.G) < tolerance, name
        assert found[name].rows == pair.rows, name


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    """Two tensors agree."""
    assert one.shape == other.shape
    assert oracle.relative_error(one, other) < tolerance
