"""Models: DIEN and the models that its paper compares it with, from ``Batch`` to logits, losses and scores.

Room card. Lives here: ``nn.Module``s with embeddings, the options and presets of models. May import:
torch, ``batch``, ``layers``, ``ops``. Must not be here: files (but for pretrained tables that options name), sampling,
optimisers, loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dien_kernels._options import unknown_name
from dien_kernels.batch import Schema
from dien_kernels.models.base import Losses, Output, RankingModel, Share
from dien_kernels.models.baselines import DIN, AveragePooling, PlainGRU
from dien_kernels.models.dien import DIEN, TwoLayerGRU
from dien_kernels.models.numbers import Statistics
from dien_kernels.models.options import (
    AttentionOptions,
    AuxiliaryOptions,
    ClickOptions,
    DenseOptions,
    EmbeddingOptions,
    EvolutionOptions,
    GRUOptions,
    HeadOptions,
    merge,
    refuse,
)
from dien_kernels.models.request import candidates

MODELS: dict[str, type[RankingModel]] = {
    "dien": DIEN,
    "din": DIN,
    "average": AveragePooling,
    "gru_attention": TwoLayerGRU,
    "gru": PlainGRU,
}


def build(
    name: str,
    schema: Schema,
    options: Mapping[str, Any] | None = None,
    preset: str | None = None,
    *,
    statistics: Statistics | None = None,
) -> RankingModel:
    """The model ``name`` (a key of ``MODELS``) for ``schema`` with a ``preset``'s options, overridden by ``options``.

    ``statistics`` are those of the numbers in the training split, by which a model scales them (``DenseOptions``), as
    the ``dense`` of a prepared folder's ``meta.json`` has them: name to a mapping with mean, std, missing, log and
    quantiles. None: numbers are read as they are.

    Options of a group are overridden one by one where the group is given as a mapping. Every model has the presets
    "paper" and "authors", which share MLP and losses, so that models of one preset compare fairly. Raises ``TypeError``
    for options that are no mapping and ``ValueError`` naming an unknown model, preset or option, with what comes close,
    or the new name of an option that has been renamed.

    >>> build("din", Schema(items={"item": 10}), {"head": {"units": (8,)}}, preset="paper").mlp.last.in_features
    8
    """
    model = MODELS[_known("model", name, MODELS)]
    chosen = dict(model.PRESETS[_known("preset", preset, model.PRESETS)]) if preset is not None else {}
    known = list(model.options())
    if not isinstance(options, Mapping | None):
        raise TypeError(f"options must be a mapping from names to values or None, got {type(options).__name__}")
    for option in options or {}:
        if option not in known:
            raise refuse(str(option), known)
    return model(schema, statistics=statistics, **merge(chosen, options or {}))


def _known(what: str, word: str, allowed: Iterable[str]) -> str:
    if word not in allowed:
        raise unknown_name(what, str(word), allowed)
    return word


__all__ = [
    "DIEN",
    "DIN",
    "MODELS",
    "AttentionOptions",
    "AuxiliaryOptions",
    "AveragePooling",
    "ClickOptions",
    "DenseOptions",
    "EmbeddingOptions",
    "EvolutionOptions",
    "GRUOptions",
    "HeadOptions",
    "Losses",
    "Output",
    "PlainGRU",
    "RankingModel",
    "Share",
    "TwoLayerGRU",
    "build",
    "candidates",
]
