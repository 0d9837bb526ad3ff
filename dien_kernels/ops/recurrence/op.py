"""The contract of the recurrence: public ops, checks, fakes, autograd.

``gru``, ``augru``, ``agru`` and ``aigru`` check their arguments, bring masks and carried padding into plain
torch, and hand everything else to ``recurrence``, which picks a backend and calls its raw op.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dien_kernels.ops import _gates
from dien_kernels.ops._autograd import by_position, differentiable_once, distinct, needs_autograd
from dien_kernels.ops._checks import (
    autocast,
    autocast_dtype,
    check_like,
    check_option,
    check_scalar_like,
    check_storage,
    check_tensor,
    compute_dtype,
)
from dien_kernels.ops._compiled import refuses_cpu
from dien_kernels.ops._dispatch import Call, register_backend, select
from dien_kernels.ops._layout import MaskIndex, Ragged, check_ragged, compact, spread
from dien_kernels.ops._register import define_raw, implement_raw, raw
from dien_kernels.ops.recurrence import cuda_launch, reference_backend, torch_backend, triton_launch
from dien_kernels.ops.recurrence.forms import FORMS, Options, form_of

_Op = TypeVar("_Op", bound=Callable[..., Any])

_TENSORS = (
    "Tensor x, Tensor? attention, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, "
    "Tensor? lengths, Tensor? offsets, Tensor? history"
)
_OPTIONS = (
    "float alpha0, float alpha1, float beta0, float beta1, bool scale_input, bool keep_side, bool reset_before, "
    "bool reverse, bool time_major, int kept_units"
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
    gates = w_hh.new_empty(_gates_shape(shape, hidden, opts.kept_units), dtype=compute_dtype(x.dtype))
    return x.new_empty((*shape, hidden)), x.new_empty((batch, hidden)), gates


def _gates_shape(shape: tuple[Any, ...], hidden: Any, units: int) -> tuple[Any, ...]:
    """Four values a unit, for whole groups of ``units`` units; nothing where ``units`` is 0."""
    return (*shape, 4 * ((hidden + units - 1) // units * units)) if units else (0,)


def _fake_recomputing_fwd(*arguments):  # type: ignore[no-untyped-def]
    y, h_n, gates = _fake_fwd(*arguments)
    return y, h_n, gates.new_empty((0,))  # the gates are computed again in the backward


def _fake_ordered_fwd(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, *rest):  # type: ignore[no-untyped-def]
    y, h_n, _ = _fake_fwd(x, attention, w_ih, w_hh, b_ih, b_hh, h0, lengths, offsets, *rest)
    ordered = lengths is not None or offsets is not None
    return y, h_n, x.new_empty((h_n.shape[0] if ordered else 0,), dtype=torch.int64)  # the rows' order


def _fake_bwd(dy, dh_n, x, attention, w_ih, w_hh, b_ih, b_hh, h0, *rest):  # type: ignore[no-untyped-def]
    _, offsets, history, y, _, need_dx, *options = rest
    compute, hidden = compute_dtype(x.dtype), w_hh.shape[1]
    jagged = offsets is not None
    batch = (
        (history if history is not None else offsets).shape[0] - (history is None)
        if jagged
        else y.shape[Options(*options).time_major]
    )
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty((0,)) if attention is None else x.new_empty(attention.shape, dtype=compute),
        w_ih.new_empty(w_ih.shape),
        w_hh.new_empty(w_hh.shape),
        x.new_empty((3 * hidden,), dtype=compute),
        x.new_empty((3 * hidden,), dtype=compute),
        x.new_empty((batch, hidden), dtype=compute),
    )


for _suffix, _fake in (
    ("native", _fake_fwd),
    ("cuda", _fake_ordered_fwd),
    ("triton", _fake_ordered_fwd),
    ("torch", _fake_recomputing_fwd),
    ("reference", _fake_recomputing_fwd),
):
    define_raw(f"_recurrence_{_suffix}_fwd", FWD_SCHEMA, _fake)
    define_raw(f"_recurrence_{_suffix}_bwd", BWD_SCHEMA, _fake_bwd)
for _name, _schema in cuda_launch.SCHEMAS.items():  # launches, implemented by the native library
    define_raw(f"_cuda_recurrence_{_name}", _schema, lambda *_: None)
implement_raw("_recurrence_cuda_fwd", cuda_launch.fwd)
implement_raw("_recurrence_cuda_bwd", cuda_launch.bwd)
implement_raw("_recurrence_triton_fwd", triton_launch.fwd)
implement_raw("_recurrence_triton_bwd", triton_launch.bwd)
implement_raw("_recurrence_torch_fwd", torch_backend.fwd)
implement_raw("_recurrence_torch_bwd", torch_backend.bwd)
implement_raw("_recurrence_reference_fwd", reference_backend.fwd)
implement_raw("_recurrence_reference_bwd", reference_backend.bwd)
register_backend("recurrence", "cpu", refuses_cpu)
register_backend("recurrence", "cuda", cuda_launch.refuses)
register_backend("recurrence", "triton", triton_launch.refuses)
register_backend("recurrence", "torch", torch_backend.refuses)
register_backend("recurrence", "reference", reference_backend.refuses)

_SUFFIXES = {"cpu": "native", "cuda": "cuda", "triton": "triton", "torch": "torch", "reference": "reference"}
_FWD = {backend: raw(f"_recurrence_{suffix}_fwd") for backend, suffix in _SUFFIXES.items()}
_BWD = {backend: raw(f"_recurrence_{suffix}_bwd") for backend, suffix in _SUFFIXES.items()}


class _Recurrence(torch.autograd.Function):
    @staticmethod
    @by_position
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
    @differentiable_once
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

    ``kind`` is a name that ``form_of`` knows; with ``time_major`` x is [T,B,I] and y [T,B,H]; with ``reverse`` each row
    runs from its last valid step to its first. Arguments are taken as checked.
    """
    form = form_of(kind)
    needs_grad = needs_autograd((x, attention, w_ih, w_hh, b_ih, b_hh, h0))
    call = Call("recurrence", x.device.type, x.dtype, x.shape[-1], w_hh.shape[1], reset, backward=needs_grad)
    name = select(call, backend)
    options = Options(
        alpha0=form.alpha0,
        alpha1=form.alpha1,
        beta0=form.beta0,
        beta1=form.beta1,
        scale_input=form.scale_input,
        keep_side=(update or form.update) == "keep",
        reset_before=reset == "before",
        reverse=reverse,
        time_major=time_major,
        kept_units=_gates.kept_units() if needs_grad else 0,
    )
    tensors = (x, attention, w_ih, w_hh, b_ih, b_hh, h0, *ragged)
    if needs_grad:
        y, h_n, _ = _Recurrence.apply(name, *distinct(tensors), options)
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
        b_ih = check_scalar_like(names[2], b_ih, (rows,), "[3 * H]", x, x_name)
    if b_hh is not None:
        b_hh = check_scalar_like(names[3], b_hh, (rows,), "[3 * H]", x, x_name)
    return b_ih, b_hh


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
    if autocast_dtype(x) is not None:  # the big operands take it; attention, biases, h0, state and sums stay float32
        w_ih, w_hh, x = autocast(w_ih, x), autocast(w_hh, x), autocast(x, x)
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
            if attention.dim() != 1:
                raise ValueError(f"attention must have one dimension with offsets, got shape {tuple(attention.shape)}")
            rows = x.shape[0] if history is None else attention.shape[0]
            attention = check_scalar_like("attention", attention, (rows,), "[N]", x, "x")
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


