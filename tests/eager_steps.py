"""Every rule of a step in plain loops: one dense inverse, one parameter at a time, and no graph anywhere."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from averaged_thor import blocks_of
from hooks import Seen, uses_by_hooks
from oracle import Pair, damped
from training import Batch, Parameters, snapshot

D = torch.float64
MODULES = nn.Linear, nn.Conv2d, nn.Embedding
DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "loss_scale": 1.0,
    "use_nesterov": False,
    "enable_clip_grad": False,
    "frequency": 100,
    "damping_rule": "factor",
    "bias": "raw",
    "block_size": 128,
    "max_dim": 8192,
    "factor_decay": None,
    "kl_clip": None,
    "clip": "tensor",
    "clip_norm": 1.0,
    "step_norm": None,
    "momentum_on": "update",
    "decoupled_weight_decay": False,
    "fallback": "sgd",
    "fallback_lr": None,
}


class Slow:
    """Trains a model whose loss is the mean over the targets ``y``; no convolution has groups.

    Layers are (out, in) matrices here: kernels are flattened, tables transposed.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model, self.o = model, {**DEFAULTS, **settings}
        self.params = {name: p.detach() for name, p in model.named_parameters()}  # the same memory
        modules = {n: m for n, m in model.named_modules() if isinstance(m, MODULES)}
        self.tables = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Embedding)}
        biased = {n for n, m in modules.items() if getattr(m, "bias", None) is not None}
        joint = biased if self.o["bias"] == "joint" else set()
        self.layers = {f"{n}.weight": f"{n}.bias" if n in joint else None for n in modules}
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        self.norms = {f"{n}.{part}" for n in norms for part in ("weight", "bias")}
        self.inside = {name for layer in self.layers.items() for name in layer if name is not None}
        self.sums: dict[str, tuple[Any, ...]] = {}
        self.inverses: dict[str, tuple[Tensor, ...]] = {}
        self.moving: Parameters = {}
        self.mean: Parameters = {}
        self.square: Parameters = {}
        self.steps = 0

    def measure(self, x: Tensor, y: Tensor) -> tuple[Parameters, dict[str, Pair]]:
        """Gradients by name, and undamped factor pairs by layer."""
        self.model.zero_grad()
        uses = uses_by_hooks(self.model, lambda: F.cross_entropy(self.model(x).flatten(0, -2), y.flatten()))
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return gradients, {name: self.pair(name, seen, y.numel()) for name, seen in uses.items()}

    def pair(self, layer: str, uses: Sequence[Seen], n: int) -> Pair:
        ungrouped = [use for (use,) in (seen.groups for seen in uses)]
        a, g = (torch.cat(rows) for rows in zip(*ungrouped, strict=True))
        if self.layers[layer] is not None:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
        return Pair(a.T @ a / len(a), n * g.T @ g, len(a))

    def invert(self, layer: str, pair: Pair) -> None:
        """Of the running averages, block by block."""
        decay = self.o["factor_decay"] or 0.0
        old = self.sums.get(layer, (torch.zeros_like(pair.A), torch.zeros_like(pair.G), 0.0))
        sums = tuple(decay * s + (1 - decay) * new for s, new in zip(old, (pair.A, pair.G, 1.0), strict=True))
        self.sums[layer] = sums
        A, G = sums[0] / sums[2], sums[1] / sums[2]
        A, G = blocks_of(A, self.input_block(layer, len(A))), blocks_of(G, self.o["block_size"])
        dampings = self.damping(A, G)
        self.inverses[layer] = tuple(
            torch.linalg.inv(damped(m, d)) for m, d in zip((A, G), dampings, strict=True)
        )

    def input_block(self, layer: str, side: int) -> int:
        """Where that side of a convolution is long, its blocks are those of whole channels."""
        size, taps = self.o["block_size"], self.params[layer][0].numel() // self.params[layer].shape[1]
        return size // taps * taps if side > self.o["max_dim"] else size

    def damping(self, A: Tensor, G: Tensor) -> tuple[float, float]:
        lam, a, g = self.o["damping"], A.trace().item() / len(A), G.trace().item() / len(G)
        root, pi = math.sqrt(lam), math.sqrt(a / g) if a > 0 < g else 1.0
        return {
            "factor": (lam, lam),
            "sqrt": (root, root),
            "pi": (pi * root, root / pi),
            "relative": (lam * (a or 1.0), lam * (g or 1.0)),
        }[self.o["damping_rule"]]

    def matrix(self, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        bias, matrix = self.layers[layer], tensors[layer].flatten(1)
        matrix = matrix.T if layer in self.tables else matrix
        return matrix if bias is None else torch.cat([matrix, tensors[bias][:, None]], 1)

    def put(self, layer: str, matrix: Tensor, tensors: Parameters) -> None:
        bias = self.layers[layer]
        weight = matrix if bias is None else matrix[:, :-1]
        weight = weight.T if layer in self.tables else weight
        tensors[layer] = weight.reshape(self.params[layer].shape)
        if bias is not None:
            tensors[bias] = matrix[:, -1]

    def average(self, given: Parameters) -> Parameters:
        """The heavy ball on some parameters."""
        mu = self.o["momentum"]
        for name, g in given.items():
            self.moving[name] = mu * self.moving.get(name, 0.0) + g
        nesterov = self.o["use_nesterov"]
        return {n: g + mu * self.moving[n] if nesterov else self.moving[n] for n, g in given.items()}

    def adam(self, gradients: Parameters) -> Parameters:
        t, new = self.steps + 1, {}
        for n, g in gradients.items():
            self.mean[n] = 0.9 * self.mean.get(n, 0.0) + 0.1 * g
            self.square[n] = 0.999 * self.square.get(n, 0.0) + 0.001 * g * g
            new[n] = (self.mean[n] / (1 - 0.9**t)) / ((self.square[n] / (1 - 0.999**t)).sqrt() + 1e-8)
        return new

    def step(self, x: Tensor, y: Tensor) -> Parameters:
        """The change of every parameter."""
        return self.change(*self.measure(x, y), y.numel())

    def change(self, gradients: Parameters, pairs: Mapping[str, Pair], terms: int) -> Parameters:
        """The same, by the gradients and factors of a loss of so many terms."""
        o = self.o
        if self.steps % o["frequency"] == 0:
            for name, pair in pairs.items():
                self.invert(name, pair)
        outside = {n: g for n, g in gradients.items() if n not in self.inside}
        inside = {n: g for n, g in gradients.items() if n in self.inside}
        change: Parameters = {}
        lr, wd = o["lr"], o["weight_decay"]
        other = lr if o["fallback_lr"] is None else o["fallback_lr"]
        if o["fallback"] == "adamw":
            change = {n: -other * (u + wd * self.params[n]) for n, u in self.adam(outside).items()}
            outside = {}
        given = self.average(inside) if o["momentum_on"] == "gradient" else dict(inside)
        U = {**given, **outside}
        for n in self.norms & outside.keys():
            d = o["damping"] if o["damping_rule"] in {"factor", "relative"} else math.sqrt(o["damping"])
            U[n] = outside[n] / (outside[n] ** 2 / terms + d)
        for layer, (A, G) in self.inverses.items():
            self.put(layer, G @ self.matrix(layer, given) @ A, U)
        if o["kl_clip"] is not None:
            square = sum(float(lr**2 * (U[n] * given[n]).sum()) for n in given)
            nu = min(1.0, math.sqrt(o["kl_clip"] / square))
            U = {n: nu * u for n, u in U.items()}
        if o["momentum_on"] == "gradient":
            U |= self.average({n: U[n] for n in outside})
        steps = self.adam(inside) if o["step_norm"] == "adam" else {}
        for layer in self.layers:
            u = self.matrix(layer, U)
            out, in_ = u.shape
            if o["step_norm"] == "orthogonal":
                self.put(layer, nearly_orthogonal(u) * math.sqrt(max(1.0, out / in_)), U)
                continue
            length = {
                None: u.norm(),
                "sgd": self.matrix(layer, given).norm(),
                "adam": self.matrix(layer, steps).norm() if steps else None,
                "rms": 0.2 * math.sqrt(out * in_),
                "spectral": math.sqrt(min(out, in_)) * math.sqrt(max(1.0, out / in_)),
            }[o["step_norm"]]
            self.put(layer, u * (length / u.norm()), U)
        if not o["decoupled_weight_decay"]:
            U = {n: u + wd * self.params[n] for n, u in U.items()}
        if o["enable_clip_grad"]:
            norms = {n: u.norm() for n, u in U.items()}
            if o["clip"] == "global":
                norms = dict.fromkeys(U, torch.stack(list(norms.values())).norm())
            U = {n: u * min(1.0, o["clip_norm"] / float(norms[n])) for n, u in U.items()}
        if o["momentum_on"] == "update":
            U = self.average(U)
        if o["decoupled_weight_decay"]:
            U = {n: u + wd * self.params[n] for n, u in U.items()}
        change |= {n: -(lr if n in self.inside else other) * u for n, u in U.items()}
        self.steps += 1
        return change

    def add(self, change: Parameters) -> None:
        for name, value in change.items():
            self.params[name].add_(value)


def nearly_orthogonal(matrix: Tensor) -> Tensor:
    """Muon's polynomial, three times, on the singular values alone."""
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.max()
    s = s / s.pow(4).sum() ** 0.25
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left * s @ right


def slowly(model: nn.Module, data: Sequence[Batch], **settings: Any) -> list[Parameters]:
    """The parameters after every step."""
    slow, trajectory = Slow(model, **settings), []
    for batch in data:
        slow.add(slow.step(*batch))
        trajectory.append(snapshot(slow.params))
    return trajectory
