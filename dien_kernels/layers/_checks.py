"""Checks that layers add to the ops' own: constructor sizes, and an input that does not fit the weights."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

from dien_kernels.ops._checks import autocast_dtype, check_storage


def check_number(name: str, value: Any, allowed: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_features(name: str, value: Any, size: int, meaning: str, weight: Tensor) -> None:
    """A floating tensor whose last dimension, dtype and device are those the weights ask for."""
    check_storage(name, value)
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} must have {meaning} = {size} features last, got shape {tuple(value.shape)}")
    if value.dtype != weight.dtype and autocast_dtype(value) is None:
        raise TypeError(f"{name} must have the dtype of the weights, {weight.dtype}, got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on the device of the weights, {weight.device}, got {value.device}")
