"""Programs, and not only layers: forward and backward in whatever order, against hooks on an eager model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from eager_thor import SETTINGS, EagerThor, Optimizer, assert_equal_to_hooks, both, errors, take_step
from thor_fx.compile import collector_of
from training import CLASSES, HIDDEN, IN, batches, build, mlp, snapshot

# plain torch.compile, too, makes torch 2.13 warn about the tensors between two graphs
BETWEEN_GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
ROWS = 7


@pytest.fixture(autouse=True)
def forget_other_models() -> None:
    """Dynamo counts the compilations of what comes after a graph break over all models of a class."""
    torch._dynamo.reset()


def train_plainly(model: nn.Module, optimizer: Optimizer) -> None:
    for x, y in batches(5, dtype=next(model.parameters()).dtype):
        F.cross_entropy(model(x), y).backward()
        take_step(optimizer, len(x))


def test_the_slow_optimizer_is_the_same_optimizer():
    assert_equal_to_hooks(mlp, train_plainly)


# --- several forward calls, several backward calls ---------------------------------------------------------


def siamese(model: nn.Module, optimizer: Optimizer) -> None:
    """Two calls, one loss over pairs: n is the number of pairs."""
    for x, _ in batches(5):
        left, right = model(x), model(x.roll(1, 0) * 0.5)
        (left - right.sin()).square().sum(-1).mean().backward()
        take_step(optimizer, len(x))


def test_two_forward_calls_in_one_backward():
    assert_equal_to_hooks(mlp, siamese)


@pytest.mark.parametrize("sizes", [(7, 3), (3, 7)], ids=str)
def test_two_batch_sizes_in_one_backward(sizes):
    """The loss has as many terms as the larger of the two batches."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5):
            losses = [F.cross_entropy(model(x[:size]), y[:size]) for size in sizes]
            sum(losses).backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(mlp, program)


@pytest.mark.parametrize("sizes", [(4, 3), (1, 6), (3, 3, 1)], ids=str)
def test_accumulation_over_unequal_micro_batches(sizes):
    """Rows weigh alike: the step is that of the whole batch."""

    def micro(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5):
            parts = zip(x.split(sizes), y.split(sizes), strict=True)
            for part_x, part_y in parts if isinstance(optimizer, thor_fx.Thor) else [(x, y)]:
                (F.cross_entropy(model(part_x), part_y) * (len(part_x) / len(x))).backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(mlp, micro)


def test_accumulation_of_pairs():
    """Two forward calls in each of two backward passes."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, _ in batches(5, rows=6):
            for part in x.chunk(2):
                (0.5 * (model(part) - model(-part).sin()).square().sum(-1).mean()).backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(mlp, program)


@pytest.mark.parametrize("sizes", [(4, 3), (3, 3, 1)], ids=str)
def test_accumulation_inside_the_functional_step(sizes):
    """The graph shows the terms of one micro-batch only, so ``batch_size`` says how many there are."""
    eager = build(mlp)

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(functional_call(eager, params, (part_x,)), part_y) * (len(part_x) / len(x))
            for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        return torch.stack(losses).sum()

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS, batch_size=ROWS), backend="eager")
    params: Any = snapshot(dict(eager.named_parameters()))
    state = step.init(params, *batches(1)[0])
    for batch in batches(5):
        params, state, _ = step(params, state, *batch)
    slow = EagerThor(eager, **SETTINGS)
    train_plainly(eager, slow)
    assert max(errors(params, dict(eager.named_parameters())).values()) < 1e-10


def test_two_losses_with_a_backward_each():
    """Two backward passes over one forward; n adds up, as for micro-batches."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5):
            scores = model(x)
            F.cross_entropy(scores, y).backward(retain_graph=True)
            (0.1 * scores.square().sum(-1).mean()).backward()
            take_step(optimizer, 2 * len(x))

    assert_equal_to_hooks(mlp, program)


class Forked(nn.Module):
    """Two heads in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = mlp(), nn.Linear(CLASSES, 2), nn.Linear(CLASSES, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.left(h.tanh()), self.right(h.sin())


def test_two_losses_in_one_backward():
    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5):
            left, right = model(x)
            (F.mse_loss(left, x[:, :2]) + F.cross_entropy(right, y)).backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(Forked, program)


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, IN))


class Discriminator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def judged(scores: Tensor, real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))


@BETWEEN_GRAPHS  # and between two models
@pytest.mark.parametrize("by_model", [True, False], ids=["model.zero_grad", "optimizer.zero_grad"])
def test_a_gan(by_model):
    """The generator's loss goes through the discriminator; what that leaves there is thrown away."""

    def play(generator: nn.Module, g_opt: Optimizer, critic: nn.Module, c_opt: Optimizer) -> None:
        def forget(model: nn.Module, optimizer: Optimizer) -> None:
            if by_model and isinstance(optimizer, thor_fx.Thor):
                model.zero_grad()
            else:
                optimizer.zero_grad()

        for x, _ in batches(5):
            noise = x.flip(0).sin()
            forget(critic, c_opt)
            fake = generator(noise)
            (judged(critic(x), True) + judged(critic(fake.detach()), False)).backward()
            c_opt.step(*([] if isinstance(c_opt, thor_fx.Thor) else [len(x)]))
            forget(generator, g_opt)
            judged(critic(fake), True).backward()
            g_opt.step(*([] if isinstance(g_opt, thor_fx.Thor) else [len(x)]))

    generators, critics = list(both(Generator, frequency=3)), list(both(Discriminator))
    for generator, critic in zip(generators, critics, strict=True):
        play(*generator, *critic)
    for (ours, _), (eager, _) in (generators, critics):
        found = errors(dict(ours.named_parameters()), dict(eager.named_parameters()))
        assert max(found.values()) < 1e-10, found


