"""The backend ``torch``: the recurrence and its derivative by hand, in plain torch, for every device and dtype.

It runs where no kernel does. Equation numbers are those of docs/math.md.

One step of every member of the family, with scalars (alpha, beta, gamma) per row and step:

    gx = gamma * (W_ih x) + b_ih                                                (1)
    gh = W_hh h + b_hh                                                          (2)
    r  = sigmoid(gx_r + gh_r)                                                   (3)
    u  = sigmoid(s * (gx_u + gh_u)),  s = -1 if the update gate is stored on the keep side, else 1   (4)
    n  = tanh(gx_n + r * gh_n)                  reset after the product         (5)
    n  = tanh(gx_n + W_hn (r * h) + b_hn)       reset before the product        (6)
    g  = alpha + beta * u                                                       (7)
    h' = (1 - g) * h + g * n                                                    (8)

The scalars are affine in the attention a of the row and step (9): see ``forms.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dien_kernels.histories import Histories
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._layout import Rows, rows_of
from dien_kernels.ops.recurrence.contract import Forward, Gradients, Inputs
from dien_kernels.ops.recurrence.forms import Options, check_index_values


class Step(NamedTuple):
    """Everything one step computes, kept for its derivative."""

    proj: Tensor  # W_ih x
    r: Tensor
    u: Tensor
    n: Tensor
    gh_n: Tensor  # W_hn h + b_hn, or r * h where the reset comes before the product
    g: Tensor
    alpha_beta_gamma: tuple[Tensor, Tensor, Tensor]


def refuses(call: Call) -> str | None:
    return None


def step(
    x: Tensor, h: Tensor, a: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, options: Options
) -> tuple[Tensor, Step]:
    """Equations (1) to (9) for rows x [B,I], h [B,H], a [B,1]."""
    hidden = h.shape[1]
    alpha = options.alpha0 + options.alpha1 * a
    beta = options.beta0 + options.beta1 * a
    gamma = a if options.scale_input else torch.ones_like(a)
    proj = linear(x, w_ih)
    gx_r, gx_u, gx_n = (gamma * proj + b_ih).split(hidden, 1)
    gh_r, gh_u = linear(h, w_hh[: 2 * hidden], b_hh[: 2 * hidden]).split(hidden, 1)
    w_hn, b_hn = w_hh[2 * hidden :], b_hh[2 * hidden :]
    r = torch.sigmoid(gx_r + gh_r)
    u = torch.sigmoid(-(gx_u + gh_u) if options.keep_side else gx_u + gh_u)
    if options.reset_before:
        gh_n = r * h
        n = torch.tanh(gx_n + linear(gh_n, w_hn, b_hn))
    else:
        gh_n = linear(h, w_hn, b_hn)
        n = torch.tanh(gx_n + r * gh_n)
    g = alpha + beta * u
    return (1 - g) * h + g * n, Step(proj, r, u, n, gh_n, g, (alpha, beta, gamma))


def _take(flat: Tensor, start: Tensor, stride: int, t: int, valid: Tensor) -> Tensor:
    """Rows of ``flat`` at step t; zeros where the step lies past a row's length (NaN there must not pass)."""
    index = torch.where(valid, start + t * stride, 0)
    return torch.where(valid.unsqueeze(1), flat[index], 0)


def forward(inputs: Inputs, histories: Histories, options: Options) -> tuple[Tensor, Tensor]:
    """The loop: y (zeros past each length) and h_n, in the dtype of x. Differentiable by autograd."""
    x = inputs.x
    rows = rows_of(x, histories, inputs.attention, time_major=options.time_major, reverse=options.reverse)
    y, h, _ = _run(inputs, rows, options)
    return _shape_y(y, x, histories, rows, options), h


def _shape_y(y: Tensor, x: Tensor, histories: Histories, rows: Rows, options: Options) -> Tensor:
    if histories.jagged:
        return y
    b = rows.length.shape[0]
    hidden = y.shape[1]
    return y.view(x.shape[0], b, hidden) if options.time_major else y.view(b, x.shape[1], hidden)


def _flat_a(attention: Tensor | None, rows: Rows, x: Tensor, options: Options) -> Tensor:
    if attention is None:
        return x.new_zeros(1, 1).expand(max(rows.y_rows, 1), 1)
    return (attention.t() if options.time_major else attention).reshape(-1, 1)


def _run(
    inputs: Inputs, rows: Rows, options: Options
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor, Step]]]:
    x, attention, w_ih, w_hh, b_ih, b_hh, h0 = inputs
    batch, hidden = rows.length.shape[0], w_hh.shape[1]
    b_ih = x.new_zeros(3 * hidden) if b_ih is None else b_ih
    b_hh = x.new_zeros(3 * hidden) if b_hh is None else b_hh
    h = x.new_zeros(batch, hidden) if h0 is None else h0
    x_flat, a_flat = x.reshape(-1, x.shape[-1]), _flat_a(attention, rows, x, options)
    y = x.new_zeros(rows.y_rows, hidden)
    tape = []
    for t in range(rows.steps):
        valid = t < rows.length
        x_t = _take(x_flat, rows.x_start, rows.x_stride, t, valid)
        a_t = _take(a_flat, rows.y_start, rows.y_stride, t, valid)
        alive = valid.unsqueeze(1)
        h_t = torch.where(alive, h, 0)  # NaN in a state that no step reads must not reach sums over rows
        h_new, kept = step(x_t, h_t, a_t, w_ih, w_hh, b_ih, b_hh, options)
        y[(rows.y_start + t * rows.y_stride)[valid]] = h_new[valid]
        tape.append((valid, x_t, a_t, h_t, kept))
        h = torch.where(alive, h_new, h)
    return y, h, tape


