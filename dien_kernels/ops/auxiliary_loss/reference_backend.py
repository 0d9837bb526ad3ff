"""The backend ``reference``: the definition of the auxiliary loss (``reference.py``) as raw ops."""

from __future__ import annotations

from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._mlp import split_layers
from dien_kernels.ops._reference import evaluated, outputs_and_gradients_of, outputs_of
from dien_kernels.ops.auxiliary_loss.contract import Inputs, LossAndGradients, Options, check_index_values
from dien_kernels.ops.auxiliary_loss.reference import auxiliary_loss


def refuses(call: Call) -> str | None:
    return None


def call_of(inputs: Inputs, histories: Histories, options: Options):  # type: ignore[no-untyped-def]
    """The definition and its inputs."""
    check_index_values(inputs.states, histories)
    counts = inputs.layers.counts()

    def definition(states: Tensor, positive: Tensor, negative: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        return (auxiliary_loss(states, positive, negative, split_layers(counts, tensors), histories, options),)

    return definition, inputs.tensors()


def evaluate(inputs: Inputs, histories: Histories, options: Options) -> tuple[Tensor, ...]:
    """The loss, as autograd differentiates it."""
    return evaluated(*call_of(inputs, histories, options))


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    (loss,) = outputs_of(*call_of(inputs, histories, options))
    return loss


def fwd_bwd(inputs: Inputs, histories: Histories, options: Options) -> LossAndGradients:
    (loss,), gradients = outputs_and_gradients_of(*call_of(inputs, histories, options))
    return LossAndGradients.of(inputs, loss, gradients)
