"""Against curvlinops, where it is right: blocks of the K-FAC approximation; and where it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import thor_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def curvlinops():
    return pytest.importorskip(
        "curvlinops", reason='curvlinops is not installed: pip install ".[dev,peers]" torch==<yours>'
    )


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(7, 5)


def cnn(groups=1):
    convolution = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=groups)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3)), torch.randn(4, 2, 5, 6)


def case(make, **settings):
    torch.manual_seed(0)
    model, x = make(**settings)
    return model.double(), x.double(), torch.randint(3, (len(x),))


def ours(model, x, y, sharing):
    def loss_fn(p, x, y):
        return F.cross_entropy(functional_call(model, p, (x,)), y)

    return thor_fx.factors(loss_fn, dict(model.named_parameters()), x, y, sharing=sharing, batch_size=len(x))


def theirs(curvlinops, model, x, y, approximation):
    """The dense K-FAC matrix of the empirical Fisher of all weights, in the order of the parameters."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), weights, [(x, y)],
        fisher_type="empirical", kfac_approx=approximation, check_deterministic=False,
    )  # fmt: skip
    return torch.as_tensor(operator @ torch.eye(sum(p.numel() for p in weights), dtype=x.dtype))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_blocks_equal_those_of_curvlinops(curvlinops, make, sharing):
    model, x, y = case(make)
    dense, start = theirs(curvlinops, model, x, y, sharing), 0
    for pair in ours(model, x, y, sharing).values():
        block = torch.kron(pair.G, pair.A)
        stop = start + len(block)
        assert oracle.relative_error(block, dense[start:stop, start:stop]) < 1e-10
        start = stop


def test_a_grouped_convolution_is_a_pair_per_group_where_curvlinops_is_wrong(curvlinops):
    """One output position and one datum: the Fisher block of every group is its Kronecker product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()).double()
    x, y = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.tensor([1])
    dense = theirs(curvlinops, model, x, y, "expand")
    pair = ours(model, x, y, "expand")["0.weight"]
    F.cross_entropy(model(x), y).backward()
    rows = model[0].weight.grad.reshape(2, -1)
    for group in range(2):
        fisher = torch.outer(rows[group], rows[group])
        assert oracle.relative_error(torch.kron(pair.G[group], pair.A[group]), fisher) < 1e-10
        own = slice(18 * group, 18 * group + 18)
        assert oracle.relative_error(dense[own, own], fisher) > 0.1


# --- estimators --------------------------------------------------------------------------------------

PEER_LOSSES = {
    "categorical": (nn.CrossEntropyLoss(), lambda y: y),
    "gaussian": (nn.MSELoss(), lambda y: F.one_hot(y, 3).double()),
    "bernoulli": (nn.BCEWithLogitsLoss(), lambda y: F.one_hot(y, 3).double()),
}


def dense(curvlinops, model, loss, x, y, **settings):
    """The dense K-FAC matrix of curvlinops over all weights."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    operator = curvlinops.KFACLinearOperator(
        model, loss, weights, [(x, y)], check_deterministic=False, **settings
    )
    return torch.as_tensor(operator @ torch.eye(sum(p.numel() for p in weights), dtype=x.dtype))


def blocks(model, loss, x, y, **options):
    """The diagonal blocks of ours, in one matrix."""

    def loss_fn(p, x, y):
        return loss(functional_call(model, p, (x,)), y)

    params = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    found = thor_fx.factors(loss_fn, params, x, y, **options)
    return torch.block_diag(*(torch.kron(pair.G, pair.A) for pair in found.values()))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("name", PEER_LOSSES)
def test_exact_blocks_equal_those_of_type_2(curvlinops, name, make, sharing):
    model, x, y = case(make)
    loss, targets = PEER_LOSSES[name]
    expected = dense(curvlinops, model, loss, x, targets(y), fisher_type="type-2", kfac_approx=sharing)
    got = blocks(model, loss, x, targets(y), fisher="exact", sharing=sharing)
    assert oracle.relative_error(got, expected) < 1e-10


def test_exact_blocks_are_the_mean_of_their_samples(curvlinops):
    model, x, y = case(mlp)
    loss = nn.CrossEntropyLoss()
    settings = {"fisher_type": "mc", "kfac_approx": "expand", "mc_samples": 1000, "seed": 0}
    sampled = dense(curvlinops, model, loss, x, y, **settings)
    exact = blocks(model, loss, x, y, fisher="exact")
    assert float((sampled - exact).norm() / exact.norm()) < 0.05
