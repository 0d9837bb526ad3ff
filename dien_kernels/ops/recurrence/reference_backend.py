"""The backend ``reference``: the definition of the recurrence (``reference.py``) as raw ops."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dien_kernels.checks import compute_dtype
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._reference import evaluated, outputs_and_gradients_of, outputs_of
from dien_kernels.ops.recurrence.contract import Forward, Gradients, Inputs
from dien_kernels.ops.recurrence.forms import Options, check_index_values
from dien_kernels.ops.recurrence.reference import recurrence


def refuses(call: Call) -> str | None:
    return None


def call_of(inputs: Inputs, histories: Histories, options: Options):  # type: ignore[no-untyped-def]
    """The definition and its inputs, with zeros in place of tensors that are absent."""
    x, attention, w_ih, w_hh, b_ih, b_hh, h0 = inputs
    check_index_values(x, attention, histories, time_major=options.time_major)
    hidden, batch = w_hh.shape[1], histories.rows(x, options.time_major)
    zeros = w_hh.new_zeros((), dtype=compute_dtype(x.dtype))
    if attention is None:
        padded = (batch, histories.steps(x, options.time_major))
        attention = zeros.expand(x.shape[:1] if histories.jagged else padded)
    b_ih, b_hh = (zeros.expand(3 * hidden) if bias is None else bias for bias in (b_ih, b_hh))
    h0 = zeros.expand(batch, hidden) if h0 is None else h0
    definition = partial(recurrence, histories=histories, options=options)
    return definition, [x, attention, w_ih, w_hh, b_ih, b_hh, h0]


def evaluate(inputs: Inputs, histories: Histories, options: Options) -> tuple[Tensor, ...]:
    """y and h_n, as autograd differentiates them."""
    return tuple(result.to(inputs.x.dtype) for result in evaluated(*call_of(inputs, histories, options)))


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Forward:
    y, h_n = outputs_of(*call_of(inputs, histories, options))
    dtype = inputs.x.dtype
    return Forward(y.to(dtype), h_n.to(dtype), y.new_empty(0))


def bwd(dy, dh_n, inputs, histories, y, kept, need_dx, options):  # type: ignore[no-untyped-def]
    definition, tensors = call_of(inputs, histories, options)
    _, gradients = outputs_and_gradients_of(definition, tensors, (dy, dh_n))
    found, x = Gradients(*gradients), inputs.x
    return found._replace(
        x=found.x.to(x.dtype) if need_dx else x.new_empty(0),
        attention=x.new_empty(0) if inputs.attention is None else found.attention,
        w_ih=found.w_ih.to(inputs.w_ih.dtype),
        w_hh=found.w_hh.to(inputs.w_hh.dtype),
    )
