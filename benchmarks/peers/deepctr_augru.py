"""DeepCTR-Torch's AUGRU: its cell in its loop over a packed sequence.

Its cell registers one parameter as both biases. Here they are two again, as the inputs have two: the same work.
"""

from __future__ import annotations

from torch.nn import Parameter

from benchmarks.inputs import Inputs, Program
from benchmarks.peers import packed_augru
from benchmarks.peers.deepctr_dien import VERSION, absent, package
from benchmarks.registry import Case

__all__ = ["absent", "build"]


def build(case: Case, inputs: Inputs) -> Program:
    _, layers, _ = package()
    loop = layers.sequence.DynamicGRU(case.inputs, case.hidden, gru_type="AUGRU")
    cell = loop.rnn
    cell.bias_ih = Parameter(inputs.leaves["b_ih"].detach().clone())
    parameters = dict(
        zip(packed_augru.NAMES, (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), strict=True)
    )
    return packed_augru.build(case, inputs, loop, parameters, f"deepctr-torch {VERSION}, its biases untied")
