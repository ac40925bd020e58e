"""The length of a layer's step, apart from its direction.

Of every layer's preconditioned update ``U``, an (out, in) matrix with the column of a joint bias, only the
direction ``U / |U|`` (Frobenius norm) is kept, and its length becomes one of:

* ``"sgd"``: that of what is preconditioned: the gradient, or what ``momentum_on="gradient"`` makes of it;
* ``"adam"``: that of the step that Adam would take with the same learning rate; both are *grafting*
  (Agarwal et al. 2020, layer by layer);
* ``"rms"``: ``0.2 sqrt(out in)``, a root mean square of 0.2: the size of AdamW's steps in practice, so that
  its learning rates can be kept (Liu et al. 2025, section 2.2);
* ``"spectral"``: ``sqrt(min(out, in)) sqrt(max(1, out / in))``, that of the orthogonal matrix that Muon takes
  (Jordan et al. 2024), whose spectral norm has the right scale for every width (Yang et al. 2023).

``"orthogonal"`` changes the direction as well: :mod:`thor_fx.orthogonal`.

Where a layer has groups (a grouped convolution, experts), each of its matrices is one of these. A zero stays
zero. What belongs to no layer is left alone.

Legend: E matrices of a layer.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from .layers import Coverage, Layer
from .matrices import matrices, norm, put_back, unit
from .transform import Params, Signals, State, Transform, Updates, chain, stateless

StepNorm = Literal["adam", "sgd", "rms", "spectral", "orthogonal"]
RMS = 0.2
Length = Callable[[int, int], float]


def rms_length(out: int, in_: int) -> float:
    """The Frobenius norm of a matrix with root mean square 0.2."""
    return float(RMS * (out * in_) ** 0.5)


def spectral_length(out: int, in_: int) -> float:
    """The Frobenius norm of Muon's step.

    Example:
        >>> spectral_length(64, 16), spectral_length(16, 64)
        (8.0, 4.0)
    """
    return float(min(out, in_) ** 0.5 * max(1.0, out / in_) ** 0.5)


LENGTHS: Mapping[str, Length] = {"rms": rms_length, "spectral": spectral_length}


def resize(length: Length) -> Transform:
    """Give the matrices of every layer a length that depends on their shape only."""

    def update(updates: Updates, _: Params, signals: Signals) -> Updates:
        return _stretch(updates, signals.coverage, lambda layer: length(layer.out, layer.in_))

    return stateless(update)


class GraftState(NamedTuple):
    """The states of the transform that gives the direction, and of the one that gives the length."""

    direction: State
    magnitude: State


def graft(direction: Transform, magnitude: Transform) -> Transform:
    """``direction``, with the length of ``magnitude`` layer by layer; both get the same gradients."""
    both = chain(direction, magnitude, shared=True)

    def init(params: Params, coverage: Coverage) -> GraftState:
        return GraftState(direction.init(params, coverage), magnitude.init(params, coverage))

    def update(
        updates: Updates, state: GraftState, params: Params, signals: Signals
    ) -> tuple[Updates, GraftState]:
        new, first = direction.update(updates, state.direction, params, signals)
        steps, second = magnitude.update(updates, state.magnitude, params, signals)
        stretched = _stretch(new, signals.coverage, lambda layer: norm(matrices(layer, steps)))
        return stretched, GraftState(first, second)

    return both._replace(init=init, update=update)


def _stretch(updates: Updates, coverage: Coverage, length: Callable[[Layer], Tensor | float]) -> Updates:
    new = dict(updates)
    for layer in coverage.layers.values():
        if layer.param in updates:
            put_back(layer, unit(matrices(layer, updates)) * length(layer), new)
    return new
