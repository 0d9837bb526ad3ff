"""The backend ``reference``: the definition of attention scores (``reference.py``) as raw ops."""

from __future__ import annotations

from torch import Tensor

from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged
from dien_kernels.ops._mlp import Layers, split_layers
from dien_kernels.ops._reference import outputs_and_gradients_of, outputs_of
from dien_kernels.ops.attention.options import Options, check_index_values
from dien_kernels.ops.attention.reference import attention_scores


def refuses(call: Call) -> str | None:
    return None


def _call(target, states, weights, biases, slopes, lengths, offsets, mask, history, *options):  # type: ignore[no-untyped-def]
    """The definition and its inputs."""
    ragged, opts, layers = Ragged(lengths, offsets, history), Options(*options), Layers(weights, biases, slopes)
    check_index_values(states, ragged, opts.rows_total)

    def definition(target: Tensor, states: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        return (attention_scores(target, states, split_layers(layers.counts(), tensors), ragged, mask, opts),)

    return definition, [target, states, *layers.tensors()]


def fwd(*arguments):  # type: ignore[no-untyped-def]
    (scores,) = outputs_of(*_call(*arguments))
    return scores


def bwd(dscores, target, states, weights, biases, slopes, lengths, offsets, mask, history, scores, *options):  # type: ignore[no-untyped-def]
    definition, inputs = _call(target, states, weights, biases, slopes, lengths, offsets, mask, history, *options)
    _, gradients = outputs_and_gradients_of(definition, inputs, (dscores,))
    return [gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True)]
