"""The recurrence's backward in Triton for weights that do not fit on chip: the loop takes BLOCK units at a time.

The products of the gates with W_hh are computed before (``triton_kernel_backward.operands``). A step then consists of
elementwise operations and of the products with the transpose of W_hh in (14b) and (17), which read W_hh from memory in
chunks of CHUNK rows. dh and the gates' gradients go through memory from block to block and from step to step, because
tiles of all units would not fit into registers. Equation numbers are those of docs/math.md.
"""

# mypy: ignore-errors
# The functions below are in Triton's language, whose compiler checks them.

from __future__ import annotations

import triton
import triton.language as tl

from dien_kernels.ops.recurrence.triton_kernel_backward import state_before, store_gradients, update_gradients
from dien_kernels.ops.triton_kernel import SIZES, add, dot, rows, sigmoid, steps_of, store_row, tanh, to


@triton.jit
def _bias(B, at, mask, like):
    """A part of a bias, repeated for every row of the tile ``like``; zeros if B is None."""
    if B is None:
        return tl.zeros(like.shape, tl.float32)
    else:
        return tl.zeros(like.shape, tl.float32) + tl.load(B + at, mask=mask, other=0.0)[None, :]


@triton.jit
def _product(
    start, at, live, W, unit, hidden, H: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``start`` plus the product of the rows at ``at`` and the columns ``unit`` of W, one gate's block of W_hh."""
    result = start
    for k0 in tl.range(0, hidden, CHUNK, num_stages=2):
        k = k0 + tl.arange(0, CHUNK)
        value = tl.load(at[:, None] + k[None, :], mask=live[:, None] & (k < H)[None, :], other=0.0)
        inside = (k < H)[:, None] & (unit < H)[None, :]
        result = dot(value, tl.load(W + k[:, None] * H + unit[None, :], mask=inside, other=0.0), result, PRECISION)
    return result


@triton.jit
def _sum_rows(x, mask):
    """Sum a tile over its rows, without fused multiply-adds.

    Several lanes hold a copy of the sum. If the multiplications that gave ``x`` were fused with the additions, each
    copy could leave a different term unrounded, and chance would decide which copy is stored. ``tl.where`` prevents it.
    """
    return tl.sum(tl.where(mask, x, 0.0), 0)


@triton.jit(do_not_specialize=SIZES)
def recurrence_backward_wide(
    PROJECTION, ATTENTION, W_HH, B_IH, B_HH, H0, ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, Y, DY, DH_N,
    PRODUCTS_RU, PRODUCTS_N, GATES, D_ATTENTION, D_BIAS, DH0,
    batch, histories, steps, x_rows, y_rows, hidden,
    ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr, SCALE_INPUT: tl.constexpr,
    KEEP_SIDE: tl.constexpr, RESET_BEFORE: tl.constexpr, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    GATE_WIDTH: tl.constexpr, DGX: tl.constexpr, DGH_R: tl.constexpr, DGH_U: tl.constexpr, DGH_N: tl.constexpr,
):  # fmt: skip
    """The same function as ``recurrence_backward``. DH0 holds dh between the steps, and D_BIAS must be zero before."""
    DTYPE: tl.constexpr = W_HH.dtype.element_ty
    RU_WIDTH: tl.constexpr = 2 * H if RESET_BEFORE else 3 * H
    N_WIDTH: tl.constexpr = H if RESET_BEFORE else 3 * H
    N_COLUMN: tl.constexpr = 0 if RESET_BEFORE else 2 * H
    row, live, length, x, y, a_at = rows(
        ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, ROWS, REVERSE, TIME_MAJOR
    )  # fmt: skip
    x_step, y_step, a_step = steps_of(batch, histories, REVERSE, TIME_MAJOR)
    bias_at = D_BIAS + tl.program_id(0).to(tl.int64) * (4 * H)
    for j in tl.range(0, hidden, BLOCK):
        unit = j + tl.arange(0, BLOCK)
        mask = live[:, None] & (unit < H)[None, :]
        dh = tl.zeros((ROWS, BLOCK), tl.float32)
        if DH_N is not None:
            dh += tl.load((DH_N + row * H)[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store((DH0 + row * H)[:, None] + unit[None, :], dh, mask=mask)
    longest = tl.max(length, 0)
    x += (longest - 1) * x_step
    y += (longest - 1) * y_step
    a_at += (longest - 1) * a_step
    for s in range(0, longest):
        t = longest - 1 - s
        valid = t < length
        a = None
        if ATTENTION is not None:
            a = tl.load(ATTENTION + a_at, mask=valid, other=0.0)
        d_a = tl.zeros((ROWS,), tl.float32)
        gates_at = GATES + y * GATE_WIDTH
        tl.debug_barrier()  # all threads have stored dh
        for j in tl.range(0, hidden, BLOCK, num_stages=1):
            unit = j + tl.arange(0, BLOCK)
            inside = unit < H
            mask = valid[:, None] & inside[None, :]
            h = state_before(Y, H0, row, y - y_step, t, length, unit, H)
            x_at = (PROJECTION + x * (3 * H))[:, None] + unit[None, :]
            p_r = tl.load(x_at, mask=mask, other=0.0)
            p_u = tl.load(x_at + H, mask=mask, other=0.0)
            p_n = tl.load(x_at + 2 * H, mask=mask, other=0.0)
            gx_r, gx_u, gx_n = p_r, p_u, p_n
            if SCALE_INPUT:
                gx_r, gx_u, gx_n = a[:, None] * p_r, a[:, None] * p_u, a[:, None] * p_n
            ru_at = (PRODUCTS_RU + y * RU_WIDTH)[:, None] + unit[None, :]
            b_r = _bias(B_IH, unit, inside, h) + _bias(B_HH, unit, inside, h)
            b_u = _bias(B_IH, H + unit, inside, h) + _bias(B_HH, H + unit, inside, h)
            r = sigmoid(gx_r + b_r + tl.load(ru_at, mask=mask, other=0.0))
            a_u = gx_u + b_u + tl.load(ru_at + H, mask=mask, other=0.0)
            u = sigmoid(-a_u if KEEP_SIDE else a_u)
            n_at = (PRODUCTS_N + (y * N_WIDTH + N_COLUMN))[:, None] + unit[None, :]
            gh_n = _bias(B_HH, 2 * H + unit, inside, h) + tl.load(n_at, mask=mask, other=0.0)
            gx_n += _bias(B_IH, 2 * H + unit, inside, h)
            n = tanh(gx_n + gh_n if RESET_BEFORE else gx_n + r * gh_n, DTYPE)

            dh_at = (DH0 + row * H)[:, None] + unit[None, :]
            dh = tl.load(dh_at, mask=mask, other=0.0)
            if DY is not None:
                dh += tl.load((DY + y * H)[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)  # (10)
            g, da_u, da_n, d_a_tile = update_gradients(dh, h, u, n, a, mask, ALPHA0, ALPHA1, BETA0, BETA1, KEEP_SIDE)
            tl.store(dh_at, dh * (1.0 - g), mask=mask)
            dgh_u, dgh_n = to(da_u, DTYPE), to(da_n if RESET_BEFORE else da_n * r, DTYPE)
            store_gradients(
                gates_at + j, dgh_u, dgh_n, da_u, da_n, a, mask, H, SCALE_INPUT, RESET_BEFORE, DGX, DGH_U, DGH_N
            )  # fmt: skip
            add(bias_at + H + unit, _sum_rows(da_u, mask), inside)
            add(bias_at + 2 * H + unit, _sum_rows(da_n, mask), inside)
            if SCALE_INPUT:
                d_a_tile += da_u * p_u + da_n * p_n  # (22)
            if not RESET_BEFORE:
                da_r = da_n * gh_n * r * (1.0 - r)  # (14a), (15)
                store_row(gates_at + (DGH_R + j), to(da_r, DTYPE), mask)
                add(bias_at + unit, _sum_rows(da_r, mask), inside)
                add(bias_at + 3 * H + unit, _sum_rows(da_n * r, mask), inside)
                if SCALE_INPUT:
                    store_row(gates_at + (DGX + j), to(a[:, None] * da_r, DTYPE), mask)
                    d_a_tile += da_r * p_r
            d_a += tl.sum(d_a_tile, 1)
        tl.debug_barrier()  # the products read what other threads have written
        if RESET_BEFORE:
            for j in tl.range(0, hidden, BLOCK, num_stages=1):
                unit = j + tl.arange(0, BLOCK)
                inside = unit < H
                mask = valid[:, None] & inside[None, :]
                zero = tl.zeros((ROWS, BLOCK), tl.float32)
                dq = _product(zero, gates_at + DGH_N, valid, W_HH + 2 * H * H, unit, hidden, H, CHUNK, PRECISION)
                h = state_before(Y, H0, row, y - y_step, t, length, unit, H)
                p_r = tl.load((PROJECTION + x * (3 * H))[:, None] + unit[None, :], mask=mask, other=0.0)
                made_r = tl.load((PRODUCTS_RU + y * RU_WIDTH)[:, None] + unit[None, :], mask=mask, other=0.0)
                b_r = _bias(B_IH, unit, inside, h) + _bias(B_HH, unit, inside, h)
                r = sigmoid((a[:, None] * p_r if SCALE_INPUT else p_r) + b_r + made_r)
                da_r = tl.where(mask, dq * h * r * (1.0 - r), 0.0)  # (14b), (15)
                dh_at = (DH0 + row * H)[:, None] + unit[None, :]
                tl.store(dh_at, tl.load(dh_at, mask=mask, other=0.0) + dq * r, mask=mask)
                store_row(gates_at + (DGH_R + j), to(da_r, DTYPE), mask)
                add(bias_at + unit, _sum_rows(da_r, mask), inside)
                if SCALE_INPUT:
                    store_row(gates_at + (DGX + j), to(a[:, None] * da_r, DTYPE), mask)
                    d_a += tl.sum(da_r * p_r, 1)
            tl.debug_barrier()
        if ATTENTION is not None:
            tl.store(D_ATTENTION + a_at, d_a, mask=valid)
        for j in tl.range(0, hidden, BLOCK, num_stages=1):
            unit = j + tl.arange(0, BLOCK)
            mask = valid[:, None] & (unit < H)[None, :]
            dh_at = (DH0 + row * H)[:, None] + unit[None, :]
            dh = tl.load(dh_at, mask=mask, other=0.0)
            if not RESET_BEFORE:
                dh = _product(dh, gates_at + DGH_N, valid, W_HH + 2 * H * H, unit, hidden, H, CHUNK, PRECISION)
            dh = _product(dh, gates_at + DGH_R, valid, W_HH, unit, hidden, H, CHUNK, PRECISION)
            dh = _product(dh, gates_at + DGH_U, valid, W_HH + H * H, unit, hidden, H, CHUNK, PRECISION)
            tl.store(dh_at, dh, mask=mask)  # (17)
        x -= x_step
        y -= y_step
        a_at -= a_step
