"""RecBole's AUGRU: its cell in its loop over a packed sequence."""

from __future__ import annotations

from benchmarks.inputs import Inputs, Program
from benchmarks.peers import packed_augru
from benchmarks.peers.recbole_dien import VERSION, absent, module
from benchmarks.registry import Case

__all__ = ["absent", "build"]


def build(case: Case, inputs: Inputs) -> Program:
    loop = module().DynamicRNN(case.inputs, case.hidden, gru="AUGRU")
    cell = loop.rnn
    parameters = dict(
        zip(packed_augru.NAMES, (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), strict=True)
    )
    note = f"recbole {VERSION}, anomaly detection off"
    return packed_augru.build(case, inputs, loop, parameters, note)
