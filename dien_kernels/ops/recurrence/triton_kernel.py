"""The recurrence's forward in Triton, and what it shares with the backward (``triton_kernel_backward``).

One launch runs the whole time loop, with the state in registers. Equation numbers are those of docs/math.md. Rows are
sorted from longest to shortest; a program owns ROWS of them and makes as many steps as its longest row has. It computes
W_ih x itself where W_ih is small and each history is read by one row. Otherwise torch computes it before the launch.

Limits: H <= 256; float32, bfloat16 and float16 storage. With CHUNK = 0, W_hh stays on chip. Otherwise each step reads
W_hh from memory, CHUNK indices of the sum at a time. The left factor of the product then goes through memory too,
because a tile in registers cannot be sliced.

Only ``triton_launch`` imports this file, at the first call, because importing Triton looks for drivers.
"""

# mypy: ignore-errors
# The functions below are in Triton's language, whose compiler checks them.

from __future__ import annotations

import triton
import triton.language as tl

from dien_kernels.ops.triton_kernel import SIZES, dot, rows, sigmoid, steps_of, store_row, tanh, to


@triton.jit
def weights(W, K: tl.constexpr, K_PADDED: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr):
    """Load one gate's block [H, K] of W_ih or W_hh, transposed to the right factor [k, unit] of a product.

    The compiler removes the load where the result is not used.
    """
    k, unit = tl.arange(0, K_PADDED), tl.arange(0, PADDED)
    inside = (k < K)[:, None] & (unit < H)[None, :]
    return tl.load(W + k[:, None] + unit[None, :] * K, mask=inside, other=0.0)


