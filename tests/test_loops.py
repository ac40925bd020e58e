"""Loops of other packages train as the plain loop over the same batches does, bit by bit, and resume as well.

All of these loops divide a loss by the number of micro-batches, clip, step and reset in the same order, and
two micro-batches make every division exact: so nothing is left to a tolerance.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import thor_fx
from training import Batch, Parameters, identical, snapshot

README = Path(__file__).parents[1] / "README.md"
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.03, "momentum": 0.9}
ROWS, EPOCHS, MICRO_BATCHES, CLIP = 16, 3, 2, 0.5  # three steps in every epoch

BOTH_PRECISIONS = pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
RESUMED = pytest.mark.parametrize("frequency", [4, 3], ids=["between_factor_steps", "at_a_factor_step"])


def digits() -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    count = 3 * MICRO_BATCHES * ROWS
    return TensorDataset(torch.tensor(pixels[:count] / 16, dtype=torch.float32), torch.tensor(labels[:count]))


def loader() -> DataLoader:
    return DataLoader(digits(), batch_size=ROWS)


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def compiled(model: nn.Module) -> nn.Module:
    return thor_fx.compile(model, backend="aot_eager")


def thor(model: nn.Module, frequency: int = 4, **settings: Any) -> thor_fx.Thor:
    return thor_fx.Thor(model, frequency=frequency, **{**SETTINGS, **settings})


def falling(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step / 8))


def autocast(half: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()


def classified(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Any],
    loss_of: Callable[[nn.Module, Any], Tensor] = classified,
    half: bool = False,
) -> Parameters:
    """The loop that everybody writes."""
    schedule = falling(optimizer)
    for start in range(0, len(data), MICRO_BATCHES):
        for batch in data[start : start + MICRO_BATCHES]:
            with autocast(half):
                loss = loss_of(model, batch)
            (loss / MICRO_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return snapshot(model.state_dict())


def on_digits(half: bool = False, **settings: Any) -> Parameters:
    """What the plain loop makes of the digits, all epochs."""
    model = compiled(mlp())
    return plain_loop(model, thor(model, **settings), EPOCHS * [*loader()], half=half)


def assert_trained(found: Parameters, start: nn.Module, optimizer: thor_fx.Thor, layers: int) -> None:
    assert not any(torch.equal(found[name], value) for name, value in start.state_dict().items())
    assert len(optimizer.coverage.layers) == layers
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()


# --- Accelerate -----------------------------------------------------------------------------------------


def with_accelerate(folder: Path, epochs: range, half: bool = False, **settings: Any) -> Parameters:
    """A loop of one's own, that saves behind its last epoch."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO_BATCHES, mixed_precision="bf16" if half else "no"
    )
    model = accelerator.prepare(compiled(mlp()))
    optimizer = thor(model, **settings)
    wrapped, data, schedule = accelerator.prepare(optimizer, loader(), falling(optimizer))
    if epochs.start > 0:
        accelerator.load_state(str(folder))
    for batch in (batch for _ in epochs for batch in data):
        with accelerator.accumulate(model):
            accelerator.backward(classified(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
    accelerator.save_state(str(folder))
    found = snapshot(accelerator.unwrap_model(model).state_dict())
    assert_trained(found, mlp(), optimizer, layers=2)
    return found


@BOTH_PRECISIONS
def test_accelerate(half: bool, tmp_path: Path):
    assert identical(with_accelerate(tmp_path, range(EPOCHS), half), on_digits(half))


@RESUMED
def test_accelerate_resumes(frequency: int, tmp_path: Path):
    with_accelerate(tmp_path, range(1), frequency=frequency)
    resumed = with_accelerate(tmp_path, range(1, EPOCHS), frequency=frequency)
    assert identical(resumed, on_digits(frequency=frequency))


# --- Lightning ------------------------------------------------------------------------------------------


LIGHTNING = pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"  # lightning's use of torch
)


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning")


def classifier(lightning: Any, manual: bool = False, **settings: Any) -> Any:
    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = compiled(mlp())
            self.automatic_optimization = not manual

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = classified(self.net, batch)
            if manual:
                self.steps_by_hand(loss, last=index % MICRO_BATCHES == MICRO_BATCHES - 1)
            return loss

        def steps_by_hand(self, loss: Tensor, last: bool) -> None:
            optimizer = self.optimizers()
            self.manual_backward(loss / MICRO_BATCHES)
            if last:
                nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
                optimizer.step()
                self.lr_schedulers().step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = thor(self.net, **settings)
            schedule = {"scheduler": falling(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)

    return Digits()


def fit(lightning: Any, model: Any, folder: Path, resume: Path | None = None, **how: Any) -> Parameters:
    """What Lightning makes of the digits, all epochs, with a checkpoint after each of a first run."""
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    if model.automatic_optimization:
        how = {"accumulate_grad_batches": MICRO_BATCHES, **how}
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints] if resume is None else [],
        enable_checkpointing=resume is None,
        **how,
    )
    trainer.fit(model, loader(), ckpt_path=resume)
    found = snapshot(model.net.state_dict())
    assert_trained(found, mlp(), trainer.optimizers[0], layers=2)
    return found


@LIGHTNING
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@BOTH_PRECISIONS
def test_lightning(lightning: Any, half: bool, manual: bool, tmp_path: Path):
    model = classifier(lightning, manual)
    found = fit(lightning, model, tmp_path, precision="bf16-mixed" if half else "32-true")
    assert identical(found, on_digits(half))


