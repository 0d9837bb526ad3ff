"""Attention scores in Triton: scores, mask and softmax over time of a row in one launch, forward and backward.

Equation numbers are those of docs/math-attention.md. A program handles one row, in ``din_backward`` several rows one
after another, and goes through its history in blocks of STEPS steps. The backward computes everything but the scores
again. torch computes what is one number or one vector for each row: v = W q of (A1) and r = (W_q + W_d) q + b_1 of
(A5). The matrix (W_k - W_d) + W_p diag(q), which (A5) has for each row, is computed on chip where it is used, BLOCK of
its rows at a time, so that a first layer of any width fits.

Limits: H <= 256, with hidden layers H <= 128; float32, bfloat16 and float16 storage; at most two hidden layers, the
second at most 128 wide.

Only ``triton_launch`` imports this file, at the first call, because importing Triton looks for drivers.
"""

# mypy: ignore-errors
# The functions below are in Triton's language, whose compiler checks them.

from __future__ import annotations

import triton
import triton.language as tl

from dien_kernels.ops.triton_kernel import SIZES, add, dot, place, sigmoid, to

_SIZES = [*SIZES, "width", "second_width", "programs"]


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _row(row, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows):
    """A row's length, and the flat rows of its step 0 among the states (x) and among the scores (y)."""
    _, length, x, y, _ = place(
        row, row < batch, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, False, False
    )  # fmt: skip
    return length, x, y


@triton.jit
def _valid_steps(t0, x, length, MASK, STEPS: tl.constexpr):
    """The numbers of the steps in a block, and which of them are valid."""
    t = t0 + tl.arange(0, STEPS)
    valid = t < length
    if MASK is not None:
        valid = valid & (tl.load(MASK + x + t, mask=valid, other=0) != 0)
    return t, valid


@triton.jit
def _steps(t0, x, length, STATES, MASK, H: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr):
    """The same as ``_valid_steps``, and the states of the steps [STEPS, PADDED], zeros at invalid steps."""
    t, valid = _valid_steps(t0, x, length, MASK, STEPS)
    unit = tl.arange(0, PADDED)
    k = tl.load(STATES + x * H + (t[:, None] * H + unit[None, :]), mask=valid[:, None] & (unit < H)[None, :], other=0.0)
    return t, valid, k


@triton.jit
def _scored(e, SCORES, at, valid, top, total, SCALE: tl.constexpr, SOFTMAX: tl.constexpr):
    """Store a block's scaled scores and update the running maximum ``top`` and sum ``total`` of exp(e - top)."""
    e *= SCALE
    tl.store(SCORES + at, e, mask=valid)
    if SOFTMAX:
        new = tl.maximum(top, tl.max(tl.where(valid, e, float("-inf")), 0))
        total = tl.where(new > top, total * _exp(top - new), total)
        total += tl.sum(tl.where(valid, _exp(e - new), 0.0), 0)
        top = new
    return top, total


@triton.jit
def _normalize(SCORES, MASK, x, y, length, top, total, STEPS: tl.constexpr):
    """Replace a row's scores in memory by their softmax, equation (A3)."""
    tl.debug_barrier()  # a thread reads scores that other threads have stored
    for t0 in range(0, length, STEPS):
        t, valid = _valid_steps(t0, x, length, MASK, STEPS)
        e = tl.load(SCORES + y + t, mask=valid, other=0.0)
        tl.store(SCORES + y + t, _exp(e - top) / total, mask=valid)


@triton.jit
def _mean_gradient(SCORES, DSCORES, MASK, x, y, length, SOFTMAX: tl.constexpr, STEPS: tl.constexpr):
    """The sum over s in equation (A13); 0 without a softmax."""
    mean = 0.0
    if SOFTMAX:
        for t0 in range(0, length, STEPS):
            t, valid = _valid_steps(t0, x, length, MASK, STEPS)
            a = tl.load(SCORES + y + t, mask=valid, other=0.0)
            mean += tl.sum(a * tl.load(DSCORES + y + t, mask=valid, other=0.0), 0)
    return mean