@triton.jit
def product(
    start, value, w, at, live, W, k_step, unit_step, hidden,
    H: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``start + value @ w`` if CHUNK = 0.

    Otherwise both factors are read in chunks: the left one from the rows at ``at``, the right one from W, one gate's
    block of W_hh, with the strides ``k_step`` along the sum and ``unit_step`` along the result.
    """
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
def bias(B, gate: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """One gate's bias, repeated for every row of a tile; zeros if B is None."""
    tile = tl.zeros((ROWS, PADDED), tl.float32)
    if B is None:
        return tile
    else:
        unit = tl.arange(0, PADDED)
        return tile + tl.load(B + gate * H + unit, mask=unit < H, other=0.0)[None, :]


@triton.jit
def biases(B_IH, B_HH, H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The biases b_ih + b_hh of r and of u, then b_ih of n and b_hh of n, which r may multiply."""
    b_r = bias(B_IH, 0, H, PADDED, ROWS) + bias(B_HH, 0, H, PADDED, ROWS)
    b_u = bias(B_IH, 1, H, PADDED, ROWS) + bias(B_HH, 1, H, PADDED, ROWS)
    return b_r, b_u, bias(B_IH, 2, H, PADDED, ROWS), bias(B_HH, 2, H, PADDED, ROWS)


@triton.jit
def gate_move(u, a, ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr):
    """g = alpha + beta u, equations (7) and (9). Terms whose coefficient is zero are not computed at all."""
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


@triton.jit(do_not_specialize=["batch"])
def length_order(LENGTHS, ORDER, batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sort the rows from longest to shortest: a row's place is the number of rows that come before it.

    Rows of equal length keep their order.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.load(LENGTHS + row, mask=row < batch, other=0).to(tl.int32)
    place = tl.zeros((ROWS,), tl.int32)
    for start in range(0, batch, BLOCK):
        other = start + tl.arange(0, BLOCK)
        length = tl.load(LENGTHS + other, mask=other < batch, other=-1).to(tl.int32)
        earlier = (length[None, :] == own[:, None]) & (other[None, :] < row[:, None])
        before = (other < batch)[None, :] & ((length[None, :] > own[:, None]) | earlier)
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(ORDER + place, row.to(tl.int64), mask=row < batch)


@triton.jit(do_not_specialize=SIZES)
def recurrence_forward(
    X, ATTENTION, W_IH, W_HH, B_IH, B_HH, H0, ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, Y, H_N, SCRATCH,
    batch, histories, steps, x_rows, y_rows, hidden,
    ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr, SCALE_INPUT: tl.constexpr,
    KEEP_SIDE: tl.constexpr, RESET_BEFORE: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
    H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, PRECISION: tl.constexpr, INPUT: tl.constexpr, I_PADDED: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (9).

    X is x if W_IH is given, otherwise W_ih x in float32. If CHUNK > 0, the threads of a program exchange the left
    factors of the products, h and r h, through SCRATCH [B, 2 H]. Y gets the state after each step, H_N the last states.
    """
    DTYPE: tl.constexpr = W_HH.dtype.element_ty
    X_WIDTH: tl.constexpr = 3 * H if W_IH is None else INPUT
    row, live, length, x, y, a_at = rows(
        ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, ROWS, REVERSE, TIME_MAJOR
    )  # fmt: skip
    x_step, y_step, a_step = steps_of(batch, histories, REVERSE, TIME_MAJOR)
    unit = tl.arange(0, PADDED)
    inside = (unit < H)[None, :]
    state_mask = live[:, None] & inside
    state_at = row[:, None] * H + unit[None, :]
    W_U, W_N = W_HH + H * H, W_HH + 2 * H * H
    w_r = weights(W_HH, H, PADDED, H, PADDED)
    w_u = weights(W_U, H, PADDED, H, PADDED)
    w_n = weights(W_N, H, PADDED, H, PADDED)
    b_r, b_u, b_n, b_hn = biases(B_IH, B_HH, H, PADDED, ROWS)
    if RESET_BEFORE:
        b_n += b_hn
    feature = tl.arange(0, I_PADDED)
    if W_IH is not None:
        i_r = weights(W_IH, INPUT, I_PADDED, H, PADDED)
        i_u = weights(W_IH + H * INPUT, INPUT, I_PADDED, H, PADDED)
        i_n = weights(W_IH + 2 * H * INPUT, INPUT, I_PADDED, H, PADDED)
    h_at, q_at = row, row
    if CHUNK != 0:
        h_at = SCRATCH + row * (2 * H)
        q_at = h_at + H
    h = tl.zeros((ROWS, PADDED), tl.float32) if H0 is None else tl.load(H0 + state_at, mask=state_mask, other=0.0)
    x_at = X + x[:, None] * X_WIDTH + (unit if W_IH is None else feature)[None, :]
    y_at = Y + y[:, None] * H + unit[None, :]
    for t in tl.range(0, tl.max(length, 0), num_stages=STAGES, loop_unroll_factor=UNROLL):
        valid = t < length
        mask = valid[:, None] & inside
        a = None
        if ATTENTION is not None:
            a = tl.load(ATTENTION + a_at, mask=valid, other=0.0)
        if W_IH is None:
            gx_r = tl.load(x_at, mask=mask, other=0.0)
            gx_u = tl.load(x_at + H, mask=mask, other=0.0)
            gx_n = tl.load(x_at + 2 * H, mask=mask, other=0.0)
        else:
            features = tl.load(x_at, mask=valid[:, None] & (feature < INPUT)[None, :], other=0.0)
            zero = tl.zeros((ROWS, PADDED), tl.float32)
            gx_r = dot(features, i_r, zero if SCALE_INPUT else b_r, PRECISION)
            gx_u = dot(features, i_u, zero if SCALE_INPUT else b_u, PRECISION)
            gx_n = dot(features, i_n, zero if SCALE_INPUT else b_n, PRECISION)
        if SCALE_INPUT:
            gx_r *= a[:, None]
            gx_u *= a[:, None]
            gx_n *= a[:, None]
        if SCALE_INPUT or W_IH is None:
            gx_r, gx_u, gx_n = gx_r + b_r, gx_u + b_u, gx_n + b_n
        operand = to(h, DTYPE)
        if CHUNK != 0:
            tl.debug_barrier()  # all threads have read the operand of the previous step
            store_row(h_at, operand, state_mask)
            tl.debug_barrier()
        a_r = product(gx_r, operand, w_r, h_at, live, W_HH, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        a_u = product(gx_u, operand, w_u, h_at, live, W_U, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        r = sigmoid(a_r)  # (3)
        u = sigmoid(-a_u if KEEP_SIDE else a_u)  # (4)
        if RESET_BEFORE:
            q = to(r * h, DTYPE)
            if CHUNK != 0:
                store_row(q_at, q, state_mask)
                tl.debug_barrier()
            a_n = product(gx_n, q, w_n, q_at, live, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = tanh(a_n, DTYPE)  # (6)
        else:
            gh_n = product(b_hn, operand, w_n, h_at, live, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = tanh(gx_n + r * gh_n, DTYPE)  # (5)
        g = gate_move(u, a, ALPHA0, ALPHA1, BETA0, BETA1)
        h = tl.where(valid[:, None], h + g * (n - h), h)  # (8)
        tl.store(y_at, to(h, DTYPE), mask=mask)
        x_at += x_step * X_WIDTH
        y_at += y_step * H
        a_at += a_step
    tl.store(H_N + state_at, to(h, DTYPE), mask=state_mask)
