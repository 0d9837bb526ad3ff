"""The Deep Interest Evolution Network, and its two-layer GRU without attention inside the recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor
from typing_extensions import Unpack

from dien_kernels.batch import Batch, Schema
from dien_kernels.models.base import Common, Interest, RankingModel, attend, of_rows
from dien_kernels.models.interest import Attention, Auxiliary, evolution_of, extractor_of
from dien_kernels.models.options import (
    Attend,
    AttentionOptions,
    AuxiliaryOptions,
    Evolution,
    EvolutionOptions,
    Extractor,
    GRUOptions,
    Pooling,
    group_of,
)
from dien_kernels.models.options import Auxiliary as AuxiliaryGiven
from dien_kernels.models.parts import Embedded
from dien_kernels.models.presets import AUTHORS, AUTHORS_ATTENTION, AUTHORS_GRU, PAPER, PAPER_GRU


class DIEN(RankingModel):
    """DIEN of arXiv 1809.03672: what a user is interested in, and how that interest moved towards a target.

    ::

        h_1 .. h_T = GRU(e_1 .. e_T)                                  extractor, once a history
        auxiliary  = -log f(h_t, e_{t+1}) - log(1 - f(h_t, e^-_{t+1}))    averaged over t and users
        a_t        = attention(h_t, e_target)
        h'         = last state of AUGRU(h_1 .. h_T; a_1 .. a_T)      evolution, once a row
        logit      = MLP([users, dense, e_target, pooled history, h'])

    The defaults are the functions of the paper; ``PRESETS["paper"]`` and ``["authors"]`` fix every option as
    the paper or the authors' code has it (``docs/models.md`` compares them row by row). A row with an empty
    history has h' = 0, and scores by its target and context.

    Args:
        schema: the features.
        extractor: ``GRUOptions``.
        evolution: ``EvolutionOptions``.
        attention: ``AttentionOptions``.
        auxiliary: ``AuxiliaryOptions``, or None for no auxiliary loss.
        pooling: as in ``RankingModel``.
        **common: see ``RankingModel``.

    A group of options (``dien_kernels.models.options``) may also be a mapping: what it does not name keeps its default.
    Raises ``ValueError`` naming an unknown option or a wrong value.

    Rows with one history in common (``batch.history_of``) run extractor, auxiliary loss and the evolution's
    input projection once.

    >>> model = DIEN(Schema({"item": 10}), evolution=EvolutionOptions(form="authors"), attention={"kind": "din"})
    >>> model.evolution.form
    'authors'
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            **PAPER,
            "extractor": PAPER_GRU,
            "evolution": {
                "kind": "augru",
                "form": "paper",
                "reset": "after",
                "update": "candidate",
                "bias": "single",
            },
            "attention": {"kind": "bilinear", "query": "raw"},
            "auxiliary": {"kind": "inner", "weight": 1.0, "normalizer": "separate", "eps": 0.0},
        },
        "authors": {
            **AUTHORS,
            "extractor": AUTHORS_GRU,
            "evolution": {
                "kind": "augru",
                "form": "authors",
                "reset": "before",
                "update": "keep",
                "bias": "single",
                "gate_bias": 1.0,
            },
            "attention": {**AUTHORS_ATTENTION, "query": "prelu"},
            "auxiliary": {
                "kind": "mlp",
                "weight": 1.0,
                "units": (100, 50),
                "activation": "sigmoid",
                "outputs": 2,
                "norm": "fixed",
                "normalizer": "padded",
                "eps": 1e-8,
            },
        },
    }

    def __init__(
        self,
        schema: Schema,
        *,
        extractor: Extractor = GRUOptions(),
        evolution: Evolution = EvolutionOptions(),
        attention: Attend = AttentionOptions(),
        auxiliary: AuxiliaryGiven | None = AuxiliaryOptions(),
        pooling: Pooling | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(schema, pooling=pooling, **common)
        item = self.embeddings.item_size
        self.extractor = extractor_of(item, group_of(GRUOptions, extractor, GRUOptions()))
        hidden = self.extractor.hidden_size
        self.auxiliary = None
        if auxiliary is not None:
            auxiliary = group_of(AuxiliaryOptions, auxiliary, AuxiliaryOptions())
            self.auxiliary = Auxiliary(auxiliary, hidden, item, self.prelu_init)
            self.auxiliary_weight = auxiliary.weight
        evolution = group_of(EvolutionOptions, evolution, EvolutionOptions())
        self.evolution = evolution_of(hidden, evolution)
        self.attends_inside = evolution.kind != "gru"
        self.attention = None
        attention = group_of(AttentionOptions, attention, AttentionOptions())
        if self.attends_inside or evolution.readout == "attention":
            self.attention = Attention(attention, item, hidden, self.prelu_init)
        self._finish(hidden)

    @property
    def reads_negatives(self) -> bool:
        return self.auxiliary is not None

    def auxiliary_shares(self, offsets: Sequence[Tensor]) -> list[float]:
        return super().auxiliary_shares(offsets) if self.auxiliary is None else self.auxiliary.shares(offsets)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        histories = batch.histories
        with self.part("extractor"):
            states, _ = self.extractor(embedded.history, histories=histories.each_once())
        auxiliary = None
        if self.auxiliary is not None and embedded.negatives is not None:
            with self.part("auxiliary"):
                auxiliary = self.auxiliary(states, embedded.history, embedded.negatives, histories.each_once())
        if self.attends_inside:
            with self.part("attention"):
                scores = cast(Attention, self.attention)(embedded.target, states, histories)
            with self.part("evolution"):
                _, last = self.evolution(states, scores, histories=histories)
            return Interest([last], auxiliary, scores)
        with self.part("evolution"):
            states, last = self.evolution(states, histories=histories.each_once())
        if self.attention is None:
            return Interest([of_rows(last[0], histories)], auxiliary)
        with self.part("attention"):
            scores = self.attention(embedded.target, states, histories)
            return Interest([attend(states, scores, histories)], auxiliary, scores)


class TwoLayerGRU(DIEN):
    """The paper's "two-layer GRU attention": DIEN with ``evolution.kind="gru"``, by default without auxiliary
    loss.

    ::

        interest = sum_t a_t h'_t,   h' = GRU(GRU(e)),   a_t = attention(h'_t, e_target)

    Args: schema, extractor, evolution, attention, auxiliary, pooling and **common are those of ``DIEN``;
    ``evolution.kind`` is always "gru", so ``evolution.form`` has no meaning.
    """

    FIXED = frozenset({"evolution.kind", "evolution.form"})
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            **{group: options for group, options in preset.items() if group != "auxiliary"},
            "evolution": {k: v for k, v in preset["evolution"].items() if k not in ("kind", "form")},
        }
        for name, preset in DIEN.PRESETS.items()
    }

    def __init__(
        self,
        schema: Schema,
        *,
        extractor: Extractor = GRUOptions(),
        evolution: Evolution = EvolutionOptions(kind="gru"),
        attention: Attend = AttentionOptions(),
        auxiliary: AuxiliaryGiven | None = None,
        pooling: Pooling | None = None,
        **common: Unpack[Common],
    ) -> None:
        evolution = group_of(EvolutionOptions, evolution, EvolutionOptions(kind="gru"))
        if evolution.kind != "gru":
            raise ValueError(f"evolution.kind must be 'gru' in this model, got {evolution.kind!r}")
        super().__init__(
            schema,
            extractor=extractor,
            evolution=evolution,
            attention=attention,
            auxiliary=auxiliary,
            pooling=pooling,
            **common,
        )
