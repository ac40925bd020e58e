"""Train a small vision transformer on handwritten digits with the ``Trainer`` of Hugging Face."""

import sys
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import thor_fx

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **size)
model = ViTForImageClassification(config)

model = thor_fx.compile(model, backend=sys.argv[1] if sys.argv[1:] else "inductor")  # not torch_compile=True
opt = thor_fx.Thor(model, lr=0.02, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=20)

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=128,
        gradient_accumulation_steps=2,
        num_train_epochs=15,
        warmup_steps=10,
        bf16=True,
        max_grad_norm=0.0,  # the updates are clipped
        logging_steps=7,
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, args, train_dataset=data, optimizers=(opt, None))  # None: the scheduler of args
    trainer.train()
    model.save_pretrained(f"{folder}/model")
    again = ViTForImageClassification.from_pretrained(f"{folder}/model")

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}")
right = (again(images).logits.argmax(-1) == torch.tensor(labels)).float().mean()
print(f"of the model that was saved and loaded, {right:.1%} of the digits are right")
