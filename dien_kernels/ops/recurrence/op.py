"""The recurrence as one op: its schemas, backends and derivative, and the checked core of every public op and layer.

``gru``, ``augru``, ``agru`` and ``aigru`` (``functional.py``) check their arguments and bring masks and carried
padding into plain torch in ``run``; ``recurrence`` picks a backend and calls its raw op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dien_kernels.checks import (
    autocast,
    autocast_dtype,
    check_compute_like,
    check_like,
    check_option,
    check_storage,
    check_tensor,
    compute_dtype,
)
from dien_kernels.histories import Histories, MaskIndex
from dien_kernels.ops import _gates
from dien_kernels.ops._autograd import needs_autograd
from dien_kernels.ops._cpu import refuses_cpu
from dien_kernels.ops._dispatch import Call, select
from dien_kernels.ops._layout import compact, spread
from dien_kernels.ops._op import Op, Pass
from dien_kernels.ops.recurrence import cuda_launch, reference_backend, torch_backend, triton_launch
from dien_kernels.ops.recurrence.contract import Forward, Gradients, Inputs
from dien_kernels.ops.recurrence.forms import Options, form_of
from dien_kernels.ops.recurrence.order import longest_first

_TENSORS = (
    "Tensor x, Tensor? attention, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, "
    "Tensor? lengths, Tensor? offsets, Tensor? history, Tensor? order"
)
_OPTIONS = (
    "float alpha0, float alpha1, float beta0, float beta1, bool scale_input, bool keep_side, bool reset_before, "
    "bool reverse, bool time_major, int kept_units"
)
FWD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
BWD_SCHEMA = (
    f"(Tensor? dy, Tensor? dh_n, {_TENSORS}, Tensor y, Tensor kept, bool need_dx, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_INPUTS = len(Inputs._fields)


def _grouped_fwd(*flat: Any) -> tuple[Any, ...]:
    lengths, offsets, history, order = flat[_INPUTS : _INPUTS + 4]
    histories = Histories(lengths, offsets, history).with_order(order)
    return Inputs(*flat[:_INPUTS]), histories, Options(*flat[_INPUTS + 4 :])


def _grouped_bwd(dy: Tensor | None, dh_n: Tensor | None, *flat: Any) -> tuple[Any, ...]:
    tensors, (y, kept, need_dx, *options) = flat[: _INPUTS + 4], flat[_INPUTS + 4 :]
    inputs, histories, opts = _grouped_fwd(*tensors, *options)
    return dy, dh_n, inputs, histories, y, kept, need_dx, opts


def _fake_fwd(inputs: Inputs, histories: Histories, options: Options) -> Forward:
    x, hidden, units = inputs.x, inputs.w_hh.shape[1], options.kept_units
    batch, steps = histories.rows(x, options.time_major), histories.steps(x, options.time_major)
    shape: tuple[Any, ...] = (steps, batch) if options.time_major else (batch, steps)
    if histories.jagged:
        shape = (x.shape[0] if inputs.attention is None else inputs.attention.shape[0],)
    # Four values a unit, for whole groups of units; nothing where there are none.
    kept = (*shape, 4 * ((hidden + units - 1) // units * units)) if units else (0,)
    return Forward(
        x.new_empty((*shape, hidden)),
        x.new_empty((batch, hidden)),
        x.new_empty(kept, dtype=compute_dtype(x.dtype)),
    )


def _fake_bwd(dy, dh_n, inputs, histories, y, kept, need_dx, options):  # type: ignore[no-untyped-def]
    x, hidden, compute = inputs.x, inputs.w_hh.shape[1], compute_dtype(inputs.x.dtype)
    batch = histories.rows() if histories.jagged else y.shape[options.time_major]
    return Gradients(
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty((0,)) if inputs.attention is None else x.new_empty(inputs.attention.shape, dtype=compute),
        inputs.w_ih.new_empty(inputs.w_ih.shape),
        inputs.w_hh.new_empty(inputs.w_hh.shape),
        x.new_empty((3 * hidden,), dtype=compute),
        x.new_empty((3 * hidden,), dtype=compute),
        x.new_empty((batch, hidden), dtype=compute),
    )


RECURRENCE = Op(
    "recurrence",
    "recurrence",
    {
        "fwd": Pass(FWD_SCHEMA, _grouped_fwd, _fake_fwd, tuple),
        "bwd": Pass(BWD_SCHEMA, _grouped_bwd, _fake_bwd, tuple),
    },
)
cuda_launch.define_launches()
RECURRENCE.backend("cpu", refuses_cpu)
RECURRENCE.backend("cuda", cuda_launch.refuses, cuda_launch)
RECURRENCE.backend("triton", triton_launch.refuses, triton_launch)
RECURRENCE.backend("torch", torch_backend.refuses, torch_backend)
RECURRENCE.backend("reference", reference_backend.refuses, reference_backend)
_FWD, _BWD = RECURRENCE.raw["fwd"], RECURRENCE.raw["bwd"]
_READ_ORDER = ("cuda", "triton")  # the backends whose loops take rows in the order of ``Histories.order``
_KEEP_GATES = ("cpu",)  # the backends whose forward can keep the gates for its backward


def _forward(backend: str, _: None, options: Options, tensors: tuple[Any, ...]) -> Any:
    return _FWD[backend](*tensors, *options)


def _backward(ctx: Any, arriving: Sequence[Any], saved: Sequence[Any]) -> tuple[Any, ...]:
    need_dx = ctx.needs_input_grad[3]  # behind the backend, the groups and the options
    dx, d_attention, dw_ih, dw_hh, db_ih, db_hh, dh0 = _BWD[ctx.backend](*arriving, *saved, need_dx, *ctx.options)
    _, attention, _, _, b_ih, b_hh, h0 = saved[:_INPUTS]
    return (
        dx if need_dx else None,
        None if attention is None else d_attention,
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


def _evaluate(_: None, options: Options, tensors: Sequence[Any]) -> Sequence[Tensor]:
    return reference_backend.evaluate(*_grouped_fwd(*tensors, *options))


RECURRENCE.derivative(_forward, lambda results: (results[0], results[2]), _backward, _evaluate, outputs=2)


def recurrence(
    kind: str,
    inputs: Inputs,
    histories: Histories,
    *,
    reset: str = "after",
    update: str | None = None,
    backend: str = "auto",
    reverse: bool = False,
    time_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """The checked core of every public op and layer: pick a backend and run its raw op.

    ``kind`` is a name that ``form_of`` knows; with ``time_major`` x is [T, U, I] and y [T, B, H]; with ``reverse``
    each row runs from its last valid step to its first. ``histories`` has no mask: ``compact`` and
    ``Histories.compacted`` come first. Arguments are taken as checked.
    """
    x, needs_grad = inputs.x, needs_autograd(inputs)
    name = select(
        Call("recurrence", x.device.type, x.dtype, x.shape[-1], inputs.w_hh.shape[1], reset, (), needs_grad), backend
    )
    form, kept_units = form_of(kind), _gates.kept_units() if needs_grad and name in _KEEP_GATES else 0
    keep_side = (update or form.update) == "keep"
    options = Options(  # by position, which takes half the time and counts where a request is one short history
        form.alpha0, form.alpha1, form.beta0, form.beta1, form.scale_input,
        keep_side, reset == "before", reverse, time_major, kept_units,
    )  # fmt: skip
    order = histories.order(longest_first) if name in _READ_ORDER else None
    tensors = (*inputs, histories.lengths, histories.offsets, histories.history_of, order)
    if needs_grad:
        y, h_n, _ = RECURRENCE.apply(name, None, options, tensors)
    else:  # an autograd.Function costs many times a raw op per call, and serving runs batches of one
        y, h_n, _ = _FWD[name](*tensors, *options)
    return y, h_n


def check_weights(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    names: Sequence[str] = ("w_ih", "w_hh", "b_ih", "b_hh"),
    x_name: str = "x",
) -> tuple[Tensor | None, Tensor | None]:
    """Check the weights, under the names that the caller's caller knows, against x; returns the biases in the compute
    dtype."""
    check_tensor(names[1], w_hh)
    if w_hh.dim() != 2 or w_hh.shape[1] < 1 or w_hh.shape[0] != 3 * w_hh.shape[1]:
        raise ValueError(f"{names[1]} must have shape [3 * H, H] with H >= 1, got {tuple(w_hh.shape)}")
    rows, size = w_hh.shape[0], x.shape[-1]
    if size < 1:
        raise ValueError(f"{x_name} must have at least one feature, got shape {tuple(x.shape)}")
    check_like(names[0], w_ih, (rows, size), "[3 * H, I]", x, x_name)
    check_like(names[1], w_hh, (rows, rows // 3), "[3 * H, H]", x, x_name)
    if b_ih is not None:
        b_ih = check_compute_like(names[2], b_ih, (rows,), "[3 * H]", x, x_name)
    if b_hh is not None:
        b_hh = check_compute_like(names[3], b_hh, (rows,), "[3 * H]", x, x_name)
    return b_ih, b_hh


def run(
    kind: str,
    inputs: Inputs,
    layout: dict[str, Any],
    *,
    reset: str,
    update: str | None,
    padded: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Check every argument of a public op, then run it; masks and carried padding are plain torch around the core.

    ``layout`` has the keywords of ``Histories.given`` beside the data.
    """
    if (reset, update, padded) != ("after", None, "zero"):  # the defaults, which most calls have
        check_option("reset", reset, ("after", "before"))
        check_option("update", update, (None, "keep", "candidate"))
        check_option("padded", padded, ("zero", "carry"))
    x, attention, w_ih, w_hh, b_ih, b_hh, h0 = inputs
    check_storage("x", x)
    if autocast_dtype(x) is not None:  # the big operands take it; attention, biases, h0, state and sums stay float32
        w_ih, w_hh, x = autocast(w_ih, x), autocast(w_hh, x), autocast(x, x)
    histories = Histories.given(x, "x", **layout)
    b_ih, b_hh = check_weights(x, w_ih, w_hh, b_ih, b_hh)
    if kind != "gru":
        attention = _check_attention(attention, x, histories)
    elif histories.history_of is not None:
        raise ValueError("histories must not have history_of: a GRU runs each history once, got one that has")
    if h0 is not None:
        h0 = check_compute_like("h0", h0, (histories.rows(x), w_hh.shape[1]), "[B, H]", x, "x")

    row_index = None
    if histories.mask is not None:
        index, row_index = cast(MaskIndex, histories.mask_index()), cast(MaskIndex, histories.row_mask_index())
        x, histories = compact(x, index), histories.compacted()
        if attention is not None:
            attention = compact(attention, row_index)
    inputs = Inputs(x, attention, w_ih, w_hh, b_ih, b_hh, h0)
    y, h_n = recurrence(kind, inputs, histories, reset=reset, update=update, backend=backend)
    if row_index is not None:
        before = None
        if padded == "carry":
            before = torch.zeros_like(h_n) if h0 is None else h0.to(h_n.dtype)
        y = spread(y, row_index, before)
    elif padded == "carry" and histories.lengths is not None:
        length = histories.row_lengths()
        valid = torch.arange(x.shape[1], device=x.device) < length.unsqueeze(1)  # type: ignore[union-attr]
        y = torch.where(valid.unsqueeze(2), y, h_n.unsqueeze(1))
    return y, h_n


def _check_attention(attention: Tensor | None, x: Tensor, histories: Histories) -> Tensor:
    check_tensor("attention", attention)
    attention = cast(Tensor, attention)
    if not histories.jagged:
        return check_compute_like("attention", attention, (histories.rows(x), x.shape[1]), "[B, T]", x, "x")
    if attention.dim() != 1:
        raise ValueError(f"attention must have one dimension with offsets, got shape {tuple(attention.shape)}")
    rows = x.shape[0] if histories.history_of is None else attention.shape[0]
    return check_compute_like("attention", attention, (rows,), "[N]", x, "x")
