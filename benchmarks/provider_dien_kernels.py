"""The package itself as a provider, with the gates as by default, kept, or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import dien_model, loading
from benchmarks.inputs import Inputs, Program, layers_of
from benchmarks.registry import LOADERS, MODELS, OPS, OURS, Case
from dien_kernels import attention_scores, augru, auxiliary_loss, gru, use_gates
from dien_kernels.ops import _gates

# Functions other than that of a case. Some peer computes one of them, and so is compared with it.
VARIANTS = {
    "authors": "the authors' form of the AUGRU, reset after the product",
    "authors_before": "the AUGRU of the authors' code, reset before the product",
    "one_bias": "an AUGRU whose candidate has no bias within the reset",
    "no_auxiliary": "the model's loss without its auxiliary loss",
}


def build(case: Case, inputs: Inputs, provider: str = OURS, backend: str = "auto", variant: str = "") -> Program:
    if case.op in MODELS:
        return dien_model.build(case, inputs, provider, backend, variant)
    if case.op in LOADERS:
        return loading.build(case, inputs, provider)
    if provider == "no_projection":
        return _without_projection(case, inputs)
    if provider == "history_repeated":
        inputs = inputs._replace(leaves=inputs.leaves | {"x": inputs.leaves["x"].repeat(case.batch, 1, 1)})
        return Program(_forward(case._replace(op="augru"), inputs, backend), inputs.leaves, "x repeated beforehand")
    forward = _forward(case, inputs, backend, variant)
    if provider != OURS:
        gates = provider.removeprefix("gates_")
        return Program(_with_gates(forward, gates), inputs.leaves, f"gates: {gates}")
    gates = "keep" if _gates.kept_units() else "recompute"
    recurrent = case.op in OPS["recurrence"] and case.trains
    return Program(forward, inputs.leaves, f"gates: {gates}" if recurrent else "")


def _without_projection(case: Case, inputs: Inputs) -> Program:
    """The same steps with an input of one number, so that nearly nothing is left of W_ih x: another function."""
    one = inputs.leaves["x"][..., :1].contiguous(), inputs.leaves["w_ih"][:, :1].contiguous()
    own = inputs._replace(leaves=inputs.leaves | dict(zip(("x", "w_ih"), one, strict=True)))
    forward = _forward(case, own, "auto")

    def check() -> str | None:
        with torch.inference_mode():
            near = torch.allclose(forward(), _forward(case, own, "reference")(), atol=1e-4)
        return None if near else "not what the reference makes of its inputs"

    return Program(forward, {}, "inputs of width 1", check=check)


def _with_gates(forward: Callable[[], Tensor], gates: str) -> Callable[[], Tensor]:
    def switched() -> Tensor:
        with use_gates(gates):
            return forward()

    return switched


def _forward(case: Case, inputs: Inputs, backend: str, variant: str = "") -> Callable[[], Tensor]:
    leaves, lengths = inputs.leaves, inputs.lengths
    if case.op in OPS["recurrence"]:
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
        # The same history for every row of attention, or each row its own.
        history = torch.zeros(case.batch, dtype=torch.int64) if case.op == "augru_shared" else None
        how: dict[str, Any] = {"lengths": lengths, "history": history, "form": form, "reset": reset, "backend": backend}
        return lambda: augru(x, attention, *weights, **how)[0]
    matrices, vectors = layers_of(leaves)
    name, kind = case.op.split("_")
    if name == "attention":
        target, states = leaves["target"], leaves["states"]
        return lambda: attention_scores(target, states, matrices, vectors, lengths=lengths, kind=kind, backend=backend)
    states, positive, negative = (leaves[name] for name in ("states", "positive", "negative"))
    return lambda: auxiliary_loss(
        states, positive, negative, matrices, vectors, lengths=lengths, kind=kind, backend=backend
    )
