"""The trajectories of MindSpore's own ``nn.thor``, by both doors: golden/README.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx

GOLDEN = Path(__file__).parent / "golden"
CASES = ("mlp", "mlp_clip", "mlp_layernorm")
PROMISED = 1e-3  # relative to how far the parameter moved, in float32
MEASURED = 1e-4  # what we hold; runs show 1e-5


class Golden:
    """One case: its settings, its batches and where the reference's parameters were after each step."""

    def __init__(self, name: str) -> None:
        self.config: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(array) for key, array in arrays.items()}

    def model(self) -> nn.Module:
        model = Net(self.config["d"], self.config["classes"], self.config["layer_norm"])
        model.load_state_dict(self.parameters("init"))
        return model

    def parameters(self, when: str) -> dict[str, Tensor]:
        return {name: self.arrays[f"{when}/{name}"].clone() for name in self.config["params"]}

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.arrays["x"], self.arrays["y"].long(), strict=True))

    def settings(self) -> dict[str, Any]:
        same = ("momentum", "weight_decay", "loss_scale", "enable_clip_grad", "frequency", "damping_rule")
        weights_only = self.config["decay_filter"] == "weights only"
        return {
            **{name: self.config[name] for name in same},
            "lr": self.arrays["lr"],
            "damping": self.arrays["damping"],
            "decay_filter": _is_weight if weights_only else None,
            "block_size": self.config["block"],
        }

    def worst_error(self, trajectory: list[tuple[float, dict[str, Tensor]]]) -> float:
        """The largest distance from the reference, of any parameter after any step that was saved."""
        start = self.parameters("init")
        errors = []
        for step, (_, parameters) in enumerate(trajectory, 1):
            for name, value in parameters.items():
                expected = self.arrays.get(f"after{step}/{name}")
                if expected is not None:
                    errors.append(float((value - expected).norm() / (expected - start[name]).norm()))
        assert len(errors) >= 3 * len(start), "the files hold at least three moments of every parameter"
        return max(errors)


class Net(nn.Module):
    """The reference's net; its LayerNorm calls its parameters gamma and beta."""

    def __init__(self, d: int, classes: int, layer_norm: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, d), nn.Linear(d, classes)
        self.ln = Norm(d) if layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ln(torch.tanh(self.fc1(x))))


class Norm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, eps=1e-7)


def _is_weight(name: str) -> bool:
    return name.endswith("weight")


def functional(case: Golden, backend: str) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Loss and parameters after every step, by ``compile_step``."""
    model, scale = case.model(), case.config["loss_scale"]

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(functional_call(model, params, (x,)), y)
        return loss * scale, loss

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**case.settings()), backend=backend)
    params = case.parameters("init")
    state = step.init(params, *case.batches()[0])
    for batch in case.batches():
        params, state, out = step(params, state, *batch)
        yield out.aux.item(), {name: p.clone() for name, p in params.items()}


def drop_in(case: Golden, backend: str) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Loss and parameters after every step, by ``compile`` and ``Thor``."""
    model = thor_fx.compile(case.model(), backend=backend)
    optimizer = thor_fx.Thor(model, **case.settings())
    for x, y in case.batches():
        loss = F.cross_entropy(model(x), y)
        (loss * case.config["loss_scale"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), {name: p.detach().clone() for name, p in model.named_parameters()}


COMPILED = pytest.param("mlp", "inductor", marks=pytest.mark.inductor, id="mlp-inductor")


@pytest.mark.parametrize("door", [functional, drop_in])
@pytest.mark.parametrize(
    ("name", "backend"), [*(pytest.param(n, "aot_eager", id=n) for n in CASES), COMPILED]
)
def test_the_reference_is_reproduced(door, name, backend):
    case = Golden(name)
    trajectory = list(door(case, backend))
    worst = case.worst_error(trajectory)
    assert worst < PROMISED
    assert worst < MEASURED, "still within the promise, but worse than it was"
    losses = torch.tensor([loss for loss, _ in trajectory])
    torch.testing.assert_close(losses, torch.tensor(case.config["losses"]), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_bound_notices_another_damping_rule(name):
    case = Golden(name)
    case.config["damping_rule"] = "factor"
    assert case.worst_error(list(functional(case, "eager"))) > PROMISED
