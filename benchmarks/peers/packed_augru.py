"""What the peers that loop over a packed sequence share: x and attention are packed in the call, as their models do.

The result stays packed, as theirs does between two of their layers; that is less than our padded one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.peers.torch_gru_packed import lengths_of, unpacked
from benchmarks.registry import Case

# The order of a cell's parameters, and of ours.
NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")


def build(
    case: Case,
    inputs: Inputs,
    loop: Callable[[PackedSequence, PackedSequence], PackedSequence],
    parameters: Mapping[str, Tensor],
    note: str,
    order: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Program:
    """``loop`` is the peer's; ``parameters`` its own under ``NAMES``; ``order`` swaps our gates with its, and back."""
    leaves = {name: inputs.leaves[name].detach().clone().requires_grad_() for name in ("x", "attention")}
    with torch.no_grad():
        for name in NAMES:
            parameters[name].copy_(order(inputs.leaves[name]))
    leaves |= parameters
    lengths = lengths_of(case, inputs)

    def packed(padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)

    def as_inputs(found: Tensors) -> Tensors:
        return {name: order(g) if name in NAMES else g for name, g in found.items()}

    dresult: Any = packed(inputs.dresult)
    return Program(
        lambda: loop(packed(leaves["x"]), packed(leaves["attention"])).data,
        leaves,
        f"{note}; packs; the result stays packed",
        dresult.data,
        lambda data: unpacked(dresult._replace(data=data), case.steps),
        as_inputs,
    )
