"""How sure is a net? A Laplace approximation from the Kronecker factors of a trained classifier of digits.

The posterior of the weights is taken as a Gaussian around the trained ones, whose precision is that of the
data, N times the curvature, plus that of a prior; the net is linear in the weights around them (Immer et al.
2021). Prints how well calibrated it is before and after, and draws that.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, jvp, vmap

import thor_fx

PRIORS = [10.0**exponent for exponent in range(-2, 4)]
DRAWS, BINS = 100, 10


def data():
    """Training, validation and test sets; the last also with noise that no training set has."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    train, validation, test = (
        part for part in zip(x.split([800, 300, 697]), y.split([800, 300, 697]), strict=True)
    )
    noise = torch.randn(test[0].shape, generator=torch.Generator().manual_seed(1))
    return train, validation, {"test": test, "test, noisy": (test[0] + 0.3 * noise, test[1])}


def trained(x, y, backend, epochs=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    model = thor_fx.compile(model, backend=backend)
    opt = thor_fx.Thor(model, lr=0.02, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(200):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            opt.step()
            opt.zero_grad()
        if epoch in {0, epochs - 1}:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    return model.eval()


def probabilities(model, posterior, x):
    """The mean of the softmax over draws of the posterior, with the net linear in its weights."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    draws = posterior.sample(DRAWS, torch.Generator().manual_seed(0))

    def logits(inner):
        return functional_call(model, {**weights, **inner}, (x,))

    def moved(draw):
        inner = {name: weights[name] for name in posterior.shapes}
        out, change = jvp(logits, (inner,), (posterior.split(draw),))
        return (out + change).softmax(-1)

    return vmap(moved, in_dims=1)(draws).mean(0)


def calibration(p, y):
    """Of every bin of confidences: its mean confidence, its accuracy, and its share of the data."""
    confidence, said = p.max(-1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    share = torch.zeros(BINS).index_add(0, place, torch.ones(len(y)))
    sums = (torch.zeros(BINS).index_add(0, place, value.float()) for value in (confidence, said == y))
    mean, right = (total / share.clamp(min=1) for total in sums)
    return mean, right, share / len(y)


def described(p, y):
    mean, right, share = calibration(p, y)
    loss = nn.functional.nll_loss(p.clamp(min=1e-12).log(), y)
    error = ((mean - right).abs() * share).sum()
    accuracy = (p.argmax(-1) == y).float().mean()
    return f"accuracy {accuracy:.3f}, log loss {loss:.3f}, calibration error {error:.3f}"


def draw(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (title, (before, after, y)) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
        for label, p, color in (("trained weights", before, "tab:red"), ("Laplace", after, "tab:blue")):
            mean, right, share = calibration(p, y)
            seen = share > 0.01
            axes.plot(mean[seen], right[seen], marker="o", color=color, label=label)
        axes.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", nargs="?", default="inductor", help="compiles the training steps")
    parser.add_argument("--out", type=Path, default=Path("laplace.png"), help="the picture")
    given = parser.parse_args()
    (x, y), (x_held, y_held), tests = data()
    model = trained(x, y, given.backend)
    loader = zip(x.split(100), y.split(100), strict=True)
    factors = thor_fx.factors(model, nn.functional.cross_entropy, loader, fisher="exact", bias="joint")
    curvature = factors.operator(scale=len(x))

    def held_out(prior):
        p = probabilities(model, curvature.with_damping(prior), x_held)
        return float(nn.functional.nll_loss(p.log(), y_held))

    prior = min(PRIORS, key=held_out)
    print(f"precision of the prior, chosen on {len(x_held)} held-out digits: {prior:g}")
    found = {}
    with torch.no_grad():
        for name, (x_test, y_test) in tests.items():
            before = model(x_test).softmax(-1)
            after = probabilities(model, curvature.with_damping(prior), x_test)
            print(f"{name}, trained weights: {described(before, y_test)}")
            print(f"{name}, Laplace: {described(after, y_test)}")
            found[name] = before, after, y_test
    draw(found, given.out)


if __name__ == "__main__":
    main()
