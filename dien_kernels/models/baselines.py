"""The models that the paper compares DIEN with, on the same embeddings, MLP and losses."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack

from dien_kernels.batch import Batch, Schema
from dien_kernels.models.base import Common, Interest, RankingModel, attend, of_rows
from dien_kernels.models.embeddings import Embedded
from dien_kernels.models.interest import Attention, extractor_of
from dien_kernels.models.options import Attend, AttentionOptions, Extractor, GRUOptions, Pooling, group_of
from dien_kernels.models.presets import AUTHORS, AUTHORS_ATTENTION, AUTHORS_GRU, PAPER, PAPER_GRU
from dien_kernels.models.tables import module_name


class AveragePooling(RankingModel):
    """The paper's BaseModel: the behaviours' embeddings pooled, and the MLP. The order of a history is lost.

    Args:
        schema: the features.
        pooling: "mean", or "sum" as in the paper and the authors' code; never None.
        **common: see ``RankingModel``.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER, "pooling": "sum"},
        "authors": {**AUTHORS, "head": {**AUTHORS["head"], "activation": "prelu"}, "product": False},
    }

    def __init__(self, schema: Schema, *, pooling: Pooling = "mean", **common: Unpack[Common]) -> None:
        if pooling is None:
            raise ValueError("pooling must be 'mean' or 'sum': it is all this model reads of a history, got None")
        super().__init__(schema, pooling=pooling, **common)
        self._finish(0)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        return Interest([])


class DIN(RankingModel):
    """The Deep Interest Network, arXiv 1706.06978: the behaviours' embeddings, weighted by attention and
    summed.

    ::

        interest = sum_t a_t b_t,   a_t = attention(k_t, e_target)
        b_t = [e_t, c_t]            a behaviour: its item, then its own fields and numbers; e_t where it has none
        k_t = e_t                   attention.kind="din" with query="raw": items are compared with items
        k_t = b_t                   otherwise: kind="bilinear", or query="prelu", which gives e_target the width of b_t

    The target has not happened yet and has no c, so that DIN's differences and products of both sides exist for the
    item alone; what is pooled has all of a behaviour. Each further sequence of the schema has an attention of its own,
    with the same options, and adds its own sum.

    Args:
        schema: the features.
        attention: ``AttentionOptions``, by default with ``kind="din"``. DIN's paper has no softmax
            (``normalize=None``); the code of DIEN's authors has one.
        pooling: as in ``RankingModel``.
        **common: see ``RankingModel``.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER, "attention": AUTHORS_ATTENTION},
        "authors": {**AUTHORS, "attention": {**AUTHORS_ATTENTION, "query": "raw"}},
    }

    def __init__(
        self,
        schema: Schema,
        *,
        attention: Attend = AttentionOptions(kind="din"),
        pooling: Pooling | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(schema, pooling=pooling, **common)
        attention = group_of(AttentionOptions, attention, AttentionOptions(kind="din"))
        item, wide = self.embeddings.item_size, self.embeddings.history_size
        self.compares_items = attention.kind == "din" and attention.query == "raw"
        keys = item if self.compares_items else wide
        self.attention = Attention(attention, item, keys, self.prelu_init)
        if schema.sequences:
            self.further = nn.ModuleDict(
                {module_name(name): Attention(attention, item, keys, self.prelu_init) for name in schema.sequences}
            )
        self._finish(wide)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        with self.part("attention"):
            keys = embedded.items if self.compares_items else embedded.history
            scores = self.attention(embedded.target, keys, batch.histories)
            features = [attend(embedded.history, scores, batch.histories)]
            for name, steps in zip(self.schema.sequences, embedded.further, strict=True):
                histories = batch.sequences[name].histories
                keys = steps.items if self.compares_items else steps.history
                own = self.further[module_name(name)](embedded.target, keys, histories)
                features.append(attend(steps.history, own, histories))
            return Interest(features, None, scores)


class PlainGRU(RankingModel):
    """A GRU's last state beside the pooled history: order, but neither attention nor auxiliary loss. Each further
    sequence of the schema has a GRU of its own.

    Args:
        schema: the features.
        extractor: ``GRUOptions``.
        pooling: as in ``RankingModel``, by default "sum".
        **common: see ``RankingModel``.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER, "extractor": PAPER_GRU, "pooling": "sum"},
        "authors": {**AUTHORS, "extractor": AUTHORS_GRU},
    }

    def __init__(
        self,
        schema: Schema,
        *,
        extractor: Extractor = GRUOptions(),
        pooling: Pooling | None = "sum",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(schema, pooling=pooling, **common)
        options = group_of(GRUOptions, extractor, GRUOptions())
        sizes = self.embeddings.history_size, self.embeddings.item_size
        self.extractor = extractor_of(*sizes, options)
        if schema.sequences:
            self.further = nn.ModuleDict(
                {module_name(name): extractor_of(*sizes, options) for name in schema.sequences}
            )
        self._finish(self.extractor.hidden_size)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        with self.part("extractor"):
            _, last = self.extractor(embedded.history, histories=batch.histories.each_once())
            features = [of_rows(last[0], batch.histories)]
            for name, steps in zip(self.schema.sequences, embedded.further, strict=True):
                histories = batch.sequences[name].histories
                _, last = self.further[module_name(name)](steps.history, histories=histories.each_once())
                features.append(of_rows(last[0], histories))
            return Interest(features)
