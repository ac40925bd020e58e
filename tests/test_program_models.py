"""Models that do more than multiply: dropout, checkpointing, buffers, compiled regions, frozen parts."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import thor_fx
from eager_thor import SETTINGS, EagerThor, Optimizer, assert_equal_to_hooks, both, errors, take_step
from thor_fx.compile import collector_of
from thor_fx.factors import kronecker
from training import CLASSES, HIDDEN, IN, batches, build, by_functional_door, mlp, snapshot, train, unfreezes

# plain torch.compile, too, makes torch 2.13 warn about the tensors between two graphs
BETWEEN_GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def forget_other_models() -> None:
    """Dynamo counts the compilations of what comes after a graph break over all models of a class."""
    torch._dynamo.reset()


def train_plainly(model: nn.Module, optimizer: Optimizer) -> None:
    for x, y in batches(5):
        F.cross_entropy(model(x), y).backward()
        take_step(optimizer, len(x))


# --- dropout -----------------------------------------------------------------------------------------------

WIDE, RATE = 400, 0.3


class Dropped(nn.Module):
    """A row of ones with holes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDE, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(x, RATE, self.training))


def assert_resampled(masks: list[Tensor]) -> None:
    """Every mask has the right rate (to 4 sigma), values and mean, and no two are alike."""
    spread = 4 * (RATE * (1 - RATE) / WIDE) ** 0.5
    for mask in masks:
        kept = mask != 0
        assert abs(float(kept.double().mean()) - (1 - RATE)) < spread
        torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - RATE)))
    for one, other in itertools.combinations(masks, 2):
        assert not torch.equal(one, other)


def dropout_masks_of_factors(backend: str) -> list[Tensor]:
    """A batch of one row ``a``: its factor is ``a a^T`` and its gradient ``g a^T``, of the same mask."""
    model = thor_fx.compile(build(Dropped), backend=backend)
    thor_fx.Thor(model, **SETTINGS, block_size=None)
    masks = []
    for _ in range(4):
        model(torch.ones(1, WIDE, dtype=torch.float64)).square().sum().backward()
        moments, terms = collector_of(model).take()
        pair = kronecker(moments, collector_of(model).coverage.layers, terms)["fc.weight"]
        gradient = model.fc.weight.grad
        torch.testing.assert_close(pair.A * pair.G.trace(), gradient.T @ gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair.A.trace() * pair.G, gradient @ gradient.T, rtol=1e-10, atol=1e-12)
        masks.append(pair.A.diagonal().sqrt())
        model.zero_grad()
    return masks


def test_dropout_in_the_factors():
    assert_resampled(dropout_masks_of_factors("aot_eager"))


@pytest.mark.inductor
def test_dropout_in_the_factors_with_inductor():
    assert_resampled(dropout_masks_of_factors("inductor"))


def dropout_masks_of_the_functional_step(backend: str) -> list[Tensor]:
    """The mask is returned, and the update is that of a batch with this mask."""
    x = torch.ones(1, WIDE, dtype=torch.float64)

    def loss_fn(params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.dropout(x, RATE)
        return (a @ params["w"].T).square().sum(), a

    tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.0, frequency=1, block_size=None)
    step = thor_fx.compile_step(loss_fn, tx, backend=backend)
    params: Any = {"w": build(Dropped).fc.weight.detach()}
    state, masks = step.init(params, x), []
    for _ in range(3):
        before = params["w"].clone()
        params, state, out = step(params, state, x)
        a = out.aux
        g = 2 * a @ before.T
        expected = before - 0.1 * solve(a, g)
        error = (params["w"] - expected).norm() / (expected - before).norm()
        assert error < 1e-7  # the conditions of A and G multiply to 1e8
        masks.append(a[0].clone())
    return masks


def solve(a: Tensor, g: Tensor) -> Tensor:
    A, G = a.T @ a, g.T @ g
    inverses = [torch.linalg.inv(m + 0.1 * torch.eye(len(m), dtype=m.dtype)) for m in (A, G)]
    return inverses[1] @ (g.T @ a) @ inverses[0]


def test_dropout_in_the_functional_step():
    assert_resampled(dropout_masks_of_the_functional_step("eager"))


