"""``torch.nn.GRU`` on a packed sequence made from the padded batch; the result stays packed.

Packing is inside the measurement, as a user's batch is padded. Unpacking is not: whoever can go on with
packed states does not pay for it (``torch_gru_packed_unpacked`` does). Full batches are packed as sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.inputs import Inputs, Program
from benchmarks.peers.torch_gru_padded import layer_of
from benchmarks.registry import Case


def absent() -> str | None:
    return None


def lengths_of(case: Case, inputs: Inputs) -> Tensor:
    """On the CPU, where packing wants them."""
    return torch.full((case.batch,), case.steps) if inputs.lengths is None else inputs.lengths.cpu()


def unpacked(packed: PackedSequence, steps: int) -> Tensor:
    y: Tensor = pad_packed_sequence(packed, batch_first=True, total_length=steps)[0]
    return y


def build(case: Case, inputs: Inputs) -> Program:
    layer, leaves = layer_of(case, inputs)
    x, lengths, is_sorted = leaves["x"], lengths_of(case, inputs), inputs.lengths is None

    def packed(padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=is_sorted)

    dresult = packed(inputs.dresult)
    return Program(
        lambda: layer(packed(x))[0].data,
        leaves,
        "packs; the result stays packed",
        dresult.data,
        lambda data: unpacked(dresult._replace(data=data), case.steps),
    )