# The words that every public op's docstring ends with, so that help() shows them and they are written once.
_ARGUMENTS = """
U is the number of histories in ``x``, B the number of rows that are run (the same, unless rows share
histories), T the padded number of steps, N the number of steps of a jagged batch, I and H the sizes of
input and state. "Storage" is the dtype of ``x``: float32, float64, bfloat16 or float16; "compute" is
float64 for float64 and float32 for the others.

Args:
    x: inputs, [U, T, I] or, with ``offsets``, [N, I]. Storage.
    w_ih: [3 * H, I], storage; rows [r | u | n] as in ``torch.nn.GRU``.
    w_hh: [3 * H, H], storage; the same rows.
    b_ih, b_hh: [3 * H] or None (zero); compute or storage dtype.
    lengths: int64 or int32 [U], in steps, each from 0 to T; None: all T steps.
    offsets: int64 or int32 [U + 1], from 0 to N and ascending: history i is rows
        offsets[i] to offsets[i + 1] - 1 of x.
    mask: bool [U, T], True for real steps; holes and left padding are welcome. At most one of lengths,
        offsets and mask may be given; none has a gradient.
    h0: state before the first step, [B, H] or None (zero); compute or storage dtype.
    reset: ``"after"``: the reset gate multiplies the product W_hn h + b_hn; ``"before"``: it multiplies h.
    update: the side on which the weights store the update gate: ``"keep"`` (it multiplies h, as in
        ``torch.nn.GRU``) or ``"candidate"`` (it multiplies n); None: the side that is named above.
    padded: what stands in y past a row's length and at masked steps: ``"zero"``, or ``"carry"`` for the
        state the row is in. Nothing in such a step of x or attention, NaN included, changes any output or
        gradient.
    backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``; one that is named
        runs or raises.

Returns:
    y, the state after each step, [B, T, H] or in jagged form [N, H] (rows one after another), and h_n, the
    last state of each row, [B, H] (h0 for rows of length 0); both in the storage dtype. x, attention,
    weights, biases and h0 have gradients, once: there is no double backward.

Raises:
    ValueError: a wrong shape, device or option, more than one of lengths, offsets and mask; on the CPU also
        index values out of range.
    TypeError: no tensor, or a tensor of a wrong dtype.
    RuntimeError: a backend that was named refuses the call; the message gives its reason.

Under autocast x, w_ih and w_hh are cast, nothing else. Equations: docs/math.md.
"""