@pytest.mark.inductor
def test_dropout_in_the_functional_step_with_inductor():
    """torch.func and dropout once read a mask of zeros here, in torch 2.11 and 2.13."""
    assert_resampled(dropout_masks_of_the_functional_step("inductor"))


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout], ids=lambda k: k.__name__)
def test_other_modules_that_drop(kind):
    """All steps but those in evaluation mode see noise."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(IN, HIDDEN), kind(0.5), nn.Linear(HIDDEN, CLASSES))

    model, optimizer = next(both(make))
    x, y = batches(1)[0]
    losses = {F.cross_entropy(model(x), y).item() for _ in range(3)}
    assert len(losses) == 3
    train(model, optimizer, batches(4))
    assert sorted(optimizer.coverage.layers) == ["0.weight", "2.weight"]
    model.eval()
    assert len({F.cross_entropy(model(x), y).item() for _ in range(3)}) == 1


# --- activation checkpointing ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(IN, IN), nn.Linear(IN, CLASSES)
        self.up, self.down = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN)
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])


@REENTRANT
def test_checkpointed_blocks(reentrant):
    """Both kinds are captured in one graph."""
    model, optimizer = assert_equal_to_hooks(lambda: Block(reentrant), train_plainly)
    assert len(collector_of(model).graphs) == 1
    assert sorted(optimizer.coverage.layers) == ["down.weight", "head.weight", "stem.weight", "up.weight"]
    assert optimizer.coverage.terms == "head.weight"


@REENTRANT
def test_checkpointed_blocks_in_the_functional_step(reentrant):
    model = build(lambda: Block(reentrant))

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS), backend="eager")
    params: Any = snapshot(dict(model.named_parameters()))
    state = step.init(params, *batches(1)[0])
    for batch in batches(5):
        params, state, _ = step(params, state, *batch)
    train_plainly(model, EagerThor(model, **SETTINGS))
    found = errors(params, dict(model.named_parameters()))
    assert max(found.values()) < 1e-10, found


@REENTRANT
@pytest.mark.parametrize("halves", [1, 2])
def test_a_checkpoint_around_the_model(reentrant, halves):
    """The model runs again in backward, and only that run is of the pass; twice, for two segments."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5):
            x.requires_grad_()
            scores = [checkpoint(model, part, use_reentrant=reentrant) for part in [x, x.sin()][:halves]]
            F.cross_entropy(sum(scores[1:], start=scores[0]), y).backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(mlp, program)


@BETWEEN_GRAPHS
@pytest.mark.filterwarnings("ignore:no compiled graph uses the weights 'up.weight', 'down.weight'")
@REENTRANT
def test_a_checkpoint_around_a_graph_break(reentrant):
    """Dynamo runs such a block as it is: it trains by the first-order rule, and the coverage says so."""

    class Broken(Block):
        def block(self, x: Tensor) -> Tensor:
            h = self.up(x).tanh()
            torch._dynamo.graph_break()
            return x + self.down(h)

    model, optimizer = next(both(lambda: Broken(reentrant), momentum=0.0))
    for x, y in batches(4):
        before = snapshot(dict(model.named_parameters()))
        F.cross_entropy(model(x), y).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        take_step(optimizer, len(x))
        for name, p in model.named_parameters():
            first_order = torch.equal(p, before[name] - SETTINGS["lr"] * gradients[name])
            assert first_order == (name not in {"stem.weight", "head.weight"}), name
            assert not torch.equal(p, before[name])
    assert sorted(optimizer.coverage.layers) == ["head.weight", "stem.weight"]
    reasons = optimizer.coverage.fallback
    assert reasons["up.weight"] == reasons["down.bias"] == "no compiled graph uses it"


# --- mutated buffers ---------------------------------------------------------------------------------------


