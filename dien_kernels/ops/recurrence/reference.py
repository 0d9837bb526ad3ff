"""The definition of the recurrence: docs/math.md, whose equation numbers stand beside the lines, in plain torch.

GRU, AIGRU, AGRU and the AUGRUs are one step whose coefficients ``forms.py`` names. Every backend is checked
against this file, and autograd differentiates it.
"""

from __future__ import annotations

import torch
from torch import Tensor, sigmoid, tanh
from torch.nn.functional import embedding, linear

from dien_kernels.histories import Histories
from dien_kernels.ops._layout import rows_of
from dien_kernels.ops.recurrence.forms import Options


def step(
    x: Tensor, h: Tensor, a: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, options: Options
) -> Tensor:
    """The states h' [B, H] after one step of B rows with inputs x [B, I], states h [B, H] and attention a [B, 1]."""
    hidden = h.shape[1]
    (w_ru, w_n), (b_ru, b_n) = w_hh.split((2 * hidden, hidden)), b_hh.split((2 * hidden, hidden))
    alpha, beta = options.alpha0 + options.alpha1 * a, options.beta0 + options.beta1 * a
    gamma = a if options.scale_input else 1.0  # (9)
    gx_r, gx_u, gx_n = (gamma * linear(x, w_ih) + b_ih).chunk(3, 1)  # (1)
    gh_r, gh_u = linear(h, w_ru, b_ru).chunk(2, 1)  # (2)
    r = sigmoid(gx_r + gh_r)  # (3)
    u = sigmoid((-1.0 if options.keep_side else 1.0) * (gx_u + gh_u))  # (4)
    gated = linear(r * h, w_n, b_n) if options.reset_before else r * linear(h, w_n, b_n)
    n = tanh(gx_n + gated)  # (5), or (6) with the reset before the product
    g = alpha + beta * u  # (7)
    return (1 - g) * h + g * n  # (8)


def recurrence(
    x: Tensor,
    attention: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    h0: Tensor,
    histories: Histories,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The state after each step of each row, zeros past a row's length, and the state after each row's last step.

    x is [U, T, I], time-major [T, U, I] or jagged [N, I]; attention [B, T] or one number for each step of each row; the
    weights are [3 H, I], [3 H, H], [3 H] and [3 H] with rows [r | u | n]; h0 is [B, H]. y has the layout of x with B
    rows of H features, h_n is [B, H]. All have one dtype. What lies past a row's length is selected away, so that NaN
    there reaches no result and no gradient.
    """
    rows = rows_of(x, histories, attention, time_major=options.time_major, reverse=options.reverse)
    t = torch.arange(rows.steps, device=x.device).unsqueeze(1)
    real = t < rows.length  # [T, B]: the steps that exist
    in_x = torch.where(real, rows.x_start + t * rows.x_stride, 0)
    in_y = torch.where(real, rows.y_start + t * rows.y_stride, 0)
    by_step = (attention.t() if options.time_major else attention).reshape(-1, 1)
    xs = torch.where(real.unsqueeze(2), embedding(in_x, x.reshape(-1, x.shape[-1])), 0)  # [T, B, I]
    scores = torch.where(real.unsqueeze(2), embedding(in_y, by_step), 0)  # [T, B, 1]
    states = [h0]
    for x_t, a_t, real_t in zip(xs, scores, real.unsqueeze(2), strict=True):
        h = torch.where(real_t, states[-1], 0)
        states.append(torch.where(real_t, step(x_t, h, a_t, w_ih, w_hh, b_ih, b_hh, options), states[-1]))
    y = h0.new_zeros(rows.y_rows, h0.shape[1]).index_put((in_y[real],), torch.stack(states)[1:][real])
    if not histories.jagged:
        batch, hidden = h0.shape
        y = y.view(rows.steps, batch, hidden) if options.time_major else y.view(batch, rows.steps, hidden)
    return y, states[-1]
