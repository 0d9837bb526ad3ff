"""The backend ``reference``: the definition of attention scores (``reference.py``) as raw ops."""

from __future__ import annotations

from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._mlp import split_layers
from dien_kernels.ops._reference import evaluated, outputs_and_gradients_of, outputs_of
from dien_kernels.ops.attention.contract import Gradients, Inputs, Options, check_index_values
from dien_kernels.ops.attention.reference import attention_scores


def refuses(call: Call) -> str | None:
    return None


def call_of(inputs: Inputs, histories: Histories, options: Options):  # type: ignore[no-untyped-def]
    """The definition and its inputs."""
    check_index_values(inputs.states, histories, options.rows_total)
    counts = inputs.layers.counts()

    def definition(target: Tensor, states: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        return (attention_scores(target, states, split_layers(counts, tensors), histories, options),)

    return definition, inputs.tensors()


def evaluate(inputs: Inputs, histories: Histories, options: Options) -> tuple[Tensor, ...]:
    """The scores, as autograd differentiates them."""
    return evaluated(*call_of(inputs, histories, options))


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    (scores,) = outputs_of(*call_of(inputs, histories, options))
    return scores


def bwd(dscores: Tensor, inputs: Inputs, histories: Histories, scores: Tensor, options: Options) -> Gradients:
    definition, tensors = call_of(inputs, histories, options)
    _, gradients = outputs_and_gradients_of(definition, tensors, (dscores,))
    return Gradients.of(inputs, gradients)
