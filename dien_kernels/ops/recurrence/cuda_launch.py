"""Host code of the CUDA C++ backend: what it refuses, which compiled instance runs, and its launches.

What it shares with the Triton backend is in ``gpu_problem``.

The kernels (csrc/cuda) take an even hidden size. It is padded to the next of ``SIZES``, for which there are instances.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from dien_kernels import _native
from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._register import define_raw, raw
from dien_kernels.ops.recurrence import gpu_problem
from dien_kernels.ops.recurrence.contract import Forward, Gradients, Inputs
from dien_kernels.ops.recurrence.forms import Options
from dien_kernels.ops.recurrence.gpu_problem import BackwardBuffers, Problem, float32_product

SIZES = (8, 16, 32, 40, 64, 112, 128)  # padded H of the instances, csrc/cuda/instances.h
FUSED = 64  # the largest I and H whose input projection the forward's loop makes; 16-bit storage
# Above this H, weights do not fit into registers: those of float32 are streamed from memory in each step, and those of
# the 16-bit backward are in shared memory.
LARGE = 64

_INPUTS = (
    "Tensor? order, Tensor? lengths, Tensor? offsets, Tensor? history, Tensor? y_start, Tensor projection, "
    "Tensor? attention, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0, int[] numbers, float[] coefficients"
)
FORWARD_SCHEMA = f"({_INPUTS}, Tensor? w_ih, Tensor? streamed, Tensor(a!)? y, Tensor(b!) h_n) -> ()"
BACKWARD_SCHEMA = (
    f"({_INPUTS}, Tensor y, Tensor? dy, Tensor? dh_n, Tensor? fragments, Tensor(a!) gates, Tensor(b!) states, "
    "Tensor(c!)? d_attention, Tensor(d!) d_bias, Tensor(e!) dh0) -> ()"
)
SUM_ROWS_SCHEMA = (
    "(Tensor gates, Tensor(a!) dgx, Tensor rows_of_history, Tensor first, Tensor? lengths, Tensor? offsets, "
    "Tensor? y_start, int[] numbers) -> ()"
)
SCHEMAS = {"forward": FORWARD_SCHEMA, "backward": BACKWARD_SCHEMA, "sum_rows_of_history": SUM_ROWS_SCHEMA}


def define_launches() -> None:
    """Define the raw ops that launch the kernels; the native library implements them."""
    for name, schema in SCHEMAS.items():
        define_raw(f"_cuda_recurrence_{name}", schema, lambda *_: None)


class Numbers(NamedTuple):
    """The whole numbers of a launch, as ``Numbers`` of csrc/torch/recurrence_cuda.cpp reads them."""

    batch: int
    histories: int
    steps: int
    x_rows: int
    y_rows: int
    reverse: int  # this and the next four: 0 or 1
    time_major: int
    scale_input: int
    keep_side: int
    reset_before: int
    padded: int = 0  # the padded H of the instance, one of ``SIZES``
    rows: int = 0  # of a tile; forward only, as ``tiles_of_8``
    tiles_of_8: int = 0


_older_driver: str | None = None  # read once for the process, because Dynamo traces ``refuses``


def look_at_driver() -> None:
    """Once the library is loaded: find out whether the driver is too old for the CUDA toolkit of the build."""
    global _older_driver
    if not _native.available() or not _native.build_info().get("cuda_archs"):
        return
    driver, runtime = raw("_cuda_driver_version")(), raw("_cuda_runtime_version")()
    if 0 < driver < runtime:
        _older_driver = (
            f"the native library was built with CUDA {_version(runtime)}, and the driver takes no more than "
            f"CUDA {_version(driver)}: update the driver, or build with an older nvcc"
        )


class Device(NamedTuple):
    name: str
    capability: int  # 90: sm_90
    shared_memory: int  # bytes that one block may have


def visible_devices() -> tuple[Device, ...]:
    """The CUDA devices; only calls on CUDA tensors ask, because asking starts the driver. Dynamo sees a constant."""
    return _look_at_devices()


# What torch.compiler.assume_constant_result does; calling it would import Dynamo, and Triton, with the package.
visible_devices._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _look_at_devices() -> tuple[Device, ...]:
    if not torch.cuda.is_available():
        return ()
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        Device(d.name, 10 * d.major + d.minor, getattr(d, "shared_memory_per_block_optin", d.shared_memory_per_block))
        for d in properties
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def refuses(call: Call) -> str | None:
    if not _native.available():
        return f"native code is absent: {_native.reason()}"
    archs = _native.build_info().get("cuda_archs")
    if not archs:
        return "the native library was built without CUDA (DIEN_KERNELS_BUILD=cuda, with nvcc on PATH)"
    if call.device != "cuda":
        return f"the tensors are on {call.device}"
    if _older_driver:
        return _older_driver
    if call.dtype == torch.float64:
        return "float64 is not among the CUDA kernels' dtypes (float32, bfloat16, float16)"
    if call.hidden_size > SIZES[-1]:
        return f"hidden={call.hidden_size} is above the {SIZES[-1]} that the kernels are compiled for"
    return _device_refuses(call, min(int("".join(filter(str.isdigit, arch))) for arch in archs))


def _device_refuses(call: Call, lowest: int) -> str | None:
    """Why a visible device cannot run the call. All are asked, because ``Call`` does not say which one it is on."""
    needed = backward_dynamic(call.dtype, padded_size(call.hidden_size)) if call.backward else 0
    for device in visible_devices():
        if device.capability < lowest:
            return (
                f"{device.name} is sm_{device.capability}, and the native library was built for sm_{lowest} and newer"
            )
        if device.shared_memory < needed:
            return (
                f"the backward of hidden={call.hidden_size} takes {needed} bytes of shared memory for a block, and "
                f"{device.name} has {device.shared_memory}"
            )
    return None


def backward_dynamic(dtype: torch.dtype, size: int) -> int:
    """The dynamic shared memory of a backward block in bytes, as ``Backward16::kDynamic`` of csrc/cuda says it."""
    itemsize, warps = dtype.itemsize, size // 8
    steps = -(-size * itemsize // 32)
    if size <= LARGE:  # only the largest float32 instances keep a part of W_hh^T in shared memory
        return 3 * steps * 32 * warps * 8 if dtype == torch.float32 and size > 40 else 0
    operand = (itemsize // 2) * 16 * (32 * steps + 16)  # float32 in two parts
    shared = 5 * operand + 4 * 4 * size + 4 * 16 * (warps + 1)
    if dtype == torch.float32:
        return shared
    gap = 1 if size % 64 == 0 else 4  # rows between which 16 bytes are left free
    return 3 * (2 * size * size + size // gap * 16) + shared


def padded_size(hidden: int) -> int:
    return next(size for size in SIZES if size >= hidden)


class Tiles(NamedTuple):
    """How a forward's rows are cut into blocks."""

    rows: int  # of a block: 16, where W_ih x is made in the loop or the batch is large, or 8
    tiles_of_8: int  # of a launch by sixteens: so many blocks at most take 8 of the longest rows; the device decides