_ATTENTION_ARGUMENTS = """
Beside the arguments below:
    attention: one number for each row and step, [B, T], or in jagged form one for each step of each row
        (rows one after another); compute or storage dtype. It is not clamped, and has a gradient.
    history: int64 or int32 [B], from 0 to U - 1, in any order: row b runs over history ``history[b]``, so
        that many candidates share one history and its input projection. x, lengths, offsets and mask then
        describe the U histories; attention, h0, y and h_n the B rows. None: each history is one row. No
        gradient.
"""


def _documented(function: _Op) -> _Op:
    """Put the family's common words behind an op's own."""
    with_attention = "attention" in inspect.signature(function).parameters
    common = (_ATTENTION_ARGUMENTS if with_attention else "") + _ARGUMENTS
    function.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n" + common
    return function


@_documented
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
    """A gated recurrent unit over ragged sequences: with default options the function of ``torch.nn.GRU``.

    With z the stored update gate and h the state before the step::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iu x + b_iu + W_hu h + b_hu)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     or, reset="before", ... + W_hn (r * h) + b_hn
        h' = z * h + (1 - z) * n                          or, update="candidate", (1 - z) * h + z * n

    ``update=None`` means ``"keep"``. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    >>> import torch
    >>> from dien_kernels import gru
    >>> x, w_ih, w_hh = torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4)
    >>> y, h_n = gru(x, w_ih, w_hh, lengths=torch.tensor([5, 2]))
    >>> y.shape, h_n.shape, y[1, 2:].any().item(), torch.equal(y[1, 1], h_n[1])
    (torch.Size([2, 5, 4]), torch.Size([2, 4]), False, True)
    """
    return _run(
        "gru",
        x,
        None,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        lengths,
        offsets,
        mask,
        None,
        h0,
        reset,
        update,
        padded,
        backend,
    )


@_documented
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
    """A GRU whose update gate is scaled by attention (AUGRU); ``form`` says how: three different functions.

    r and n are those of ``gru``; u is the gate as a step towards the candidate (the stored gate z if
    ``update`` is ``"candidate"``, 1 - z if it is ``"keep"``); a is the attention of the row and step::

        h' = (1 - g) * h + g * n
        form="paper"            g = a * u              update=None means "candidate"
        form="authors"          g = a + (1 - a) * u    update=None means "keep": (1 - a) * z of h is kept
        form="prediction_flow"  g = (1 - a) + a * u    update=None means "keep": a * z of h is kept

    Sources: equations (11) and (12) of https://arxiv.org/abs/1809.03672 (paper);
    https://github.com/mouna99/dien (authors, with ``reset="before"``). Raises ValueError for another form.

    >>> import torch
    >>> from dien_kernels import augru
    >>> x, w_ih, w_hh = torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4)
    >>> candidates = torch.tensor([1, 0, 0])  # three candidates on two histories
    >>> y, h_n = augru(x, torch.rand(3, 5), w_ih, w_hh, history=candidates)
    >>> y.shape, h_n.shape
    (torch.Size([3, 5, 4]), torch.Size([3, 4]))
    """
    check_option("form", form, FORMS)
    return _run(
        form,
        x,
        attention,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        lengths,
        offsets,
        mask,
        history,
        h0,
        reset,
        update,
        padded,
        backend,
    )


@_documented
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
    """A GRU whose update gate is replaced by attention (AGRU).

    r and n are those of ``gru``; a is the attention of the row and step::

        h' = (1 - a) * h + a * n

    The update rows of weights and biases are accepted, unused, and get zero gradient; ``update`` changes
    nothing. Source: equation (10) of https://arxiv.org/abs/1809.03672.

    >>> import torch
    >>> from dien_kernels import agru
    >>> x, w_ih, w_hh = torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4)
    >>> y, h_n = agru(x, torch.zeros(2, 5), w_ih, w_hh, h0=torch.ones(2, 4))
    >>> torch.equal(h_n, torch.ones(2, 4))  # attention 0 leaves the state alone
    True
    """
    return _run(
        "agru",
        x,
        attention,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        lengths,
        offsets,
        mask,
        history,
        h0,
        reset,
        update,
        padded,
        backend,
    )


@_documented
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
    """A GRU that reads inputs scaled by attention (AIGRU): ``gru`` of a * x.

    The product W_ih x is made once for each history and scaled afterwards::

        r = sigmoid(a * (W_ir x) + b_ir + W_hr h + b_hr)      and u, n, h' likewise as in ``gru``

    ``update=None`` means ``"keep"``. Source: equation (9) of https://arxiv.org/abs/1809.03672.

    >>> import torch
    >>> from dien_kernels import aigru, gru
    >>> x, a = torch.randn(2, 5, 3), torch.rand(2, 5)
    >>> w_ih, w_hh = torch.randn(12, 3), torch.randn(12, 4)
    >>> y, _ = aigru(x, a, w_ih, w_hh)
    >>> torch.allclose(y, gru(a.unsqueeze(2) * x, w_ih, w_hh)[0], atol=1e-5)
    True
    """
    return _run(
        "aigru",
        x,
        attention,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        lengths,
        offsets,
        mask,
        history,
        h0,
        reset,
        update,
        padded,
        backend,
    )
