"""A GRU or AUGRU in plain torch, as well as a loop over time can be written.

One product for the whole input, ``unbind`` instead of indexing (whose gradient would be a full-size tensor a
step), one sigmoid for two gates, ``addcmul`` and ``lerp``. Ragged rows are computed to the end, without
a mask: padding comes last, so valid steps never see it, and results are compared there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.compiled import compiled
from benchmarks.inputs import Inputs, Program
from benchmarks.registry import COMPUTES_PADDING, Case


def absent() -> str | None:
    return None


def step(gx: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor, scores: Tensor | None, widths: list[int]) -> Tensor:
    x_ru, x_n = torch.split(gx, widths, 1)
    h_ru, h_n = torch.split(linear(h, w_hh, b_hh), widths, 1)
    r, u = torch.sigmoid(x_ru + h_ru).chunk(2, 1)
    n = torch.tanh(torch.addcmul(x_n, r, h_n))
    return torch.lerp(n, h, u) if scores is None else torch.lerp(h, n, scores * u)


def chunk(
    gx: Sequence[Tensor],
    h: Tensor,
    w_hh: Tensor,
    b_hh: Tensor,
    scores: Sequence[Tensor] | None,
    widths: list[int],
) -> list[Tensor]:
    """The states after some steps in a row, from ``h`` on."""
    states = []
    for t, gates in enumerate(gx):
        h = step(gates, h, w_hh, b_hh, None if scores is None else scores[t], widths)
        states.append(h)
    return states


def build(case: Case, inputs: Inputs, together: int = 0) -> Program:
    """So many steps ``together`` are compiled, if any; all of them as one graph would take minutes to compile."""
    leaves, hidden = inputs.leaves, case.hidden
    run = compiled(chunk) if together else chunk
    x, w_ih, w_hh, b_ih, b_hh = (leaves[name] for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh"))
    attention = leaves.get("attention")
    widths, many = [2 * hidden, hidden], together or case.steps

    def forward() -> Tensor:
        steps = linear(x, w_ih, b_ih).unbind(1)
        scores = None if attention is None else attention.unsqueeze(2).unbind(1)
        h, states = x.new_zeros(x.shape[0], hidden), []
        for start in range(0, len(steps), many):
            now = slice(start, start + many)
            states += run(steps[now], h, w_hh, b_hh, None if scores is None else scores[now], widths)
            h = states[-1]
        return torch.stack(states, 1)

    return Program(forward, leaves, "" if inputs.lengths is None else COMPUTES_PADDING)