@LIGHTNING
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # saves nothing again
@RESUMED
def test_lightning_resumes(lightning: Any, frequency: int, tmp_path: Path):
    first = fit(lightning, classifier(lightning, frequency=frequency), tmp_path)
    second = fit(lightning, classifier(lightning, frequency=frequency), tmp_path, tmp_path / "epoch=0.ckpt")
    assert identical(first, second)


@LIGHTNING
def test_lightning_closures_can_be_called_again(lightning: Any, tmp_path: Path):
    """The damping is adapted by the loss after the step: the closure computes it, and leaves no gradient."""

    def adaptive() -> dict[str, Any]:
        return {"damping": thor_fx.LevenbergMarquardt(0.03, interval=1)}

    model = classifier(lightning, **adaptive())
    found = fit(lightning, model, tmp_path, accumulate_grad_batches=1)
    plain = compiled(mlp())
    optimizer = thor(plain, **adaptive())
    schedule = falling(optimizer)
    for batch in EPOCHS * [*loader()]:

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = classified(plain, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
            return loss

        optimizer.step(closure)
        schedule.step()
    assert identical(found, snapshot(plain.state_dict()))
    assert optimizer.param_groups[0]["damping"] != 0.03


# --- Trainer of transformers ----------------------------------------------------------------------------

TRAINER_STEPS, WINDOW = 6, 8


def windows() -> list[dict[str, Tensor]]:
    """Characters of the README, as a language model learns them."""
    codes = torch.tensor([*README.read_bytes()[: 48 * WINDOW]])
    codes = codes.unique(return_inverse=True)[1].view(-1, WINDOW)
    return [{"input_ids": window, "labels": window} for window in codes]


def gpt() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    torch.manual_seed(3)
    size = {"vocab_size": 64, "n_positions": WINDOW, "n_embd": 12, "n_layer": 1, "n_head": 2}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, **quiet, bos_token_id=0, eos_token_id=0)
    )
    model.loss_type = "ForCausalLM"  # else it logs something while it is traced, which breaks the graph
    return model


class Recorder:
    """A collator that remembers its batches: the Trainer shuffles."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return self.batches[-1]


def with_trainer(
    folder: Path, half: bool = False, resume: Path | None = None, collate: Any = None
) -> nn.Module:
    """The model that the Trainer has trained; frequency 3, and a checkpoint behind step 3."""
    transformers = pytest.importorskip("transformers")
    model = compiled(gpt())
    optimizer = thor(model, frequency=3)
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=TRAINER_STEPS,
        save_steps=3,
        bf16=half,
        max_grad_norm=CLIP,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    how: dict[str, Any] = {"train_dataset": windows(), "data_collator": collate or Recorder()}
    trainer = transformers.Trainer(model, args, optimizers=(optimizer, falling(optimizer)), **how)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    assert_trained(snapshot(model.state_dict()), gpt(), optimizer, layers=6)
    return model


@BOTH_PRECISIONS
def test_trainer(half: bool, tmp_path: Path):
    """In float32 it resumes, too, and what it saves has the model's own names."""
    recorder = Recorder()
    model = with_trainer(tmp_path, half, collate=recorder)
    plain = compiled(gpt())
    data = recorder.batches[: TRAINER_STEPS * MICRO_BATCHES]
    expected = plain_loop(plain, thor(plain, frequency=3), data, lambda m, batch: m(**batch).loss, half)
    assert identical(snapshot(model.state_dict()), expected)
    if half:
        return
    resumed = with_trainer(tmp_path, resume=tmp_path / "checkpoint-3")
    assert identical(snapshot(resumed.state_dict()), expected)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert identical(snapshot(again.state_dict()), expected)
    assert [*expected] == [*gpt().state_dict()]


# --- adapters of PEFT -----------------------------------------------------------------------------------


class Adapted(nn.Module):
    """LoRA by hand: ``W x + b`` of a frozen layer, and ``scale B A x``."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), scale
        self.A = nn.Linear(layer.in_features, rank, bias=False)
        self.B = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.B(self.A(x)) * self.scale


def test_adapters(tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    by_hand = mlp()
    for name in ("0", "2"):
        adapted = Adapted(by_hand.get_submodule(name), 4, 2.0)
        for side in "AB":
            pair = getattr(model.base_model.model.get_submodule(name), f"lora_{side}").default
            getattr(adapted, side).load_state_dict(pair.state_dict())
        by_hand.set_submodule(name, adapted)
    optimizers = [thor(compiled(one)) for one in (model, by_hand)]
    for one, optimizer in zip((model, by_hand), optimizers, strict=True):
        plain_loop(one, optimizer, EPOCHS * [*loader()])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = [p for p in by_hand.parameters() if p.requires_grad]
    assert all(torch.equal(p, other) for p, other in zip(trained.values(), expected, strict=True))
    assert [*optimizers[0].coverage.layers] == [*trained]  # all of them A and B
    assert len(trained) == 4
    assert all(p.any() for p in trained.values())

    base = mlp()
    frozen = model.base_model.model
    for name in ("0", "2"):
        assert torch.equal(frozen.get_submodule(name).base_layer.weight, base.get_submodule(name).weight)
    model.eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    x = digits().tensors[0]
    assert torch.equal(again(x), by_hand(x))
    merged = again.merge_and_unload()
    assert isinstance(merged, nn.Sequential)
    for name in ("0", "2"):
        adapted = by_hand.get_submodule(name)
        whole = adapted.layer.weight + adapted.scale * (adapted.B.weight @ adapted.A.weight)
        torch.testing.assert_close(merged.get_submodule(name).weight, whole, rtol=1e-6, atol=1e-6)
