"""The recurrence's forward in Triton, and what it shares with the backward (``triton_kernel_backward``).

The whole time loop is one launch, with the state in registers. Equation numbers are those of docs/math.md. A program
owns ROWS rows, longest first, and takes as many steps as the longest of them. W_ih x comes in as a product of torch's.

Limits: H <= 256, 16 and 32 bits of storage. CHUNK = 0 keeps W_hh on chip; else each step reads it in blocks of CHUNK
rows, and the operand of the product goes through memory, since registers cannot be sliced.

Only ``triton_launch`` imports this file, at the first call: importing Triton looks for drivers.
"""

# mypy: ignore-errors
# This is Triton's language, not Python's: its compiler checks it.

from __future__ import annotations

import torch
import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
_LOG2_E = tl.constexpr(1.4426950408889634)
# No kernel is compiled anew for another batch; ``hidden`` is H where a loop over its chunks shall stay a loop.
SIZES = ["batch", "histories", "steps", "x_rows", "y_rows", "hidden"]


@triton.jit
def _logistic2(x):
    """1 / (1 + 2^-x) without a division: 2^-x may be inf, whose reciprocal is 0, and NaN passes."""
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
def sigmoid(x):
    return _logistic2(x * _LOG2_E)


@triton.jit
def tanh(x, DTYPE: tl.constexpr):
    far = 2.0 * _logistic2(x * (2 * _LOG2_E)) - 1.0
    if DTYPE == tl.float32:  # near 0 the subtraction leaves few of its digits: a least-squares fit, good to 4e-8
        s = x * x
        p = ((0.01643201 * s - 0.05266803) * s + 0.13320643) * s - 0.33332941
        return tl.where(s < 0.3, x * s * p + x, far)
    else:
        return far


@triton.jit
def to(x, DTYPE: tl.constexpr):
    """Round to the nearest, which the interpreter does not do for bfloat16."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, start, PRECISION: tl.constexpr):
    if _INTERPRETED:  # which multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), start, input_precision="ieee")
    else:
        return tl.dot(a, b, start, input_precision=PRECISION)


@triton.jit
def weights(W, H: tl.constexpr, PADDED: tl.constexpr):
    """One gate's block of W_hh as the right factor [k, unit], zeros from H on. Unused, it is not loaded."""
    k, unit = tl.arange(0, PADDED), tl.arange(0, PADDED)
    inside = (k < H)[:, None] & (unit < H)[None, :]
    return tl.load(W + k[:, None] + unit[None, :] * H, mask=inside, other=0.0)