def tiles_of(batch: int, narrow: bool, size: int, fused: bool, ragged: bool, multiprocessors: int) -> Tiles:
    """How many rows a block of the forward takes.

    A small batch is bound by the latency of a step: while each tile of 8 rows can have a multiprocessor of its own, all
    tiles have 8 rows. A larger batch has tiles of 16 rows. If its lengths differ, the kernel runs the longest rows in
    tiles of 8 (csrc/cuda/forward16.cuh). 16-bit kernels above ``LARGE`` cannot, because their weights leave no
    registers for both kinds of tile.
    """
    small_batch = batch <= 8 * multiprocessors
    if small_batch and narrow and not fused:
        return Tiles(8, 0)
    both = not narrow or size <= LARGE
    return Tiles(16, multiprocessors if both and (small_batch or ragged) else 0)


def multiprocessors_of(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0


def _launch(name: str, **arguments: Any) -> None:
    """Every launch goes through here, so that a test can replace it by a simulator of the kernels."""
    raw(f"_cuda_recurrence_{name}")(**arguments)


def _used_rows(problem: Problem, rows: Tensor) -> Tensor:
    """[3H, ...] with zeros for a gate that nothing reads (AGRU's update), so that NaN there has no effect."""
    if problem.options.beta0 != 0 or problem.options.beta1 != 0:
        return rows
    r, _, n = rows.split(problem.hidden)
    return torch.cat((r, torch.zeros_like(r), n))


def _projection(problem: Problem, size: int) -> Tensor:
    """W_ih x and, unless it is scaled afterwards, the biases that are added to it in any case: [x_rows, 3 * size]."""
    hidden, given = problem.hidden, [problem.b_ih, problem.b_hh]
    if problem.b_hh is not None and not problem.options.reset_before:
        # b_hn is multiplied by the reset gate, so that it cannot be added here.
        given[1] = pad(problem.b_hh[: 2 * hidden], (0, hidden))
    biases = [] if problem.options.scale_input else [b for b in given if b is not None]
    bias = None
    if biases:
        total = sum(biases[1:], biases[0]).to(problem.w_ih.dtype)
        bias = gpu_problem.padded(_used_rows(problem, total), hidden, size)
    return linear(problem.x, gpu_problem.padded(_used_rows(problem, problem.w_ih), hidden, size), bias)


def _numbers(problem: Problem, size: int = 0, tiles: tuple[int, int] = (0, 0)) -> Numbers:
    o = problem.options
    flags = (o.reverse, o.time_major, o.scale_input, o.keep_side, o.reset_before)
    return Numbers._make((*problem.sizes.values(), *map(int, flags), size, *tiles))


def _inputs(problem: Problem, projection: Tensor, numbers: Numbers) -> dict[str, Any]:
    """The arguments of ``_INPUTS``."""
    layout, o = problem.layout, problem.options
    return dict(
        order=problem.order, lengths=layout.lengths, offsets=layout.offsets, history=layout.history_of,
        y_start=problem.y_start, projection=projection, attention=problem.attention, w_hh=problem.w_hh,
        b_ih=problem.b_ih, b_hh=problem.b_hh, h0=problem.h0, numbers=numbers,
        coefficients=(o.alpha0, o.alpha1, o.beta0, o.beta1),
    )  # fmt: skip


def _fragments(problem: Problem, size: int) -> Tensor | None:
    """W_hh and its transpose in the order in which threads stream them: by gate, step of the product, and thread."""
    if problem.w_hh.dtype != torch.float32 or size <= LARGE:
        return None
    w = pad(
        gpu_problem.padded(_used_rows(problem, problem.w_hh), problem.hidden, size), (0, size - problem.hidden)
    ).unflatten(0, (3, size))
    both = torch.stack((w, w.transpose(1, 2)))
    # The column of the product is (warp, group), the index of the sum is (step, half, place): csrc/cuda/tile16.cuh.
    return both.view(2, 3, size // 8, 8, size // 8, 2, 4).permute(0, 1, 4, 2, 3, 6, 5).contiguous()


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Forward:
    hidden = inputs.w_hh.shape[1]
    if hidden % 2:  # the kernels move units in pairs: add a unit that stays zero
        y, h_n, kept = fwd(_even(inputs), histories, options)
        return Forward(y[..., :hidden].contiguous(), h_n[:, :hidden].contiguous(), kept)
    problem = Problem(inputs, histories, options)
    if problem.empty:
        return gpu_problem.empty_forward(problem)
    y = problem.new(*problem.y_shape)
    return Forward(y, run_forward(problem, y), gpu_problem.nothing_kept(problem))


def run_forward(problem: Problem, y: Tensor | None) -> Tensor:
    """The states after each row's last step; those after every step go to ``y``, unless it is None."""
    x, hidden, fused = problem.x, problem.hidden, fuses(problem)
    size = padded_size(max(hidden, problem.input) if fused else hidden)
    narrow = x.dtype != torch.float32
    h_n = x.new_empty(problem.batch, hidden)
    ragged = problem.row_lengths is not None
    tiles = tiles_of(problem.batch, narrow, size, fused, ragged, multiprocessors_of(x))
    projection = x.contiguous() if fused else _projection(problem, size)
    streamed = _fragments(problem, size)  # the second half, the transpose, is for the backward
    _launch(
        "forward",
        **_inputs(problem, projection, _numbers(problem, size, tiles)),
        w_ih=problem.w_ih.contiguous() if fused else None,
        streamed=streamed,
        y=y,
        h_n=h_n,
    )
    return h_n


def fuses(problem: Problem) -> bool:
    """Whether the forward kernel computes W_ih x in its loop (``Forward.w_ih`` of csrc/cuda/params.h).

    For shared histories it is computed before the loop, once for each history.
    """
    options = problem.options
    return (
        problem.x.dtype != torch.float32
        and max(problem.input, problem.hidden) <= FUSED
        and problem.input % 4 == 0
        and problem.x.data_ptr() % 8 == 0
        and not (problem.shared or options.reset_before or options.scale_input)
    )


def bwd(dy, dh_n, inputs, histories, y, kept, need_dx, options):  # type: ignore[no-untyped-def]
    hidden = inputs.w_hh.shape[1]
    if hidden % 2:
        dy, dh_n, y = (None if t is None else pad(t, (0, 1)) for t in (dy, dh_n, y))
        return _without_last_unit(bwd(dy, dh_n, _even(inputs), histories, y, kept, need_dx, options), hidden)
    problem = Problem(inputs, histories, options)
    if problem.empty:
        return gpu_problem.empty_backward(problem, dh_n, need_dx)
    if max(problem.x_rows, problem.y_rows) >= 2**31:
        raise ValueError(
            f"the CUDA backward counts steps in 32 bits, and there are {max(problem.x_rows, problem.y_rows)}"
        )
    size = padded_size(hidden)
    buffers = BackwardBuffers.allocate(problem, -(-problem.batch // 16), size)
    projection = float32_product(problem.x, gpu_problem.padded(_used_rows(problem, problem.w_ih), hidden, size))
    _launch(
        "backward",
        **_inputs(problem, projection, _numbers(problem, size)),
        y=y,
        dy=_aligned(dy),
        dh_n=_aligned(dh_n),
        fragments=_fragments(problem, size),
        gates=buffers.gates,
        states=buffers.states,
        d_attention=buffers.d_attention,
        d_bias=buffers.d_bias,
        dh0=buffers.dh0,
    )
    return gpu_problem.gradients(problem, buffers, need_dx, lambda dgx: _sum_rows(problem, dgx))


def _aligned(t: Tensor | None) -> Tensor | None:
    """A contiguous copy where ``t`` is not contiguous or not aligned to the pairs of elements that the kernels read."""
    if t is None:
        return None
    t = t.contiguous()
    return t.clone() if t.data_ptr() % (2 * t.itemsize) else t


def _sum_rows(problem: Problem, dgx_rows: Tensor) -> Tensor:
    dgx, layout = dgx_rows.new_zeros(problem.x_rows, dgx_rows.shape[1]), problem.layout
    rows_of_history = layout.rows_of_history(problem.histories)
    _launch(
        "sum_rows_of_history",
        gates=dgx_rows,
        dgx=dgx,
        rows_of_history=rows_of_history.rows,
        first=rows_of_history.first,
        lengths=layout.lengths,
        offsets=layout.offsets,
        y_start=problem.y_start,
        numbers=_numbers(problem),
    )
    return dgx


def _even(inputs: Inputs) -> Inputs:
    """Weights, biases and h0 with one more unit, all zeros."""
    hidden = inputs.w_hh.shape[1]
    b_ih, b_hh = (None if b is None else gpu_problem.padded(b, hidden, hidden + 1) for b in (inputs.b_ih, inputs.b_hh))
    return inputs._replace(
        w_ih=gpu_problem.padded(inputs.w_ih, hidden, hidden + 1),
        w_hh=gpu_problem.padded(pad(inputs.w_hh, (0, 1)), hidden, hidden + 1),
        b_ih=b_ih,
        b_hh=b_hh,
        h0=None if inputs.h0 is None else pad(inputs.h0, (0, 1)),
    )


def _without_last_unit(gradients: Gradients, hidden: int) -> Gradients:
    """Take the unit that ``_even`` added out of the gradients."""
    w_ih, w_hh, b_ih, b_hh = (
        gpu_problem.unpadded(t, hidden, hidden + 1)
        for t in (gradients.w_ih, gradients.w_hh[:, :hidden], gradients.b_ih, gradients.b_hh)
    )
    return gradients._replace(w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, h0=gradients.h0[:, :hidden].contiguous())
