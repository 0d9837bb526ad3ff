"""Attention units: the scores that steer AUGRU, AGRU and AIGRU, as layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dien_kernels.checks import (
    check_dtype,
    check_features,
    check_flag,
    check_number,
    check_option,
    check_size,
    check_sizes,
    check_tensor,
    compute_dtype,
)
from dien_kernels.histories import Histories
from dien_kernels.layers._checks import check_backend
from dien_kernels.layers.activations import Dice
from dien_kernels.layers.starts import Linear, WeightInit
from dien_kernels.ops._dispatch import BackendName
from dien_kernels.ops.attention.op import attention_scores

_ACTIVATIONS = ("sigmoid", "relu", "prelu", "dice", None)


def _check_common(scale: float | None, normalize: str | None, backend: str, dtype: torch.dtype | None) -> None:
    if scale is not None:
        check_number("scale", scale, "a number or None")
    check_option("normalize", normalize, ("softmax", None))
    check_backend(backend)
    check_dtype(dtype)


class BilinearAttention(nn.Module):
    """The paper's attention, ``dien_kernels.attention_scores`` with kind "bilinear" and its weight.

    With q the target of a row, k_t the states of its history and c = ``scale`` (None: 1), over the valid
    steps of the row (arXiv 1809.03672, equation 8)::

        e_t = c * k_t^T W q,   a_t = exp(e_t) / sum_s exp(e_s)   or e_t with normalize=None

    Args:
        target_size: features of the target, D.
        hidden_size: features of the states, H.
        scale: a number, or None for 1.
        normalize: ``"softmax"`` or None.
        backend: as in the op.
        device, dtype: of the parameter ``weight`` [H, D], which starts as U(-1/sqrt(D), 1/sqrt(D)), as a
            ``torch.nn.Linear`` would; the paper gives no rule.

    Inputs ``(target, states, *, lengths=None, offsets=None, mask=None, history=None, rows_total=None,
    histories=None)``:
        target: [B, D], the dtype of the parameter (float32, float64, bfloat16, float16).
        states: [U, T, H], or [N, H] with ``offsets``; U = B unless ``history`` is given.
        lengths [U], offsets [U + 1], mask [U, T] (at most one), history [B], rows_total: as in the op.
        histories: all of these as a ``dien_kernels.Histories``; the others must then be None.

    Returns scores [B, T]; [N] with ``offsets``; [rows_total] with ``offsets`` and ``history``; float64 for
    float64, else float32. Exactly 0 past a row's length, at masked steps and in rows without a valid step;
    NaN there reaches nothing.

    Differentiable in ``target``, ``states`` and ``weight``; under autocast all three are cast.
    Raises ``TypeError`` or ``ValueError`` naming the argument.

    Set the attribute ``weight_init`` to ``"glorot"`` for another start (``dien_kernels.layers.starts``).

    >>> BilinearAttention(3, 4)(torch.randn(2, 3), torch.randn(2, 5, 4)).shape
    torch.Size([2, 5])
    """

    weight_init: WeightInit = "torch"

    def __init__(
        self,
        target_size: int,
        hidden_size: int,
        *,
        scale: float | None = None,
        normalize: Literal["softmax"] | None = "softmax",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("target_size", target_size)
        check_size("hidden_size", hidden_size)
        _check_common(scale, normalize, backend, dtype)
        self.target_size = target_size
        self.hidden_size = hidden_size
        self.scale = scale
        self.normalize = normalize
        self.backend = backend
        self.weight = nn.Parameter(torch.empty((hidden_size, target_size), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-1/sqrt(D), 1/sqrt(D)), or Glorot's uniform distribution with ``weight_init="glorot"``."""
        if self.weight_init == "glorot":
            nn.init.xavier_uniform_(self.weight)
            return
        bound = 1 / math.sqrt(self.target_size)
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.target_size}, {self.hidden_size}, scale={self.scale}, normalize={self.normalize!r}"

    def forward(
        self,
        target: Tensor,
        states: Tensor,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        history: Tensor | None = None,
        rows_total: int | None = None,
        histories: Histories | None = None,
    ) -> Tensor:
        try:
            return attention_scores(
                target,
                states,
                self.weight,
                lengths=lengths,
                offsets=offsets,
                mask=mask,
                history=history,
                rows_total=rows_total,
                histories=histories,
                kind="bilinear",
                scale=self.scale,
                normalize=self.normalize,
                backend=self.backend,
            )
        except (TypeError, ValueError):  # the layer's own words, where it has some
            check_features("target", target, self.target_size, "target_size", self.weight)
            check_features("states", states, self.hidden_size, "hidden_size", self.weight)
            raise


