"""The parts that read histories in order: recurrences, attention with its query, the auxiliary loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dien_kernels.batch import Batch
from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, BilinearAttention, DINAttention
from dien_kernels.layers._checks import check_sizes
from dien_kernels.layers.starts import Linear
from dien_kernels.models.parts import Norm
from dien_kernels.ops._checks import check_number, check_option
from dien_kernels.ops.auxiliary_loss.op import auxiliary_loss

FORMS = ("paper", "authors", "prediction_flow")
EVOLUTIONS = ("augru", "agru", "aigru", "gru")
NORMALIZERS = ("joint", "separate", "padded", "row", "history")


def gru_of(
    inputs: int,
    hidden: int,
    *,
    reset: str,
    update: str | None,
    bias: Any,
    gate_bias: float | None,
    name: str,
) -> GRU:
    """The recurrence of the interest extractor."""
    check_option(f"{name}_bias", bias, (True, False, "single"))
    return GRU(inputs, hidden, bias=bias, reset=reset, update=update, gate_bias=gate_bias)


def evolution_of(
    kind: str,
    inputs: int,
    hidden: int,
    *,
    form: str,
    reset: str,
    update: str | None,
    bias: bool | str,
    gate_bias: float | None,
) -> AUGRU | AGRU | AIGRU | GRU:
    """The recurrence of the interest evolution."""
    check_option("evolution", kind, EVOLUTIONS)
    check_option("form", form, FORMS)
    if kind == "gru":
        return gru_of(inputs, hidden, reset=reset, update=update, bias=bias, gate_bias=gate_bias, name="evolution")
    if kind == "augru":
        return AUGRU(inputs, hidden, bias, form=form, reset=reset, update=update, gate_bias=gate_bias)
    cls = AGRU if kind == "agru" else AIGRU
    return cls(inputs, hidden, bias, reset=reset, update=update, gate_bias=gate_bias)


class Attention(nn.Module):
    """Scores of the steps of a jagged batch against each row's target: the query, then an attention layer.

    ::

        q = e_target                         query="raw"
        q = PReLU(W e_target + b)            query="prelu", of H features, as the authors' code
        e_t = k_t^T W q                      kind="bilinear"
        e_t = MLP([q, k_t, q - k_t, q * k_t])    kind="din": ``units`` and ``activation``, then one output
        a_t = softmax of scale * e_t over the row; sigmoid(scale * e_t); or scale * e_t (``normalize``)

    Returns [N], or with shared histories [rows_total].
    """

    def __init__(
        self,
        kind: str,
        item_size: int,
        hidden_size: int,
        *,
        units: Sequence[int],
        activation: str | None,
        scale: float | None,
        normalize: str | None,
        query: str,
        prelu_init: float,
    ) -> None:
        super().__init__()
        check_option("attention", kind, ("bilinear", "din"))
        check_option("query", query, ("raw", "prelu"))
        check_option("attention_normalize", normalize, ("softmax", "sigmoid", None))
        check_sizes("attention_units", units)
        if scale is not None:
            check_number("attention_scale", scale, "a number or None")
        self.query: nn.Module | None = None
        if query == "prelu":
            self.query = nn.Sequential(Linear(item_size, hidden_size), nn.PReLU(hidden_size, init=prelu_init))
        elif kind == "din" and item_size != hidden_size:
            raise ValueError(
                f"query must be 'prelu' where attention='din' compares items of {item_size} features with "
                f"states of {hidden_size}, got 'raw'"
            )
        self.sigmoid = normalize == "sigmoid"
        rule = None if self.sigmoid else normalize
        self.scores: BilinearAttention | DINAttention
        if kind == "bilinear":
            size = item_size if query == "raw" else hidden_size
            self.scores = BilinearAttention(size, hidden_size, scale=scale, normalize=rule)
        else:
            self.scores = DINAttention(
                hidden_size, units, activation=activation, scale=scale, normalize=rule, prelu_init=prelu_init
            )

    def forward(self, target: Tensor, states: Tensor, batch: Batch) -> Tensor:
        query = target if self.query is None else self.query(target)
        scores: Tensor = self.scores(
            query,
            states,
            offsets=batch.offsets,
            history=batch.history_of,
            rows_total=None if batch.history_of is None else batch.rows_total,
        )
        return scores.sigmoid() if self.sigmoid else scores


class Auxiliary(nn.Module):
    """The auxiliary loss of the states [N, H] against the behaviours that follow and sampled negatives.

    ``dien_kernels.auxiliary_loss`` with its network. Each history counts once, however many rows read it. Two
    normalisers are added to the op's, as it has no T on jagged input: with p and n a pair's terms (all K
    negatives)

        padded    sum (p + n) / (U (T - 1)), T the longest history: the authors' mean, which counts padding
        history   sum (p + n) / U: equation 6 of the paper to the letter, which does not divide by steps
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        item_size: int,
        *,
        units: Sequence[int],
        activation: str | None,
        outputs: int,
        norm: str | None,
        normalizer: str,
        eps: float | str,
        prelu_init: float,
    ) -> None:
        super().__init__()
        check_option("auxiliary", kind, ("inner", "mlp"))
        check_option("auxiliary_activation", activation, ("sigmoid", "relu", "prelu", None))
        check_option("auxiliary_outputs", outputs, (1, 2))
        check_option("auxiliary_norm", norm, (None, "fixed"))
        check_option("auxiliary_normalizer", normalizer, NORMALIZERS)
        check_sizes("auxiliary_units", units)
        if isinstance(eps, str):
            check_option("auxiliary_eps", eps, ("clamp",))
        else:
            check_number("auxiliary_eps", eps, "a number or 'clamp'")
            if not (eps == 0 or torch.finfo(torch.float32).tiny <= eps <= 1):
                raise ValueError(f"auxiliary_eps must be 0, 'clamp' or a number up to 1, got {eps}")
        self.kind, self.activation, self.normalizer, self.eps = kind, activation, normalizer, eps
        self.norm: Norm | None = None
        self.linears, self.slopes = nn.ModuleList(), nn.ModuleList()
        if kind == "inner":
            if hidden_size != item_size:
                raise ValueError(
                    f"hidden_size must be {item_size}, the width of an item, with auxiliary='inner', got {hidden_size}"
                )
            return
        if norm is not None:
            self.norm = Norm(hidden_size + item_size, norm)
        sizes = (hidden_size + item_size, *units, outputs)
        self.linears.extend(Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        if activation == "prelu":
            self.slopes.extend(nn.PReLU(unit, init=prelu_init) for unit in units)

    def forward(self, states: Tensor, positive: Tensor, negative: Tensor, offsets: Tensor) -> Tensor:
        own = self.normalizer in ("padded", "history")
        loss = auxiliary_loss(
            states,
            positive,
            negative,
            [linear.weight for linear in self.linears],  # type: ignore[misc]
            [linear.bias for linear in self.linears],  # type: ignore[misc]
            slopes=[slope.weight for slope in self.slopes],  # type: ignore[misc]
            affine=None if self.norm is None else self.norm.affine(),
            offsets=offsets,
            kind=self.kind,
            activation=self.activation if self.kind == "mlp" else "sigmoid",
            normalizer="joint" if own else self.normalizer,
            eps=self.eps,
        )
        if not own:
            return loss
        length = offsets.diff()
        terms = (length - 1).clamp(min=0).sum() * (1 + negative.shape[1])
        slots = length.new_tensor(length.shape[0])
        if self.normalizer == "padded" and length.shape[0] > 0:  # of no histories none is the longest
            slots = slots * (length.max() - 1)
        return loss * (terms.to(loss.dtype) / slots.clamp(min=1))