@triton.jit
def _de(SCORES, DSCORES, at, valid, mean, SCALE: tl.constexpr, SOFTMAX: tl.constexpr):
    """The gradient of the scores before they are scaled: equation (A13) times SCALE, and zero at invalid steps."""
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
    """Equations (A1), with V [B, H] in float32, and (A3).

    A network of one layer is also of this form, with a number OFFSET [B] added to the scores of each row.
    """
    row = tl.program_id(0).to(tl.int64)
    length, x, y = _row(row, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows)
    unit = tl.arange(0, PADDED)
    v = tl.load(V + row * H + unit, mask=unit < H, other=0.0)
    offset = 0.0
    if OFFSET is not None:
        offset = tl.load(OFFSET + row)
    top, total = float("-inf"), 0.0
    for t0 in range(0, length, STEPS):
        t, valid, k = _steps(t0, x, length, STATES, MASK, H, PADDED, STEPS)
        e = tl.sum(k.to(tl.float32) * v[None, :], 1) + offset
        top, total = _scored(e, SCORES, y + t, valid, top, total, SCALE, SOFTMAX)
    if SOFTMAX:
        _normalize(SCORES, MASK, x, y, length, top, total, STEPS)


@triton.jit(do_not_specialize=_SIZES)
def bilinear_backward(
    STATES, V, LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES, DSCORES, DSTATES, DV, D_OFFSET,
    batch, histories, steps, x_rows, y_rows,
    SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Equation (A13), and from (A6) the gradients of the states (of each row, not yet summed by history) and of v."""
    row = tl.program_id(0).to(tl.int64)
    length, x, y = _row(row, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows)
    unit = tl.arange(0, PADDED)
    inside = unit < H
    v = tl.load(V + row * H + unit, mask=inside, other=0.0)
    mean = _mean_gradient(SCORES, DSCORES, MASK, x, y, length, SOFTMAX, STEPS)
    dv = tl.zeros((PADDED,), tl.float32)
    d_offset = 0.0
    for t0 in range(0, length, STEPS):
        t, valid, k = _steps(t0, x, length, STATES, MASK, H, PADDED, STEPS)
        de = _de(SCORES, DSCORES, y + t, valid, mean, SCALE, SOFTMAX)
        dk = to(de[:, None] * v[None, :], DSTATES.dtype.element_ty)
        tl.store(DSTATES + y * H + (t[:, None] * H + unit[None, :]), dk, mask=valid[:, None] & inside[None, :])
        dv += tl.sum(de[:, None] * k.to(tl.float32), 0)
        d_offset += tl.sum(de, 0)
    tl.store(DV + row * H + unit, dv, mask=inside)
    if D_OFFSET is not None:
        tl.store(D_OFFSET + row, d_offset)


@triton.jit
def _act(z, slope, ACTIVATION: tl.constexpr):
    """The activation of equation (M1). NaN gives NaN in all four cases."""
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
    """The gradient of z given that of a = act(z), called ``d``: equation (M2)."""
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
    """A part of a vector in float32; zeros if P is None."""
    if P is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(P + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _matrix(Q, W_STEP, W_P, m, unit, width, H: tl.constexpr, DTYPE: tl.constexpr):
    """A part of the matrix (W_k - W_d) + W_p diag(q) of (A5), in the storage dtype.

    One of the index vectors ``m`` and ``unit`` is a row and the other a column, so that the caller chooses whether the
    part is transposed.
    """
    inside = (m < width) & (unit < H)
    at = m * H + unit
    q = tl.load(Q + unit, mask=unit < H, other=0.0)
    return to(tl.load(W_STEP + at, mask=inside, other=0.0) + tl.load(W_P + at, mask=inside, other=0.0) * q, DTYPE)


@triton.jit
def _first_layer(
    STATES, Q, R, W_STEP, W_P, SLOPE_1, t, valid, m, width, hidden, ACTIVATION: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation (A5) for the units ``m``: z_1, a_1 and the slopes. STATES, Q and R point to the row's first element."""
    DTYPE: tl.constexpr = STATES.dtype.element_ty
    wide = m < width
    r = tl.load(R + m, mask=wide, other=0.0)
    z = tl.zeros((t.shape[0], m.shape[0]), tl.float32) + r[None, :]
    for u0 in tl.range(0, hidden, BLOCK, num_stages=1):
        unit = u0 + tl.arange(0, BLOCK)
        mask = valid[:, None] & (unit < H)[None, :]
        k = tl.load(STATES + (t[:, None] * H + unit[None, :]), mask=mask, other=0.0)
        z = dot(k, _matrix(Q, W_STEP, W_P, m[None, :], unit[:, None], width, H, DTYPE), z, PRECISION)
    z = tl.where(wide[None, :], z, 0.0)  # padded units: an infinite state times their zero weights is NaN
    slope = _vector(SLOPE_1, m, wide)
    return z, _act(z, slope[None, :], ACTIVATION), slope


@triton.jit
def _second_layer(
    STATES, Q, R, W_STEP, W_P, SLOPE_1, W_2, B_2, t, valid, width, hidden, ACTIVATION: tl.constexpr, H: tl.constexpr,
    M2: tl.constexpr, PADDED_2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_2 of a block of steps, computed from z_1 in blocks of BLOCK units."""
    DTYPE: tl.constexpr = STATES.dtype.element_ty
    m2 = tl.arange(0, PADDED_2)
    z = tl.zeros((t.shape[0], PADDED_2), tl.float32) + _vector(B_2, m2, m2 < M2)[None, :]
    for m0 in tl.range(0, width, BLOCK, num_stages=1):
        m = m0 + tl.arange(0, BLOCK)
        z_1, a, slope = _first_layer(
            STATES, Q, R, W_STEP, W_P, SLOPE_1, t, valid, m, width, hidden, ACTIVATION, H, BLOCK, PRECISION
        )  # fmt: skip
        inside = (m < width)[:, None] & (m2 < M2)[None, :]
        w = tl.load(W_2 + m2[None, :] * width + m[:, None], mask=inside, other=0.0)
        z = dot(to(a, DTYPE), w, z, PRECISION)
    return tl.where((m2 < M2)[None, :], z, 0.0)  # padded units may be NaN, as in the first layer


@triton.jit(do_not_specialize=_SIZES)
def din_forward(
    STATES, Q, R, W_STEP, W_P, SLOPE_1, W_2, B_2, SLOPE_2, W_LAST, B_LAST,
    LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES,
    batch, histories, steps, x_rows, y_rows, width, hidden,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr,
    M2: tl.constexpr, PADDED_2: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equation (A2), computed as (A5), and (A3).

    There are one or, if M2 > 0, two hidden layers; the first has ``width`` units, the second M2.
    """
    row = tl.program_id(0).to(tl.int64)
    length, x, y = _row(row, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows)
    own, q, r = STATES + x * H, Q + row * H, R + row * width
    b_last = 0.0
    if B_LAST is not None:
        b_last = tl.load(B_LAST)
    top, total = float("-inf"), 0.0
    for t0 in range(0, length, STEPS):
        t, valid = _valid_steps(t0, x, length, MASK, STEPS)
        if M2 > 0:
            m2 = tl.arange(0, PADDED_2)
            z = _second_layer(
                own, q, r, W_STEP, W_P, SLOPE_1, W_2, B_2, t, valid, width, hidden, ACTIVATION, H, M2, PADDED_2, BLOCK,
                PRECISION,
            )  # fmt: skip
            a = _act(z, _vector(SLOPE_2, m2, m2 < M2)[None, :], ACTIVATION)
            e = tl.sum(a * _vector(W_LAST, m2, m2 < M2)[None, :], 1)
        else:
            e = tl.zeros((STEPS,), tl.float32)
            for m0 in tl.range(0, width, BLOCK, num_stages=1):
                m = m0 + tl.arange(0, BLOCK)
                z, a, slope = _first_layer(
                    own, q, r, W_STEP, W_P, SLOPE_1, t, valid, m, width, hidden, ACTIVATION, H, BLOCK, PRECISION
                )  # fmt: skip
                e += tl.sum(a * _vector(W_LAST, m, m < width)[None, :], 1)
        top, total = _scored(e + b_last, SCORES, y + t, valid, top, total, SCALE, SOFTMAX)
    if SOFTMAX:
        _normalize(SCORES, MASK, x, y, length, top, total, STEPS)


@triton.jit(do_not_specialize=_SIZES)
def din_backward(
    STATES, Q, R, W_STEP, W_P, SLOPE_1, W_2, B_2, SLOPE_2, W_LAST,
    LENGTHS, OFFSETS, MASK, HISTORY, Y_START, SCORES, DSCORES, DSTATES, DQ, DR,
    DZ_2, D_STEP, D_P, D_W2, D_FIRST, D_SECOND, D_LAST_BIAS,
    batch, histories, steps, x_rows, y_rows, width, hidden, second_width, programs,
    ACTIVATION: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr,
    M2: tl.constexpr, PADDED_2: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equations (A7) to (A13). Program n handles the rows n, n + programs, n + 2 programs and so on.

    The gradients of the weights are partial sums, one for each program, in buffers that must be zero before:

    - D_STEP and D_P [programs, width, H]: the gradients of W_k - W_d and of W_p, (A9) and (A12).
    - D_W2 [programs, M2, width]: the gradient of W_2.
    - D_FIRST [programs, 2, width]: the gradients of the slopes and, with one hidden layer, of the last weights.
    - D_SECOND [programs, 3, M2]: the gradients of the second layer's bias and slopes and of the last weights.
    - D_LAST_BIAS [programs]: the gradient of the last bias.

    DQ [B, H] gets q's gradient (A12) without the term of r, which torch adds; DR [B, width] gets (A8). Both must be
    zero before. DZ_2 [programs, STEPS, M2] holds the gradients of z_2 within a block of steps. Each product loads its
    operands again, a block at a time, because registers could not hold them from one product to the next.
    """
    DTYPE: tl.constexpr = STATES.dtype.element_ty
    unit = tl.arange(0, PADDED)
    m2 = tl.arange(0, PADDED_2)
    step = tl.arange(0, STEPS)
    second = m2 < M2
    part = tl.program_id(0).to(tl.int64)
    second_at = D_SECOND + part * (3 * M2)
    dz_at = DZ_2 + part * (STEPS * M2)
    db_last = 0.0
    for row in range(part, batch, programs):
        length, x, y = _row(row, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows)
        own, q, r = STATES + x * H, Q + row * H, R + row * width
        mean = _mean_gradient(SCORES, DSCORES, MASK, x, y, length, SOFTMAX, STEPS)
        for t0 in range(0, length, STEPS):
            t, valid = _valid_steps(t0, x, length, MASK, STEPS)
            de = _de(SCORES, DSCORES, y + t, valid, mean, SCALE, SOFTMAX)
            db_last += tl.sum(de, 0)
            tl.debug_barrier()  # all threads have read the gradients of z_2 of the previous block of steps
            if M2 > 0:
                z_2 = _second_layer(
                    own, q, r, W_STEP, W_P, SLOPE_1, W_2, B_2, t, valid, width, hidden, ACTIVATION, H, M2, PADDED_2,
                    BLOCK, PRECISION,
                )  # fmt: skip
                slope_2 = _vector(SLOPE_2, m2, second)[None, :]
                a_2 = _act(z_2, slope_2, ACTIVATION)
                da_2 = de[:, None] * _vector(W_LAST, m2, second)[None, :]
                dz_2 = _act_backward(da_2, z_2, a_2, slope_2, ACTIVATION)
                add(second_at + m2, tl.sum(dz_2, 0), second)
                if ACTIVATION == "prelu":
                    add(second_at + M2 + m2, tl.sum(tl.where(z_2 > 0, 0.0, z_2 * da_2), 0), second)
                add(second_at + 2 * M2 + m2, tl.sum(de[:, None] * a_2, 0), second)
                every = (step[:, None] >= 0) & second[None, :]
                tl.store(dz_at + (step[:, None] * M2 + m2[None, :]), to(dz_2, DTYPE), mask=every)
            dk = tl.zeros((STEPS, PADDED), tl.float32)
            tl.debug_barrier()  # all threads have stored the gradients of z_2 and their last partial sums
            for m0 in tl.range(0, width, BLOCK, num_stages=1):
                m = m0 + tl.arange(0, BLOCK)
                wide = m < width
                z_1, a_1, slope_1 = _first_layer(
                    own, q, r, W_STEP, W_P, SLOPE_1, t, valid, m, width, hidden, ACTIVATION, H, BLOCK, PRECISION
                )  # fmt: skip
                first_at = D_FIRST + part * (2 * width) + m
                if M2 > 0:
                    da_1 = tl.zeros((STEPS, BLOCK), tl.float32)
                    for n0 in tl.range(0, second_width, BLOCK, num_stages=1):
                        n = n0 + tl.arange(0, BLOCK)
                        rows_mask = (step[:, None] >= 0) & (n < M2)[None, :]
                        dz_rows = tl.load(dz_at + (step[:, None] * M2 + n[None, :]), mask=rows_mask, other=0.0)
                        w2_at = n[:, None] * width + m[None, :]
                        inside = (n < M2)[:, None] & wide[None, :]
                        da_1 = dot(dz_rows, tl.load(W_2 + w2_at, mask=inside, other=0.0), da_1, PRECISION)
                        dw_2 = dot(
                            tl.trans(dz_rows), to(a_1, DTYPE), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION
                        )  # fmt: skip
                        add(D_W2 + part * (M2 * width) + w2_at, dw_2, inside)
                else:
                    da_1 = de[:, None] * _vector(W_LAST, m, wide)[None, :]
                    add(first_at + width, tl.sum(de[:, None] * a_1, 0), wide)
                if ACTIVATION == "prelu":
                    add(first_at, tl.sum(tl.where(z_1 > 0, 0.0, z_1 * da_1), 0), wide)
                dz_1 = _act_backward(da_1, z_1, a_1, slope_1[None, :], ACTIVATION)
                add(DR + row * width + m, tl.sum(dz_1, 0), wide)
                dz_1 = to(dz_1, DTYPE)
                # G of (A12) for these units and steps, transposed: [unit, m]
                k_mask = (unit < H)[:, None] & valid[None, :]
                k = tl.load(own + (t[None, :] * H + unit[:, None]), mask=k_mask, other=0.0)
                g = dot(k, dz_1, tl.zeros((PADDED, BLOCK), tl.float32), PRECISION)
                at = m[None, :] * H + unit[:, None]
                inside_1 = (unit < H)[:, None] & wide[None, :]
                add(D_STEP + part * (width * H) + at, g, inside_1)
                add(D_P + part * (width * H) + at, g * tl.load(q + unit, mask=unit < H, other=0.0)[:, None], inside_1)
                dq = tl.sum(g * tl.load(W_P + at, mask=inside_1, other=0.0), 1)
                add(DQ + row * H + unit, dq, unit < H)
                dk = dot(dz_1, _matrix(q, W_STEP, W_P, m[:, None], unit[None, :], width, H, DTYPE), dk, PRECISION)
            mask = valid[:, None] & (unit < H)[None, :]
            dk_at = DSTATES + y * H + (t[:, None] * H + unit[None, :])
            tl.store(dk_at, to(dk, DSTATES.dtype.element_ty), mask=mask)
    tl.store(D_LAST_BIAS + part, db_last)
