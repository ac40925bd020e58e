"""A small GPT learns the documentation that comes with Python, character by character, and writes some."""

import argparse
import math
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import thor_fx

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 64, 4, 64, 32

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("backend", nargs="?", default="inductor")
parser.add_argument("--steps", type=int, default=400)
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rise, self.fall = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.mix(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, positions, size)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.fall(nn.functional.gelu(self.rise(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, characters):
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.blocks(self.characters(ids) + self.places(places)))


text = "\n".join(topics.values())
letters = sorted(set(text))
ids = torch.tensor([letters.index(letter) for letter in text])
train, held_out = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])

torch.manual_seed(0)
model = GPT(len(letters))
params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def batch_of(ids):
    starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1))
    windows = ids[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_fn(params, ids, following):
    return cross_entropy(functional_call(model, params, ids).flatten(0, 1), following.flatten())


@torch.no_grad()
def held_out_bits(batches=8):
    generator = torch.random.get_rng_state()
    bits = sum(loss_fn(params, *batch_of(held_out)).item() for _ in range(batches)) / batches / math.log(2)
    torch.random.set_rng_state(generator)
    return bits


@torch.no_grad()
def written(start, length=300):
    found = [letters.index(letter) for letter in start]
    for _ in range(length):
        logits = functional_call(model, params, torch.tensor([found[-CONTEXT:]]))[0, -1]
        found.append(int(logits.softmax(-1).multinomial(1)))
    return "".join(letters[i] for i in found)


step = thor_fx.compile_step(loss_fn, thor_fx.thor(lr=0.01, preset="recommended"), backend=args.backend)
state = step.init(params, *batch_of(train))

print(f"before: {held_out_bits():.3f} bits per character")
for number in range(1, args.steps + 1):
    params, state, out = step(params, state, *batch_of(train))
    if number % 100 == 0 or number == args.steps:
        print(f"step {number}: {held_out_bits():.3f} bits per character")
print(f"it writes:\n{written('The ')}")
