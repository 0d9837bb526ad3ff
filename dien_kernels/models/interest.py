"""The parts that read histories in order: recurrences, attention with its query, the auxiliary loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from dien_kernels.histories import Histories
from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, BilinearAttention, DINAttention
from dien_kernels.layers.starts import Linear
from dien_kernels.models.base import Interest, attend, of_rows
from dien_kernels.models.embeddings import Steps
from dien_kernels.models.options import AttentionOptions, AuxiliaryOptions, EvolutionOptions, GRUOptions
from dien_kernels.models.parts import Norm
from dien_kernels.ops.auxiliary_loss.op import auxiliary_loss


def extractor_of(inputs: int, item_size: int, options: GRUOptions) -> GRU:
    """The recurrence of the interest extractor; its width is ``hidden_size``, or that of an item."""
    hidden = item_size if options.hidden_size is None else options.hidden_size
    return GRU(
        inputs,
        hidden,
        bias=options.bias,
        reset=options.reset,
        update=options.update,
        gate_bias=_gate_bias(options),
    )


def evolution_of(hidden: int, options: EvolutionOptions) -> AUGRU | AGRU | AIGRU | GRU:
    """The recurrence of the interest evolution, from states of H features to states of H features."""
    if options.kind == "gru":
        return GRU(
            hidden,
            hidden,
            bias=cast(Any, options.bias),  # the options have refused "tied"
            reset=options.reset,
            update=options.update,
            gate_bias=_gate_bias(options),
        )
    common: dict[str, Any] = {"reset": options.reset, "update": options.update, "gate_bias": _gate_bias(options)}
    if options.kind == "augru":
        return AUGRU(hidden, hidden, options.bias, form=options.form, **common)
    return (AGRU if options.kind == "agru" else AIGRU)(hidden, hidden, options.bias, **common)


def _gate_bias(options: GRUOptions | EvolutionOptions) -> float | None:
    if options.gate_bias is not None and options.bias is False:
        name = options.NAME
        raise ValueError(f"{name}.gate_bias must be None with {name}.bias=False, got {options.gate_bias}")
    return options.gate_bias


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

    def __init__(self, options: AttentionOptions, item_size: int, hidden_size: int, prelu_init: float = 0.25) -> None:
        super().__init__()
        self.query: nn.Module | None = None
        if options.query == "prelu":
            self.query = nn.Sequential(Linear(item_size, hidden_size), nn.PReLU(hidden_size, init=prelu_init))
        elif options.kind == "din" and item_size != hidden_size:
            raise ValueError(
                f"attention.query must be 'prelu' where attention.kind='din' compares items of {item_size} features "
                f"with states of {hidden_size}, got 'raw'"
            )
        self.sigmoid = options.normalize == "sigmoid"
        rule: Literal["softmax"] | None = "softmax" if options.normalize == "softmax" else None
        self.scores: BilinearAttention | DINAttention
        if options.kind == "bilinear":
            size = item_size if options.query == "raw" else hidden_size
            self.scores = BilinearAttention(size, hidden_size, scale=options.scale, normalize=rule)
        else:
            self.scores = DINAttention(
                hidden_size,
                options.units,
                activation=options.activation,
                scale=options.scale,
                normalize=rule,
                prelu_init=prelu_init,
            )

    def forward(self, target: Tensor, states: Tensor, histories: Histories) -> Tensor:
        query = target if self.query is None else self.query(target)
        scores: Tensor = self.scores(query, states, histories=histories)
        return scores.sigmoid() if self.sigmoid else scores


class Auxiliary(nn.Module):
    """The auxiliary loss of the states [N, H] against the behaviours that follow and sampled negatives.

    ``dien_kernels.auxiliary_loss`` with its network. Each history counts once, however many rows read it. Two
    normalisers are added to the op's, as it has no T on jagged input: with p and n a pair's terms (all K
    negatives)

        padded    sum (p + n) / (U (T - 1)), T the longest history: the authors' mean, which counts padding
        history   sum (p + n) / U: equation 6 of the paper to the letter, which does not divide by steps
    """

    def __init__(self, options: AuxiliaryOptions, hidden_size: int, item_size: int, prelu_init: float = 0.25) -> None:
        super().__init__()
        self.kind, self.activation = options.kind, options.activation
        self.normalizer, self.eps = options.normalizer, options.eps
        self.norm: Norm | None = None
        self.linears, self.slopes = nn.ModuleList(), nn.ModuleList()
        if options.kind == "inner":
            if hidden_size != item_size:
                raise ValueError(
                    f"extractor.hidden_size must be {item_size}, the width of an item, with auxiliary.kind='inner', "
                    f"got {hidden_size}"
                )
            return
        if options.norm is not None:
            self.norm = Norm(hidden_size + item_size, options.norm)
        sizes = (hidden_size + item_size, *options.units, options.outputs)
        self.linears.extend(Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        if options.activation == "prelu":
            self.slopes.extend(nn.PReLU(unit, init=prelu_init) for unit in options.units)

    def forward(self, states: Tensor, positive: Tensor, negative: Tensor, histories: Histories) -> Tensor:
        over_histories = self.normalizer in ("padded", "history")
        loss = auxiliary_loss(
            states,
            positive,
            negative,
            [linear.weight for linear in self.linears],  # type: ignore[misc]
            [linear.bias for linear in self.linears],  # type: ignore[misc]
            slopes=[slope.weight for slope in self.slopes],  # type: ignore[misc]
            affine=None if self.norm is None else self.norm.affine(),
            histories=histories,
            kind=self.kind,
            activation=self.activation if self.kind == "mlp" else "sigmoid",
            normalizer=cast(Any, "joint" if over_histories else self.normalizer),
            eps=self.eps,
        )
        if not over_histories:
            return loss
        length = cast(Tensor, histories.history_lengths())  # models have jagged histories
        terms = (length - 1).clamp(min=0).sum() * (1 + negative.shape[1])
        slots = length.new_tensor(length.shape[0])
        if self.normalizer == "padded" and length.shape[0] > 0:  # of no histories none is the longest
            slots = slots * (length.max() - 1)
        return loss * (terms.to(loss.dtype) / slots.clamp(min=1))

    def shares(self, offsets: Sequence[Tensor]) -> list[float]:
        """What the loss of each batch counts in that of one batch with all of their histories: its part of the sum that
        the normaliser divides by."""
        lengths = [each.diff() for each in offsets]
        histories = [length.shape[0] for length in lengths]
        if self.normalizer in ("row", "history"):
            amounts, total = histories, sum(histories)
        elif self.normalizer == "padded":
            pairs = [int(length.max()) - 1 if length.shape[0] else 0 for length in lengths]
            amounts = [u * max(most, 0) for u, most in zip(histories, pairs, strict=True)]
            total = sum(histories) * max(pairs)
        else:
            amounts = [int((length - 1).clamp(min=0).sum()) for length in lengths]
            total = sum(amounts)
        return [amount / total if total > 0 else 0.0 for amount in amounts]


class PathOptions(NamedTuple):
    """The options of a ``Path``, which all sequences of a model share."""

    extractor: GRUOptions
    evolution: EvolutionOptions
    attention: AttentionOptions
    auxiliary: AuxiliaryOptions | None
    prelu_init: float


class Path(nn.Module):
    """The way of one sequence through DIEN: extractor, auxiliary loss, attention, evolution.

    ``DIEN`` is itself the path of ``batch.history``; each further sequence has a ``Path`` of its own.
    """

    extractor: GRU
    auxiliary: Auxiliary | None
    evolution: AUGRU | AGRU | AIGRU | GRU
    attention: Attention | None
    attends_inside: bool

    def make_parts(self, options: PathOptions, history_size: int, item_size: int) -> None:
        """The modules that ``options`` ask for: behaviours have ``history_size`` features, items ``item_size``."""
        self.extractor = extractor_of(history_size, item_size, options.extractor)
        hidden = self.extractor.hidden_size
        self.auxiliary = None
        if options.auxiliary is not None:
            self.auxiliary = Auxiliary(options.auxiliary, hidden, item_size, options.prelu_init)
        self.evolution = evolution_of(hidden, options.evolution)
        self.attends_inside = options.evolution.kind != "gru"
        self.attention = None
        if self.attends_inside or options.evolution.readout == "attention":
            self.attention = Attention(options.attention, item_size, hidden, options.prelu_init)

    def follow(
        self, steps: Steps, target: Tensor, histories: Histories, part: Callable[[str], AbstractContextManager[Any]]
    ) -> Interest:
        """What ``target`` [B, E] finds in the ``steps`` of one sequence: a vector [B, H], the auxiliary loss, scores.

        ``histories`` says which steps each row reads; each part of the work runs within ``part`` of its name.
        """
        with part("extractor"):
            states, _ = self.extractor(steps.history, histories=histories.each_once())
        auxiliary = None
        if self.auxiliary is not None and steps.negatives is not None:
            with part("auxiliary"):
                auxiliary = self.auxiliary(states, steps.items, steps.negatives, histories.each_once())
        if self.attends_inside:
            with part("attention"):
                scores = cast(Attention, self.attention)(target, states, histories)
            with part("evolution"):
                _, last = self.evolution(states, scores, histories=histories)
            return Interest([last], auxiliary, scores)
        with part("evolution"):
            states, last = self.evolution(states, histories=histories.each_once())
        if self.attention is None:
            return Interest([of_rows(last[0], histories)], auxiliary)
        with part("attention"):
            scores = self.attention(target, states, histories)
            return Interest([attend(states, scores, histories)], auxiliary, scores)


class FurtherPath(Path):
    """The path of a further sequence."""

    def __init__(self, options: PathOptions, history_size: int, item_size: int) -> None:
        super().__init__()
        self.make_parts(options, history_size, item_size)
