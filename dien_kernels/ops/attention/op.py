"""The contract of the attention scores: public op, checks, fakes, autograd.

``attention_scores`` checks its arguments, picks a backend and calls its raw op. Masks need no compaction
here: scores of different steps meet in the softmax only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from dien_kernels.ops._autograd import by_position, differentiable_once, distinct, needs_autograd
from dien_kernels.ops._checks import (
    autocast,
    check_like,
    check_number,
    check_option,
    check_storage,
    check_tensor,
    compute_dtype,
)
from dien_kernels.ops._compiled import refuses_cpu
from dien_kernels.ops._dispatch import Call, register_backend, select
from dien_kernels.ops._layout import check_ragged, check_rows_total
from dien_kernels.ops._mlp import ACTIVATIONS, Layers, check_layers, split_layers
from dien_kernels.ops._register import define_raw, implement_raw, raw
from dien_kernels.ops.attention import reference_backend, torch_backend, triton_launch
from dien_kernels.ops.attention.options import Options

_TENSORS = (
    "Tensor target, Tensor states, Tensor[] weights, Tensor[] biases, Tensor[] slopes, "
    "Tensor? lengths, Tensor? offsets, Tensor? mask, Tensor? history"
)
_OPTIONS = "SymInt rows_total, bool bilinear, int activation, float scale, bool softmax"
FWD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> Tensor"
BWD_SCHEMA = f"(Tensor dscores, {_TENSORS}, Tensor scores, {_OPTIONS}) -> Tensor[]"


def _fake_fwd(target, states, weights, biases, slopes, lengths, offsets, mask, history, rows_total, *options):  # type: ignore[no-untyped-def]
    if offsets is None:
        shape: tuple[Any, ...] = (target.shape[0], states.shape[1])
    else:
        shape = (states.shape[0] if history is None else rows_total,)
    return target.new_empty(shape, dtype=compute_dtype(target.dtype))


def _fake_bwd(dscores, target, states, weights, biases, slopes, *rest):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (target, states, *weights, *biases, *slopes)]


for _suffix in ("native", "triton", "torch", "reference"):
    define_raw(f"_attention_{_suffix}_fwd", FWD_SCHEMA, _fake_fwd)
    define_raw(f"_attention_{_suffix}_bwd", BWD_SCHEMA, _fake_bwd)
implement_raw("_attention_triton_fwd", triton_launch.fwd)
implement_raw("_attention_triton_bwd", triton_launch.bwd)
implement_raw("_attention_torch_fwd", torch_backend.fwd)
implement_raw("_attention_torch_bwd", torch_backend.bwd)
implement_raw("_attention_reference_fwd", reference_backend.fwd)
implement_raw("_attention_reference_bwd", reference_backend.bwd)
register_backend("attention_scores", "cpu", refuses_cpu)
register_backend("attention_scores", "triton", triton_launch.refuses)
register_backend("attention_scores", "torch", torch_backend.refuses)
register_backend("attention_scores", "reference", reference_backend.refuses)

_SUFFIXES = {"cpu": "native", "triton": "triton", "torch": "torch", "reference": "reference"}
_FWD = {backend: raw(f"_attention_{suffix}_fwd") for backend, suffix in _SUFFIXES.items()}
_BWD = {backend: raw(f"_attention_{suffix}_bwd") for backend, suffix in _SUFFIXES.items()}


class _Attention(torch.autograd.Function):
    @staticmethod
    @by_position
    def forward(backend, counts, options, target, states, lengths, offsets, mask, history, *layers):  # type: ignore[no-untyped-def]
        return _FWD[backend](target, states, *split_layers(counts, layers), lengths, offsets, mask, history, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.backend, ctx.counts, ctx.options, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @differentiable_once
    def backward(ctx, da):  # type: ignore[no-untyped-def]
        target, states, lengths, offsets, mask, history, *layers, scores = ctx.saved_tensors
        if da is None:
            return (None,) * (9 + len(layers))
        dq, dstates, *dlayers = _BWD[ctx.backend](
            da,
            target,
            states,
            *split_layers(ctx.counts, layers),
            lengths,
            offsets,
            mask,
            history,
            scores,
            *ctx.options,
        )
        return (None, None, None, dq, dstates, None, None, None, None, *dlayers)


def attention_scores(
    target: Tensor,
    states: Tensor,
    weights: Tensor | Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] = (),
    *,
    slopes: Sequence[Tensor] = (),
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    rows_total: int | None = None,
    kind: str = "bilinear",
    activation: str | None = "sigmoid",
    scale: float | None = None,
    normalize: str | None = "softmax",
    backend: str = "auto",
) -> Tensor:
    """How much each step of a history matters to a target: the scalars ``a`` of AUGRU, AGRU and AIGRU.

    With q the target of row b, k_t the states of its history and c = ``scale`` (None: 1)::

        kind="bilinear"   e_t = c * k_t^T W q                          arXiv 1809.03672, equation 8
        kind="din"        e_t = c * (W_L a_{L-1} + b_L)                arXiv 1706.06978; DIEN's authors
                          a_i = act(W_i a_{i-1} + b_i),  a_0 = [q, k_t, q - k_t, q * k_t]
        normalize="softmax"   a_t = exp(e_t) / sum of exp(e_s) over the valid steps s of the row
        normalize=None        a_t = e_t

    The concatenation a_0 is never built. Other orders of it are a shuffle of the columns of ``weights[0]``
    (for [k, q, k - q, k * q]: swap the first two blocks and negate the third). The query projection of the
    authors' code, PReLU(Dense(target)), is plain torch in front of this op.

    Args:
        target: [B, D], the dtype of ``states``.
        states: [U, T, H], or [N, H] with ``offsets``; float32, float64, bfloat16 or float16. U = B unless
            ``history`` is given.
        weights: bilinear: W [H, D], or None for the inner product (then D = H). din: a list of matrices
            [M1, 4 H], [M2, M1], ..., [1, M], and D = H. The dtype of ``states``.
        biases: din only: empty, or one for each layer, [M_i] or None; in the dtype of ``states`` or in the
            compute dtype (float64 for float64 ``states``, else float32).
        slopes: din with ``activation="prelu"`` only: one for each hidden layer, a scalar, [1] or one a
            channel [M_i]; dtypes as ``biases``.
        lengths: [U] int64 or int32, between 0 and T.
        offsets: [U + 1] int64 or int32, ascending from 0 to N; history u owns the rows
            offsets[u]:offsets[u+1].
        mask: [U, T] bool, True at valid steps; left padding and holes are welcome.
        history: [B] int64 or int32: the history of each row, in any order; its part of the first layer is
            shared where that pays.
        rows_total: with ``offsets`` and ``history`` only, and required there: the steps of all rows,
            sum_b length[history[b]], so that the size of the result never depends on data on a device.
        kind: ``"bilinear"`` or ``"din"``.
        activation: din only: ``"sigmoid"``, ``"relu"``, ``"prelu"`` or None, after every layer but the last.
        scale: a number, or None for 1. RecBole's 1/sqrt(D), for one, is a scale.
        normalize: ``"softmax"`` over the valid steps of each row, or None.
        backend: ``"auto"``, or a backend's name, which then runs or raises.

    Returns:
        [B, T]; [N] with ``offsets``; [rows_total] with ``offsets`` and ``history``, the steps of row 0, then
        of row 1, and so on. In the compute dtype. At most one of ``lengths``, ``offsets`` and ``mask`` may
        be given.

    Past a row's length, and at masked steps, scores are exactly 0, with and without ``normalize``; a row
    without a valid step is all zeros. NaN there changes no score and no gradient; NaN in a valid step
    reaches its row and the gradient of every weight. At most about M1 values a step are alive at once, for a
    tile of rows.

    Differentiable once in ``target``, ``states``, ``weights``, ``biases`` and ``slopes``; under autocast
    ``target``, ``states`` and ``weights`` are cast, biases, slopes and sums stay float32.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option; ``RuntimeError`` for a backend that refuses and for a second derivative. Values of index
    tensors are read on the CPU only; elsewhere they are clamped.

    >>> target, states = torch.randn(2, 3), torch.randn(2, 5, 4)
    >>> attention_scores(target, states, torch.zeros(4, 3), lengths=torch.tensor([4, 0]))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.0000, 0.0000]])
    """
    check_option("kind", kind, ("bilinear", "din"))
    check_option("normalize", normalize, ("softmax", None))
    if scale is not None:
        check_number("scale", scale, "a number or None")
    if scale is not None and not -inf < scale < inf:
        raise ValueError(f"scale must be finite, got {scale}")
    check_option("activation", activation, ACTIVATIONS)
    biases, slopes = () if biases is None else biases, () if slopes is None else slopes
    check_storage("states", states)
    check_tensor("target", target)
    target, weights, states = autocast(target, states), autocast(weights, states), autocast(states, states)
    ragged, _ = check_ragged(states, "states", lengths, offsets, mask, history)
    if mask is not None:
        ragged = ragged._replace(lengths=None)
    if target.dim() != 2:
        raise ValueError(f"target must have shape [B, D], got {tuple(target.shape)}")
    histories = states.shape[0] if ragged.offsets is None else ragged.offsets.shape[0] - 1
    batch = histories if ragged.history is None else ragged.history.shape[0]
    check_like("target", target, (batch, target.shape[1]), "[B, D]", states, "states")
    hidden = states.shape[-1]
    if hidden < 1:
        raise ValueError(f"states must have at least one feature, got shape {tuple(states.shape)}")
    layers = _check_weights(target, states, weights, biases, slopes, kind, activation)
    rows_total = check_rows_total(rows_total, ragged)

    widths = tuple(w.shape[0] for w in layers.weights[:-1])
    call = Call("attention_scores", states.device.type, states.dtype, target.shape[1], hidden, kind, widths)
    name = select(call, backend)
    options = Options(
        rows_total=rows_total,
        bilinear=kind == "bilinear",
        activation=ACTIVATIONS.index(activation) if kind == "din" else 0,
        scale=1.0 if scale is None else float(scale),
        softmax=normalize == "softmax",
    )
    tensors = layers.tensors()
    if needs_autograd((target, states, *tensors)):
        scores: Tensor = _Attention.apply(
            name,
            layers.counts(),
            options,
            *distinct((target, states, ragged.lengths, ragged.offsets, mask, ragged.history, *tensors)),
        )
    else:
        scores = _FWD[name](target, states, *layers, ragged.lengths, ragged.offsets, mask, ragged.history, *options)
    return scores


def _check_weights(
    target: Tensor,
    states: Tensor,
    weights: Tensor | Sequence[Tensor] | None,
    biases: Sequence[Tensor | None],
    slopes: Sequence[Tensor],
    kind: str,
    activation: str | None,
) -> Layers:
    size, hidden = target.shape[1], states.shape[-1]
    if kind == "din":
        if size != hidden:
            raise ValueError(f"target must have H = {hidden} features with kind='din', as states, got {size}")
        return check_layers(weights, biases, slopes, activation, 4 * hidden, "4 * H", (1,), states, "states")  # type: ignore[arg-type]
    if len(biases) or len(slopes):
        raise ValueError("biases and slopes must be empty with kind='bilinear', got some")
    if isinstance(weights, (list, tuple)):
        if len(weights) != 1:
            raise ValueError(f"weights must be one matrix [H, D] or None with kind='bilinear', got {len(weights)}")
        weights = weights[0]
    if weights is None:
        if size != hidden:
            raise ValueError(f"weights must be given where target has D = {size} and states H = {hidden}, got None")
        return Layers([], [], [])
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor or None with kind='bilinear', got {type(weights).__name__}")
    check_like("weights", weights, (hidden, size), "[H, D]", states, "states")
    return Layers([weights], [], [])
