"""The package itself as a provider, with the gates as by default, kept, or recomputed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Program, layers_of
from benchmarks.registry import LOADERS, MODELS, OURS, Case
from dien_kernels import attention_scores, augru, auxiliary_loss, gru, use_gates
from dien_kernels.ops import _gates

NAMES = (OURS, "gates_keep", "gates_recompute", "step_sparse", "step_reference", "step_mlp", "step_inner")
# Other functions than the cases', which some peer computes and its result is therefore compared with.
VARIANTS = {
    "authors": "the authors' form of the AUGRU, reset after the product",
    "authors_before": "the AUGRU of the authors' code, reset before the product",
    "one_bias": "an AUGRU whose candidate has no bias within the reset",
    "no_auxiliary": "the model's loss without its auxiliary loss",
}


def build(case: Case, inputs: Inputs, provider: str = OURS, backend: str = "auto", variant: str = "") -> Program:
    if case.op in MODELS:
        from benchmarks import whole

        return whole.build(case, inputs, provider, backend, variant)
    if case.op in LOADERS:
        from benchmarks import loading

        return loading.build(case, inputs, provider)
    forward = _forward(case, inputs, backend, variant)
    if provider != OURS:
        gates = provider.removeprefix("gates_")
        return Program(_with_gates(forward, gates), inputs.leaves, f"gates: {gates}")
    gates = "keep" if _gates.kept() else "recompute"
    recurrent = case.op in ("gru", "augru") and case.trains
    return Program(forward, inputs.leaves, f"gates: {gates}" if recurrent else "")


def _with_gates(forward: Callable[[], Tensor], gates: str) -> Callable[[], Tensor]:
    def switched() -> Tensor:
        with use_gates(gates):
            return forward()

    return switched


def _forward(case: Case, inputs: Inputs, backend: str, variant: str) -> Callable[[], Tensor]:
    leaves, lengths = inputs.leaves, inputs.lengths
    if case.op in ("gru", "augru"):
        weights = tuple(leaves[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
        x = leaves["x"]
        if case.op == "gru":
            return lambda: gru(x, *weights, lengths=lengths, backend=backend)[0]
        attention = leaves["attention"]
        form, reset = "authors" if variant.startswith("authors") else "paper", "after"
        if variant == "authors_before":
            reset = "before"
        if variant == "one_bias":
            w_ih, w_hh, b_ih, b_hh = weights
            weights = w_ih, w_hh, b_ih, torch.cat((b_hh[: 2 * case.hidden], b_hh.new_zeros(case.hidden)))
        return lambda: augru(x, attention, *weights, lengths=lengths, form=form, reset=reset, backend=backend)[0]
    matrices, vectors = layers_of(leaves)
    name, kind = case.op.split("_")
    if name == "attention":
        target, states = leaves["target"], leaves["states"]
        return lambda: attention_scores(target, states, matrices, vectors, lengths=lengths, kind=kind, backend=backend)
    states, positive, negative = (leaves[name] for name in ("states", "positive", "negative"))
    return lambda: auxiliary_loss(
        states, positive, negative, matrices, vectors, lengths=lengths, kind=kind, backend=backend
    )
