"""The recurrence's backward in Triton: one launch runs from the last step to the first.

It computes the gates again from the states and writes their gradients to GATES and the operands of W_hh to STATES. From
these torch computes dx, dW_ih and dW_hh as products over all steps. The products of the gates with W_hh are computed in
the loop. Where W_hh and its transpose do not both fit on chip, torch computes these products too, before the loop and
for all steps: ``operands`` writes their operands to STATES, and the loop reads the results as PRODUCTS_RU and
PRODUCTS_N. Where not even the transpose fits, the loop of ``triton_kernel_wide`` runs. Equation numbers are those of
docs/math.md; limits and layout are those of ``triton_kernel``.
"""

# mypy: ignore-errors
# The functions below are in Triton's language, whose compiler checks them.

from __future__ import annotations

import triton
import triton.language as tl

from dien_kernels.ops.recurrence.triton_kernel import biases, gate_move, weights
from dien_kernels.ops.triton_kernel import SIZES, dot, rows, sigmoid, steps_of, store_row, tanh, to


@triton.jit
def state_before(Y, H0, row, at, t, length, unit, H: tl.constexpr):
    """The states before step ``t`` in float32: the rows of Y at ``at``, or at step 0 the rows of h0."""
    inside = (unit < H)[None, :]
    step = length - length + t  # t as a vector: in the interpreter a comparison of scalars is no mask
    later = (step < length) & (step > 0)
    h = tl.load((Y + at * H)[:, None] + unit[None, :], mask=later[:, None] & inside, other=0.0).to(tl.float32)
    if H0 is not None:
        first = (step < length) & (step == 0)
        h += tl.load((H0 + row * H)[:, None] + unit[None, :], mask=first[:, None] & inside, other=0.0)
    return h