class Normalised(nn.Sequential):
    """Without scale and shift, which have no rows."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN, affine=False), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
        )


def test_running_statistics():
    """Equal to those of the eager model after steps of both kinds, and in evaluation."""
    (model, optimizer), (eager, slow) = both(Normalised)
    for x, y in batches(5):
        scores = [m(x) for m in (model, eager)]
        for each, opt in zip(scores, (optimizer, slow), strict=True):
            F.cross_entropy(each, y).backward()
            take_step(opt, len(x))
        for (name, ours), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)
    assert int(model[1].num_batches_tracked) == 5
    for each in (model, eager):
        each.eval()
    torch.testing.assert_close(model(x), eager(x), rtol=1e-10, atol=1e-12)


class Counting(nn.Module):
    """Buffers changed in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.training:
            self.seen += len(x)
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.head((h - self.mean).tanh())


def test_other_buffers():
    found: list[dict[str, Tensor]] = []

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        train_plainly(model, optimizer)
        found.append({name: b.clone() for name, b in model.named_buffers()})

    assert_equal_to_hooks(Counting, program)
    assert float(found[0]["seen"]) == 5 * 7
    assert max(errors(*found).values()) < 1e-10


# --- compiled regions --------------------------------------------------------------------------------------


@torch.compile(backend="aot_eager")
def activation(x: Tensor) -> Tensor:
    return x.tanh() * 1.5


class Regions(nn.Module):
    """A compiled function, a submodule wrapped by ``torch.compile``, and one that compiled itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN)
        self.second, self.third = nn.Linear(HIDDEN, HIDDEN), nn.Sequential(nn.Linear(HIDDEN, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(activation(self.first(x))).sin())


def with_compiled_regions() -> nn.Module:
    model = Regions()
    model.second = torch.compile(model.second, backend="aot_eager")
    model.third.compile(backend="aot_eager")
    return model


@BETWEEN_GRAPHS
def test_compiled_regions_inside():
    """They are traced through; names are those of ``named_parameters``."""
    model, optimizer = next(both(with_compiled_regions))
    train_plainly(model, optimizer)
    assert sorted(optimizer.coverage.layers) == ["first.weight", "second._orig_mod.weight", "third.0.weight"]
    assert len(collector_of(model).graphs) == 1
    assert_is_that_of_hooks(model, Regions)


def compiled_in_its_parts() -> nn.Module:
    model = Regions()
    model.second.compile(backend="aot_eager")
    model.third.compile(backend="aot_eager")
    return model


@BETWEEN_GRAPHS
def test_compiled_regions_in_the_functional_step():
    """They are part of the one graph."""
    found = by_functional_door(build(compiled_in_its_parts), batches(5), **SETTINGS)[-1]
    eager = build(Regions)
    train_plainly(eager, EagerThor(eager, **SETTINGS))
    worst = errors(found, dict(eager.named_parameters()))
    assert max(worst.values()) < 1e-10, worst


def test_a_wrapped_submodule_in_the_functional_step_is_refused():
    """Torch cannot put other parameters into the wrapper of ``torch.compile`` while it traces."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="get_submodule"):
        by_functional_door(build(with_compiled_regions), batches(1), **SETTINGS)


