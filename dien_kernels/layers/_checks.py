"""Checks that layers add to the ops' own: constructor sizes, and an input that does not fit the weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from torch import Tensor

from dien_kernels.checks import (
    FLOATS,
    autocast_dtype,
    check_number,
    check_option,
    check_storage,
)
from dien_kernels.ops._dispatch import BACKENDS


def check_weight(name: str, value: Any) -> None:
    """A finite number of at least 0."""
    check_number(name, value)
    if not 0 <= value < inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_sizes(name: str, value: Any) -> None:
    """Widths of layers: a list or tuple of sizes, which may be empty."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of ints, got {type(value).__name__}")
    for i, size in enumerate(value):
        check_size(f"{name}[{i}]", size)


def check_backend(backend: Any) -> None:
    """As the ops do, but when the layer is built and not at its first call."""
    check_option("backend", backend, ("auto", *BACKENDS))


def check_dtype(dtype: Any) -> None:
    """The dtype of parameters: None is torch's default."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float64, bfloat16, float16 or None, got {dtype}")


def check_features(name: str, value: Any, size: int, meaning: str, weight: Tensor) -> None:
    """A floating tensor whose last dimension, dtype and device are those the weights ask for."""
    check_storage(name, value)
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} must have {meaning} = {size} features last, got shape {tuple(value.shape)}")
    if value.dtype != weight.dtype and autocast_dtype(value) is None:
        raise TypeError(f"{name} must have the dtype of the weights, {weight.dtype}, got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on the device of the weights, {weight.device}, got {value.device}")
