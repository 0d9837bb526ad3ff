"""Argument checks shared by all rooms: every message names the argument, what was given and what is allowed.

Room card. Lives here: checks of single values and tensors, and the dtype rules they need. May import: torch. Must not
be here: checks that know an op, a backend or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """The dtype of state, accumulation, attention, biases and h0: float32, or float64 for float64 storage."""
    return torch.float64 if storage == torch.float64 else torch.float32


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """What autocast makes of big operands beside ``like``; None where it is off or leaves them alone.

    float64 is never cast, and torch refuses the very question for the meta device.
    """
    # Most calls end here, as the name of a device costs more than the rest. "Any" leaves out some devices, such as MPS.
    if (like.is_cpu or like.is_cuda) and not torch._C._is_any_autocast_enabled():
        return None
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or like.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def autocast(value: Any, like: Tensor) -> Any:
    """A big operand (or a list of them) in autocast's dtype where that is on; anything else as it came."""
    dtype = autocast_dtype(like)
    if dtype is None:
        return value
    if isinstance(value, (list, tuple)):
        return [autocast(v, like) for v in value]
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.to(dtype)
    return value


def check_number(name: str, value: Any, allowed: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense (strided) tensor, got a {kind} one")


def check_storage(name: str, value: Any) -> None:
    """A floating tensor that sets the dtype and device of the call (x, states)."""
    check_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must have dtype float32, float64, bfloat16 or float16, got {value.dtype}")


def check_like(name: str, value: Any, shape: tuple[int, ...], meaning: str, like: Tensor, like_name: str) -> None:
    """A floating tensor of exactly ``shape`` with the dtype and device of ``like``."""
    check_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(value.shape)}")
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")


def check_compute_like(
    name: str, value: Any, shape: tuple[int, ...], meaning: str, like: Tensor, like_name: str
) -> Tensor:
    """As ``check_like``, but float32 is welcome beside 16-bit storage; returns the value in the compute dtype."""
    check_tensor(name, value)
    compute = compute_dtype(like.dtype)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(value.shape)}")
    if value.dtype != compute:
        if value.dtype != like.dtype:
            either = f"{like.dtype}" if like.dtype == compute else f"{like.dtype} (as {like_name}) or {compute}"
            raise TypeError(f"{name} must have dtype {either}, got {value.dtype}")
        value = value.to(compute)
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")
    checked: Tensor = value
    return checked


def check_index(name: str, value: Any, meaning: str) -> Tensor:
    """An int32 or int64 tensor with one dimension, of the size that ``meaning`` names; returns it as int64."""
    check_tensor(name, value)
    if value.dtype != torch.int64:
        if value.dtype != torch.int32:
            raise TypeError(f"{name} must have dtype int64 or int32, got {value.dtype}")
        value = value.long()
    if value.dim() != 1:
        raise ValueError(f"{name} must have shape {meaning}, got {tuple(value.shape)}")
    checked: Tensor = value
    return checked


_FEW = 64  # so many numbers are read faster as a list than by an operation


def bounds(values: Tensor) -> tuple[int, int]:
    """The least and the greatest of a tensor of integers that has some."""
    if values.dim() == 1 and values.shape[0] <= _FEW:
        numbers = values.tolist()
        return min(numbers), max(numbers)
    low, high = values.aminmax()
    return int(low), int(high)


def check_option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, int, type(None))) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


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
