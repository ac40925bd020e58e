"""Kronecker factors of a model over a data set: those of one batch with all of the data, batch by batch.

With ``n_b`` terms in batch ``b`` and ``N`` in all, and what :mod:`thor_fx.factors` measures of every batch::

    A = sum_b sum_r a_r a_r^T / R            R: the rows of all batches
    G = sum_b n_b^2 sum_r g_r g_r^T / N      n_b g_r are the gradients of single terms

Cotangents of the other estimators (``fisher="sampled"``, ``"exact"``) are those of single terms already.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from .capture import Captured, LossCapture, Runner
from .factors import Factors, Moments, kronecker, moments_of
from .inductor import check_backend, compile_graph
from .layers import Layer, coverage
from .parameters import check_params
from .passes import canonicalize, emit_factors, outputs, pipeline
from .passes.layout import Rules
from .passes.outputs import Loss, Output, Terms
from .passes.survey import survey
from .whole_step import results_of

Sums = dict[str, Moments]


def factors_over(
    model: nn.Module,
    loss_fn: Any,
    loader: Iterable[Any],
    rules: Rules,
    *,
    progress: bool = False,
    backend: str = "eager",
) -> Factors:
    """The factors of a model, as :func:`thor_fx.factors` returns them; see there.

    Raises:
        TypeError: ``model`` has parameters that are not floating-point.
        ValueError: there are no data, or batches use different layers.
    """
    check_backend(backend)
    params = dict(model.named_parameters())
    check_params(params)
    measuring = _Measuring(model, loss_fn, rules, backend)
    sums: Sums = {}
    terms = torch.zeros((), dtype=torch.float64)
    for batch in _shown(loader) if progress else loader:
        moments, found = measuring(params, batch)
        sums = _added(sums, _of_single_terms(moments, found) if rules.fisher == "empirical" else moments)
        terms = terms + found.detach().cpu()
    if measuring.layers is None:
        raise ValueError("loader must yield at least one batch: there are no data to measure factors on")
    pairs = kronecker(sums, measuring.layers, terms, 1 / (float(terms) * rules.loss_scale**2))
    return Factors(pairs, measuring.layers, {name: p.shape for name, p in params.items()})


class _Measuring:
    """The moments of one batch after the other; graphs are traced once for every form of batch."""

    def __init__(self, model: nn.Module, loss_fn: Any, rules: Rules, backend: str) -> None:
        self.layers: Mapping[str, Layer] | None = None
        self._rules, self._backend = rules, backend
        self._found: tuple[Sums, Tensor | None] | None = None

        def loss_of(params: Mapping[str, Tensor], batch: Any) -> Any:
            inputs, targets = _parted(batch)
            arguments, keywords = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
            out = functional_call(model, dict(params), arguments, keywords)
            return out if loss_fn is None else loss_fn(out, *targets)

        self._capture = LossCapture(loss_of, self._compile)

    def __call__(self, params: Mapping[str, Tensor], batch: Any) -> tuple[Sums, Tensor]:
        self._found = None
        self._capture(params, batch)
        if self._found is None:
            raise ValueError("the loss does not depend on the parameters of model: it is a constant")
        moments, terms = self._found
        return moments, torch.ones(()) if terms is None else terms

    def _compile(self, captured: Captured) -> Runner:
        graph = pipeline.run(captured.graph, [canonicalize])
        layers = coverage(survey(graph, self._rules), self._rules).layers
        if self.layers is not None and self.layers != layers:
            raise ValueError(
                f"loader has batches that use different layers of model: {sorted(self.layers)}, and now "
                f"{sorted(layers)}; measure them apart"
            )
        self.layers = layers
        whole = pipeline.run(graph, [partial(emit_factors, rules=self._rules)])
        returned = [d for d, node in outputs.output_nodes(whole).items() if node is not None]
        outputs.select(whole, set(returned).__contains__)
        fakes = [node.meta["val"] for node in whole.graph.find_nodes(op="placeholder")]
        compiled = compile_graph(whole, fakes, backend=self._backend)
        forward = _forward_results(returned, captured.forward)

        def run(*flat: Any) -> Sequence[Any]:
            with torch.no_grad():
                values = dict(zip(returned, compiled(*flat), strict=True))
            self._found = moments_of(values), values.get(Terms())
            return [values[descriptor] for descriptor in forward]

        return run


def _forward_results(returned: Sequence[Any], forward: fx.GraphModule) -> list[Any]:
    return [Output(i) if Output(i) in returned else Loss() for i in range(results_of(forward))]


def _parted(batch: Any) -> tuple[Any, Sequence[Any]]:
    """What the model takes of a batch, and what the loss takes beside its output."""
    if isinstance(batch, Mapping):
        return dict(batch), ()
    if isinstance(batch, list | tuple):
        return batch[0], batch[1:]
    return batch, ()


def _of_single_terms(moments: Sums, terms: Tensor) -> Sums:
    def undone(m: Moments) -> Moments:
        g = m.cotangents
        return m if g is None else m._replace(cotangents=g * terms.to(g) ** 2)

    return {name: undone(m) for name, m in moments.items()}


def _added(sums: Sums, more: Sums) -> Sums:
    both = {name: Moments(*map(_plus, sums[name], more[name])) for name in sums.keys() & more.keys()}
    return {**sums, **more, **both}


def _plus(one: Tensor | None, two: Tensor | None) -> Any:
    return two if one is None else one if two is None else one + two


def _shown(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader behind a progress bar."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "thor-fx[examples]"') from error
    shown: Iterable[Any] = tqdm(loader, desc="factors", unit=" batches", dynamic_ncols=True)
    return shown
