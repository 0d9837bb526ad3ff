"""The recurrence's backward in Triton: time runs backwards in one launch, the gates are computed again from the states.

Products over all steps are left to torch: dx and dW_ih of GATES, the gates' gradients; dW_hh of GATES and STATES.
Equation numbers are those of docs/math.md; limits, layout and chunks are those of ``triton_kernel``.
"""

# mypy: ignore-errors
# This is Triton's language, not Python's: its compiler checks it.

from __future__ import annotations

import triton
import triton.language as tl

from dien_kernels.ops.recurrence.triton_kernel import (
    SIZES,
    biases,
    gate_move,
    product,
    rows,
    sigmoid,
    steps_of,
    store_row,
    tanh,
    to,
    weights,
)


@triton.jit
def _collect(total, at, part, H: tl.constexpr, CHUNK: tl.constexpr):
    """Add a step's part to a sum over rows and steps: in registers, or at ``at`` where a tile leaves none."""
    if CHUNK == 0:
        return total + part
    else:
        unit = tl.arange(0, part.shape[1])
        so_far = tl.load(at + unit, mask=unit < H, other=0.0)
        tl.store(at + unit, so_far + tl.sum(part, 0), mask=unit < H)
        return total


@triton.jit(do_not_specialize=SIZES)
def recurrence_backward(
    PROJECTION, ATTENTION, W_HH, B_IH, B_HH, H0, ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, Y, DY, DH_N,
    GATES, STATES, D_ATTENTION, D_BIAS, DH0,
    batch, histories, steps, x_rows, y_rows, hidden,
    ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr, SCALE_INPUT: tl.constexpr,
    KEEP_SIDE: tl.constexpr, RESET_BEFORE: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
    H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, PRECISION: tl.constexpr,
    GATE_WIDTH: tl.constexpr, DGX: tl.constexpr, DGH_R: tl.constexpr, DGH_U: tl.constexpr, DGH_N: tl.constexpr,
):  # fmt: skip
    """Equations (10) to (17), (21), (22) and the biases' sums, one partial sum [4, H] for each program.

    A step's row of GATES has GATE_WIDTH values: the columns of dgx, times gamma, start at DGX, those of dgh at the
    other three (``triton_launch.Gates``). A row of STATES is what W_hh has read: h and, with the reset before, q.
    """
    DTYPE: tl.constexpr = W_HH.dtype.element_ty
    STATE_WIDTH: tl.constexpr = 2 * H if RESET_BEFORE else H
    # Here weights and tiles leave no registers for what can be read again.
    AGAIN: tl.constexpr = CHUNK != 0 or (DTYPE == tl.float32 and PADDED == 64)
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
    v_r, v_u, v_n = tl.trans(w_r), tl.trans(w_u), tl.trans(w_n)
    bias_r, bias_u, bias_n, bias_hn = biases(B_IH, B_HH, H, PADDED, ROWS)
    if DH_N is None:
        dh = tl.zeros((ROWS, PADDED), tl.float32)
    else:
        dh = tl.load(DH_N + state_at, mask=state_mask, other=0.0).to(tl.float32)
    if H0 is not None and CHUNK == 0:
        h0 = tl.load(H0 + state_at, mask=state_mask, other=0.0)
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
        later = valid & (length - length + t > 0)  # t > 0 alone would be no mask in the interpreter
        before_at = Y + (y - y_step) * H
        h = tl.load(before_at[:, None] + unit[None, :], mask=later[:, None] & inside, other=0.0).to(tl.float32)
        b_r, b_u, b_n, b_hn = bias_r, bias_u, bias_n, bias_hn
        if CHUNK != 0:
            b_r, b_u, b_n, b_hn = biases(B_IH, B_HH, H, PADDED, ROWS)
        if H0 is not None:
            if CHUNK == 0:
                h = tl.where(later[:, None], h, h0)
            else:
                h += tl.load(
                    (H0 + row * H)[:, None] + unit[None, :],
                    mask=(valid & (length - length + t == 0))[:, None] & inside,
                    other=0.0,
                )
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

        # The gates, once more, from the forward's operands. A barrier, as chunked products read what all threads wrote.
        h_at = STATES + y * STATE_WIDTH
        q_at = h_at + H
        operand = to(h, DTYPE)
        store_row(h_at, operand, mask)
        if CHUNK != 0:
            tl.debug_barrier()
        a_r = product(gx_r + b_r, operand, w_r, h_at, valid, W_HH, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        a_u = product(gx_u + b_u, operand, w_u, h_at, valid, W_U, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        r = sigmoid(a_r)
        u = sigmoid(-a_u if KEEP_SIDE else a_u)
        if RESET_BEFORE:
            q = to(r * h, DTYPE)
            store_row(q_at, q, mask)
            if CHUNK != 0:
                tl.debug_barrier()
            a_n = product(gx_n + (b_n + b_hn), q, w_n, q_at, valid, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = tanh(a_n, DTYPE)
        else:
            gh_n = product(b_hn, operand, w_n, h_at, valid, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = tanh(gx_n + b_n + r * gh_n, DTYPE)

        # Their gradients. A step that does not exist has none, whatever stands in its place.
        gates_at = GATES + y * GATE_WIDTH
        if DY is not None:
            dh += tl.load((DY + y * H)[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)  # (10)
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
        dh_past = dh * (1.0 - g)
        if not RESET_BEFORE:
            da_r = da_n * gh_n * r * (1.0 - r)  # (14a), (15)
            db_hn = _collect(db_hn, bias_at + 3 * H, da_n * r, H, CHUNK)
        dgh_u, dgh_n = to(da_u, DTYPE), to(da_n if RESET_BEFORE else da_n * r, DTYPE)
        store_row(gates_at + DGH_U, dgh_u, mask)
        store_row(gates_at + DGH_N, dgh_n, mask)
        if SCALE_INPUT:
            store_row(gates_at + (DGX + H), to(a[:, None] * da_u, DTYPE), mask)
            store_row(gates_at + (DGX + 2 * H), to(a[:, None] * da_n, DTYPE), mask)
        elif not RESET_BEFORE:
            store_row(gates_at + (DGX + 2 * H), to(da_n, DTYPE), mask)
        db_u = _collect(db_u, bias_at + 1 * H, da_u, H, CHUNK)
        db_n = _collect(db_n, bias_at + 2 * H, da_n, H, CHUNK)
        d_a = tl.zeros(dg.shape, tl.float32)
        if ALPHA1 != 0:
            d_a += ALPHA1 * dg
        if BETA1 != 0:
            d_a += BETA1 * u * dg  # (21)
        if SCALE_INPUT:
            if AGAIN:
                p_u = tl.load(x_at + H, mask=mask, other=0.0)
                p_n = tl.load(x_at + 2 * H, mask=mask, other=0.0)
            d_a += da_u * p_u + da_n * p_n  # (22)

        if RESET_BEFORE:
            if CHUNK != 0:
                tl.debug_barrier()
            zero = tl.zeros((ROWS, PADDED), tl.float32)
            dq = product(zero, dgh_n, v_n, gates_at + DGH_N, valid, W_N, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
            da_r = tl.where(mask, dq * h * r * (1.0 - r), 0.0)  # (14b), (15)
            dh_past += dq * r
        dgh_r = to(da_r, DTYPE)
        store_row(gates_at + DGH_R, dgh_r, mask)
        db_r = _collect(db_r, bias_at, da_r, H, CHUNK)
        if SCALE_INPUT:
            store_row(gates_at + DGX, to(a[:, None] * da_r, DTYPE), mask)
            if AGAIN:
                p_r = tl.load(x_at, mask=mask, other=0.0)
            d_a += da_r * p_r
        if ATTENTION is not None:
            tl.store(D_ATTENTION + a_at, tl.sum(d_a, 1), mask=valid)

        if CHUNK != 0:
            tl.debug_barrier()
        if not RESET_BEFORE:
            n_at = gates_at + DGH_N
            dh_past = product(dh_past, dgh_n, v_n, n_at, valid, W_N, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
        r_at, u_at = gates_at + DGH_R, gates_at + DGH_U
        dh_past = product(dh_past, dgh_r, v_r, r_at, valid, W_HH, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
        dh_past = product(dh_past, dgh_u, v_u, u_at, valid, W_U, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
        dh = tl.where(valid[:, None], dh_past, dh)  # (17)
        x -= x_step
        y -= y_step
        a_at -= a_step
    if CHUNK == 0:
        tl.store(DH0 + state_at, dh, mask=state_mask)
    else:
        row, live, length, x, y, a_at = rows(
            ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows,
            ROWS, REVERSE, TIME_MAJOR,
        )  # fmt: skip
        tl.store((DH0 + row * H)[:, None] + unit[None, :], dh, mask=live[:, None] & inside)
    if CHUNK == 0:
        tl.store(bias_at + unit, tl.sum(db_r, 0), mask=unit < H)
        tl.store(bias_at + H + unit, tl.sum(db_u, 0), mask=unit < H)
        tl.store(bias_at + 2 * H + unit, tl.sum(db_n, 0), mask=unit < H)
        tl.store(bias_at + 3 * H + unit, tl.sum(db_hn, 0), mask=unit < H)


@triton.jit(do_not_specialize=SIZES)
def sum_readers(
    DGX_ROWS, DGX, READERS, FIRST_READER, LENGTHS, OFFSETS, Y_START, batch, histories, steps, x_rows, y_rows,
    TIME_MAJOR: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, GATE_WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The rows' dgx summed for each step of a history, in row order: program (history, gate)."""
    history = tl.program_id(0).to(tl.int64)
    gate = tl.program_id(1) * H
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
    first, end = tl.load(FIRST_READER + history), tl.load(FIRST_READER + history + 1)
    for t0 in range(0, length, STEPS):
        t = t0 + tl.arange(0, STEPS).to(tl.int64)
        mask = (t < length)[:, None] & (unit < H)[None, :]
        total = tl.zeros((STEPS, PADDED), tl.float32)
        for reader in range(first, end):
            row = tl.load(READERS + reader)
            if OFFSETS is not None:
                y = tl.load(Y_START + row)
                exists = (y + t < y_rows)[:, None]
            elif TIME_MAJOR:
                y = row
                exists = mask
            else:
                y = row * steps
                exists = mask
            at = DGX_ROWS + (y + t * y_step)[:, None] * GATE_WIDTH + gate + unit[None, :]
            total += tl.load(at, mask=mask & exists, other=0.0).to(tl.float32)
        at = DGX + (x + t * x_step)[:, None] * (3 * H) + gate + unit[None, :]
        tl.store(at, to(total, DGX.dtype.element_ty), mask=mask)
