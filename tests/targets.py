"""What this process can run: the tests that it cannot are not made, and the table at the end of a run says why.

A target is a backend, or the CPU kernels on one instruction set: "reference", "cpu-avx2", "triton".
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from dien_kernels import _native
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import BACKENDS, Call, refusal
from tests.triton_launches import INTERPRETED


@lru_cache
def missing(target: str) -> str | None:
    """Why this process cannot run the target whatever the call, or None if it can.

    A library that is absent is not among the reasons: its tests are made, and skipped with the words of the loader.
    """
    backend, _, isa = target.partition("-")
    if backend == "triton" and _triton.ABSENT:
        return "triton is not installed"
    if backend == "triton" and not INTERPRETED:
        return "Triton's interpreter takes a process of its own, which make test starts"
    if backend == "cpu" and isa and _native.available():
        before = torch.ops.dien_kernels._cpu_isa()
        try:
            torch.ops.dien_kernels._set_cpu_isa(isa)
        except (ValueError, RuntimeError) as error:
            emulated = "; make test-avx512 runs it on an emulated one" if isa == "avx512" else ""
            return str(error).partition("\n")[0] + emulated
        torch.ops.dien_kernels._set_cpu_isa(before)
    return None


@lru_cache
def refuses(target: str, dtype: torch.dtype) -> str | None:
    """Why the target takes no tensors of this dtype, or None if it does or is missing for another reason."""
    backend = target.partition("-")[0]
    if backend not in BACKENDS or refusal(Call("recurrence", "cpu", torch.float32, 8, 8), backend) is not None:
        return None
    return refusal(Call("recurrence", "cpu", dtype, 8, 8), backend)


def impossible(item: pytest.Function) -> bool:
    """Whether a test is of a target and a dtype that it refuses, or of a target that it is marked to go without."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    target = next(
        (parameters[name] for name in ("target", "name", "target_dtype", "backend") if name in parameters), None
    )
    if not isinstance(target, str):
        return False
    if any(target in mark.args for mark in item.iter_markers("without")):
        return True
    dtype = getattr(parameters.get("case"), "dtype", parameters.get("dtype"))
    return isinstance(dtype, torch.dtype) and refuses(target, dtype) is not None