@triton.jit
def product(
    start, value, w, at, live, W, k_step, unit_step, hidden,
    H: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``start + value @ w``, both on chip; or, in chunks, of the rows at ``at`` and one gate's block of W_hh."""
    if CHUNK == 0:
        return dot(value, w, start, PRECISION)
    else:
        unit = tl.arange(0, PADDED)
        result = start
        for k0 in tl.range(0, hidden, CHUNK, num_stages=2):
            k = k0 + tl.arange(0, CHUNK)
            v = tl.load(at[:, None] + k[None, :], mask=live[:, None] & (k < H)[None, :], other=0.0)
            inside = (k < H)[:, None] & (unit < H)[None, :]
            block = tl.load(W + k[:, None] * k_step + unit[None, :] * unit_step, mask=inside, other=0.0)
            result = dot(v, block, result, PRECISION)
        return result


@triton.jit
def store_row(at, value, mask):
    tl.store(at[:, None] + tl.arange(0, value.shape[1])[None, :], value, mask=mask)


@triton.jit
def bias(B, gate: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """One gate's bias, the same in every row of a tile."""
    tile = tl.zeros((ROWS, PADDED), tl.float32)
    if B is None:
        return tile
    else:
        unit = tl.arange(0, PADDED)
        return tile + tl.load(B + gate * H + unit, mask=unit < H, other=0.0)[None, :]


@triton.jit
def biases(B_IH, B_HH, H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Of r and u both biases together; of n the input's and the state's."""
    b_r = bias(B_IH, 0, H, PADDED, ROWS) + bias(B_HH, 0, H, PADDED, ROWS)
    b_u = bias(B_IH, 1, H, PADDED, ROWS) + bias(B_HH, 1, H, PADDED, ROWS)
    return b_r, b_u, bias(B_IH, 2, H, PADDED, ROWS), bias(B_HH, 2, H, PADDED, ROWS)


@triton.jit
def rows(
    ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
):  # fmt: skip
    """The layout rule (docs/design.md, "One layout") for this program's rows: where steps 0 of x, y and attention lie.

    Index values are clamped to what exists; on the CPU they have been checked.
    """
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < batch
    row = at
    if ORDER is not None:
        row = tl.load(ORDER + at, mask=live, other=0)
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
        length = tl.zeros((ROWS,), tl.int64) + steps
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
    return row, live, length.to(tl.int32), x, y, a


@triton.jit
def steps_of(batch, histories, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr):
    """From one step of a row to the next, in flat rows of x, of y and of attention."""
    sign: tl.constexpr = -1 if REVERSE else 1
    if TIME_MAJOR:
        return sign * tl.cast(histories, tl.int64), sign * tl.cast(batch, tl.int64), sign
    else:
        return sign, sign, sign


@triton.jit
def gate_move(u, a, ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr):
    """g = alpha + beta u (7), (9); what a coefficient of zero would multiply is not computed at all."""
    if BETA1 != 0:
        g = (BETA0 + BETA1 * a)[:, None] * u
    elif BETA0 != 0:
        g = BETA0 * u
    else:
        g = tl.zeros(u.shape, tl.float32)
    if ALPHA1 != 0:
        g += (ALPHA0 + ALPHA1 * a)[:, None]
    elif ALPHA0 != 0:
        g += ALPHA0
    return g


@triton.jit(do_not_specialize=SIZES)
def recurrence_forward(
    PROJECTION, ATTENTION, W_HH, B_IH, B_HH, H0, ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, Y, H_N, SCRATCH,
    batch, histories, steps, x_rows, y_rows, hidden,
    ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr, SCALE_INPUT: tl.constexpr,
    KEEP_SIDE: tl.constexpr, RESET_BEFORE: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
    H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (9). SCRATCH [B, 2H] is where a chunked product's operands are exchanged."""
    DTYPE: tl.constexpr = W_HH.dtype.element_ty
    row, live, length, x, y, a_at = rows(
        ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, ROWS, REVERSE, TIME_MAJOR
    )  # fmt: skip
    x_step, y_step, a_step = steps_of(batch, histories, REVERSE, TIME_MAJOR)
    unit = tl.arange(0, PADDED)
    inside = (unit < H)[None, :]
    state_mask = live[:, None] & inside
    state_at = row[:, None] * H + unit[None, :]
    W_U, W_N = W_HH + H * H, W_HH + 2 * H * H
    w_r = weights(W_HH, H, PADDED)
    w_u = weights(W_U, H, PADDED)
    w_n = weights(W_N, H, PADDED)
    b_r, b_u, b_n, b_hn = biases(B_IH, B_HH, H, PADDED, ROWS)
    h_at, q_at = row, row
    if CHUNK != 0:
        h_at = SCRATCH + row * (2 * H)
        q_at = h_at + H
    h = tl.zeros((ROWS, PADDED), tl.float32) if H0 is None else tl.load(H0 + state_at, mask=state_mask, other=0.0)
    x_at = PROJECTION + x[:, None] * (3 * H) + unit[None, :]
    y_at = Y + y[:, None] * H + unit[None, :]
    for t in tl.range(0, tl.max(length, 0), num_stages=STAGES, loop_unroll_factor=UNROLL):
        valid = t < length
        mask = valid[:, None] & inside
        gx_r = tl.load(x_at, mask=mask, other=0.0)
        gx_u = tl.load(x_at + H, mask=mask, other=0.0)
        gx_n = tl.load(x_at + 2 * H, mask=mask, other=0.0)
        a = None
        if ATTENTION is not None:
            a = tl.load(ATTENTION + a_at, mask=valid, other=0.0)
        if SCALE_INPUT:
            gx_r *= a[:, None]
            gx_u *= a[:, None]
            gx_n *= a[:, None]
        operand = to(h, DTYPE)
        if CHUNK != 0:
            tl.debug_barrier()  # all have read what stood here in the last step
            store_row(h_at, operand, state_mask)
            tl.debug_barrier()
        a_r = product(gx_r + b_r, operand, w_r, h_at, live, W_HH, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        a_u = product(gx_u + b_u, operand, w_u, h_at, live, W_U, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        r = sigmoid(a_r)  # (3)
        u = sigmoid(-a_u if KEEP_SIDE else a_u)  # (4)
        if RESET_BEFORE:
            q = to(r * h, DTYPE)
            if CHUNK != 0:
                store_row(q_at, q, state_mask)
                tl.debug_barrier()
            a_n = product(gx_n + (b_n + b_hn), q, w_n, q_at, live, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = tanh(a_n, DTYPE)  # (6)
        else:
            gh_n = product(b_hn, operand, w_n, h_at, live, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = tanh(gx_n + b_n + r * gh_n, DTYPE)  # (5)
        g = gate_move(u, a, ALPHA0, ALPHA1, BETA0, BETA1)
        h = tl.where(valid[:, None], h + g * (n - h), h)  # (8)
        tl.store(y_at, to(h, DTYPE), mask=mask)
        x_at += x_step * (3 * H)
        y_at += y_step * H
        a_at += a_step
    tl.store(H_N + state_at, to(h, DTYPE), mask=state_mask)
