"""Triton kernels of the recurrence: the whole time loop in one launch, rows dealt to programs, the state in registers.

Equation numbers are those of docs/math.md. A program owns ROWS rows, longest first, and takes as many steps as the longest of
them. It reads W_ih x, which torch has multiplied for all steps at once, and leaves W_ih, W_hh and x their gradients as
products of whole matrices too: of ``GATES``, the gates' gradients, and of ``STATES``, what W_hh has read.

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
_SIZES = ["batch", "histories", "steps", "x_rows", "y_rows", "hidden"]


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
def _sigmoid(x):
    return _logistic2(x * _LOG2_E)


@triton.jit
def _tanh(x, DTYPE: tl.constexpr):
    far = 2.0 * _logistic2(x * (2 * _LOG2_E)) - 1.0
    if tl.float32 == DTYPE:  # near 0 the subtraction leaves few of its digits: a least-squares fit, good to 4e-8
        s = x * x
        p = ((0.01643201 * s - 0.05266803) * s + 0.13320643) * s - 0.33332941
        return tl.where(s < 0.3, x * s * p + x, far)
    else:
        return far


@triton.jit
def _to(x, DTYPE: tl.constexpr):
    """Round to the nearest, which the interpreter does not do for bfloat16."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def _dot(a, b, start, PRECISION: tl.constexpr):
    if _INTERPRETED:  # which multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), start, input_precision="ieee")
    else:
        return tl.dot(a, b, start, input_precision=PRECISION)


@triton.jit
def _weights(W, H: tl.constexpr, PADDED: tl.constexpr):
    """One gate's block of W_hh as the right factor [k, unit]; zeros from H on. The compiler drops one that is not used."""
    k, unit = tl.arange(0, PADDED), tl.arange(0, PADDED)
    inside = (k < H)[:, None] & (unit < H)[None, :]
    return tl.load(W + k[:, None] + unit[None, :] * H, mask=inside, other=0.0)


