"""What a user may do between two steps, in any order, against an optimizer whose state is plain dicts."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import thor_fx
from eager_thor import errors
from profiles import examples
from slow_thor import SlowThor
from training import build

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.filterwarnings("ignore:a factor step found no factors"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

FREQUENCY = 3
SETTINGS: dict[str, float] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9}
CLASSES, VOCABULARY = 3, 6

Operation = tuple[Any, ...]
Run = tuple[Operation, ...]


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.LayerNorm(5),
        nn.Tanh(),
        nn.Linear(5, 4, bias=False),
        nn.Tanh(),
        nn.Linear(4, CLASSES),
    )


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, CLASSES))


class Words(nn.Module):
    """A table, a layer that is used twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.nan_to_num(0.0).abs() * 10).long() % VOCABULARY
        return self.head(self.mix(self.mix(self.table(ids)).tanh()).tanh().mean(1) + 0 * x.sum())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "normalised": (normalised, (4,), "0"),
    "convolution": (convolution, (2, 2), "0"),
    "words": (Words, (3,), "mix"),
}
"""What makes it, the shape of a datum, and the part that may be frozen."""


class Both:
    """A model behind the drop-in door, and an eager one with an optimizer of dicts."""

    def __init__(self, name: str, late: bool) -> None:
        self.make, self.shape, self.part = MODELS[name]
        self.late = late  # the part is frozen when the optimizers are made
        self.slow_model = self._model()
        self.slow = SlowThor(self.slow_model, FREQUENCY, **SETTINGS)
        self._compiled(self._model())

    def _model(self) -> nn.Module:
        model = build(self.make)
        model.get_submodule(self.part).requires_grad_(not self.late)
        return model

    def _compiled(self, model: nn.Module) -> None:
        self.model = thor_fx.compile(model, backend="eager")
        self.optimizer = thor_fx.Thor(self.model, **SETTINGS, frequency=FREQUENCY)

    def _batch(self, seed: int) -> tuple[Tensor, Tensor]:
        rows = 4 + 2 * (seed % 2)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, *self.shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(CLASSES, (rows,), generator=generator)

    def _backward(self, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(self.model(x), y).backward()
        self.slow.backward(lambda: F.cross_entropy(self.slow_model(x), y), len(x))

    # --- operations, by name ------------------------------------------------------------------------

    def backward(self, seed: int) -> None:
        self._backward(*self._batch(seed))

    def lost(self, seed: int) -> None:
        """A batch that is not finite."""
        x, y = self._batch(seed)
        x[0] = torch.nan
        self._backward(x, y)

    def look(self, seed: int) -> None:
        """A forward pass that nothing follows. It is one with factors, if those are wanted."""
        self.model(self._batch(seed)[0])
        self.slow.looked()

    def evaluate(self, seed: int) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(self._batch(seed)[0])
        self.model.train()

    def backward_in_evaluation(self, seed: int) -> None:
        for model in (self.model, self.slow_model):
            model.eval()
        self.backward(seed)
        for model in (self.model, self.slow_model):
            model.train()

    def step(self) -> None:
        self.optimizer.step()
        self.slow.step()

    def zero_grad(self, to_none: bool) -> None:
        self.optimizer.zero_grad(to_none)
        self.slow.zero_grad(to_none)

    def zero_model(self) -> None:
        """The factors are forgotten with the gradients: it is seen in the next forward pass."""
        self.model.zero_grad()
        self.slow_model.zero_grad()
        self.slow.forget()

    def set(self, name: str, value: float) -> None:
        for group in self.optimizer.param_groups:
            group[name] = value
        for setting in self.slow.settings.values():
            setting[name] = value

    def freeze(self, frozen: bool) -> None:
        for model in (self.model, self.slow_model):
            model.get_submodule(self.part).requires_grad_(not frozen)

    def add_group(self, lr: float) -> None:
        """The part that was left out, with a rate of its own."""
        names = [n for n, _ in self.model.named_parameters() if n not in self.slow.settings]
        if names:
            self.optimizer.add_param_group({"params": names, "lr": lr})
            self.slow.settings |= {name: {**SETTINGS, "lr": lr} for name in names}

    def reload(self) -> None:
        """A new model and a new optimizer go on from what was saved."""
        weights, state = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        groups = len(self.optimizer.param_groups)
        flags = [p.requires_grad for p in self.model.parameters()]
        self._compiled(self._model())
        if groups > 1:
            added = [n for n, p in self.model.named_parameters() if not p.requires_grad]
            self.optimizer.add_param_group({"params": added})
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        for p, flag in zip(self.model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
        self.slow_model.zero_grad()
        self.slow.resume()

    def round_trip(self) -> None:
        """Rounded to float32 and back."""
        for model in (self.model, self.slow_model):
            model.float().double()

    def check(self) -> None:
        found, expected = dict(self.model.named_parameters()), dict(self.slow_model.named_parameters())
        worst = errors(found, expected)
        assert max(worst.values()) < 1e-9, worst
        assert self.optimizer.param_groups[0]["step"] == self.slow.steps
        assert self.optimizer.param_groups[0].get("skipped_steps", 0) == self.slow.skipped


def assert_agree(model: str, late: bool, run: Run) -> None:
    torch._dynamo.reset()
    both = Both(model, late)
    for name, *arguments in run:
        getattr(both, name)(*arguments)
        both.check()


SEEDS = st.integers(0, 5)
STEP = (("step",), ("zero_grad", True))
PLAIN = st.builds(lambda seed: (("backward", seed), *STEP), SEEDS)
OPERATIONS: list[st.SearchStrategy[Run]] = [
    PLAIN,
    PLAIN,
    st.builds(lambda one, other: (("backward", one), ("backward", other), *STEP), SEEDS, SEEDS),
    st.builds(lambda seed: (("backward", seed), ("step",)), SEEDS),  # gradients stay
    st.builds(lambda seed: (("backward", seed),), SEEDS),
    st.builds(lambda seed: (("lost", seed), *STEP), SEEDS),
    st.builds(lambda seed: (("look", seed),), SEEDS),
    st.builds(lambda seed: (("evaluate", seed),), SEEDS),
    st.builds(lambda seed: (("backward_in_evaluation", seed),), SEEDS),
    st.just((("step",),)),
    st.builds(lambda to_none: (("zero_grad", to_none),), st.booleans()),
    st.just((("zero_model",),)),
    st.builds(
        lambda name, value: (("set", name, value),),
        st.sampled_from(sorted(SETTINGS)),
        st.sampled_from([0.02, 0.3]),
    ),
    st.just((("add_group", 0.01),)),
    st.just((("reload",),)),
    st.just((("round_trip",),)),
]
if not torch.__version__.startswith("2.11"):  # it runs the old graph: see unfreezes in training.py
    OPERATIONS.append(st.builds(lambda frozen: (("freeze", frozen),), st.booleans()))
RUNS = st.lists(st.one_of(OPERATIONS), min_size=3, max_size=9).map(lambda parts: sum(parts, ()))


def _plain(seeds: range) -> Run:
    return sum(((("backward", seed), *STEP) for seed in seeds), ())


LATE: Run = (*_plain(range(3)), ("backward_in_evaluation", 1), *STEP, ("reload",), *_plain(range(2)))
"""A factor step in evaluation mode finds no factors; what is saved after it has to say so."""


@example("normalised", False, LATE)
@examples(ci=8, nightly=200)
@given(st.sampled_from(sorted(MODELS)), st.booleans(), RUNS)
def test_any_order_of_operations(model, late, run):
    assert_agree(model, late, run)
