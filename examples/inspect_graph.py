"""Look at the training step of a small GPT: what is preconditioned, what it costs, what depends on what."""

import argparse
from pathlib import Path

import torch
from torch import nn

import thor_fx
from thor_fx.graphs import critical_path, factor_dependencies, forward_backward_cut, live_ranges
from thor_fx.plots import factor_spectra


class Block(nn.Module):
    """Attention and a perceptron, each beside a path around it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.fall(nn.functional.gelu(self.rise(self.between(x))))


class Gpt(nn.Module):
    """Predicts the next of ``words`` words."""

    def __init__(self, words, width, heads, layers):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens, targets):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path(), help="for gpt.svg and gpt.html")
    parser.add_argument("--measure", action="store_true", help="compile and run both kinds of step")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = Gpt(words=65, width=64, heads=4, layers=given.layers)
    tokens, targets = torch.randint(65, (2, 8, 32))
    report = thor_fx.explain(model, tokens, targets)

    print(report.summary)
    print(report.why("blocks.0.qkv.weight"))
    print(report.steps)

    graph = report.graph
    path, memory, cut = critical_path(graph, "flops"), live_ranges(graph), forward_backward_cut(graph)
    work = path.total / path.weight
    print(
        f"\ncritical path: {len(path.nodes)} of {len(graph)} nodes; all of them are {work:.1f} times its work"
    )
    print(f"alive at once: {memory.peak / 1e6:.2f} MB, of which forward keeps {cut.bytes / 1e6:.2f} MB")
    factor, needs = max(factor_dependencies(graph).items(), key=lambda item: item[1].own_flops)
    print(f"dearest factor: {factor}, {needs.own_flops / 1e6:.2f} MFLOP in {len(needs.own)} nodes of its own")

    kinds = ("plain", "factor") if given.measure else ()
    measured = {kind: report.steps.measured(kind) for kind in kinds}
    factors = thor_fx.factors(model_loss(model), dict(model.named_parameters()), tokens, targets)
    few = {name: pair for name, pair in factors.items() if name.startswith("blocks.0.")}
    spectra = {"Spectra of the factors of the first block": factor_spectra(few)}
    picture, page = given.folder / "gpt.svg", given.folder / "gpt.html"
    report.draw(picture)
    report.html(page, measured=measured, plots=spectra, title=f"GPT, {given.layers} layers")
    print(f"written: {picture} and {page}")


def model_loss(model):
    return lambda params, *batch: torch.func.functional_call(model, params, batch)


if __name__ == "__main__":
    main()
