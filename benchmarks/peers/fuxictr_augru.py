"""FuxiCTR's AUGRU: its cell in its loop over a packed sequence. Its gates are in the order u, r, n."""

from __future__ import annotations

from benchmarks.inputs import Inputs, Program
from benchmarks.peers import packed_augru
from benchmarks.peers.fuxictr_dien import VERSION, absent, module, swapped
from benchmarks.registry import Case

__all__ = ["absent", "build"]


def build(case: Case, inputs: Inputs) -> Program:
    loop = module().DynamicGRU(case.inputs, case.hidden, gru_type="AUGRU")
    x2h, h2h = loop.gru_cell.x2h, loop.gru_cell.h2h
    parameters = dict(zip(packed_augru.NAMES, (x2h.weight, h2h.weight, x2h.bias, h2h.bias), strict=True))
    return packed_augru.build(case, inputs, lambda x, a: loop(x, a)[0], parameters, f"fuxictr {VERSION}", swapped)
