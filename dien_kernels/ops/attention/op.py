"""Attention scores as one op: its schemas, backends and derivative, and the public function with its checks.

Masks need no compaction here: scores of different steps meet in the softmax only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, Literal

from torch import Tensor

from dien_kernels.checks import (
    autocast,
    check_like,
    check_number,
    check_option,
    check_storage,
    check_tensor,
    compute_dtype,
)
from dien_kernels.histories import Histories
from dien_kernels.ops._autograd import needs_autograd
from dien_kernels.ops._cpu import refuses_cpu
from dien_kernels.ops._dispatch import BackendName, Call, select
from dien_kernels.ops._mlp import ACTIVATIONS, Activation, Layers, check_layers, split_layers
from dien_kernels.ops._op import Op, Pass
from dien_kernels.ops.attention import reference_backend, torch_backend, triton_launch
from dien_kernels.ops.attention.contract import KINDS, Gradients, Inputs, Kind, Options

_TENSORS = (
    "Tensor target, Tensor states, Tensor[] weights, Tensor[] biases, Tensor[] slopes, "
    "Tensor? lengths, Tensor? offsets, Tensor? mask, Tensor? history"
)
_OPTIONS = "SymInt rows_total, bool bilinear, int activation, float scale, bool softmax"
FWD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> Tensor"
BWD_SCHEMA = f"(Tensor dscores, {_TENSORS}, Tensor scores, {_OPTIONS}) -> Tensor[]"
_FLAT = 9  # flat tensors and lists of tensors before the options


def _grouped_fwd(*flat: Any) -> tuple[Any, ...]:
    target, states, weights, biases, slopes, lengths, offsets, mask, history = flat[:_FLAT]
    options = Options(*flat[_FLAT:])
    histories = Histories(lengths, offsets, history, mask, options.rows_total)
    return Inputs(target, states, Layers(weights, biases, slopes)), histories, options


def _grouped_bwd(dscores: Tensor, *flat: Any) -> tuple[Any, ...]:
    scores = flat[_FLAT]
    inputs, histories, options = _grouped_fwd(*flat[:_FLAT], *flat[_FLAT + 1 :])
    return dscores, inputs, histories, scores, options


def _fake_fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    target, states, _ = inputs
    shape: tuple[Any, ...] = (target.shape[0], states.shape[1] if states.dim() == 3 else 0)
    if histories.jagged:
        shape = (states.shape[0] if histories.history_of is None else options.rows_total,)
    return target.new_empty(shape, dtype=compute_dtype(target.dtype))


def _fake_bwd(dscores: Tensor, inputs: Inputs, histories: Histories, scores: Tensor, options: Options) -> Gradients:
    return Gradients.like(inputs, lambda t: t.new_empty(t.shape))


ATTENTION = Op(
    "attention_scores",
    "attention",
    {
        "fwd": Pass(FWD_SCHEMA, _grouped_fwd, _fake_fwd, lambda scores: scores),
        "bwd": Pass(BWD_SCHEMA, _grouped_bwd, _fake_bwd, Gradients.tensors),
    },
)
ATTENTION.backend("cpu", refuses_cpu)
ATTENTION.backend("triton", triton_launch.refuses, triton_launch)
ATTENTION.backend("torch", torch_backend.refuses, torch_backend)
ATTENTION.backend("reference", reference_backend.refuses, reference_backend)
_FWD, _BWD = ATTENTION.raw["fwd"], ATTENTION.raw["bwd"]
_LAYOUT = 4  # lengths, offsets, mask and history, behind target and states


def _arguments(counts: tuple[int, int, int], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The raw ops' tensors and lists from one flat list: target, states, the layout, then all layers."""
    target, states, *rest = tensors
    return target, states, *split_layers(counts, rest[_LAYOUT:]), *rest[:_LAYOUT]


def _forward(backend: str, counts: tuple[int, int, int], options: Options, tensors: tuple[Any, ...]) -> Any:
    return _FWD[backend](*_arguments(counts, tensors), *options)


def _backward(ctx: Any, arriving: Sequence[Any], saved: Sequence[Any]) -> tuple[Any, ...]:
    *tensors, scores = saved
    dtarget, dstates, *dlayers = _BWD[ctx.backend](*arriving, *_arguments(ctx.groups, tensors), scores, *ctx.options)
    return dtarget, dstates, *(None,) * _LAYOUT, *dlayers


def _evaluate(counts: tuple[int, int, int], options: Options, tensors: Sequence[Any]) -> Sequence[Tensor]:
    return reference_backend.evaluate(*_grouped_fwd(*_arguments(counts, tensors), *options))


ATTENTION.derivative(_forward, lambda results: results, _backward, _evaluate, outputs=1)


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
    histories: Histories | None = None,
    kind: Kind = "bilinear",
    activation: Activation | None = "sigmoid",
    scale: float | None = None,
    normalize: Literal["softmax"] | None = "softmax",
    backend: BackendName = "auto",
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
        histories: a ``dien_kernels.Histories``, which says what lengths, offsets, mask, history and
            rows_total say and is checked once for all ops that read a batch; the five must then be None.
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

    Differentiable in ``target``, ``states``, ``weights``, ``biases`` and ``slopes``; under autocast
    ``target``, ``states`` and ``weights`` are cast, biases, slopes and sums stay float32.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option; ``RuntimeError`` for a backend that refuses. Values of index
    tensors are read on the CPU only; elsewhere they are clamped.

    >>> target, states = torch.randn(2, 3), torch.randn(2, 5, 4)
    >>> attention_scores(target, states, torch.zeros(4, 3), lengths=torch.tensor([4, 0]))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.0000, 0.0000]])
    """
    check_option("kind", kind, KINDS)
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
    layout = Histories.given(
        states, "states", lengths=lengths, offsets=offsets, mask=mask, history=history, histories=histories
    )
    if target.dim() != 2:
        raise ValueError(f"target must have shape [B, D], got {tuple(target.shape)}")
    check_like("target", target, (layout.rows(states), target.shape[1]), "[B, D]", states, "states")
    hidden = states.shape[-1]
    if hidden < 1:
        raise ValueError(f"states must have at least one feature, got shape {tuple(states.shape)}")
    layers = _check_weights(target, states, weights, biases, slopes, kind, activation)
    options = Options(
        rows_total=layout.check_rows_total(rows_total),
        bilinear=kind == "bilinear",
        activation=ACTIVATIONS.index(activation) if kind == "din" else 0,
        scale=1.0 if scale is None else float(scale),
        softmax=normalize == "softmax",
    )
    widths = tuple(w.shape[0] for w in layers.weights[:-1])
    call = Call("attention_scores", states.device.type, states.dtype, target.shape[1], hidden, kind, widths)
    name, flat = select(call, backend), layers.tensors()
    where = (layout.lengths, layout.offsets, layout.mask, layout.history_of)
    if needs_autograd((target, states, *flat)):
        scores: Tensor = ATTENTION.apply(name, layers.counts(), options, (target, states, *where, *flat))
    else:
        scores = _FWD[name](target, states, *layers, *where, *options)
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