@triton.jit
def _product(
    start, value, w, at, live, W, k_step, unit_step, hidden,
    H: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``start + value @ w``, both on chip; or, in chunks, of the rows at ``at`` and one gate's block of W_hh."""
    if CHUNK == 0:
        return _dot(value, w, start, PRECISION)
    else:
        unit = tl.arange(0, PADDED)
        result = start
        for k0 in tl.range(0, hidden, CHUNK, num_stages=2):
            k = k0 + tl.arange(0, CHUNK)
            v = tl.load(at[:, None] + k[None, :], mask=live[:, None] & (k < H)[None, :], other=0.0)
            inside = (k < H)[:, None] & (unit < H)[None, :]
            block = tl.load(W + k[:, None] * k_step + unit[None, :] * unit_step, mask=inside, other=0.0)
            result = _dot(v, block, result, PRECISION)
        return result


@triton.jit
def _store_row(at, value, mask):
    tl.store(at[:, None] + tl.arange(0, value.shape[1])[None, :], value, mask=mask)


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


@triton.jit
def _bias(B, gate: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """One gate's bias, the same in every row of a tile."""
    tile = tl.zeros((ROWS, PADDED), tl.float32)
    if B is None:
        return tile
    else:
        unit = tl.arange(0, PADDED)
        return tile + tl.load(B + gate * H + unit, mask=unit < H, other=0.0)[None, :]


@triton.jit
def _biases(B_IH, B_HH, H: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Of r and u both biases together; of n the input's and the state's."""
    b_r = _bias(B_IH, 0, H, PADDED, ROWS) + _bias(B_HH, 0, H, PADDED, ROWS)
    b_u = _bias(B_IH, 1, H, PADDED, ROWS) + _bias(B_HH, 1, H, PADDED, ROWS)
    return b_r, b_u, _bias(B_IH, 2, H, PADDED, ROWS), _bias(B_HH, 2, H, PADDED, ROWS)


@triton.jit
def _rows(
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
def _steps_of(batch, histories, REVERSE: tl.constexpr, TIME_MAJOR: tl.constexpr):
    """From one step of a row to the next, in flat rows of x, of y and of attention."""
    sign: tl.constexpr = -1 if REVERSE else 1
    if TIME_MAJOR:
        return sign * tl.cast(histories, tl.int64), sign * tl.cast(batch, tl.int64), sign
    else:
        return sign, sign, sign


@triton.jit
def _gate_move(u, a, ALPHA0: tl.constexpr, ALPHA1: tl.constexpr, BETA0: tl.constexpr, BETA1: tl.constexpr):
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


@triton.jit(do_not_specialize=_SIZES)
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
    row, live, length, x, y, a_at = _rows(
        ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, ROWS, REVERSE, TIME_MAJOR
    )  # fmt: skip
    x_step, y_step, a_step = _steps_of(batch, histories, REVERSE, TIME_MAJOR)
    unit = tl.arange(0, PADDED)
    inside = (unit < H)[None, :]
    state_mask = live[:, None] & inside
    state_at = row[:, None] * H + unit[None, :]
    W_U, W_N = W_HH + H * H, W_HH + 2 * H * H
    w_r = _weights(W_HH, H, PADDED)
    w_u = _weights(W_U, H, PADDED)
    w_n = _weights(W_N, H, PADDED)
    b_r, b_u, b_n, b_hn = _biases(B_IH, B_HH, H, PADDED, ROWS)
    h_at, q_at = row, row
    if CHUNK != 0:
        h_at = SCRATCH + row * (2 * H)
        q_at = h_at + H
    if H0 is None:
        h = tl.zeros((ROWS, PADDED), tl.float32)
    else:
        h = tl.load(H0 + state_at, mask=state_mask, other=0.0)
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
        operand = _to(h, DTYPE)
        if CHUNK != 0:
            tl.debug_barrier()  # all have read what stood here in the last step
            _store_row(h_at, operand, state_mask)
            tl.debug_barrier()
        a_r = _product(gx_r + b_r, operand, w_r, h_at, live, W_HH, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        a_u = _product(gx_u + b_u, operand, w_u, h_at, live, W_U, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        r = _sigmoid(a_r)  # (3)
        u = _sigmoid(-a_u if KEEP_SIDE else a_u)  # (4)
        if RESET_BEFORE:
            q = _to(r * h, DTYPE)
            if CHUNK != 0:
                _store_row(q_at, q, state_mask)
                tl.debug_barrier()
            a_n = _product(gx_n + (b_n + b_hn), q, w_n, q_at, live, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = _tanh(a_n, DTYPE)  # (6)
        else:
            gh_n = _product(b_hn, operand, w_n, h_at, live, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = _tanh(gx_n + b_n + r * gh_n, DTYPE)  # (5)
        g = _gate_move(u, a, ALPHA0, ALPHA1, BETA0, BETA1)
        h = tl.where(valid[:, None], h + g * (n - h), h)  # (8)
        tl.store(y_at, _to(h, DTYPE), mask=mask)
        x_at += x_step * (3 * H)
        y_at += y_step * H
        a_at += a_step
    tl.store(H_N + state_at, _to(h, DTYPE), mask=state_mask)


@triton.jit(do_not_specialize=_SIZES)
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

    A step's row of GATES has GATE_WIDTH values: the columns of dgx, times gamma, start at DGX; those of dgh at the other
    three (``triton_launch.Gates``). A row of STATES is h and, with the reset before the product, q.
    """
    DTYPE: tl.constexpr = W_HH.dtype.element_ty
    STATE_WIDTH: tl.constexpr = 2 * H if RESET_BEFORE else H
    row, live, length, x, y, a_at = _rows(
        ORDER, LENGTHS, OFFSETS, HISTORY, Y_START, batch, histories, steps, x_rows, y_rows, ROWS, REVERSE, TIME_MAJOR
    )  # fmt: skip
    x_step, y_step, a_step = _steps_of(batch, histories, REVERSE, TIME_MAJOR)
    unit = tl.arange(0, PADDED)
    inside = (unit < H)[None, :]
    state_mask = live[:, None] & inside
    state_at = row[:, None] * H + unit[None, :]
    W_U, W_N = W_HH + H * H, W_HH + 2 * H * H
    w_r = _weights(W_HH, H, PADDED)
    w_u = _weights(W_U, H, PADDED)
    w_n = _weights(W_N, H, PADDED)
    v_r, v_u, v_n = tl.trans(w_r), tl.trans(w_u), tl.trans(w_n)
    bias_r, bias_u, bias_n, bias_hn = _biases(B_IH, B_HH, H, PADDED, ROWS)
    if DH_N is None:
        dh = tl.zeros((ROWS, PADDED), tl.float32)
    else:
        dh = tl.load(DH_N + state_at, mask=state_mask, other=0.0).to(tl.float32)
    if H0 is not None and CHUNK == 0:
        h0 = tl.load(H0 + state_at, mask=state_mask, other=0.0)
    bias_at = D_BIAS + tl.program_id(0) * (4 * H)
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
        if CHUNK != 0:  # tiles so large leave no registers for what can be read again
            b_r, b_u, b_n, b_hn = _biases(B_IH, B_HH, H, PADDED, ROWS)
        if H0 is not None:
            if CHUNK == 0:
                h = tl.where(later[:, None], h, h0)
            else:
                h += tl.load(H0 + state_at, mask=(valid & (length - length + t == 0))[:, None] & inside, other=0.0)
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
        if DY is not None:
            dh += tl.load((DY + y * H)[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)  # (10)

        # The gates, once more, from the same operands as in the forward. A barrier: chunked products read what all wrote.
        h_at = STATES + y * STATE_WIDTH
        q_at = h_at + H
        operand = _to(h, DTYPE)
        _store_row(h_at, operand, mask)
        if CHUNK != 0:
            tl.debug_barrier()
        a_r = _product(gx_r + b_r, operand, w_r, h_at, valid, W_HH, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        a_u = _product(gx_u + b_u, operand, w_u, h_at, valid, W_U, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
        r = _sigmoid(a_r)
        u = _sigmoid(-a_u if KEEP_SIDE else a_u)
        if RESET_BEFORE:
            q = _to(r * h, DTYPE)
            _store_row(q_at, q, mask)
            if CHUNK != 0:
                tl.debug_barrier()
            a_n = _product(gx_n + (b_n + b_hn), q, w_n, q_at, valid, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = _tanh(a_n, DTYPE)
        else:
            gh_n = _product(b_hn, operand, w_n, h_at, valid, W_N, 1, H, hidden, H, PADDED, CHUNK, PRECISION)
            n = _tanh(gx_n + b_n + r * gh_n, DTYPE)

        # Their gradients. A step that does not exist has none, whatever stands in its place.
        gates_at = GATES + y * GATE_WIDTH
        g = _gate_move(u, a, ALPHA0, ALPHA1, BETA0, BETA1)
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
        if RESET_BEFORE:
            dgh_n = _to(da_n, DTYPE)
            _store_row(gates_at + DGH_N, dgh_n, mask)
            if CHUNK != 0:
                tl.debug_barrier()
            zero = tl.zeros((ROWS, PADDED), tl.float32)
            dq = _product(zero, dgh_n, v_n, gates_at + DGH_N, valid, W_N, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
            da_r = tl.where(mask, dq * h * r * (1.0 - r), 0.0)  # (14b), (15)
            dh_past += dq * r
        else:
            da_r = da_n * gh_n * r * (1.0 - r)  # (14a), (15)
            dgh_n = _to(da_n * r, DTYPE)
            _store_row(gates_at + DGH_N, dgh_n, mask)
            db_hn = _collect(db_hn, bias_at + 3 * H, da_n * r, H, CHUNK)
        dgh_r, dgh_u = _to(da_r, DTYPE), _to(da_u, DTYPE)
        _store_row(gates_at + DGH_R, dgh_r, mask)
        _store_row(gates_at + DGH_U, dgh_u, mask)
        if SCALE_INPUT:
            _store_row(gates_at + DGX, _to(a[:, None] * da_r, DTYPE), mask)
            _store_row(gates_at + (DGX + H), _to(a[:, None] * da_u, DTYPE), mask)
            _store_row(gates_at + (DGX + 2 * H), _to(a[:, None] * da_n, DTYPE), mask)
        elif not RESET_BEFORE:
            _store_row(gates_at + (DGX + 2 * H), _to(da_n, DTYPE), mask)
        db_r = _collect(db_r, bias_at + 0 * H, da_r, H, CHUNK)
        db_u = _collect(db_u, bias_at + 1 * H, da_u, H, CHUNK)
        db_n = _collect(db_n, bias_at + 2 * H, da_n, H, CHUNK)
        if ATTENTION is not None:
            d_a = tl.zeros(dg.shape, tl.float32)
            if ALPHA1 != 0:
                d_a += ALPHA1 * dg
            if BETA1 != 0:
                d_a += BETA1 * u * dg  # (21)
            if SCALE_INPUT:
                d_a += da_r * p_r + da_u * p_u + da_n * p_n  # (22)
            tl.store(D_ATTENTION + a_at, tl.sum(d_a, 1), mask=valid)

        if CHUNK != 0:
            tl.debug_barrier()
        if not RESET_BEFORE:
            n_at = gates_at + DGH_N
            dh_past = _product(dh_past, dgh_n, v_n, n_at, valid, W_N, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
        r_at, u_at = gates_at + DGH_R, gates_at + DGH_U
        dh_past = _product(dh_past, dgh_r, v_r, r_at, valid, W_HH, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
        dh_past = _product(dh_past, dgh_u, v_u, u_at, valid, W_U, H, 1, hidden, H, PADDED, CHUNK, PRECISION)
        dh = tl.where(valid[:, None], dh_past, dh)  # (17)
        x -= x_step
        y -= y_step
        a_at -= a_step
    tl.store(DH0 + state_at, dh, mask=state_mask)
    if CHUNK == 0:
        tl.store(bias_at + unit, tl.sum(db_r, 0), mask=unit < H)
        tl.store(bias_at + H + unit, tl.sum(db_u, 0), mask=unit < H)
        tl.store(bias_at + 2 * H + unit, tl.sum(db_n, 0), mask=unit < H)
        tl.store(bias_at + 3 * H + unit, tl.sum(db_hn, 0), mask=unit < H)


@triton.jit(do_not_specialize=_SIZES)
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
    x_step, y_step, _ = _steps_of(batch, histories, False, TIME_MAJOR)
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
        tl.store(at, _to(total, DGX.dtype.element_ty), mask=mask)
