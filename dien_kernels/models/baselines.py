"""The rows of the paper's tables that stand beside DIEN, on the same embeddings, MLP and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from dien_kernels.batch import Batch, Schema
from dien_kernels.models.base import Interest, RankingModel, attend, of_rows
from dien_kernels.models.interest import Attention, gru_of
from dien_kernels.models.parts import Embedded
from dien_kernels.models.presets import AUTHORS_ATTENTION, AUTHORS_GRU, AUTHORS_HEAD, PAPER_GRU, PAPER_HEAD


class AveragePooling(RankingModel):
    """The paper's BaseModel: the behaviours' embeddings pooled, and the MLP. The order of a history is lost.

    Args:
        schema: the features.
        pooling: "mean", or "sum" as in the paper and the authors' code; never None.
        **common: see ``RankingModel``.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER_HEAD, "pooling": "sum"},
        "authors": {**AUTHORS_HEAD, "activation": "prelu", "product": False},
    }

    def __init__(self, schema: Schema, *, pooling: str = "mean", **common: Any) -> None:
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
        attention, attention_units, attention_activation, attention_scale, attention_normalize, query: as in
            ``DIEN``. DIN's paper has no softmax (``attention_normalize=None``); the code of DIEN's authors
            has one.
        **common: see ``RankingModel``.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER_HEAD, **AUTHORS_ATTENTION},
        "authors": {**AUTHORS_HEAD, **AUTHORS_ATTENTION, "query": "raw"},
    }

    def __init__(
        self,
        schema: Schema,
        *,
        attention: str = "din",
        attention_units: Sequence[int] = (80, 40),
        attention_activation: str | None = "sigmoid",
        attention_scale: float | None = None,
        attention_normalize: str | None = "softmax",
        query: str = "raw",
        **common: Any,
    ) -> None:
        super().__init__(schema, **common)
        item = self.embeddings.item_size
        self.attention = Attention(
            attention,
            item,
            item,
            units=attention_units,
            activation=attention_activation,
            scale=attention_scale,
            normalize=attention_normalize,
            query=query,
            prelu_init=self.prelu_init,
        )
        self._finish(item)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        with self.part("attention"):
            scores = self.attention(embedded.target, embedded.history, batch)
            return Interest([attend(embedded.history, scores, batch)], None, scores)


class PlainGRU(RankingModel):
    """A GRU's last state beside the pooled history: order, but neither attention nor auxiliary loss.

    Args:
        schema: the features.
        hidden_size: of the GRU; None: the width of an item.
        extractor_reset, extractor_update, extractor_bias, gate_bias: as in ``DIEN``.
        pooling: as in ``RankingModel``, by default "sum".
        **common: see ``RankingModel``.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**PAPER_HEAD, **PAPER_GRU, "pooling": "sum"},
        "authors": {**AUTHORS_HEAD, **AUTHORS_GRU},
    }

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_size: int | None = None,
        extractor_reset: str = "after",
        extractor_update: str | None = None,
        extractor_bias: bool | str = True,
        gate_bias: float | None = None,
        pooling: str | None = "sum",
        **common: Any,
    ) -> None:
        super().__init__(schema, pooling=pooling, **common)
        item = self.embeddings.item_size
        hidden = item if hidden_size is None else hidden_size
        self.extractor = gru_of(
            item,
            hidden,
            reset=extractor_reset,
            update=extractor_update,
            bias=extractor_bias,
            gate_bias=gate_bias,
            name="extractor",
        )
        self._finish(hidden)

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        with self.part("extractor"):
            _, last = self.extractor(embedded.history, offsets=batch.offsets)
            return Interest([of_rows(last[0], batch)])
