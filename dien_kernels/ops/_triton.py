"""Host code that the Triton backends of all ops share: common refusals, properties of a device, launches.

Room card. Lives here: what ``triton_launch.py`` of any op needs and no op owns. May import: torch, ``_dispatch``,
``_layout``; the kernels at the first launch only. Must not be here: an op's mathematics or sizes.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call

# Read once for the process, because Dynamo traces ``refuses``. Triton is not imported here, because
# importing it searches for GPU drivers.
ABSENT = importlib.util.find_spec("triton") is None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuses(call: Call, max_hidden: int) -> str | None:
    """The reasons to refuse a call that are the same for all ops."""
    if ABSENT:
        return "triton is not installed (pip install 'dien_kernels[triton]')"
    if call.device != "cuda" and not (INTERPRETED and call.device == "cpu"):
        return f"the tensors are on {call.device}; Triton needs cuda, or TRITON_INTERPRET=1 for its interpreter"
    if call.dtype == torch.float64:
        return "float64 is not among the Triton kernels' dtypes (float32, bfloat16, float16)"
    if call.hidden_size > max_hidden:
        return f"hidden={call.hidden_size} is above the {max_hidden} of the Triton kernels"
    return None


def shared_memory_of(x: Tensor) -> int:
    """Bytes of shared memory that one program may have; 0 in the interpreter, which then takes the smallest launch."""
    if not x.is_cuda:
        return 0
    device = torch.cuda.get_device_properties(x.device)
    return int(getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block))


def processors_of(x: Tensor) -> int:
    """The multiprocessors of the device; 2 in the interpreter, so that its tests make partial sums, too."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def padded_size(size: int) -> int:
    """Triton's sizes are powers of two, and its matrix products want 16 of everything."""
    return max(16, 1 << (size - 1).bit_length())


def precision(x: Tensor) -> str:
    """The precision of products of float32: that of float32, unless the user has allowed TF32."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Launch a kernel on the device of ``like``, every argument by name.

    Every launch goes through here, so that a test can replace it by one that compiles or simulates the kernels.
    """
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](**arguments)


def compiler_options(warps: int, registers: int | None = None) -> dict[str, Any]:
    """Options of Triton's compiler. ``registers`` is the most that a thread may use; without it, ptxas may choose fewer
    and spill.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    return options


def sum_rows_of_history(
    by_row: Tensor,
    total: Tensor,
    layout: Histories,
    y_start: Tensor | None,
    sizes: dict[str, int],
    *,
    parts: int,
    hidden: int,
    time_major: bool,
) -> None:
    """Add up the gradients of all rows that read a history, in row order, into ``total`` [x_rows, parts * hidden].

    ``y_start`` says where rows start in ``by_row``, where that is not their start in x. Steps that no row reads are not
    written.
    """
    from dien_kernels.ops import triton_kernel

    rows_of_history = layout.rows_of_history(sizes["histories"])
    launch(
        triton_kernel.sum_rows_of_history,
        (sizes["histories"], parts),
        total,
        BY_ROW=by_row,
        TOTAL=total,
        ROWS_OF_HISTORY=rows_of_history.rows,
        FIRST=rows_of_history.first,
        LENGTHS=layout.lengths,
        OFFSETS=layout.offsets,
        Y_START=y_start,
        **sizes,
        TIME_MAJOR=time_major,
        H=hidden,
        PADDED=padded_size(hidden),
        ROW_WIDTH=by_row.stride(0),
        TOTAL_WIDTH=parts * hidden,
        STEPS=16,
        **compiler_options(4),
    )
