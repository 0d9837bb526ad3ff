"""Attention scores in Triton: scores, mask and softmax over time of a row in one launch, forward and backward.

Equation numbers are those of docs/math-attention.md. A program owns a row and walks its history in blocks of STEPS
steps; nothing of it is kept but what it returns. What is a number or a vector a row comes from torch: v = W q of (A1),
r of (A5). The matrix a row of (A5) is made on chip, BLOCK rows of it at a time, where it is used: any width fits.

Limits: H <= 256, 16 and 32 bits of storage; at most two hidden layers, the second at most 128 wide.

Only ``triton_launch`` imports this file, at the first call: importing Triton looks for drivers.
"""

# mypy: ignore-errors
# This is Triton's language, not Python's: its compiler checks it.

from __future__ import annotations

import triton
import triton.language as tl

from dien_kernels.ops.triton_kernel import SIZES, dot, place, sigmoid, to

_SIZES = [*SIZES, "width", "programs"]


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _steps(t0, x, length, STATES, MASK, H: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr):
    """A block of steps: their numbers, which of them are valid, and their states, zeros elsewhere."""
    t = t0 + tl.arange(0, STEPS)
    unit = tl.arange(0, PADDED)
    valid = t < length
    if MASK is not None:
        valid = valid & (tl.load(MASK + x + t, mask=valid, other=0) != 0)
    k = tl.load(
        STATES + (x + t)[:, None] * H + unit[None, :], mask=valid[:, None] & (unit < H)[None, :], other=0.0
    )  # fmt: skip
    return t, valid, k


@triton.jit
def _seen(e, valid, top, total):
    """The largest score so far, and the sum of exp(e - top): of the scores up to this block."""
    new = tl.maximum(top, tl.max(tl.where(valid, e, float("-inf")), 0))
    total = tl.where(new > top, total * _exp(top - new), total)
    return new, total + tl.sum(tl.where(valid, _exp(e - new), 0.0), 0)


@triton.jit
def _normalize(SCORES, MASK, x, y, length, top, total, STEPS: tl.constexpr):
    """(A3), where the scores themselves stand."""
    tl.debug_barrier()  # a thread reads what others have stored
    for t0 in range(0, length, STEPS):
        t = t0 + tl.arange(0, STEPS)
        valid = t < length
        if MASK is not None:
            valid = valid & (tl.load(MASK + x + t, mask=valid, other=0) != 0)
        e = tl.load(SCORES + y + t, mask=valid, other=0.0)
        tl.store(SCORES + y + t, _exp(e - top) / total, mask=valid)


@triton.jit
def _mean_gradient(SCORES, DSCORES, MASK, x, y, length, STEPS: tl.constexpr):
    """The sum in (A13)."""
    mean = 0.0
    for t0 in range(0, length, STEPS):
        t = t0 + tl.arange(0, STEPS)
        valid = t < length
        if MASK is not None:
            valid = valid & (tl.load(MASK + x + t, mask=valid, other=0) != 0)
        a = tl.load(SCORES + y + t, mask=valid, other=0.0)
        mean += tl.sum(a * tl.load(DSCORES + y + t, mask=valid, other=0.0), 0)
    return mean


