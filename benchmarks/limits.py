"""What the machine could do: the fastest product and the fastest copy, measured in the same rounds as the providers.

``of_peak`` of a row is the useful operations of its case, divided by its time and by the rate of an sgemm of 1024 x
1024 x 1024 in the same round; ``of_bandwidth`` the bytes that a case must at least move, by the rate of a copy that no
cache holds. Both count steps that exist, once: padding, gates computed again and products made for it are no work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.inputs import Inputs
from benchmarks.registry import LOADERS, MODELS, Case

SIDE = 1024  # 2.1 GFLOP: long enough for a rate, short beside the cases it stands in
COPIED = 1 << 24  # float32 values, 64 MiB
TRAINING = 3  # operations of forward and backward, in forwards: two products for each of the forward's


class Work(NamedTuple):
    flops: float
    bytes: float | None  # None where tensors of a whole model pass by


def work(case: Case, inputs: Inputs) -> Work | None:
    """The least a case takes; None for what is not arithmetic."""
    if case.op in LOADERS or case.suite in ("short", "latency"):
        return None
    passes = TRAINING if case.trains else 1
    if case.op in MODELS:
        return Work(passes * _model_flops(case, inputs), None)
    steps = case.batch * case.steps if inputs.lengths is None else int(inputs.lengths.sum())
    size = {name: leaf.numel() for name, leaf in inputs.leaves.items()}
    matrices = sum(numel for name, numel in size.items() if name.startswith("w"))
    flops = 2 * steps * matrices
    if case.op == "attention_bilinear":
        flops = 2 * case.batch * matrices + 2 * steps * case.hidden
    elif case.op.startswith("auxiliary"):
        flops = 2 * (flops or 2 * steps * case.hidden)  # of a positive and a negative
    by_step = [leaf for leaf in inputs.leaves.values() if leaf.dim() > 1 and leaf.shape[:2] == (case.batch, case.steps)]
    read = steps * sum(leaf[0, 0].numel() for leaf in by_step)
    written = inputs.dresult.numel()
    # Backward: what was read is read again, and its gradients written; the result's gradient is read.
    moved = read + written + case.trains * (2 * read + written)
    return Work(passes * flops, 4 * moved)


def _model_flops(case: Case, inputs: Inputs) -> float:
    """Every matrix of the forward, with the steps, pairs or rows it meets."""
    assert inputs.lengths is not None
    steps = int(inputs.lengths.sum())
    evolved = steps if case.mode != "request" else case.batch * case.steps  # each candidate evolves the history anew
    meets = {"extractor": steps, "evolution": evolved, "attention": evolved, "mlp": case.batch}
    meets["auxiliary"] = 2 * steps if case.trains else 0
    total = 0
    for name, leaf in inputs.leaves.items():
        part = name.partition(".")[0]
        if leaf.dim() == 2 and part in meets:
            shared = name == "evolution.weight_ih"  # its product with a history serves every candidate
            total += 2 * (steps if shared else meets[part]) * leaf.numel()
    if case.op == "dien_inner" and case.trains:
        total += 4 * steps * case.hidden
    return total


def sgemm() -> Callable[[], object]:
    a, b, out = (torch.ones(SIDE, SIDE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def copy() -> Callable[[], object]:
    a, b = torch.ones(COPIED), torch.empty(COPIED)
    return lambda: b.copy_(a)


SGEMM_FLOPS = 2.0 * SIDE**3
COPY_BYTES = 8.0 * COPIED
