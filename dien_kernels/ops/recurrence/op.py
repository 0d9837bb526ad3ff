"""The contract of the recurrence: public ops, checks, fakes, autograd.

``gru``, ``augru``, ``agru`` and ``aigru`` check their arguments, bring masks and carried padding into plain
torch, and hand everything else to ``recurrence``, which picks a backend and calls its raw op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dien_kernels.ops import _gates
from dien_kernels.ops._checks import (
    check_like,
    check_option,
    check_scalar_like,
    check_storage,
    check_tensor,
    compute_dtype,
)
from dien_kernels.ops._dispatch import Call, register_backend, select
from dien_kernels.ops._layout import MaskIndex, Ragged, check_ragged, compact, spread
from dien_kernels.ops._register import define_raw, implement_raw, raw
from dien_kernels.ops.recurrence import native, reference
from dien_kernels.ops.recurrence.reference import FORMS, Options

_TENSORS = (
    "Tensor x, Tensor? attention, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, "
    "Tensor? lengths, Tensor? offsets, Tensor? history"
)
_OPTIONS = (
    "float alpha0, float alpha1, float beta0, float beta1, bool scale_input, bool keep_side, bool reset_before, "
    "bool reverse, bool time_major, bool keep_gates"
)
FWD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
BWD_SCHEMA = (
    f"(Tensor? dy, Tensor? dh_n, {_TENSORS}, Tensor y, Tensor gates, bool need_dx, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake_fwd(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, *options):  # type: ignore[no-untyped-def]
    opts, hidden = Options(*options), w_hh.shape[1]
    if offsets is not None:
        batch = offsets.shape[0] - 1 if history is None else history.shape[0]
        shape: tuple[Any, ...] = (x.shape[0] if attention is None else attention.shape[0],)
    else:
        steps, batch = x.shape[:2] if opts.time_major else (x.shape[1], x.shape[0])
        batch = batch if history is None else history.shape[0]
        shape = (steps, batch) if opts.time_major else (batch, steps)
    gates = w_hh.new_empty(_gates_shape(shape, hidden, opts.keep_gates), dtype=compute_dtype(x.dtype))
    return x.new_empty((*shape, hidden)), x.new_empty((batch, hidden)), gates


def _gates_shape(shape: tuple[Any, ...], hidden: Any, keep: bool) -> tuple[Any, ...]:
    """Kept gates are padded to whole vectors of every instruction set (kKeptUnits in csrc/cpu/params.h)."""
    return (*shape, 4 * ((hidden + 15) // 16 * 16)) if keep else (0,)


def _fake_reference_fwd(*arguments):  # type: ignore[no-untyped-def]
    y, h_n, gates = _fake_fwd(*arguments)
    return y, h_n, gates.new_empty((0,))  # the reference recomputes always


def _fake_bwd(dy, dh_n, x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, y, gates, need_dx, *options):  # type: ignore[no-untyped-def]
    compute, hidden = compute_dtype(x.dtype), w_hh.shape[1]
    jagged = offsets is not None
    batch = (history if history is not None else offsets).shape[0] - (history is None) if jagged else y.shape[Options(*options).time_major]
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty((0,)) if attention is None else x.new_empty(attention.shape, dtype=compute),
        w_ih.new_empty(w_ih.shape),
        w_hh.new_empty(w_hh.shape),
        x.new_empty((3 * hidden,), dtype=compute),
        x.new_empty((3 * hidden,), dtype=compute),
        x.new_empty((batch, hidden), dtype=compute),
    )


for _suffix, _fake in (("native", _fake_fwd), ("reference", _fake_reference_fwd)):
    define_raw(f"_recurrence_{_suffix}_fwd", FWD_SCHEMA, _fake)
    define_raw(f"_recurrence_{_suffix}_bwd", BWD_SCHEMA, _fake_bwd)
implement_raw("_recurrence_reference_fwd", reference.fwd)
implement_raw("_recurrence_reference_bwd", reference.bwd)
register_backend("recurrence", "cpu", native.refuses_cpu)
register_backend("recurrence", "reference", reference.refuses)

_FWD = {"cpu": raw("_recurrence_native_fwd"), "reference": raw("_recurrence_reference_fwd")}
_BWD = {"cpu": raw("_recurrence_native_bwd"), "reference": raw("_recurrence_reference_bwd")}


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(backend, x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, options):  # type: ignore[no-untyped-def]
        return _FWD[backend](x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, history, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        backend, *tensors, options = inputs
        y, _, gates = output
        ctx.backend, ctx.options = backend, options
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh_n, _):  # type: ignore[no-untyped-def]
        x, attention, w_ih, w_hh, b_ih, b_hh, h0, *rest = ctx.saved_tensors
        dx, da, dw_ih, dw_hh, db_ih, db_hh, dh0 = _BWD[ctx.backend](
            dy, dh_n, x, attention, w_ih, w_hh, b_ih, b_hh, h0, *rest, ctx.needs_input_grad[1], *ctx.options
        )
        return (
            None,
            dx if ctx.needs_input_grad[1] else None,
            None if attention is None else da,
            dw_ih,
            dw_hh,
            None if b_ih is None else db_ih,
            None if b_hh is None else db_hh,
            None if h0 is None else dh0,
            None,
            None,
            None,
            None,
        )


def recurrence(
    kind: str,
    x: Tensor,
    attention: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    ragged: Ragged,
    *,
    reset: str = "after",
    update: str | None = None,
    backend: str = "auto",
    reverse: bool = False,
    time_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """The checked core of every public op and layer: pick a backend and run its raw op.

    ``kind`` is a key of ``FORMS``; with ``time_major`` x is [T,B,I] and y [T,B,H]; with ``reverse`` each row
    runs from its last valid step to its first. Arguments are taken as checked.
    """
    form = FORMS[kind]
    call = Call("recurrence", x.device.type, x.dtype, x.shape[-1], w_hh.shape[1], reset)
    name = select(call, backend)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, attention, w_ih, w_hh, b_ih, b_hh, h0)
    )
    options = Options(
        form.alpha0,
        form.alpha1,
        form.beta0,
        form.beta1,
        form.scale_input,
        (update or form.update) == "keep",
        reset == "before",
        reverse,
        time_major,
        needs_grad and _gates.kept(),
    )
    tensors = (x, attention, w_ih, w_hh, b_ih, b_hh, h0, *ragged)
    if needs_grad:
        y, h_n, _ = _Recurrence.apply(name, *tensors, options)
    else:  # an autograd.Function costs many times a raw op per call, and serving runs batches of one
        y, h_n, _ = _FWD[name](*tensors, *options)
    return y, h_n


def check_weights(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the weights against x; returns the biases in the compute dtype."""
    check_tensor("w_hh", w_hh)
    if w_hh.dim() != 2 or w_hh.shape[1] < 1 or w_hh.shape[0] != 3 * w_hh.shape[1]:
        raise ValueError(f"w_hh must have shape [3 * H, H] with H >= 1, got {tuple(w_hh.shape)}")
    rows, size = w_hh.shape[0], x.shape[-1]
    if size < 1:
        raise ValueError(f"x must have at least one feature, got shape {tuple(x.shape)}")
    check_like("w_ih", w_ih, (rows, size), "[3 * H, I]", x, "x")
    check_like("w_hh", w_hh, (rows, rows // 3), "[3 * H, H]", x, "x")
    if b_ih is not None:
        b_ih = check_scalar_like("b_ih", b_ih, (rows,), "[3 * H]", x, "x")
    if b_hh is not None:
        b_hh = check_scalar_like("b_hh", b_hh, (rows,), "[3 * H]", x, "x")
    return b_ih, b_hh


def _autocast(x: Tensor, w_ih: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast the big operands take its dtype; attention, biases, h0, state and sums stay float32."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), w_ih.to(dtype), w_hh.to(dtype)
    return x, w_ih, w_hh


def _run(
    kind: str,
    x: Tensor,
    attention: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None,
    h0: Tensor | None,
    reset: str,
    update: str | None,
    padded: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Check every argument, then run; masks and carried padding are plain torch around the core."""
    check_option("reset", reset, ("after", "before"))
    check_option("update", update, (None, "keep", "candidate"))
    check_option("padded", padded, ("zero", "carry"))
    check_storage("x", x)
    check_tensor("w_ih", w_ih)
    check_tensor("w_hh", w_hh)
    x, w_ih, w_hh = _autocast(x, w_ih, w_hh)
    ragged, index = check_ragged(x, "x", lengths, offsets, mask, history)
    b_ih, b_hh = check_weights(x, w_ih, w_hh, b_ih, b_hh)
    jagged = offsets is not None
    if ragged.history is not None:
        batch = ragged.history.shape[0]
    else:
        batch = offsets.shape[0] - 1 if offsets is not None else x.shape[0]
    if kind != "gru":
        check_tensor("attention", attention)
        assert attention is not None
        if jagged:
            rows = x.shape[0] if history is None else attention.shape[0] if attention.dim() == 1 else -1
            meaning = "[N]" if history is None else "[steps of all rows]"
            attention = check_scalar_like("attention", attention, (rows,), meaning, x, "x")
        else:
            attention = check_scalar_like("attention", attention, (batch, x.shape[1]), "[B, T]", x, "x")
    if h0 is not None:
        h0 = check_scalar_like("h0", h0, (batch, w_hh.shape[1]), "[B, H]", x, "x")

    row_index = index
    if index is not None:
        x = compact(x, index)
        if ragged.history is not None:  # the clamp only keeps this gather inside; the op reports the value
            of_row = ragged.history.clamp(0, max(index.mask.shape[0] - 1, 0))
            row_index = MaskIndex(*(t[of_row] for t in index))
        if attention is not None:
            assert row_index is not None
            attention = compact(attention, row_index)
    y, h_n = recurrence(
        kind, x, attention, w_ih, w_hh, b_ih, b_hh, h0, ragged, reset=reset, update=update, backend=backend
    )
    if row_index is not None:
        before = None
        if padded == "carry":
            before = torch.zeros_like(h_n) if h0 is None else h0.to(h_n.dtype)
        y = spread(y, row_index, before)
    elif padded == "carry" and ragged.lengths is not None:
        length = ragged.lengths if ragged.history is None else ragged.lengths[ragged.history]
        valid = torch.arange(x.shape[1], device=x.device) < length.unsqueeze(1)
        y = torch.where(valid.unsqueeze(2), y, h_n.unsqueeze(1))
    return y, h_n


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    h0: Tensor | None = None,
    reset: str = "after",
    update: str | None = None,
    padded: str = "zero",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return _run(
        "gru", x, None, w_ih, w_hh, b_ih, b_hh, lengths, offsets, mask, None, h0, reset, update, padded, backend
    )


def augru(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    h0: Tensor | None = None,
    form: str = "paper",
    reset: str = "after",
    update: str | None = None,
    padded: str = "zero",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    check_option("form", form, ("paper", "authors", "prediction_flow"))
    return _run(
        form, x, attention, w_ih, w_hh, b_ih, b_hh, lengths, offsets, mask, history, h0, reset, update, padded, backend
    )


def agru(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    h0: Tensor | None = None,
    reset: str = "after",
    update: str | None = None,
    padded: str = "zero",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return _run(
        "agru", x, attention, w_ih, w_hh, b_ih, b_hh, lengths, offsets, mask, history, h0, reset, update, padded, backend
    )


def aigru(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    h0: Tensor | None = None,
    reset: str = "after",
    update: str | None = None,
    padded: str = "zero",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return _run(
        "aigru", x, attention, w_ih, w_hh, b_ih, b_hh, lengths, offsets, mask, history, h0, reset, update, padded, backend
    )
