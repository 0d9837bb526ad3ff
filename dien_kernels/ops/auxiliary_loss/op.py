"""The auxiliary loss as one op: its schemas, backends and derivative, and the public function with its checks.

``auxiliary_loss`` folds the affine map, the two-class output and masks into plain torch before it picks a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dien_kernels.checks import (
    autocast,
    check_compute_like,
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
from dien_kernels.ops._layout import compact
from dien_kernels.ops._mlp import ACTIVATIONS, Activation, Layers, check_layers, split_layers
from dien_kernels.ops._op import Op, Pass
from dien_kernels.ops.auxiliary_loss import reference_backend, torch_backend
from dien_kernels.ops.auxiliary_loss.contract import (
    KINDS,
    NORMALIZERS,
    Inputs,
    Kind,
    LossAndGradients,
    Normalizer,
    Options,
)

_TENSORS = (
    "Tensor states, Tensor positive, Tensor negative, Tensor[] weights, Tensor[] biases, Tensor[] slopes, "
    "Tensor? lengths, Tensor? offsets"
)
_OPTIONS = "bool inner, int activation, int normalizer, float eps, int ahead"
FWD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> Tensor"
# The loss, then its derivative by each tensor of floats, in the compute dtype.
FWD_BWD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> Tensor[]"


def _grouped(*flat: Any) -> tuple[Any, ...]:
    states, positive, negative, weights, biases, slopes, lengths, offsets, *options = flat
    inputs = Inputs(states, positive, negative, Layers(weights, biases, slopes))
    return inputs, Histories(lengths, offsets), Options(*options)


def _fake_fwd(inputs: Inputs, histories: Histories, options: Options) -> Tensor:
    return inputs.states.new_empty((), dtype=compute_dtype(inputs.states.dtype))


def _fake_fwd_bwd(inputs: Inputs, histories: Histories, options: Options) -> LossAndGradients:
    compute = compute_dtype(inputs.states.dtype)
    gradients = [t.new_empty(t.shape, dtype=compute) for t in inputs.tensors()]
    return LossAndGradients.of(inputs, _fake_fwd(inputs, histories, options), gradients)


AUXILIARY_LOSS = Op(
    "auxiliary_loss",
    "auxiliary_loss",
    {
        "fwd": Pass(FWD_SCHEMA, _grouped, _fake_fwd, lambda loss: loss),
        "fwd_bwd": Pass(FWD_BWD_SCHEMA, _grouped, _fake_fwd_bwd, LossAndGradients.tensors),
    },
)
AUXILIARY_LOSS.backend("cpu", refuses_cpu)
AUXILIARY_LOSS.backend("torch", torch_backend.refuses, torch_backend)
AUXILIARY_LOSS.backend("reference", reference_backend.refuses, reference_backend)
_FWD, _FWD_BWD = AUXILIARY_LOSS.raw["fwd"], AUXILIARY_LOSS.raw["fwd_bwd"]


def _forward(backend: str, counts: tuple[int, int, int], options: Options, tensors: tuple[Any, ...]) -> Any:
    states, positive, negative, lengths, offsets, *layers = tensors
    split = split_layers(counts, layers)
    return tuple(_FWD_BWD[backend](states, positive, negative, *split, lengths, offsets, *options))


def _backward(ctx: Any, arriving: Sequence[Any], saved: Sequence[Any]) -> tuple[Any, ...]:
    """The derivative of a scalar is known but for a factor: the forward has computed it with the loss, and here it is
    scaled. So nothing is computed twice and no logits are kept; what is kept has the inputs' size. The inputs are saved
    for their dtypes, and for derivatives of higher order."""
    (states, positive, negative, _, _, *layers), kept = saved[: ctx.count], saved[ctx.count :]
    inputs = (states, positive, negative, *layers)
    dstates, dpositive, dnegative, *dlayers = ((d * arriving[0]).to(t.dtype) for d, t in zip(kept, inputs, strict=True))
    return dstates, dpositive, dnegative, None, None, *dlayers


def _evaluate(counts: tuple[int, int, int], options: Options, tensors: Sequence[Any]) -> Sequence[Tensor]:
    states, positive, negative, lengths, offsets, *layers = tensors
    split = split_layers(counts, layers)
    return reference_backend.evaluate(*_grouped(states, positive, negative, *split, lengths, offsets, *options))


AUXILIARY_LOSS.derivative(_forward, lambda results: results[1:], _backward, _evaluate, outputs=1)


def auxiliary_loss(
    states: Tensor,
    positive: Tensor,
    negative: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor | None] = (),
    *,
    slopes: Sequence[Tensor] = (),
    affine: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    histories: Histories | None = None,
    kind: Kind = "inner",
    activation: Activation | None = "sigmoid",
    normalizer: Normalizer = "joint",
    eps: float | Literal["clamp"] = 0.0,
    shift: bool = True,
    backend: BackendName = "auto",
) -> Tensor:
    """The loss by which an interest state tells the next behaviour from negatives (arXiv 1809.03672, eq. 6).

    With h_{b,t} the states and e_{b,t} the behaviours of row b, V_b = max(length_b - 1, 0) pairs in it (with
    ``shift=False``: length_b), V = sum_b V_b, and K negatives e^k a behaviour; sums run over pairs::

        kind="inner"   x(h, e) = <h, e>                                        the paper
        kind="mlp"     x(h, e) = W_L a_{L-1} + b_L,  a_i = act(W_i a_{i-1} + b_i),  a_0 = [h, e]
                       two outputs in the last layer are a softmax: x = x_0 - x_1, class 0 the positive
        p_{b,t}   = f( x(h_{b,t}, e_{b,t+1}))                 with ``shift=False`` e_{b,t}, as given
        n_{b,t,k} = f(-x(h_{b,t}, e^k_{b,t+1}))
        eps=0          f(z) = -log sigmoid(z), exactly
        eps > 0        f(z) = -log(sigmoid(z) + eps)           1e-8 or 1e-6, on both sides alike
        eps="clamp"    f(z) = min(-log sigmoid(z), 100)        torch's binary cross entropy, unrounded

        normalizer="joint"      sum_{b,t} (p + sum_k n) / (V (1 + K))
        normalizer="separate"   sum_{b,t} p / V  +  sum_{b,t,k} n / (V K)      = 2 joint for K = 1
        normalizer="padded"     sum_{b,t} (p + sum_k n) / (B (T - 1))          the authors: counts padding;
                                                                               B T with ``shift=False``
        normalizer="row"        sum_b [sum_t (p + sum_k n) / (V_b (1 + K))] / B     rows without a pair add 0

    The first layer's product with h is made once for the positive and all negatives. The authors' code adds
    1e-8 to both softmax outputs, and so takes log(1 - y - 1e-8) for negatives, which can be NaN; here eps is
    added inside either logarithm. torch's binary cross entropy rounds 1 - sigmoid to 0 from x = 17 in float32
    and then reports 100; here the clamp acts on the exact logarithm.

    Args:
        states: [B, T, H], all states, or [N, H] with ``offsets``; float32, float64, bfloat16 or float16.
        positive: [B, T, D] or [N, D]: the behaviours themselves, shifted inside; D = H for "inner".
        negative: [B, T, D] or [B, T, K, D], jagged [N, D] or [N, K, D]: negatives of the behaviour at the
            same position, K >= 1; the first behaviour's are not used. The dtype of ``states``, as
            ``positive``.
        weights: mlp only: matrices [M1, H + D], [M2, M1], ..., [1 or 2, M]; the authors' are 100, 50 and 1
            or 2.
        biases: mlp only: empty, or one for each layer, [M_i] or None; in the dtype of ``states`` or the
            compute dtype (float64 for float64 ``states``, else float32).
        slopes: with ``activation="prelu"`` only: one for each hidden layer, a scalar, [1] or [M_i].
        affine: mlp only: (scale, shift), [H + D] each: a_0 = scale * [h, e] + shift, a batch norm whose
            statistics are fixed; folded into the first layer. Batch statistics are the caller's.
        lengths: [B] int64 or int32, between 0 and T.
        offsets: [B + 1] int64 or int32, ascending from 0 to N.
        mask: [B, T] bool; the behaviour "after" a step is then the one at the next True.
        histories: a ``dien_kernels.Histories`` without ``history_of``, which says what lengths, offsets and
            mask say and is checked once for all ops that read a batch; the three must then be None.
        kind: ``"inner"`` or ``"mlp"``.
        activation: mlp only: ``"sigmoid"``, ``"relu"``, ``"prelu"`` or None, after every layer but the last.
        normalizer: as above; ``"padded"`` needs padded input.
        eps: as above: 0, a number up to 1 (and normal in the compute dtype), or ``"clamp"``.
        shift: False if positive and negative are already aligned with the states.
        backend: ``"auto"``, or a backend's name, which then runs or raises.

    Returns:
        The loss, a scalar in the compute dtype, 0 where there is no pair (rows of length 0 and 1, T of 0 and
        1). Finite whenever the logits x are. At most one of ``lengths``, ``offsets`` and ``mask`` may be
        given.

    Past a row's length nothing is read: NaN there changes no loss and no gradient, and gradients there are
    0. NaN in a pair reaches the loss and the gradient of every weight.

    Differentiable in ``states``, ``positive``, ``negative``, ``weights``, ``biases``, ``slopes`` and
    ``affine``; under autocast the first four are cast, the rest and the sums stay float32.

    Raises ``TypeError`` or ``ValueError`` naming the argument for a wrong type, dtype, rank, size, device,
    value or option; ``RuntimeError`` for a backend that refuses.

    >>> h, e, n = torch.zeros(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    >>> auxiliary_loss(h, e, n, lengths=torch.tensor([5, 1]))
    tensor(0.6931)
    """
    check_option("kind", kind, KINDS)
    check_option("normalizer", normalizer, NORMALIZERS)
    if not isinstance(shift, bool):
        raise TypeError(f"shift must be a bool, got {type(shift).__name__}")
    if isinstance(eps, str):
        check_option("eps", eps, ("clamp",))
    else:
        check_number("eps", eps, "a number or 'clamp'")
    check_option("activation", activation, ACTIVATIONS)
    weights = () if weights is None else weights
    biases, slopes = () if biases is None else biases, () if slopes is None else slopes
    check_storage("states", states)
    if not isinstance(eps, str):
        least = torch.finfo(compute_dtype(states.dtype)).tiny
        if not (eps == 0 or least <= eps <= 1):
            raise ValueError(f"eps must be 0, 'clamp' or a number from {least:.3g} to 1, got {eps}")
    check_tensor("positive", positive)
    check_tensor("negative", negative)
    positive, negative, weights, states = (autocast(v, states) for v in (positive, negative, weights, states))
    layout = Histories.given(states, "states", lengths=lengths, offsets=offsets, mask=mask, histories=histories)
    if layout.history_of is not None:
        raise ValueError("histories must not have history_of: each history has its loss once, got one that has")
    if layout.jagged and normalizer == "padded":
        raise ValueError("normalizer must not be 'padded' with offsets: jagged input has no T, got 'padded'")
    hidden = states.shape[-1]
    if hidden < 1:
        raise ValueError(f"states must have at least one feature, got shape {tuple(states.shape)}")
    negative = _check_behaviours(states, positive, negative, kind)
    layers = _check_weights(states, positive, weights, biases, slopes, affine, kind, activation)

    index = layout.mask_index()
    if index is not None:
        states, positive, negative = (compact(t, index) for t in (states, positive, negative))
        layout = layout.compacted()
    name = select(Call("auxiliary_loss", states.device.type, states.dtype, positive.shape[-1], hidden, kind), backend)
    options = Options(
        inner=kind == "inner",
        activation=ACTIVATIONS.index(activation) if kind == "mlp" else 0,
        normalizer=NORMALIZERS.index(normalizer),
        eps=-1.0 if isinstance(eps, str) else float(eps),
        ahead=int(shift),
    )
    flat, where = layers.tensors(), (layout.lengths, layout.offsets)
    if needs_autograd((states, positive, negative, *flat)):
        tensors = (states, positive, negative, *where, *flat)
        loss: Tensor = AUXILIARY_LOSS.apply(name, layers.counts(), options, tensors)[0]
    else:
        loss = _FWD[name](states, positive, negative, *layers, *where, *options)
    return loss


def _check_behaviours(states: Tensor, positive: Tensor, negative: Tensor, kind: str) -> Tensor:
    """Check positive and negative against the states; returns negative with its K."""
    rows = tuple(states.shape[:-1])
    layout = "[N, D]" if len(rows) == 1 else "[B, T, D]"
    if positive.dim() != states.dim() or positive.shape[-1] < 1:
        raise ValueError(f"positive must have shape {layout} with D >= 1, got {tuple(positive.shape)}")
    width = positive.shape[-1]
    check_like("positive", positive, (*rows, width), layout, states, "states")
    if kind == "inner" and width != states.shape[-1]:
        raise ValueError(f"positive must have H = {states.shape[-1]} features with kind='inner', got {width}")
    if negative.dim() == len(rows) + 1:
        check_like("negative", negative, (*rows, width), layout, states, "states")
        return negative.unsqueeze(-2)
    several = layout.replace("D", "K, D")
    if negative.dim() != len(rows) + 2 or negative.shape[-2] < 1:
        raise ValueError(f"negative must have shape {layout} or {several} with K >= 1, got {tuple(negative.shape)}")
    check_like("negative", negative, (*rows, negative.shape[-2], width), several, states, "states")
    return negative


def _check_weights(
    states: Tensor,
    positive: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[Tensor],
    affine: tuple[Tensor, Tensor] | None,
    kind: str,
    activation: str | None,
) -> Layers:
    """The checked layers with the affine map and a two-class output folded in, in the compute dtype."""
    if kind == "inner":
        if len(weights) or len(biases) or len(slopes) or affine is not None:
            raise ValueError("weights, biases, slopes and affine must be empty with kind='inner', got some")
        return Layers([], [], [])
    inputs = states.shape[-1] + positive.shape[-1]
    checked = check_layers(weights, biases, slopes, activation, inputs, "H + D", (1, 2), states, "states")
    matrices, vectors, slopes = checked
    if affine is not None:
        if not isinstance(affine, (list, tuple)) or len(affine) != 2:
            raise TypeError(f"affine must be a pair (scale, shift) or None, got {type(affine).__name__}")
        scale, move = (
            check_compute_like(f"affine[{i}]", v, (inputs,), "[H + D]", states, "states") for i, v in enumerate(affine)
        )
        first = matrices[0].to(scale.dtype)
        bias = first @ move
        if vectors:
            bias = bias + vectors[0] if vectors[0].numel() else bias
        else:
            vectors = [bias.new_empty(0)] * len(matrices)
        matrices, vectors = [first * scale, *matrices[1:]], [bias, *vectors[1:]]
    if matrices[-1].shape[0] == 2:  # softmax over two classes is the sigmoid of the difference
        last = matrices[-1].to(compute_dtype(states.dtype))  # 16 bits would round the difference
        matrices = [*matrices[:-1], last[:1] - last[1:]]
        if vectors and vectors[-1].numel():
            vectors = [*vectors[:-1], vectors[-1][:1] - vectors[-1][1:]]
    return Layers(matrices, vectors, list(slopes))
