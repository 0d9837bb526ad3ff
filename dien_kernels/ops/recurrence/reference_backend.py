"""The backend ``reference``: the definition of the recurrence (``reference.py``) as raw ops."""

from __future__ import annotations

from functools import partial

from dien_kernels.ops._checks import compute_dtype
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Ragged
from dien_kernels.ops._reference import outputs_and_gradients_of, outputs_of
from dien_kernels.ops.recurrence.forms import Options, check_index_values
from dien_kernels.ops.recurrence.reference import recurrence


def refuses(call: Call) -> str | None:
    return None


def _call(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, options):  # type: ignore[no-untyped-def]
    """The definition and its inputs, with zeros in place of tensors that are absent."""
    ragged = Ragged(lengths, offsets, history)
    check_index_values(x, attention, ragged, time_major=options.time_major)
    hidden = w_hh.shape[1]
    histories = offsets.shape[0] - 1 if offsets is not None else x.shape[options.time_major]
    batch = histories if history is None else history.shape[0]
    zeros = w_hh.new_zeros((), dtype=compute_dtype(x.dtype))
    if attention is None:
        attention = zeros.expand(x.shape[:1] if offsets is not None else (batch, x.shape[1 - options.time_major]))
    b_ih, b_hh = (zeros.expand(3 * hidden) if bias is None else bias for bias in (b_ih, b_hh))
    h0 = zeros.expand(batch, hidden) if h0 is None else h0
    return partial(recurrence, ragged=ragged, options=options), [x, attention, w_ih, w_hh, b_ih, b_hh, h0]


def fwd(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, *options):  # type: ignore[no-untyped-def]
    tensors = (x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history)
    y, h_n = outputs_of(*_call(*tensors, Options(*options)))
    return y.to(x.dtype), h_n.to(x.dtype), y.new_empty(0)


def bwd(dy, dh_n, x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, y, gates, need_dx, *options):  # type: ignore[no-untyped-def]
    tensors = (x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history)
    definition, inputs = _call(*tensors, Options(*options))
    _, (dx, d_attention, dw_ih, dw_hh, *rest) = outputs_and_gradients_of(definition, inputs, (dy, dh_n))
    return (
        dx.to(x.dtype) if need_dx else x.new_empty(0),
        x.new_empty(0) if attention is None else d_attention,
        dw_ih.to(w_ih.dtype),
        dw_hh.to(w_hh.dtype),
        *rest,
    )