class DINAttention(nn.Module):
    """The attention of DIN and of the authors' DIEN, ``dien_kernels.attention_scores`` with kind "din".

    With q the target of a row, k_t the states of its history and c = ``scale`` (None: 1), over the valid
    steps of the row (arXiv 1706.06978)::

        z_0 = [q, k_t, q - k_t, q * k_t],  z_i = act(W_i z_{i-1} + b_i),  e_t = c * (W_L z_{L-1} + b_L)
        a_t = exp(e_t) / sum_s exp(e_s)   or e_t with normalize=None

    With ``activation="dice"`` all is plain torch on the valid steps alone, gathered first, because Dice takes
    statistics over them; z_0 is built, and the number of steps is read on the host unless ``offsets`` are
    given. So full-graph compilation of Dice needs ``offsets``.

    Args:
        hidden_size: features of target and states, H.
        units: widths of the hidden layers; those of the authors' code by default.
        activation: ``"sigmoid"`` (theirs), ``"relu"``, ``"prelu"`` (one slope a channel),
            ``"dice"`` or None.
        bias: False leaves the layers' biases out.
        scale, normalize, backend: as in the op.
        device, dtype: of the parameters: ``linears.i.weight`` and ``.bias``, and ``activations.i.weight``
            (PReLU) or ``activations.i.alpha`` (Dice), initialised as ``torch.nn.Linear`` and ``PReLU`` do.
        prelu_init: the start of every slope of ``"prelu"``.

    Inputs ``(target, states, *, lengths=None, offsets=None, mask=None, history=None, rows_total=None,
    histories=None)``,
    result, treatment of padding, derivatives and errors: as in ``BilinearAttention``, with D = H.

    >>> DINAttention(4)(torch.randn(2, 4), torch.randn(2, 5, 4), lengths=torch.tensor([5, 0])).sum(1)
    tensor([1., 0.], grad_fn=<SumBackward1>)
    """

    def __init__(
        self,
        hidden_size: int,
        units: Sequence[int] = (80, 40),
        *,
        activation: Literal["sigmoid", "relu", "prelu", "dice"] | None = "sigmoid",
        bias: bool = True,
        scale: float | None = None,
        normalize: Literal["softmax"] | None = "softmax",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prelu_init: float = 0.25,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_sizes("units", units)
        check_number("prelu_init", prelu_init)
        check_option("activation", activation, _ACTIVATIONS)
        check_flag("bias", bias)
        _check_common(scale, normalize, backend, dtype)
        self.hidden_size = hidden_size
        self.activation = activation
        self.scale = scale
        self.normalize = normalize
        self.backend = backend
        sizes = (4 * hidden_size, *units, 1)
        self.linears = nn.ModuleList(
            Linear(i, o, bias, device=device, dtype=dtype) for i, o in zip(sizes, sizes[1:], strict=False)
        )
        self.activations = nn.ModuleList()
        for unit in units:
            if activation == "prelu":
                self.activations.append(nn.PReLU(unit, init=prelu_init, device=device, dtype=dtype))
            elif activation == "dice":
                self.activations.append(Dice(unit, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        unit = f"{self.hidden_size}, activation={self.activation!r}"
        return f"{unit}, scale={self.scale}, normalize={self.normalize!r}"

    def forward(
        self,
        target: Tensor,
        states: Tensor,
        *,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        history: Tensor | None = None,
        rows_total: int | None = None,
        histories: Histories | None = None,
    ) -> Tensor:
        if self.activation == "dice":
            self._check_inputs(target, states)
            layout = Histories.given(
                states, "states", lengths=lengths, offsets=offsets, mask=mask, history=history, histories=histories
            )
            return self._dice(target, states, layout, layout.check_rows_total(rows_total))
        biases = [getattr(linear, "bias", None) for linear in self.linears]  # a converted layer may have none
        try:
            return attention_scores(
                target,
                states,
                [linear.weight for linear in self.linears],  # type: ignore[misc]
                biases if biases[0] is not None else (),
                slopes=[prelu.weight for prelu in self.activations],  # type: ignore[misc]
                lengths=lengths,
                offsets=offsets,
                mask=mask,
                history=history,
                rows_total=rows_total,
                histories=histories,
                kind="din",
                activation=self.activation,
                scale=self.scale,
                normalize=self.normalize,
                backend=self.backend,
            )
        except (TypeError, ValueError):  # the layer's own words, where it has some
            self._check_inputs(target, states)
            raise

    def _check_inputs(self, target: Tensor, states: Tensor) -> None:
        weight = cast(Tensor, self.linears[0].weight)
        check_tensor("linears[0].weight", weight)  # a converted layer, such as a quantised one, may have a method there
        check_features("target", target, self.hidden_size, "hidden_size", weight)
        check_features("states", states, self.hidden_size, "hidden_size", weight)

    def _dice(self, target: Tensor, states: Tensor, histories: Histories, rows_total: int) -> Tensor:
        batch = histories.rows(states)
        if tuple(target.shape) != (batch, self.hidden_size):
            raise ValueError(f"target must have shape [B, H] = {(batch, self.hidden_size)}, got {tuple(target.shape)}")
        if not histories.jagged:
            return self._padded_dice(target, states, histories)
        size = states.shape[0] if histories.history_of is None else rows_total
        histories.check_values(total=states.shape[0])  # what follows would believe any offsets
        histories.check_steps_of_rows(size)
        row, source = histories.row_of_step(size), histories.source_of_step(size, states.shape[0])
        return self._valid_scores(target[row], states if source is None else states[source], row, batch)

    def _padded_dice(self, target: Tensor, states: Tensor, histories: Histories) -> Tensor:
        count, steps = states.shape[:2]
        batch, mask = target.shape[0], histories.mask
        if not torch.compiler.is_compiling():  # the values cannot be read while a graph is made
            histories.check_values(histories=count, steps=steps)
        if mask is None:
            length = histories.lengths
            if length is None:
                length = torch.full((count,), steps, device=states.device)
            mask = torch.arange(steps, device=states.device) < length.unsqueeze(1)
        of_row = torch.arange(batch, device=states.device) if histories.history_of is None else histories.index(count)
        row, column = mask[of_row].nonzero(as_tuple=True)
        scores = self._valid_scores(target[row], states[of_row[row], column], row, batch)
        return scores.new_zeros(batch, steps).index_put((row, column), scores)

    def _valid_scores(self, q: Tensor, k: Tensor, row: Tensor, batch: int) -> Tensor:
        """Scores [P] of pairs of targets and states; ``row`` [P] says whose softmax each belongs to."""
        z = torch.cat((q, k, q - k, q * k), 1)
        for linear, dice in zip(self.linears, self.activations, strict=False):
            z = dice(linear(z))
        e: Tensor = self.linears[-1](z).squeeze(1).to(compute_dtype(q.dtype))
        if self.scale is not None:
            e = e * self.scale
        if self.normalize is None:
            return e
        # The largest score of a row drops out of the quotient: no gradient goes through it.
        top = e.new_full((batch,), -math.inf).scatter_reduce(0, row, e.detach(), "amax")
        weight = torch.exp(e - top[row])
        total: Tensor = weight.new_zeros(batch).index_add(0, row, weight)
        return weight / total[row]