def backward(
    dy: Tensor | None, dh_n: Tensor | None, inputs: Inputs, histories: Histories, options: Options
) -> Gradients:
    """Equations (10) to (22) of docs/math.md: the derivative of the loop, last step first."""
    x, attention, w_ih, w_hh, *_ = inputs
    hidden = w_hh.shape[1]
    rows = rows_of(x, histories, attention, time_major=options.time_major, reverse=options.reverse)
    _, h_n, tape = _run(inputs, rows, options)
    dh = torch.zeros_like(h_n) if dh_n is None else dh_n.clone()
    dy_flat = None if dy is None else dy.reshape(-1, hidden)
    w_ru, w_n = w_hh[: 2 * hidden], w_hh[2 * hidden :]
    dx = x.new_zeros(x.shape).reshape(-1, x.shape[-1])
    da = x.new_zeros(rows.y_rows, 1)
    dw_ih, dw_hh = torch.zeros_like(w_ih), torch.zeros_like(w_hh)
    db_ih, db_hh = x.new_zeros(3 * hidden), x.new_zeros(3 * hidden)
    for t in range(rows.steps - 1, -1, -1):
        valid, x_t, a_t, h, (proj, r, u, n, gh_n, g, (_, beta, gamma)) = tape[t]
        alive = valid.unsqueeze(1)
        if dy_flat is not None:
            dh = dh + _take(dy_flat, rows.y_start, rows.y_stride, t, valid)  # (10)
        dh_valid = torch.where(alive, dh, 0)
        dg = dh_valid * (n - h)  # (11)
        dan = dh_valid * g * (1 - n * n)  # (12)
        dau = beta * dg * u * (1 - u) * (-1 if options.keep_side else 1)  # (13)
        dh_prev = dh_valid * (1 - g)
        if options.reset_before:
            dq = dan @ w_n  # (14b), q = r * h stands in gh_n
            dr, dghn, n_input = dq * h, dan, gh_n
            dh_prev = dh_prev + dq * r
        else:
            dr, dghn, n_input = dan * gh_n, dan * r, h  # (14a)
            dh_prev = dh_prev + dghn @ w_n
        dar = dr * r * (1 - r)  # (15)
        dru = torch.cat((dar, dau), 1)
        dgx = torch.cat((dru, dan), 1)  # (16)
        dh_prev = dh_prev + dru @ w_ru  # (17)
        dw_hh += torch.cat((dru.t() @ h, dghn.t() @ n_input))  # (18)
        db_hh += torch.cat((dru, dghn), 1).sum(0)
        dw_ih += (gamma * dgx).t() @ x_t  # (19)
        db_ih += dgx.sum(0)
        dx.index_add_(0, (rows.x_start + t * rows.x_stride)[valid], ((gamma * dgx) @ w_ih)[valid])  # (20)
        da_t = options.alpha1 * dg.sum(1, True) + options.beta1 * (u * dg).sum(1, True)  # (21)
        if options.scale_input:
            da_t = da_t + (dgx * proj).sum(1, True)  # (22)
        da.index_add_(0, (rows.y_start + t * rows.y_stride)[valid], da_t[valid])
        dh = torch.where(alive, dh_prev, dh)
    if attention is None:
        d_attention = x.new_empty(0)  # a raw op returns tensors only
    elif options.time_major:
        d_attention = da.view(attention.shape[1], attention.shape[0]).t().contiguous()
    else:
        d_attention = da.view(attention.shape)
    return Gradients(dx.view(x.shape), d_attention, dw_ih, dw_hh, db_ih, db_hh, dh)


# The backend: the same two functions in the compute dtype.


def _upcast(inputs: Inputs) -> Inputs:
    """x and the weights of 16 bits in float32."""
    return inputs._replace(x=_wide(inputs.x), w_ih=_wide(inputs.w_ih), w_hh=_wide(inputs.w_hh))


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def fwd(inputs: Inputs, histories: Histories, options: Options) -> Forward:
    check_index_values(inputs.x, inputs.attention, histories, time_major=options.time_major)
    y, h_n = forward(_upcast(inputs), histories, options)
    h_n = h_n.clone() if h_n is inputs.h0 else h_n  # an op must not return its input
    dtype = inputs.x.dtype
    return Forward(y.to(dtype), h_n.to(dtype), y.new_empty(0))


def bwd(dy, dh_n, inputs, histories, y, kept, need_dx, options):  # type: ignore[no-untyped-def]
    dy, dh_n = (None if d is None else _wide(d) for d in (dy, dh_n))
    found = backward(dy, dh_n, _upcast(inputs), histories, options)
    x, w_ih, w_hh = inputs.x, inputs.w_ih, inputs.w_hh
    return found._replace(
        x=found.x.to(x.dtype) if need_dx else x.new_empty(0),
        attention=x.new_empty(0) if inputs.attention is None else found.attention,
        w_ih=found.w_ih.to(w_ih.dtype),
        w_hh=found.w_hh.to(w_hh.dtype),
    )
