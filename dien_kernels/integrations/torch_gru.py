"""``torch.nn.GRU`` on the CPU, by our kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.integrations._target import Fallback, Target
from dien_kernels.layers import GRU


class Live:
    """What ``layers.GRU`` computes, with the parameters of a ``torch.nn.GRU``, which are read where they lie."""

    reset, update, padded, backend = "after", None, "zero", "auto"
    forward, _batched, _packed, _stack, _check_hx, _check_input, _forbid, _spread = (
        GRU.forward,
        GRU._batched,
        GRU._packed,
        GRU._stack,
        GRU._check_hx,
        GRU._check_input,
        staticmethod(GRU._forbid),
        GRU._spread,
    )

    def __init__(self, module: nn.GRU) -> None:
        self._module, self._names = module, module._all_weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def live(module: nn.GRU) -> Any:
    """``Live`` of a module that our code takes; ``Fallback`` says why not."""
    weight = module.weight_ih_l0
    if weight.device.type != "cpu":
        raise Fallback(f"on {weight.device.type}, which has a GRU of its own")
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise Fallback(f"parameters of {weight.dtype}")
    if module.proj_size:
        raise Fallback("proj_size")
    if module.training and module.dropout > 0 and module.num_layers > 1:
        raise Fallback("dropout between layers, whose random numbers would be others")
    return Live(module)


def forward(self: nn.GRU, input: Any, hx: Tensor | None = None) -> Any:
    """``torch.nn.GRU.forward``."""
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or data.is_nested or data.layout is not torch.strided:
        raise Fallback("input that is no dense tensor")
    if not data.numel():
        raise Fallback("input without elements")
    with no_autocast(data):
        return live(self).forward(input, hx)


def no_autocast(data: Tensor) -> Any:
    """On the CPU autocast leaves the hosts' recurrences alone, and so their results are float32."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


TARGETS = [Target("torch", "torch.nn.modules.rnn", "GRU", "forward", forward, prints=None)]