@triton.jit
def _de(SCORES, DSCORES, at, valid, mean, SCALE: tl.constexpr, SOFTMAX: tl.constexpr):
    """(A13), times what the scores were scaled with."""
    de = tl.load(DSCORES + at, mask=valid, other=0.0)
    if SOFTMAX:
        de = tl.load(SCORES + at, mask=valid, other=0.0) * (de - mean)
    return tl.where(valid, de * SCALE, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def bilinear_forward(
    STATES, V, OFFSET, LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES,
    batch, histories, steps, x_rows, y_rows,
    SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(A1) with v and, for a network of one layer, which is this too, an offset a row; (A3)."""
    row = tl.program_id(0).to(tl.int64)
    source, length, x, y, start = place(
        row, row < batch, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, False, False
    )  # fmt: skip
    unit = tl.arange(0, PADDED)
    v = tl.load(V + row * H + unit, mask=unit < H, other=0.0)
    offset = 0.0
    if OFFSET is not None:
        offset = tl.load(OFFSET + row)
    top, total = float("-inf"), 0.0
    for t0 in range(0, length, STEPS):
        t, valid, k = _steps(t0, x, length, STATES, MASK, H, PADDED, STEPS)
        e = (tl.sum(k.to(tl.float32) * v[None, :], 1) + offset) * SCALE
        tl.store(SCORES + y + t, e, mask=valid)
        if SOFTMAX:
            top, total = _seen(e, valid, top, total)
    if SOFTMAX:
        _normalize(SCORES, MASK, x, y, length, top, total, STEPS)


@triton.jit(do_not_specialize=_SIZES)
def bilinear_backward(
    STATES, V, LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES, DSCORES, DSTATES, DV, D_OFFSET,
    batch, histories, steps, x_rows, y_rows,
    SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(A13), and of (A6) the gradients of the states, by row, and of v."""
    row = tl.program_id(0).to(tl.int64)
    source, length, x, y, start = place(
        row, row < batch, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, False, False
    )  # fmt: skip
    unit = tl.arange(0, PADDED)
    inside = unit < H
    v = tl.load(V + row * H + unit, mask=inside, other=0.0)
    mean = 0.0
    if SOFTMAX:
        mean = _mean_gradient(SCORES, DSCORES, MASK, x, y, length, STEPS)
    dv = tl.zeros((PADDED,), tl.float32)
    d_offset = 0.0
    for t0 in range(0, length, STEPS):
        t, valid, k = _steps(t0, x, length, STATES, MASK, H, PADDED, STEPS)
        de = _de(SCORES, DSCORES, y + t, valid, mean, SCALE, SOFTMAX)
        dk = to(de[:, None] * v[None, :], DSTATES.dtype.element_ty)
        tl.store(DSTATES + (y + t)[:, None] * H + unit[None, :], dk, mask=valid[:, None] & inside[None, :])
        dv += tl.sum(de[:, None] * k.to(tl.float32), 0)
        d_offset += tl.sum(de, 0)
    tl.store(DV + row * H + unit, dv, mask=inside)
    if D_OFFSET is not None:
        tl.store(D_OFFSET + row, d_offset)


@triton.jit
def _act(z, slope, ACTIVATION: tl.constexpr):
    """(M1); NaN passes through all four."""
    if ACTIVATION == "sigmoid":
        return sigmoid(z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "prelu":
        return tl.where(z > 0, z, slope * z)
    else:
        return z


@triton.jit
def _act_backward(d, z, a, slope, ACTIVATION: tl.constexpr):
    """(M2)"""
    if ACTIVATION == "sigmoid":
        return d * a * (1.0 - a)
    elif ACTIVATION == "relu":
        return tl.where(a <= 0, 0.0, d)
    elif ACTIVATION == "prelu":
        return tl.where(z > 0, d, slope * d)
    else:
        return d


@triton.jit
def _vector(P, at, mask):
    """Part of a vector in float32; zeros where there is none."""
    if P is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(P + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _first_layer(
    k, q, row, m, width, R, W_STEP, W_P, SLOPE_1, ACTIVATION: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(A5) of the units m: the matrix's part [unit, m], W_p's part, z_1, a_1 and the slopes."""
    unit = tl.arange(0, PADDED)
    wide = m < width
    inside = (unit < H)[:, None] & wide[None, :]
    at = m[None, :] * H + unit[:, None]
    w_p = tl.load(W_P + at, mask=inside, other=0.0)
    matrix = to(tl.load(W_STEP + at, mask=inside, other=0.0) + w_p * q[:, None], k.dtype)
    r = tl.load(R + row * width + m, mask=wide, other=0.0)
    z = dot(k, matrix, tl.zeros((k.shape[0], m.shape[0]), tl.float32) + r[None, :], PRECISION)
    slope = _vector(SLOPE_1, m, wide)
    return matrix, w_p, z, _act(z, slope[None, :], ACTIVATION), slope


@triton.jit
def _second_layer(
    k, q, row, width, R, W_STEP, W_P, SLOPE_1, W_2, B_2, ACTIVATION: tl.constexpr, H: tl.constexpr,
    PADDED: tl.constexpr, M2: tl.constexpr, PADDED_2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_2 of a block of steps."""
    m2 = tl.arange(0, PADDED_2)
    z = tl.zeros((k.shape[0], PADDED_2), tl.float32) + _vector(B_2, m2, m2 < M2)[None, :]
    for m0 in tl.range(0, width, BLOCK, num_stages=1):
        m = m0 + tl.arange(0, BLOCK)
        matrix, w_p, z_1, a, slope = _first_layer(
            k, q, row, m, width, R, W_STEP, W_P, SLOPE_1, ACTIVATION, H, PADDED, PRECISION
        )  # fmt: skip
        inside = (m < width)[:, None] & (m2 < M2)[None, :]
        w = tl.load(W_2 + m2[None, :] * width + m[:, None], mask=inside, other=0.0)
        z = dot(to(a, k.dtype), w, z, PRECISION)
    return z


@triton.jit(do_not_specialize=_SIZES)
def din_forward(
    STATES, Q, R, W_STEP, W_P, SLOPE_1, W_2, B_2, SLOPE_2, W_LAST, B_LAST,
    LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES,
    batch, histories, steps, x_rows, y_rows, width,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr,
    M2: tl.constexpr, PADDED_2: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(A2) by (A5), with one or two (M2 > 0) hidden layers, the first of them ``width`` wide; (A3)."""
    row = tl.program_id(0).to(tl.int64)
    source, length, x, y, start = place(
        row, row < batch, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, False, False
    )  # fmt: skip
    unit = tl.arange(0, PADDED)
    q = tl.load(Q + row * H + unit, mask=unit < H, other=0.0)
    b_last = 0.0
    if B_LAST is not None:
        b_last = tl.load(B_LAST)
    top, total = float("-inf"), 0.0
    for t0 in range(0, length, STEPS):
        t, valid, k = _steps(t0, x, length, STATES, MASK, H, PADDED, STEPS)
        if M2 > 0:
            m2 = tl.arange(0, PADDED_2)
            z = _second_layer(
                k, q, row, width, R, W_STEP, W_P, SLOPE_1, W_2, B_2, ACTIVATION, H, PADDED, M2, PADDED_2, BLOCK,
                PRECISION,
            )  # fmt: skip
            a = _act(z, _vector(SLOPE_2, m2, m2 < M2)[None, :], ACTIVATION)
            e = tl.sum(a * _vector(W_LAST, m2, m2 < M2)[None, :], 1)
        else:
            e = tl.zeros((STEPS,), tl.float32)
            for m0 in tl.range(0, width, BLOCK, num_stages=1):
                m = m0 + tl.arange(0, BLOCK)
                matrix, w_p, z_1, a, slope = _first_layer(
                    k, q, row, m, width, R, W_STEP, W_P, SLOPE_1, ACTIVATION, H, PADDED, PRECISION
                )  # fmt: skip
                e += tl.sum(a * _vector(W_LAST, m, m < width)[None, :], 1)
        e = (e + b_last) * SCALE
        tl.store(SCORES + y + t, e, mask=valid)
        if SOFTMAX:
            top, total = _seen(e, valid, top, total)
    if SOFTMAX:
        _normalize(SCORES, MASK, x, y, length, top, total, STEPS)


@triton.jit
def _add(at, part, mask):
    """To a partial sum of this program's own."""
    tl.store(at, tl.load(at, mask=mask, other=0.0) + part, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def din_backward(
    STATES, Q, R, W_STEP, W_P, SLOPE_1, W_2, B_2, SLOPE_2, W_LAST,
    LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES, DSCORES, DSTATES, DQ, DR,
    D_STEP, D_P, D_W2, D_FIRST, D_SECOND, D_LAST_BIAS,
    batch, histories, steps, x_rows, y_rows, width, programs,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr,
    M2: tl.constexpr, PADDED_2: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(A7) to (A13): rows n, n + programs, ... in program n, whose partial sums stand in the D_ buffers, zeros before.

    D_STEP and D_P [programs, width, H]: A_k and W_p of (A9). D_W2 [programs, M2, width]. D_FIRST [programs, 2, width]:
    the slopes' gradients and, with one hidden layer, the last weights'. D_SECOND [programs, 3, M2]: of the second layer
    the bias, the slopes and the last weights. D_LAST_BIAS [programs]. DQ is without r's part of (A10), DR is (A8).
    """
    unit = tl.arange(0, PADDED)
    m2 = tl.arange(0, PADDED_2)
    second = m2 < M2
    part = tl.program_id(0).to(tl.int64)
    db_last = 0.0
    db_2 = tl.zeros((PADDED_2,), tl.float32)
    ds_2 = tl.zeros((PADDED_2,), tl.float32)
    dw_last = tl.zeros((PADDED_2,), tl.float32)
    for row in range(part, batch, programs):
        source, length, x, y, start = place(
            row, row < batch, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, False, False
        )  # fmt: skip
        q = tl.load(Q + row * H + unit, mask=unit < H, other=0.0)
        mean = 0.0
        if SOFTMAX:
            mean = _mean_gradient(SCORES, DSCORES, MASK, x, y, length, STEPS)
        dq = tl.zeros((PADDED,), tl.float32)
        for t0 in range(0, length, STEPS):
            t, valid, k = _steps(t0, x, length, STATES, MASK, H, PADDED, STEPS)
            de = _de(SCORES, DSCORES, y + t, valid, mean, SCALE, SOFTMAX)
            db_last += tl.sum(de, 0)
            if M2 > 0:
                z_2 = _second_layer(
                    k, q, row, width, R, W_STEP, W_P, SLOPE_1, W_2, B_2, ACTIVATION, H, PADDED, M2, PADDED_2, BLOCK,
                    PRECISION,
                )  # fmt: skip
                slope_2 = _vector(SLOPE_2, m2, second)[None, :]
                a_2 = _act(z_2, slope_2, ACTIVATION)
                da_2 = de[:, None] * _vector(W_LAST, m2, second)[None, :]
                dz_2 = _act_backward(da_2, z_2, a_2, slope_2, ACTIVATION)
                dw_last += tl.sum(de[:, None] * a_2, 0)
                db_2 += tl.sum(dz_2, 0)
                if ACTIVATION == "prelu":
                    ds_2 += tl.sum(tl.where(z_2 > 0, 0.0, z_2 * da_2), 0)
                dz_2 = to(dz_2, k.dtype)
            dk = tl.zeros((STEPS, PADDED), tl.float32)
            tl.debug_barrier()  # the partial sums of the last block have been stored
            for m0 in tl.range(0, width, BLOCK, num_stages=1):
                m = m0 + tl.arange(0, BLOCK)
                wide = m < width
                matrix, w_p, z_1, a_1, slope_1 = _first_layer(
                    k, q, row, m, width, R, W_STEP, W_P, SLOPE_1, ACTIVATION, H, PADDED, PRECISION
                )  # fmt: skip
                first_at = D_FIRST + part * (2 * width) + m
                if M2 > 0:
                    w2_at = m2[:, None] * width + m[None, :]
                    inside = second[:, None] & wide[None, :]
                    zero = tl.zeros((STEPS, BLOCK), tl.float32)
                    da_1 = dot(dz_2, tl.load(W_2 + w2_at, mask=inside, other=0.0), zero, PRECISION)
                    zero = tl.zeros((PADDED_2, BLOCK), tl.float32)
                    dw_2 = dot(tl.trans(dz_2), to(a_1, k.dtype), zero, PRECISION)
                    _add(D_W2 + part * (M2 * width) + w2_at, dw_2, inside)
                else:
                    da_1 = de[:, None] * _vector(W_LAST, m, wide)[None, :]
                    _add(first_at + width, tl.sum(de[:, None] * a_1, 0), wide)
                if ACTIVATION == "prelu":
                    _add(first_at, tl.sum(tl.where(z_1 > 0, 0.0, z_1 * da_1), 0), wide)
                dz_1 = _act_backward(da_1, z_1, a_1, slope_1[None, :], ACTIVATION)
                _add(DR + row * width + m, tl.sum(dz_1, 0), wide)
                dz_1 = to(dz_1, k.dtype)
                # (A12) of these units and steps, [unit, m]
                g = dot(tl.trans(k), dz_1, tl.zeros((PADDED, BLOCK), tl.float32), PRECISION)
                inside = (unit < H)[:, None] & wide[None, :]
                at = part * (width * H) + m[None, :] * H + unit[:, None]
                _add(D_STEP + at, g, inside)
                _add(D_P + at, g * q[:, None], inside)
                dq += tl.sum(g * w_p, 1)
                dk = dot(dz_1, tl.trans(matrix), dk, PRECISION)
            mask = valid[:, None] & (unit < H)[None, :]
            tl.store(DSTATES + (y + t)[:, None] * H + unit[None, :], to(dk, DSTATES.dtype.element_ty), mask=mask)
        tl.store(DQ + row * H + unit, dq, mask=unit < H)
    if M2 > 0:
        second_at = D_SECOND + part * (3 * M2) + m2
        tl.store(second_at, db_2, mask=second)
        tl.store(second_at + M2, ds_2, mask=second)
        tl.store(second_at + 2 * M2, dw_last, mask=second)
    tl.store(D_LAST_BIAS + part, db_last)
