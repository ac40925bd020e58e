"""Factors over a data set are those of one batch with all data; as an operator they are its dense matrix."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx

ROWS = 13  # not a multiple of a batch
EVERY_FISHER = pytest.mark.parametrize("fisher", ["empirical", "exact"])


class Words(nn.Module):
    """A table of words, grouped convolutions over them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.head = nn.Embedding(7, 4), nn.Conv1d(4, 6, 2, groups=2), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.words(ids).mT).relu().mean(-1))


def built(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randint(3, (ROWS,))
    if name == "words":
        return Words().double(), torch.randint(7, (ROWS, 5)), y
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model.double(), torch.randn(ROWS, 4, dtype=torch.float64), y


def at_once(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> thor_fx.Factors:
    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    return thor_fx.factors(loss_fn, dict(model.named_parameters()), x, y, **options)


def assert_equal(found: thor_fx.Factors, expected: thor_fx.Factors) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(found[name].A, pair.A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[name].G, pair.G, rtol=1e-10, atol=1e-12)
        assert (found[name].rows, found[name].n) == (pair.rows, pair.n)


@EVERY_FISHER
@pytest.mark.parametrize("name", ["perceptron", "words"])
def test_batches_together_are_one_batch(name, fisher):
    model, x, y = built(name)
    loader = list(zip(x.split(4), y.split(4), strict=True))
    found = thor_fx.factors(model, F.cross_entropy, loader, fisher=fisher)
    assert_equal(found, at_once(model, x, y, fisher=fisher))


def test_joint_biases_and_a_scaled_loss():
    model, x, y = built("perceptron")
    options: dict[str, Any] = {"bias": "joint", "loss_scale": 8.0}
    loader = zip(x.split(5), y.split(5), strict=True)

    def scaled(out: Tensor, y: Tensor) -> Tensor:
        return 8 * F.cross_entropy(out, y)

    assert_equal(thor_fx.factors(model, scaled, loader, **options), at_once(model, x, y, bias="joint"))


class WithLoss(nn.Module):
    """Takes and returns what models of transformers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.inner(inputs)
        return {"loss": F.cross_entropy(out, labels), "logits": out}


def test_batches_that_are_mappings_and_models_that_return_their_loss():
    model, x, y = built("perceptron")
    parts = zip(x.split(4), y.split(4), strict=True)
    loader = [{"inputs": inputs, "labels": labels} for inputs, labels in parts]
    found = thor_fx.factors(WithLoss(model), lambda out: out["loss"], loader)
    expected = at_once(model, x, y)
    assert_equal(thor_fx.Factors({n[6:]: p for n, p in found.items()}, {}, {}), expected)

    class Alone(WithLoss):
        def forward(self, batch: Tensor) -> Tensor:
            return self.inner(batch).square().mean()

    square = thor_fx.factors(Alone(model), None, [x])
    assert square.keys() == found.keys()


def test_a_model_in_training_mode_is_left_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    thor_fx.factors(model, F.mse_loss, [(torch.randn(6, 4), torch.randn(6, 2))])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((F.mse_loss, []), {}, ValueError, "loader must yield at least one batch"),
        (("mse", []), {}, TypeError, r"needs a loss function of the model's output, or None, got "),
        ((F.mse_loss,), {}, TypeError, "takes one loader, got 0 arguments"),
        ((F.mse_loss, []), {"batch_size": 3}, ValueError, "batch_size is that of one batch"),
        ((F.mse_loss, []), {"backend": "xla"}, ValueError, "backend must be one of"),
        ((F.mse_loss, []), {"fisher": "true"}, ValueError, "fisher must be one of"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        thor_fx.factors(nn.Linear(2, 2), *arguments, **options)


def test_batches_that_use_other_layers_are_refused():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(3, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) if x.shape[1] == 3 else self.narrow(x)

    with pytest.raises(ValueError, match=r"different layers of model: \['wide.weight'\], and now \['narrow"):
        thor_fx.factors(Either(), lambda out: out.mean(), [torch.ones(2, 3), torch.ones(2, 2)])


def test_a_progress_bar_is_shown_where_one_is_asked_for(capsys):
    pytest.importorskip("tqdm")
    thor_fx.factors(nn.Linear(2, 1), lambda out: out.mean(), [torch.ones(2, 2)], progress=True)
    assert "factors: " in capsys.readouterr().err
    thor_fx.factors(nn.Linear(2, 1), lambda out: out.mean(), [torch.ones(2, 2)])
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


# --- the operator ------------------------------------------------------------------------------------------


def dense(found: thor_fx.Factors) -> Tensor:
    """The curvature of the covered weights as a matrix, block by block."""
    blocks = []
    for name, pair in found.items():
        a = torch.diag(pair.A) if pair.A.dim() == 1 else pair.A
        if found.layers[name].kind == "embedding":
            blocks.append(torch.kron(a, pair.G))  # a table is (in, out)
        else:
            many = [(a, pair.G)] if pair.groups == 1 else zip(pair.A, pair.G, strict=True)
            blocks += [torch.kron(g, a) for a, g in many]
    return torch.block_diag(*blocks)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["perceptron", "words"])
def found(request) -> thor_fx.Factors:
    return at_once(*built(request.param))


def test_products_solutions_and_numbers_are_those_of_the_matrix(found):
    operator, matrix = found.operator(damping=0.1, scale=5.0), 5 * dense(found)
    matrix += 0.1 * torch.eye(len(matrix), dtype=matrix.dtype)
    assert operator.shape == tuple(matrix.shape)
    v = random(len(matrix), 3)
    torch.testing.assert_close(operator @ v, matrix @ v)
    torch.testing.assert_close(operator @ v[:, 0], matrix @ v[:, 0])
    torch.testing.assert_close(operator.solve(v), torch.linalg.solve(matrix, v))
    torch.testing.assert_close(operator.power(0.5, operator.power(0.5, v)), matrix @ v)
    torch.testing.assert_close(operator.logdet(), torch.logdet(matrix))
    torch.testing.assert_close(operator.trace(), matrix.trace())
    other = operator.with_damping(0.2)
    torch.testing.assert_close(other @ v, operator @ v + 0.1 * v)
    torch.testing.assert_close(other.solve(other @ v), v)


def test_draws_have_the_inverse_as_covariance():
    operator = at_once(*built("perceptron")).operator(damping=0.5)
    draws = operator.sample(20_000, torch.Generator().manual_seed(0))
    covariance = draws @ draws.T / draws.shape[1]
    expected = operator.solve(torch.eye(operator.shape[0], dtype=torch.float64))
    assert float((covariance - expected).norm() / expected.norm()) < 0.1


def test_vectors_are_parameters_in_the_order_of_the_model(found):
    operator = found.operator()
    tensors = {name: random(*shape) for name, shape in found.shapes.items()}
    flat = operator.join(tensors)
    again = operator.split(flat)
    assert list(again) == [name for name in found.shapes if name.endswith("weight")]
    assert all(torch.equal(again[name], tensors[name]) for name in again)


def test_scipy_can_use_it(found):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = found.operator(damping=0.1)
    b = random(operator.shape[0])
    x, failed = linalg.cg(operator.to_scipy(), b.numpy(), rtol=1e-12, maxiter=5000)
    assert not failed
    torch.testing.assert_close(torch.as_tensor(x), operator.solve(b), rtol=1e-6, atol=1e-8)
    inverse = operator.to_scipy(-1)
    torch.testing.assert_close(torch.as_tensor(inverse @ b.numpy()), operator.solve(b))


def test_plain_tensors(found):
    tensors = found.tensors()
    assert len(tensors) == 2 * len(found)
    assert all(tensors[f"{name}.A"] is pair.A for name, pair in found.items())


def test_what_cannot_be():
    found = at_once(*built("perceptron"))
    operator = found.operator()
    with pytest.raises(ValueError, match="damping must be positive for a negative power"):
        operator.solve(random(operator.shape[0]))
    with pytest.raises(ValueError, match=r"v must have shape \(35,\) or \(35, K\), got \(3,\)"):
        operator @ random(3)
    with pytest.raises(ValueError, match="damping must be finite and >= 0"):
        found.operator(damping=-1)
    with pytest.raises(ValueError, match="there are no layers"):
        thor_fx.Factors({}, {}, {}).operator()