@triton.jit(do_not_specialize=SIZES)
def operands(
    PROJECTION, ATTENTION, B_IH, B_HH, H0, ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, Y, PRODUCTS_RU, STATES,
    batch, histories, steps, x_rows, y_rows,
    SCALE_INPUT: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr, H: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, STATE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the operands of W_hh for all steps at once to STATES.

    Without PRODUCTS_RU these are the states before the steps. With it, which gives the reset gate r, they are q = r h.
    Program (i, n) takes the steps n, n + programs, n + 2 programs and so on of the i-th tile of rows.
    """
    DTYPE: tl.constexpr = Y.dtype.element_ty
    row, live, length, x, y, a_at = rows(
        ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, ROWS, REVERSE, TIME_MAJOR
    )  # fmt: skip
    x_step, y_step, a_step = steps_of(batch, histories, REVERSE, TIME_MAJOR)
    unit = tl.arange(0, PADDED)
    for t in range(tl.program_id(1), tl.max(length, 0), tl.num_programs(1)):
        valid = t < length
        mask = valid[:, None] & (unit < H)[None, :]
        at = y + t * y_step
        h = state_before(Y, H0, row, at - y_step, t, length, unit, H)
        states_at = STATES + at * STATE_WIDTH
        if PRODUCTS_RU is None:
            store_row(states_at, to(h, DTYPE), mask)
        else:
            gx_r = tl.load((PROJECTION + (x + t * x_step) * (3 * H))[:, None] + unit[None, :], mask=mask, other=0.0)
            if SCALE_INPUT:
                gx_r *= tl.load(ATTENTION + a_at + t * a_step, mask=valid, other=0.0)[:, None]
            b_r, _, _, _ = biases(B_IH, B_HH, H, PADDED, ROWS)
            gh_r = tl.load((PRODUCTS_RU + at * (2 * H))[:, None] + unit[None, :], mask=mask, other=0.0)
            store_row(states_at + H, to(sigmoid(gx_r + b_r + gh_r) * h, DTYPE), mask)


@triton.jit
def update_gradients(
    dh, h, u, n, a, mask, ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr,
    KEEP_SIDE: tl.constexpr,
):  # fmt: skip
    """Equations (11) to (13), and the terms of (21) before their sum over units.

    da_u and da_n are zero where ``mask`` is false, whatever values were loaded there.
    """
    g = gate_move(u, a, ALPHA0, ALPHA1, BETA0, BETA1)
    dg = dh * (n - h)  # (11)
    da_n = tl.where(mask, dh * g * (1.0 - n * n), 0.0)  # (12)
    if BETA1 != 0:
        da_u = (BETA0 + BETA1 * a)[:, None] * dg * u * (1.0 - u)  # (13)
    elif BETA0 != 0:
        da_u = BETA0 * dg * u * (1.0 - u)
    else:
        da_u = tl.zeros(dg.shape, tl.float32)
    da_u = tl.where(mask, -da_u if KEEP_SIDE else da_u, 0.0)
    d_a = tl.zeros(dg.shape, tl.float32)
    if ALPHA1 != 0:
        d_a += ALPHA1 * dg
    if BETA1 != 0:
        d_a += BETA1 * u * dg  # (21)
    return g, da_u, da_n, d_a


@triton.jit
def store_gradients(
    at, dgh_u, dgh_n, da_u, da_n, a, mask, H: tl.constexpr, SCALE_INPUT: tl.constexpr, RESET_BEFORE: tl.constexpr,
    DGX: tl.constexpr, DGH_U: tl.constexpr, DGH_N: tl.constexpr,
):  # fmt: skip
    """Store the gradients of u and n in the columns of a step's row of GATES (``gpu_problem.Gates``)."""
    store_row(at + DGH_U, dgh_u, mask)
    store_row(at + DGH_N, dgh_n, mask)
    if SCALE_INPUT:
        store_row(at + (DGX + H), to(a[:, None] * da_u, dgh_u.dtype), mask)
        store_row(at + (DGX + 2 * H), to(a[:, None] * da_n, dgh_u.dtype), mask)
    elif not RESET_BEFORE:
        store_row(at + (DGX + 2 * H), to(da_n, dgh_u.dtype), mask)


@triton.jit(do_not_specialize=SIZES)
def recurrence_backward(
    PROJECTION, ATTENTION, W_HH, B_IH, B_HH, H0, ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, Y, DY, DH_N,
    PRODUCTS_RU, PRODUCTS_N, GATES, STATES, D_ATTENTION, D_BIAS, DH0,
    batch, histories, steps, x_rows, y_rows,
    ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr, SCALE_INPUT: tl.constexpr,
    KEEP_SIDE: tl.constexpr, RESET_BEFORE: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
    H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
    GATE_WIDTH: tl.constexpr, DGX: tl.constexpr, DGH_R: tl.constexpr, DGH_U: tl.constexpr, DGH_N: tl.constexpr,
):  # fmt: skip
    """Equations (10) to (17), (21) and (22), and the sums of the biases' gradients.

    D_BIAS [programs, 4, H] gets each program's sums over its rows and steps, for r, u, n and gh_n. A step's row of
    GATES has GATE_WIDTH values: the columns of gamma dgx start at DGX, those of dgh at DGH_R, DGH_U and DGH_N
    (``gpu_problem.Gates``). A step's row of STATES is the operand of W_hh: h and, with the reset before the product, q.
    """
    DTYPE: tl.constexpr = W_HH.dtype.element_ty
    STATE_WIDTH: tl.constexpr = 2 * H if RESET_BEFORE else H
    RU_WIDTH: tl.constexpr = 2 * H if RESET_BEFORE else 3 * H  # with the reset after, one product has all gates
    N_WIDTH: tl.constexpr = H if RESET_BEFORE else 3 * H
    N_COLUMN: tl.constexpr = 0 if RESET_BEFORE else 2 * H
    # Weights and tiles fill the registers here, so that the projection is loaded twice instead of being kept.
    AGAIN: tl.constexpr = DTYPE == tl.float32 and PADDED == 64
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
    v_r, v_u, v_n = tl.trans(w_r), tl.trans(w_u), tl.trans(w_n)
    b_r, b_u, b_n, b_hn = biases(B_IH, B_HH, H, PADDED, ROWS)
    if DH_N is None:
        dh = tl.zeros((ROWS, PADDED), tl.float32)
    else:
        dh = tl.load(DH_N + state_at, mask=state_mask, other=0.0).to(tl.float32)
    if H0 is not None:
        has_steps = (length > 0)[:, None]  # elsewhere no step reads h0: zero times a NaN there would reach a sum
        h0 = tl.load(H0 + state_at, mask=has_steps & inside, other=0.0)
    bias_at = D_BIAS + tl.program_id(0).to(tl.int64) * (4 * H)
    db_r = tl.zeros((ROWS, PADDED), tl.float32)
    db_u = tl.zeros((ROWS, PADDED), tl.float32)
    db_n = tl.zeros((ROWS, PADDED), tl.float32)
    db_hn = tl.zeros((ROWS, PADDED), tl.float32)
    longest = tl.max(length, 0)
    x += (longest - 1) * x_step
    y += (longest - 1) * y_step
    a_at += (longest - 1) * a_step
    for s in tl.range(0, longest, num_stages=STAGES, loop_unroll_factor=UNROLL):
        t = longest - 1 - s
        valid = t < length
        mask = valid[:, None] & inside
        h = state_before(Y, None, row, y - y_step, t, length, unit, H)
        if H0 is not None:
            later = valid & (length - length + t > 0)
            h = tl.where(later[:, None], h, h0)
        x_at = (PROJECTION + x * (3 * H))[:, None] + unit[None, :]
        p_r = tl.load(x_at, mask=mask, other=0.0)
        p_u = tl.load(x_at + H, mask=mask, other=0.0)
        p_n = tl.load(x_at + 2 * H, mask=mask, other=0.0)
        a = None
        if ATTENTION is not None:
            a = tl.load(ATTENTION + a_at, mask=valid, other=0.0)
        gx_r, gx_u, gx_n = p_r, p_u, p_n
        if SCALE_INPUT:
            gx_r, gx_u, gx_n = a[:, None] * p_r, a[:, None] * p_u, a[:, None] * p_n

        # Compute the gates again, with the operands that the forward's products had.
        states_at = STATES + y * STATE_WIDTH
        if PRODUCTS_RU is None:
            operand = to(h, DTYPE)
            store_row(states_at, operand, mask)
            a_r = dot(operand, w_r, gx_r + b_r, PRECISION)
            a_u = dot(operand, w_u, gx_u + b_u, PRECISION)
        else:
            ru_at = (PRODUCTS_RU + y * RU_WIDTH)[:, None] + unit[None, :]
            a_r = gx_r + b_r + tl.load(ru_at, mask=mask, other=0.0)
            a_u = gx_u + b_u + tl.load(ru_at + H, mask=mask, other=0.0)
            n_at = (PRODUCTS_N + (y * N_WIDTH + N_COLUMN))[:, None] + unit[None, :]
            gh_n = b_hn + tl.load(n_at, mask=mask, other=0.0)
        r = sigmoid(a_r)
        u = sigmoid(-a_u if KEEP_SIDE else a_u)
        if RESET_BEFORE:
            if PRODUCTS_N is None:
                q = to(r * h, DTYPE)
                store_row(states_at + H, q, mask)
                a_n = dot(q, w_n, gx_n + (b_n + b_hn), PRECISION)
            else:
                a_n = gx_n + b_n + gh_n
            n = tanh(a_n, DTYPE)
        else:
            if PRODUCTS_N is None:
                gh_n = dot(operand, w_n, b_hn, PRECISION)
            n = tanh(gx_n + b_n + r * gh_n, DTYPE)

        # Compute the gradients of the gates.
        gates_at = GATES + y * GATE_WIDTH
        if DY is not None:
            dh += tl.load((DY + y * H)[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)  # (10)
        g, da_u, da_n, d_a = update_gradients(dh, h, u, n, a, mask, ALPHA0, ALPHA1, BETA0, BETA1, KEEP_SIDE)
        dh_past = dh * (1.0 - g)
        if not RESET_BEFORE:
            da_r = da_n * gh_n * r * (1.0 - r)  # (14a), (15)
            db_hn += da_n * r
        dgh_u, dgh_n = to(da_u, DTYPE), to(da_n if RESET_BEFORE else da_n * r, DTYPE)
        store_gradients(gates_at, dgh_u, dgh_n, da_u, da_n, a, mask, H, SCALE_INPUT, RESET_BEFORE, DGX, DGH_U, DGH_N)
        db_u += da_u
        db_n += da_n
        if SCALE_INPUT:
            if AGAIN:
                p_u = tl.load(x_at + H, mask=mask, other=0.0)
                p_n = tl.load(x_at + 2 * H, mask=mask, other=0.0)
            d_a += da_u * p_u + da_n * p_n  # (22)
        if RESET_BEFORE:
            dq = dot(dgh_n, v_n, tl.zeros((ROWS, PADDED), tl.float32), PRECISION)
            da_r = tl.where(mask, dq * h * r * (1.0 - r), 0.0)  # (14b), (15)
            dh_past += dq * r
        dgh_r = to(da_r, DTYPE)
        store_row(gates_at + DGH_R, dgh_r, mask)
        db_r += da_r
        if SCALE_INPUT:
            store_row(gates_at + DGX, to(a[:, None] * da_r, DTYPE), mask)
            if AGAIN:
                p_r = tl.load(x_at, mask=mask, other=0.0)
            d_a += da_r * p_r
        if ATTENTION is not None:
            tl.store(D_ATTENTION + a_at, tl.sum(d_a, 1), mask=valid)

        if not RESET_BEFORE:
            dh_past = dot(dgh_n, v_n, dh_past, PRECISION)
        dh_past = dot(dgh_r, v_r, dh_past, PRECISION)
        dh_past = dot(dgh_u, v_u, dh_past, PRECISION)
        dh = tl.where(valid[:, None], dh_past, dh)  # (17)
        x -= x_step
        y -= y_step
        a_at -= a_step
    tl.store(DH0 + state_at, dh, mask=state_mask)
    tl.store(bias_at + unit, tl.sum(db_r, 0), mask=unit < H)
    tl.store(bias_at + H + unit, tl.sum(db_u, 0), mask=unit < H)
    tl.store(bias_at + 2 * H + unit, tl.sum(db_n, 0), mask=unit < H)
    tl.store(bias_at + 3 * H + unit, tl.sum(db_hn, 0), mask=unit < H)
