"""The options that several models of a preset have in common; ``docs/models.md`` gives the source of each."""

from __future__ import annotations

from typing import Any

PAPER_HEAD: dict[str, Any] = {
    "mlp": (200, 80),
    "activation": "dice",
    "dice_statistics": "moving",
    "norm": None,
    "outputs": 2,
    "pooling": None,
    "product": False,
    "click_weight": 1.0,
    "click_reduction": "mean",
    "click_eps": 0.0,
}
PAPER_GRU: dict[str, Any] = {
    "extractor_reset": "after",
    "extractor_update": "candidate",
    "extractor_bias": "single",
}
AUTHORS_HEAD: dict[str, Any] = {
    "embedding_size": 18,
    "mlp": (200, 80),
    "activation": "dice",
    "dice_statistics": "batch",
    "prelu_init": 0.1,
    "norm": "fixed",
    "outputs": 2,
    "pooling": "sum",
    "product": True,
    "init": "glorot",
    "click_weight": 0.5,
    "click_reduction": "mean",
    "click_eps": 1e-8,
}
AUTHORS_GRU: dict[str, Any] = {
    "extractor_reset": "before",
    "extractor_update": "keep",
    "extractor_bias": "single",
    "gate_bias": 1.0,
}
AUTHORS_ATTENTION: dict[str, Any] = {
    "attention": "din",
    "attention_units": (80, 40),
    "attention_activation": "sigmoid",
    "attention_normalize": "softmax",
}
