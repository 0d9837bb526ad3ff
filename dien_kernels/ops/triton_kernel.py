"""What the Triton kernels of all ops share: the layout rule, activations, products, sums over shared histories.

Room card. Lives here: device functions that know no op. May import: torch, triton, ``_environment``. Must not be here:
an op's mathematics. The file is imported at the first launch only, because importing Triton looks for drivers.
"""

# mypy: ignore-errors
# The functions below are in Triton's language, whose compiler checks them.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dien_kernels.ops._environment import FAST

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
_FAST = tl.constexpr(FAST)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments on whose values Triton must not specialise a kernel, so that a batch of another size compiles nothing.
# ``hidden`` is H as a run-time number: a loop over chunks of it must not be unrolled.
SIZES = ["batch", "histories", "steps", "x_rows", "y_rows", "hidden"]


@triton.jit
def _logistic2(x):
    """1 / (1 + 2^-x), in PTX by an approximate reciprocal. 2^-x may be inf, whose reciprocal is 0; NaN gives NaN."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=&f,f",
            [-x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(-x))


@triton.jit
def _tanh_approximately(x):
    """tanh with an error of up to 5e-4, for DIEN_KERNELS_FAST.

    It is one instruction of the special function unit; ``_logistic2`` is two.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def sigmoid(x):
    if _FAST and _PTX:
        return 0.5 * _tanh_approximately(0.5 * x) + 0.5
    else:
        return _logistic2(x * _LOG2_E)


@triton.jit
def tanh(x, DTYPE: tl.constexpr):
    if _FAST and _PTX:
        return _tanh_approximately(x)
    far = 2.0 * _logistic2(x * (2 * _LOG2_E)) - 1.0
    if DTYPE == tl.float32:  # near 0 the subtraction cancels digits: take a least-squares fit, good to 4e-8
        s = x * x
        p = ((0.01643201 * s - 0.05266803) * s + 0.13320643) * s - 0.33332941
        return tl.where(s < 0.3, x * s * p + x, far)
    else:
        return far


@triton.jit
def to(x, DTYPE: tl.constexpr):
    """Convert float32 to DTYPE, rounding to nearest even, which Triton's interpreter does not do for bfloat16."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, start, PRECISION: tl.constexpr):
    """``start + a @ b``, summed in float32."""
    if _INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), start, input_precision="ieee")
    else:
        return tl.dot(a, b, start, input_precision=PRECISION)


@triton.jit
def store_row(at, value, mask):
    """Store a tile whose row i begins at the pointer ``at[i]``."""
    tl.store(at[:, None] + tl.arange(0, value.shape[1])[None, :], value, mask=mask)


@triton.jit
def add(at, part, mask):
    """Add ``part`` to a partial sum in memory. No other program writes there, so no atomic operation is needed."""
    tl.store(at, tl.load(at, mask=mask, other=0.0) + part, mask=mask)


@triton.jit
def rows(
    ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
):  # fmt: skip
    """Apply the layout rule (docs/design.md, "One layout") to the ROWS rows of this program.

    Returns for each row its index, whether it exists, its length, and the flat rows of x, y and attention where its
    step 0 lies. Index values are clamped to the range that exists, because tensors on a GPU have not been checked.
    """
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < batch
    row = at
    if ORDER is not None:
        row = tl.load(ORDER + at, mask=live, other=0)
    _, length, x, y, a = place(
        row, live, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, REVERSE, TIME_MAJOR
    )  # fmt: skip
    return row, live, length, x, y, a


@triton.jit
def place(
    row, live, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows,
    REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
):  # fmt: skip
    """For one row or a tile of rows: the history, the length, and the flat rows of step 0 in x, y and attention."""
    source = row
    if HISTORY is not None:
        source = tl.load(HISTORY + row, mask=live, other=0)
        source = tl.minimum(tl.maximum(source, 0), histories - 1)
    if OFFSETS is not None:
        x = tl.minimum(tl.maximum(tl.load(OFFSETS + source, mask=live, other=0), 0), x_rows)
        length = tl.load(OFFSETS + source + 1, mask=live, other=0) - x
        y = x
        if Y_START is not None:
            y = tl.load(Y_START + row, mask=live, other=0)
        length = tl.minimum(length, tl.minimum(x_rows - x, y_rows - y))
        a = y
    else:
        length = row - row + steps
        if LENGTHS is not None:
            length = tl.minimum(tl.load(LENGTHS + source, mask=live, other=0), steps)
        a = row * steps
        x = source * steps
        y = a
        if TIME_MAJOR:
            x = source
            y = row
    length = tl.where(live, tl.maximum(length, 0), 0)
    if REVERSE:
        last = tl.maximum(length - 1, 0)
        a += last
        if TIME_MAJOR:
            x += last * histories
            y += last * batch
        else:
            x += last
            y += last
    return source, length.to(tl.int32), x, y, a


@triton.jit
def steps_of(batch, histories, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr):
    """The strides from one step of a row to the next, in flat rows of x, y and attention."""
    sign: tl.constexpr = -1 if REVERSE else 1
    if TIME_MAJOR:
        return sign * tl.cast(histories, tl.int64), sign * tl.cast(batch, tl.int64), sign
    else:
        return sign, sign, sign


@triton.jit(do_not_specialize=SIZES)
def sum_rows_of_history(
    BY_ROW, TOTAL, ROWS_OF_HISTORY, FIRST, LENGTHS, OFFSETS, Y_START, batch, histories, steps, x_rows, y_rows,
    TIME_MAJOR: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, ROW_WIDTH: tl.constexpr,
    TOTAL_WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients BY_ROW of the rows that share a history, for each of its steps, in row order, into TOTAL.

    Program (u, j) sums columns j H to (j + 1) H of history u.
    """
    history = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * H
    unit = tl.arange(0, PADDED)
    if OFFSETS is not None:
        x = tl.minimum(tl.maximum(tl.load(OFFSETS + history), 0), x_rows)
        length = tl.minimum(tl.load(OFFSETS + history + 1) - x, x_rows - x)
    else:
        length = tl.cast(steps, tl.int64)
        if LENGTHS is not None:
            length = tl.minimum(tl.load(LENGTHS + history), length)
        x = history * steps
        if TIME_MAJOR:
            x = history
    x_step, y_step, _ = steps_of(batch, histories, False, TIME_MAJOR)
    first, end = tl.load(FIRST + history), tl.load(FIRST + history + 1)
    for t0 in range(0, length, STEPS):
        t = t0 + tl.arange(0, STEPS).to(tl.int64)
        mask = (t < length)[:, None] & (unit < H)[None, :]
        total = tl.zeros((STEPS, PADDED), tl.float32)
        for k in range(first, end):
            row = tl.load(ROWS_OF_HISTORY + k)
            if OFFSETS is not None:
                y = tl.load(Y_START + row)
                exists = (y + t < y_rows)[:, None]
            elif TIME_MAJOR:
                y = row
                exists = mask
            else:
                y = row * steps
                exists = mask
            at = BY_ROW + (y + t * y_step)[:, None] * ROW_WIDTH + column + unit[None, :]
            total += tl.load(at, mask=mask & exists, other=0.0).to(tl.float32)
        at = TOTAL + (x + t * x_step)[:, None] * TOTAL_WIDTH + column + unit[None, :]
        tl.store(at, to(total, TOTAL.dtype.element_ty), mask=mask)
