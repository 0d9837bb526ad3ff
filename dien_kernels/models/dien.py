"""The Deep Interest Evolution Network, and its two-layer GRU without attention inside the recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from dien_kernels.batch import Batch, Schema
from dien_kernels.layers._checks import check_weight
from dien_kernels.models.base import Interest, RankingModel, attend, of_rows
from dien_kernels.models.interest import Attention, Auxiliary, evolution_of, gru_of
from dien_kernels.models.parts import Embedded
from dien_kernels.models.presets import AUTHORS_ATTENTION, AUTHORS_GRU, AUTHORS_HEAD, PAPER_GRU, PAPER_HEAD
from dien_kernels.ops._checks import check_option


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
        hidden_size: H, of both recurrences; None: the width of an item.
        extractor_reset, evolution_reset: "after" or "before" the product with W_hn.
        extractor_update, evolution_update: "keep" or "candidate", the side the stored update gate multiplies;
            None: "candidate" for the paper's AUGRU, else "keep". Changes the meaning of weights, not the
            functions that can be learned.
        extractor_bias, evolution_bias: True: b_ih and b_hh; "single": b_ih alone; False; for the evolution
            also "tied", one vector under both names (not with evolution="gru").
        gate_bias: both gates' bias at the start, seen from the side of what is kept; None: as the layers do.
        attention: "bilinear" or "din".
        attention_units, attention_activation: the hidden layers of "din".
        attention_scale: factor of the scores, None for 1.
        attention_normalize: "softmax" over a row's steps, "sigmoid", or None.
        query: "raw", or "prelu": PReLU(Dense(target)) in front of the attention.
        evolution: "augru", "agru", "aigru", or "gru": a second GRU that attention does not enter.
        form: of "augru": "paper", "authors" or "prediction_flow".
        gru_readout: with "gru": "attention", the sum of its states weighted by their attention; or "last",
            its last state, with no attention in the model.
        auxiliary: None, "inner" (inner product, then H is the width of an item) or "mlp".
        auxiliary_weight: of the auxiliary loss in the total loss.
        auxiliary_units, auxiliary_activation, auxiliary_outputs: of the network of "mlp"; two outputs are a
            softmax.
        auxiliary_norm: None or "fixed", a map of each of its inputs (the authors' batch norm).
        auxiliary_normalizer: "separate": mean(p) + mean(n); "joint": mean over all terms; "row": mean of each
            history's mean; "padded": the authors' mean, which counts padding; "history": sum over steps, mean
            over histories.
        auxiliary_eps: added to the probabilities inside the logarithms, or "clamp".
        **common: see ``RankingModel``.

    Rows with one history in common (``batch.history_of``) run extractor, auxiliary loss and the evolution's
    input projection once.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            **PAPER_HEAD,
            **PAPER_GRU,
            "evolution": "augru",
            "form": "paper",
            "evolution_reset": "after",
            "evolution_update": "candidate",
            "evolution_bias": "single",
            "attention": "bilinear",
            "query": "raw",
            "auxiliary": "inner",
            "auxiliary_weight": 1.0,
            "auxiliary_normalizer": "separate",
            "auxiliary_eps": 0.0,
        },
        "authors": {
            **AUTHORS_HEAD,
            **AUTHORS_GRU,
            **AUTHORS_ATTENTION,
            "evolution": "augru",
            "form": "authors",
            "evolution_reset": "before",
            "evolution_update": "keep",
            "evolution_bias": "single",
            "query": "prelu",
            "auxiliary": "mlp",
            "auxiliary_weight": 1.0,
            "auxiliary_units": (100, 50),
            "auxiliary_activation": "sigmoid",
            "auxiliary_outputs": 2,
            "auxiliary_norm": "fixed",
            "auxiliary_normalizer": "padded",
            "auxiliary_eps": 1e-8,
        },
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
        attention: str = "bilinear",
        attention_units: Sequence[int] = (80, 40),
        attention_activation: str | None = "sigmoid",
        attention_scale: float | None = None,
        attention_normalize: str | None = "softmax",
        query: str = "raw",
        evolution: str = "augru",
        form: str = "paper",
        evolution_reset: str = "after",
        evolution_update: str | None = None,
        evolution_bias: bool | str = True,
        gru_readout: str = "attention",
        auxiliary: str | None = "inner",
        auxiliary_weight: float = 1.0,
        auxiliary_units: Sequence[int] = (100, 50),
        auxiliary_activation: str | None = "sigmoid",
        auxiliary_outputs: int = 1,
        auxiliary_norm: str | None = None,
        auxiliary_normalizer: str = "separate",
        auxiliary_eps: float | str = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(schema, **common)
        check_option("gru_readout", gru_readout, ("attention", "last"))
        check_weight("auxiliary_weight", auxiliary_weight)
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
        self.auxiliary = None
        self.auxiliary_weight = auxiliary_weight
        if auxiliary is not None:
            self.auxiliary = Auxiliary(
                auxiliary,
                hidden,
                item,
                units=auxiliary_units,
                activation=auxiliary_activation,
                outputs=auxiliary_outputs,
                norm=auxiliary_norm,
                normalizer=auxiliary_normalizer,
                eps=auxiliary_eps,
                prelu_init=self.prelu_init,
            )
        self.evolution = evolution_of(
            evolution,
            hidden,
            hidden,
            form=form,
            reset=evolution_reset,
            update=evolution_update,
            bias=evolution_bias,
            gate_bias=gate_bias,
        )
        self.attends_inside = evolution != "gru"
        self.attention = None
        if self.attends_inside or gru_readout == "attention":
            self.attention = Attention(
                attention,
                item,
                hidden,
                units=attention_units,
                activation=attention_activation,
                scale=attention_scale,
                normalize=attention_normalize,
                query=query,
                prelu_init=self.prelu_init,
            )
        self._finish(hidden)

    @property
    def reads_negatives(self) -> bool:
        return self.auxiliary is not None

    def interest(self, batch: Batch, embedded: Embedded) -> Interest:
        offsets = batch.offsets
        with self.part("extractor"):
            states, _ = self.extractor(embedded.history, offsets=offsets)
        auxiliary = None
        if self.auxiliary is not None and embedded.negatives is not None:
            with self.part("auxiliary"):
                auxiliary = self.auxiliary(states, embedded.history, embedded.negatives, offsets)
        if self.attends_inside:
            assert self.attention is not None
            with self.part("attention"):
                scores = self.attention(embedded.target, states, batch)
            with self.part("evolution"):
                _, last = self.evolution(states, scores, offsets=offsets, history=batch.history_of)
            return Interest([last], auxiliary, scores)
        with self.part("evolution"):
            states, last = self.evolution(states, offsets=offsets)
        if self.attention is None:
            return Interest([of_rows(last[0], batch)], auxiliary)
        with self.part("attention"):
            scores = self.attention(embedded.target, states, batch)
            return Interest([attend(states, scores, batch)], auxiliary, scores)


class TwoLayerGRU(DIEN):
    """The paper's "two-layer GRU attention": DIEN with ``evolution="gru"``, by default without auxiliary
    loss.

    ::

        interest = sum_t a_t h'_t,   h' = GRU(GRU(e)),   a_t = attention(h'_t, e_target)

    Args: those of ``DIEN`` but ``evolution`` and ``form``.
    """

    FIXED = frozenset({"evolution", "form"})
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            option: value
            for option, value in preset.items()
            if option not in ("evolution", "form") and not option.startswith("auxiliary")
        }
        for name, preset in DIEN.PRESETS.items()
    }

    def __init__(self, schema: Schema, *, auxiliary: str | None = None, **options: Any) -> None:
        super().__init__(schema, evolution="gru", auxiliary=auxiliary, **options)
