"""Models: DIEN and the rows of the paper's tables beside it, from ``Batch`` to logits, losses and scores.

Room card. Lives here: ``nn.Module``s with embeddings, the options and presets of whole models. May import:
torch, ``batch``, ``layers``, ``ops``. Must not be here: files, sampling, optimisers, loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from dien_kernels.batch import Schema
from dien_kernels.models.base import Losses, Output, RankingModel
from dien_kernels.models.baselines import DIN, AveragePooling, PlainGRU
from dien_kernels.models.dien import DIEN, TwoLayerGRU
from dien_kernels.models.request import candidates

MODELS: dict[str, type[RankingModel]] = {
    "dien": DIEN,
    "din": DIN,
    "average": AveragePooling,
    "gru_attention": TwoLayerGRU,
    "gru": PlainGRU,
}


def build(
    name: str, schema: Schema, options: Mapping[str, Any] | None = None, preset: str | None = None
) -> RankingModel:
    """The model ``name`` (a key of ``MODELS``) with a preset's options, overridden by ``options``.

    Every model has the presets "paper" and "authors", which share MLP and losses, so that models of one
    preset compare fairly. Raises ``ValueError`` naming an unknown model, preset or option, with what comes
    close.

    >>> build("din", Schema(items={"item": 10}), {"mlp": (8,)}, preset="paper").mlp.last.in_features
    8
    """
    model = MODELS[_known("name", name, MODELS)]
    chosen = dict(model.PRESETS[_known("preset", preset, model.PRESETS)]) if preset is not None else {}
    known = model.options()
    for option in options or {}:
        _known(f"options of the model {name!r}", option, known)
    return model(schema, **{**chosen, **(options or {})})


def _known(what: str, word: str, allowed: Mapping[str, Any]) -> str:
    if word in allowed:
        return word
    close = get_close_matches(str(word), list(allowed), n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"{what} must be among {sorted(allowed)}, got {word!r}{hint}")


__all__ = [
    "DIEN",
    "DIN",
    "MODELS",
    "AveragePooling",
    "Losses",
    "Output",
    "PlainGRU",
    "RankingModel",
    "TwoLayerGRU",
    "build",
    "candidates",
]
