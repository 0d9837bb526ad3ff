"""What the compiled CPU kernels take: one rule for every op.

Room card. Lives here: the refusals shared by the ops' ``cpu`` backends. May import: ``_native``, ``_dispatch``.
Must not be here: mathematics, schemas. The kernels themselves are in ``csrc/cpu``; the C++ library implements the
raw ops ``_<op>_cpu_*``, and torch picks them by the tensors' device.
"""

from __future__ import annotations

import torch

from dien_kernels import _native
from dien_kernels.ops._dispatch import Call


def refuses_cpu(call: Call) -> str | None:
    """Why the C++ kernels for the CPU cannot run ``call``, or None if they can."""
    if not _native.available():
        return f"native code is absent: {_native.reason()}"
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if call.dtype == torch.float16:
        return "float16 is not among the CPU kernels' dtypes (float32, float64, bfloat16)"
    return None