def assert_is_that_of_hooks(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Up to the names that ``torch.compile`` gives."""
    expected = build(make)
    train_plainly(expected, EagerThor(expected, **SETTINGS))
    found = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
    worst = errors(found, dict(expected.named_parameters()))
    assert max(worst.values()) < 1e-10, worst


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="aot_eager")
    return model


def test_a_model_that_was_compiled_before():
    for make in (compiled_in_place, lambda: torch.compile(mlp(), backend="aot_eager")):
        model, optimizer = next(both(make))
        train_plainly(model, optimizer)
        assert len(optimizer.coverage.layers) == 2
        assert_is_that_of_hooks(model, mlp)


# --- frozen, unused, added ---------------------------------------------------------------------------------


def thaw_and_freeze(model: nn.Module, optimizer: Optimizer) -> None:
    """The first layer is frozen in steps 2 to 4; ``requires_grad`` is all that is touched."""
    for step, (x, y) in enumerate(batches(8)):
        model[0].requires_grad_(not 2 <= step <= 4)
        F.cross_entropy(model(x), y).backward()
        take_step(optimizer, len(x))


@unfreezes
def test_freezing_and_unfreezing():
    assert_equal_to_hooks(mlp, thaw_and_freeze)


@unfreezes
def test_unfreezing_and_adding_a_group():
    """Unfrozen in step 3, which is plain: it has factors in step 4."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for step, (x, y) in enumerate(batches(9)):
            if step == 4:
                model[0].requires_grad_(True)
                if isinstance(optimizer, thor_fx.Thor):
                    optimizer.add_param_group({"params": model[0].parameters()})
            F.cross_entropy(model(x), y).backward()
            take_step(optimizer, len(x))

    def frozen() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    assert_equal_to_hooks(frozen, program, frequency=4)


@unfreezes
def test_an_unfrozen_layer_has_factors_at_once():
    """Not only in the next scheduled factor step: it takes one step by its first-order rule."""
    model = build(mlp)
    model[0].requires_grad_(False)
    model = thor_fx.compile(model, backend="aot_eager")
    optimizer = thor_fx.Thor(model, **{**SETTINGS, "frequency": 100})
    train(model, optimizer, batches(3))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    kinds = []
    for batch in batches(4):
        train(model, optimizer, [batch])
        kinds.append("0.weight" in optimizer.coverage.layers)
    assert kinds == [False, True, True, True]
    assert optimizer.state[model[0].weight]["inverses"]["0.weight"]["input"][0].any()
    assert not collector_of(model).wanted


class Sometimes(nn.Module):
    """A side branch in some calls; and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.side, self.head = (
            nn.Linear(IN, HIDDEN),
            nn.Linear(IN, HIDDEN),
            nn.Linear(HIDDEN, CLASSES),
        )
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor, side: bool) -> Tensor:
        h = self.fc(x)
        return self.head((h + self.side(x) if side else h).tanh())


@pytest.mark.parametrize("used", [(0, 2, 3, 5), (0, 1, 2)], ids=str)
def test_parameters_that_are_used_in_some_steps(used):
    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for step, (x, y) in enumerate(batches(6)):
            F.cross_entropy(model(x, step in used), y).backward()
            take_step(optimizer, len(x))

    (model, optimizer), (eager, slow) = both(Sometimes)
    program(model, optimizer)
    program(eager, slow)
    found = errors(dict(model.named_parameters()), dict(eager.named_parameters()))
    assert max(found.values()) < 1e-10, found
    assert torch.equal(model.idle.weight, build(Sometimes).idle.weight)
    assert optimizer.coverage.fallback["idle.weight"] == "no compiled graph uses it"


# --- dynamic shapes ----------------------------------------------------------------------------------------


class Sequence(nn.Module):
    """Positions are rows; the batch and the length both change."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mix, self.head = nn.Linear(IN, 4), nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).tanh()
        q, k, v = self.mix(h).chunk(3, dim=-1)
        return self.head((q @ k.mT / x.shape[1]).softmax(-1) @ v)


SHAPES = [(2, 3), (2, 3), (3, 3), (4, 5), (5, 6), (3, 7), (6, 4), (2, 3)]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a factor graph and an update were compiled."""
    counts = {"compile_differentiable": 0, "compile_graph": 0}
    for module, name in (
        ("thor_fx.factor_graphs", "compile_differentiable"),
        ("thor_fx.compiled_update", "compile_graph"),
    ):
        original: Callable[..., Any] = getattr(sys.modules[module], name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(sys.modules[module], name, counted)
    return counts


def test_batch_and_sequence_length(compilations):
    """Once for the first shape, once for a second batch size, once for a second length; then never again."""
    seen = []

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        generator = torch.Generator().manual_seed(0)
        for shape in SHAPES:
            x = torch.randn(*shape, IN, generator=generator, dtype=torch.float64)
            y = torch.randint(CLASSES, (shape[0] * shape[1],), generator=generator)
            F.cross_entropy(model(x).flatten(0, 1), y).backward()
            take_step(optimizer, len(y))
            seen.append(dict(compilations))

    _, optimizer = assert_equal_to_hooks(Sequence, program, frequency=1)
    ours = seen[: len(SHAPES)]
    assert [c["compile_differentiable"] for c in ours] == [1, 1, 2, 3, 3, 3, 3, 3]
    assert [c["compile_graph"] for c in ours] == [1] * len(SHAPES), "the update depends on no batch"
    assert len(optimizer.coverage.layers) >= 3
