"""The models that the paper compares DIEN with, on the same embeddings, MLP and losses."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import Unpack

from dien_kernels.batch import Batch, Schema
from dien_kernels.models.base import Common, Interest, RankingModel, attend, of_rows
from dien_kernels.models.interest import Attention, extractor_of
from dien_kernels.models.options import Attend, AttentionOptions, Extractor, GRUOptions, Pooling, group_of
from dien_kernels.models.parts import Embedded
from dien_kernels.models.presets import AUTHORS, AUTHORS_ATTENTION, AUTHORS_GRU, PAPER, PAPER_GRU


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

        interest = sum_t a_t e_t,   a_t = attention(e_t, e_target)

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
        item = self.embeddings.item_size
        self.attention = Attention(attention, item, item, self.prelu_init)
        self._finish(item)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        with self.part("attention"):
            scores = self.attention(embedded.target, embedded.history, batch.histories)
            return Interest([attend(embedded.history, scores, batch.histories)], None, scores)


class PlainGRU(RankingModel):
    """A GRU's last state beside the pooled history: order, but neither attention nor auxiliary loss.

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
        self.extractor = extractor_of(self.embeddings.item_size, group_of(GRUOptions, extractor, GRUOptions()))
        self._finish(self.extractor.hidden_size)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        with self.part("extractor"):
            _, last = self.extractor(embedded.history, histories=batch.histories.each_once())
            return Interest([of_rows(last[0], batch.histories)])
