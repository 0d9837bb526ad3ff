"""What the machine could do: the fastest product and the fastest copy, measured in the same rounds as the providers.

``of_peak`` of a row is the useful operations of its case, divided by its time and by the rate of an sgemm of 512 x 512
x 512, whose operands are in the caches, in the same round; ``of_bandwidth`` the bytes that a case must at least move,
by the rate of a copy that no cache holds. Both count steps that exist, once: padding, gates computed again and products
made for it are no work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from benchmarks.inputs import Inputs
from benchmarks.registry import AUXILIARY_WIDTHS, LOADERS, MODELS, Case

SIDE = 512  # larger ones are slower here; a visit is a few calls, as the first finds its operands in no cache
CALLS = 4
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
    if case.op == "augru_shared":
        flops -= 2 * (case.batch - 1) * case.steps * size["w_ih"]  # one history, one projection
    elif case.op == "attention_bilinear":
        flops = 2 * case.batch * matrices + 2 * steps * case.hidden
    elif case.op == "attention_din":
        # Its first layer sees target, state, difference and product: one matrix of H rows a target serves them.
        flops = 2 * steps * (matrices - size["w0"]) + 2 * (steps + case.batch) * size["w0"] // 4
    elif case.op.startswith("auxiliary"):
        pairs = steps - case.batch  # the last state has no next behaviour
        flops = 2 * pairs * (2 * matrices - AUXILIARY_WIDTHS[0] * case.hidden) if matrices else 4 * pairs * case.hidden
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
    pairs = steps - len(inputs.lengths) if case.trains else 0
    meets["auxiliary"] = 2 * pairs
    total = 0
    for name, leaf in inputs.leaves.items():
        part = name.partition(".")[0]
        if leaf.dim() == 2 and part in meets:
            shared = name == "evolution.weight_ih"  # its product with a history serves every candidate
            total += 2 * (steps if shared else meets[part]) * leaf.numel()
    # First layers: attention's as in `work`, the auxiliary one's share of the state for both of a pair.
    targets = case.batch
    total -= 2 * (3 * evolved - targets) * inputs.leaves["attention.scores.linears.0.weight"].numel() // 4
    if case.op == "dien_mlp":
        total -= 2 * pairs * AUXILIARY_WIDTHS[0] * case.hidden
    else:
        total += 4 * pairs * case.hidden
    return total


@lru_cache
def sgemm() -> Callable[[], object]:
    a, b, out = (torch.ones(SIDE, SIDE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


@lru_cache  # of so many cases that one is enough for all
def copy() -> Callable[[], object]:
    a, b = torch.ones(COPIED), torch.empty(COPIED)
    return lambda: b.copy_(a)


SGEMM_FLOPS = 2.0 * SIDE**3
COPY_BYTES = 8.0 * COPIED
