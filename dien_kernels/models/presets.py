"""The options that several models of a preset have in common; ``docs/models.md`` gives the source of each."""

from __future__ import annotations

from typing import Any

PAPER: dict[str, Any] = {
    "head": {"units": (200, 80), "activation": "dice", "dice_statistics": "moving", "norm": None, "outputs": 2},
    "pooling": None,
    "product": False,
    "click": {"weight": 1.0, "reduction": "mean", "eps": 0.0},
}
PAPER_GRU: dict[str, Any] = {"reset": "after", "update": "candidate", "bias": "single"}
AUTHORS: dict[str, Any] = {
    "embedding": {"size": 18},
    "head": {"units": (200, 80), "activation": "dice", "dice_statistics": "batch", "norm": "fixed", "outputs": 2},
    "prelu_init": 0.1,
    "pooling": "sum",
    "product": True,
    "init": "glorot",
    "click": {"weight": 0.5, "reduction": "mean", "eps": 1e-8},
}
AUTHORS_GRU: dict[str, Any] = {"reset": "before", "update": "keep", "bias": "single", "gate_bias": 1.0}
AUTHORS_ATTENTION: dict[str, Any] = {
    "kind": "din",
    "units": (80, 40),
    "activation": "sigmoid",
    "normalize": "softmax",
}
