"""The backend ``reference``: the definition of the auxiliary loss (``reference.py``) as raw ops."""

from __future__ import annotations

from torch import Tensor

from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged
from dien_kernels.ops._mlp import Layers, split_layers
from dien_kernels.ops._reference import outputs_and_gradients_of, outputs_of
from dien_kernels.ops.auxiliary_loss.options import Options, check_index_values
from dien_kernels.ops.auxiliary_loss.reference import auxiliary_loss


def refuses(call: Call) -> str | None:
    return None


def _call(states, positive, negative, weights, biases, slopes, lengths, offsets, *options):  # type: ignore[no-untyped-def]
    """The definition and its inputs."""
    ragged, opts, layers = Ragged(lengths, offsets, None), Options(*options), Layers(weights, biases, slopes)
    check_index_values(states, ragged)

    def definition(states: Tensor, positive: Tensor, negative: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        return (auxiliary_loss(states, positive, negative, split_layers(layers.counts(), tensors), ragged, opts),)

    return definition, [states, positive, negative, *layers.tensors()]


def fwd(*arguments):  # type: ignore[no-untyped-def]
    (loss,) = outputs_of(*_call(*arguments))
    return loss


def fwd_bwd(*arguments):  # type: ignore[no-untyped-def]
    (loss,), gradients = outputs_and_gradients_of(*_call(*arguments))
    return [loss, *gradients]