# --- what must not leak -----------------------------------------------------------------------------------


class Switched(nn.Module):
    """A layer that only some calls use, and a head of two; ``side`` chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor, side: str) -> Tensor:
        h = self.body(x).tanh()
        torch._dynamo.graph_break()
        return getattr(self, side)(h)


@BETWEEN_GRAPHS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_without_backward_leaves_nothing(when):
    """Of another size and in another graph: it takes part in nothing, not even in the number of terms."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for step, (x, y) in enumerate(batches(6)):
            if when == "before":
                model(torch.cat([x, x]), "right")
            loss = F.cross_entropy(model(x, "left" if step < 4 else "right"), y)
            if when == "after":
                model(torch.cat([x, x]), "right")
            loss.backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(Switched, program)


def test_a_backward_after_the_step_leaves_nothing():
    """It fills the slots of a factor graph when no factors are wanted; gradients are zeroed, not dropped."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5):
            loss = F.cross_entropy(model(x), y)
            loss.backward(retain_graph=True)
            optimizer.step(*([] if isinstance(optimizer, thor_fx.Thor) else [len(x)]))
            loss.backward()
            model.zero_grad(set_to_none=False)
            if isinstance(optimizer, EagerThor):
                optimizer.uses.clear()

    assert_equal_to_hooks(lambda: nn.Linear(IN, CLASSES), program)


@BETWEEN_GRAPHS
def test_a_branch_gets_its_first_factors_when_it_is_first_used():
    """In step 1, which is plain, it takes the first-order rule; with its next use it has factors."""
    model, optimizer = next(both(Switched, frequency=100, momentum=0.0))
    rules = []
    for (x, y), side in zip(batches(6), ["left", "right", "left", "right", "right", "left"], strict=True):
        weight = getattr(model, side).weight
        before = weight.detach().clone()
        F.cross_entropy(model(x, side), y).backward()
        first_order = before - SETTINGS["lr"] * weight.grad
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, weight)
        rules.append("first-order" if torch.equal(weight, first_order) else "factors")
    assert rules == ["factors", "first-order", "factors", "factors", "factors", "factors"]
    assert not collector_of(model).wanted


@BETWEEN_GRAPHS
def test_waiting_for_a_branch_ends():
    """A branch that is hardly ever used does not make every step a factor step."""
    model, optimizer = next(both(Switched, frequency=1000))
    wanted = []
    for step, (x, y) in enumerate(batches(20)):
        F.cross_entropy(model(x, "right" if step == 3 else "left"), y).backward()
        wanted.append(collector_of(model).wanted)
        optimizer.step()
        optimizer.zero_grad()
    assert wanted == [step == 0 or 3 < step <= 13 for step in range(20)]


# --- graph breaks -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One weight in two graphs, with a third layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.shared, self.head = nn.Linear(IN, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.inp(x).tanh()).sin()
        torch._dynamo.graph_break()
        h = self.shared(h).tanh()
        torch._dynamo.graph_break()
        return self.head(h)


@BETWEEN_GRAPHS
def test_a_weight_in_two_graphs():
    model, optimizer = assert_equal_to_hooks(Twice, train_plainly)
    assert len(collector_of(model).graphs) == 3
    assert sorted(optimizer.coverage.layers) == ["head.weight", "inp.weight", "shared.weight"]


class Pooled(nn.Module):
    """Three positions in one graph, their mean in the next, which alone says how many terms there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(torch.stack([x, x.sin(), x.roll(1, -1)], dim=1)).tanh()
        torch._dynamo.graph_break()
        return self.head(h.mean(1))


@BETWEEN_GRAPHS
def test_terms_are_those_of_the_graph_nearest_to_the_loss():
    assert_equal_to_hooks(Pooled, train_plainly)


class TiedAcrossGraphs(nn.Module):
    """``W`` in one graph and ``W.T`` in the next."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.code, self.broken = nn.Linear(IN, 3), broken

    def forward(self, x: Tensor) -> Tensor:
        h = self.code(x).tanh()
        if self.broken:
            torch._dynamo.graph_break()
        return h @ self.code.weight


@BETWEEN_GRAPHS
def test_a_weight_both_ways_in_two_graphs():
    trajectories = []
    for broken in (True, False):
        model, optimizer = next(both(lambda broken=broken: TiedAcrossGraphs(broken)))
        for x, _ in batches(5):
            F.mse_loss(model(x), x).backward()
            take_step(optimizer, 0)
        assert list(optimizer.coverage.layers) == ["code.weight"]
        trajectories.append(snapshot(dict(model.named_parameters())))
    found = errors(*trajectories)
    assert max(found.values()) < 1e-10, found


class Parts(nn.Module):
    """A slice of a weight in one graph and all of it in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x[:, :4] @ self.fc.weight[:2].T, x[:, 3:]], dim=1)
        torch._dynamo.graph_break()
        return self.head(self.fc(h).tanh())


@BETWEEN_GRAPHS
def test_overlapping_parts_in_two_graphs_have_no_factors():
    """As in one graph: no part has one factor pair, and nothing is preconditioned twice."""
    model, optimizer = next(both(Parts, momentum=0.0))
    for x, y in batches(4):
        before = model.fc.weight.detach().clone()
        F.cross_entropy(model(x), y).backward()
        expected = before - SETTINGS["lr"] * model.fc.weight.grad
        take_step(optimizer, 0)
        torch.testing.assert_close(model.fc.weight.detach(), expected, rtol=1e-12, atol=0)
    assert list(optimizer.coverage.layers) == ["head.weight"]
    assert "parts that overlap" in optimizer.coverage.fallback["fc.weight"]
