"""Adapter to torch's decompositions of recurrent layers: they become graphs that can be trained.

The only module that knows ``torch._decomp``. Written for torch 2.11, 2.13 and 2.15.

NOTE: [Recurrent nets] ``aten.lstm``, ``gru`` and ``rnn_*`` decompose into their time steps, by Python
code of torch (2.11, 2.13 and 2.15) that was written for inference. Twice it is wrong for training:
an LSTM on a CPU in float32 or bfloat16 becomes oneDNN's fused layer in its form for inference, which
keeps nothing for backward (AOTAutograd would save a None); and dropout between layers never happens.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._decomp import decompositions


def has_recurrent_operator(forward: fx.GraphModule) -> bool:
    """Whether a recurrent layer is part of one of Dynamo's graphs."""
    return any(getattr(node.target, "__name__", "") in RECURRENT for node in forward.graph.nodes)


RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@contextlib.contextmanager
def trainable_rnns() -> Iterator[None]:
    """Decompose recurrent layers as training needs it. See NOTE: [Recurrent nets]."""
    layers = decompositions._rnn_helper
    ours: dict[str, Any] = {
        "mkldnn_one_layer_lstm": decompositions.one_layer_lstm,
        "_rnn_helper": functools.partial(_layer_by_layer, layers),
    }
    with patch.multiple(decompositions, **ours):
        yield


def _layer_by_layer(
    layers: Callable[..., tuple[Tensor, list[Any]]],
    x: Tensor,
    hidden: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *rest: Any,
) -> tuple[Tensor, list[Any]]:
    """What ``layers`` does, with dropout before all layers but the first."""
    directions = 2 if bidirectional else 1
    final_hidden: list[Any] = []
    for i in range(num_layers):
        if i > 0 and train and dropout > 0:
            x = torch.dropout(x, dropout, train)
        own = slice(i * directions, (i + 1) * directions)
        x, final = layers(x, hidden[own], params[own], has_biases, 1, 0.0, train, bidirectional, *rest)
        final_hidden += final
    return x, final_hidden
