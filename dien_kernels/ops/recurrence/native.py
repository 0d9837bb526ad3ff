"""Compiled recurrences: ``csrc/cpu`` today; torch picks the kernel by the tensors' device.

The C++ library implements the raw ops ``_recurrence_native_fwd`` and ``_recurrence_native_bwd``.
"""

from __future__ import annotations

import torch

from dien_kernels import _native
from dien_kernels.ops._dispatch import Call


def refuses_cpu(call: Call) -> str | None:
    if not _native.available():
        return f"native code is absent: {_native.reason()}"
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if call.dtype == torch.float16:
        return "float16 is not among the CPU kernels' dtypes (float32, float64, bfloat16)"
    return None
