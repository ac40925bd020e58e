"""Both doors compute the same parameters, step by step."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import thor_fx
from training import (
    MODELS,
    Parameters,
    assert_moved,
    batches,
    build,
    by_both_doors,
    by_functional_door,
    mlp,
    snapshot,
)

STEPS = 13
PLAIN = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 5}
SETTINGS = {
    "tables": {
        "lr": torch.linspace(0.1, 0.02, STEPS, dtype=torch.float64),
        "damping": torch.linspace(0.3, 0.1, STEPS),
    },
    "callables": {
        "lr": lambda step: 0.1 / (1 + step),
        "damping": lambda step: torch.tensor(0.5) / (1 + step),
    },
    "zero_dim": {"lr": torch.tensor(0.1), "damping": torch.tensor(0.2, dtype=torch.float64)},
    "decay": {"weight_decay": 0.01},
    "decay_filter": {"weight_decay": 0.1, "decay_filter": lambda name: name.endswith("weight")},
    "nesterov": {"use_nesterov": True},
    "clip": {"enable_clip_grad": True, "lr": 0.01},
    "loss_scale": {"loss_scale": 256.0},
    "batch_size": {"batch_size": 50},
    "no_momentum": {"momentum": 0.0},
    "every_step": {"frequency": 1},
    "sqrt": {"damping_rule": "sqrt"},
    "pi": {"damping_rule": "pi"},
    "small_blocks": {"block_size": 4},
    "whole_factors": {"block_size": None},
    "everything": {
        "lr": torch.linspace(0.1, 0.02, STEPS),
        "weight_decay": 0.01,
        "use_nesterov": True,
        "enable_clip_grad": True,
        "loss_scale": 8.0,
        "damping_rule": "pi",
        "block_size": 4,
    },
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_model(make):
    data = batches(STEPS)
    trajectory = by_both_doors(lambda: build(make), data, **PLAIN)
    assert_moved(trajectory, snapshot(dict(build(make).named_parameters())))


@functools.cache
def plain_trajectory() -> list[Parameters]:
    return by_functional_door(build(mlp), batches(STEPS), **PLAIN)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting(name):
    data, settings = batches(STEPS), {**PLAIN, **SETTINGS[name]}
    trajectory = by_both_doors(lambda: build(mlp), data, **settings)
    assert_moved(trajectory, snapshot(dict(build(mlp).named_parameters())))
    # a setting that both doors ignore would pass until here
    cancels = name in {"loss_scale", "whole_factors"}  # all sides are far below the 128 of a block
    plain = plain_trajectory()[-1]
    errors = [float((plain[n] - p).norm() / p.norm()) for n, p in trajectory[-1].items()]
    assert (max(errors) < 1e-12) == cancels


# --- a real model ------------------------------------------------------------------------------------

REAL = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 4, "damping_rule": "pi"}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(1))


def language_loss(model: nn.Module) -> Callable[..., Tensor]:
    def loss_fn(params: Parameters, ids: Tensor, mask: Tensor) -> Tensor:
        return functional_call(model, params, (ids,), {"attention_mask": mask, "labels": ids}).loss

    return loss_fn


def test_plain_tracing_cannot_capture_the_real_model(llama, tokens):
    with pytest.raises(RuntimeError, match="trying to get value out of a tracing tensor"):
        make_fx(language_loss(llama))(dict(llama.named_parameters()), tokens, torch.ones_like(tokens))


def test_a_real_model_through_both_doors(llama, tokens):
    start, mask = snapshot(dict(llama.named_parameters())), torch.ones_like(tokens)
    step = thor_fx.compile_step(language_loss(llama), thor_fx.thor(**REAL), backend="eager")
    params = snapshot(start)
    state = step.init(params, tokens, mask)
    losses = []
    for _ in range(10):
        params, state, out = step(params, state, tokens, mask)
        losses.append(out.loss.item())
    assert len(step.coverage.layers) == 16  # 2 x 7 projections, the embedding and the head
    assert step.coverage.terms == "lm_head.weight"
    assert sum(layer.uses for layer in step.coverage.layers.values()) == 16
    assert len(step.coverage.norms) == 5
    assert not step.coverage.fallback
    assert losses[-1] < 0.6 * losses[0]

    model = thor_fx.compile(llama, backend="aot_eager")
    optimizer = thor_fx.Thor(model, **REAL)
    for expected in losses:
        loss = model(tokens, attention_mask=mask, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert optimizer.coverage == step.coverage
    for name, parameter in model.named_parameters():
        moved = (params[name] - start[name]).norm()
        assert (parameter - params[name]).norm() < 1e-5 * moved, name
