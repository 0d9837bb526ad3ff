"""The loop in plain torch under ``torch.compile``, ten steps a graph: more steps take minutes to compile.

It is compiled here, before anything is timed, for this shape, mode and number of threads.
"""

from __future__ import annotations

import shutil
import time

import torch

from benchmarks.inputs import Inputs, Program
from benchmarks.peers import eager_loop
from benchmarks.registry import Case

STEPS = 10


def absent() -> str | None:
    return None if shutil.which("g++") else "torch.compile needs g++, which is not there"


def build(case: Case, inputs: Inputs) -> Program:
    program = eager_loop.build(case, inputs, together=STEPS)
    started = time.perf_counter()
    with torch.inference_mode(case.infers):
        program.step(case, inputs)()
    for leaf in program.leaves.values():
        leaf.grad = None
    spent = time.perf_counter() - started
    notes = (f"torch.compile, {STEPS} steps a graph", f"compiled in {spent:.0f} s", program.note)
    return program._replace(note="; ".join(filter(None, notes)))
