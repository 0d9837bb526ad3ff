"""The Deep Interest Evolution Network, and its two-layer GRU without attention inside the recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from dien_kernels.batch import Batch, Schema
from dien_kernels.models.base import Common, Interest, RankingModel
from dien_kernels.models.embeddings import Embedded, Steps
from dien_kernels.models.interest import FurtherPath, Path, PathOptions
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
from dien_kernels.models.presets import AUTHORS, AUTHORS_ATTENTION, AUTHORS_GRU, PAPER, PAPER_GRU
from dien_kernels.models.tables import module_name


class DIEN(RankingModel, Path):
    """DIEN of arXiv 1809.03672: what a user is interested in, and how that interest moved towards a target.

    ::

        h_1 .. h_T = GRU(b_1 .. b_T)                                  extractor, once a history
        auxiliary  = -log f(h_t, e_{t+1}) - log(1 - f(h_t, e^-_{t+1}))    averaged over t and users
        a_t        = attention(h_t, e_target)
        h'         = last state of AUGRU(h_1 .. h_T; a_1 .. a_T)      evolution, once a row
        logit      = MLP([users, dense, e_target, pooled history, h'])

    e is the embedding of an item, b = [e, c] that of a behaviour, where c are the fields and numbers of the behaviour
    itself, if the schema has any. The extractor alone reads them: attention compares states with the target, the
    auxiliary loss compares states with items. Each further sequence of the schema has an extractor, an attention and an
    evolution of its own with the same options; the tables are shared, each h' is an input of the MLP, and the auxiliary
    losses of the sequences that have negatives are added.

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
        if auxiliary is not None:
            auxiliary = group_of(AuxiliaryOptions, auxiliary, AuxiliaryOptions())
            self.auxiliary_weight = auxiliary.weight
        options = PathOptions(
            group_of(GRUOptions, extractor, GRUOptions()),
            group_of(EvolutionOptions, evolution, EvolutionOptions()),
            group_of(AttentionOptions, attention, AttentionOptions()),
            auxiliary,
            self.prelu_init,
        )
        sizes = self.embeddings.history_size, self.embeddings.item_size
        self.make_parts(options, *sizes)
        if schema.sequences:
            self.further = nn.ModuleDict({module_name(name): FurtherPath(options, *sizes) for name in schema.sequences})
        self._finish(self.extractor.hidden_size)

    @property
    def reads_negatives(self) -> bool:
        return self.auxiliary is not None

    def auxiliary_shares(self, offsets: Sequence[Tensor]) -> list[float]:
        return super().auxiliary_shares(offsets) if self.auxiliary is None else self.auxiliary.shares(offsets)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        steps = Steps(embedded.history, embedded.items, embedded.negatives)
        found = self.follow(steps, embedded.target, batch.histories, self.part)
        if not embedded.further:
            return found
        features, auxiliaries = list(found.features), [found.auxiliary]
        for name, steps in zip(self.schema.sequences, embedded.further, strict=True):
            path = cast(FurtherPath, self.further[module_name(name)])
            own = path.follow(steps, embedded.target, batch.sequences[name].histories, self.part)
            features += own.features
            auxiliaries.append(own.auxiliary)
        if all([each is None for each in auxiliaries]):
            return Interest(features, None, found.attention)
        losses = [embedded.target.new_zeros(()) if each is None else each for each in auxiliaries]
        return Interest(features, torch.stack(losses).sum(), found.attention, tuple(losses))


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
