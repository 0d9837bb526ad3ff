"""``torch.nn.GRU`` from padded batch to padded batch through a packed one: packing and unpacking timed."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.inputs import Inputs, Program
from benchmarks.peers.torch_gru_packed import lengths_of, unpacked
from benchmarks.peers.torch_gru_padded import layer_of
from benchmarks.registry import Case


def absent() -> str | None:
    return None


def build(case: Case, inputs: Inputs) -> Program:
    layer, leaves = layer_of(case, inputs)
    x, lengths, is_sorted = leaves["x"], lengths_of(case, inputs), inputs.lengths is None

    def forward() -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
        return unpacked(layer(packed)[0], case.steps)

    return Program(forward, leaves, "packs and unpacks")
