"""Batches without rows, steps or histories: results and gradients without elements, which have no address.

``make test-asan`` runs these under the sanitizers, which stop at a null pointer that is given to the C library.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dien_kernels import aigru, attention_scores, augru, auxiliary_loss, gru, use_backend, use_gates
from tests.cases import ISAS, running_on, target_params

TARGETS = target_params(tuple(f"cpu-{isa}" for isa in ISAS))
UNITS = 5
EMPTY = [sizes for sizes in itertools.product((0, 2), (0, 3), (0, 1)) if 0 in sizes]  # rows, steps, histories


def layouts(histories: int, steps: int, masks: bool = True) -> list[tuple[str, dict[str, Tensor]]]:
    """Names and keyword arguments; the steps of a jagged batch are those of a full one."""
    offsets = steps * torch.arange(histories + 1)
    found = [
        ("full", {}),
        ("lengths", {"lengths": torch.full((histories,), steps // 2)}),
        ("jagged", {"offsets": offsets}),
    ]
    return found + [("mask", {"mask": torch.zeros(histories, steps, dtype=torch.bool)})] * masks


def leaf(*shape: int) -> Tensor:
    return torch.ones(*shape).requires_grad_()


def results(run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor], backend: str) -> list[Tensor]:
    """The outputs and the gradients of all leaves."""
    with use_backend(backend):
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(t) for t in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)]


def check(run: Callable[..., Tensor | tuple[Tensor, ...]], leaves: list[Tensor], target: str) -> None:
    expected = results(run, leaves, "reference")
    with running_on(target):
        for actual, wanted in zip(results(run, leaves, "cpu"), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reset", ["after", "before"])
@pytest.mark.parametrize("gates", ["keep", "recompute"])
@pytest.mark.parametrize(("rows", "steps", "histories"), EMPTY)
def test_recurrence(rows: int, steps: int, histories: int, gates: str, reset: str, target: str) -> None:
    weights = [leaf(3 * UNITS, UNITS), leaf(3 * UNITS, UNITS), leaf(3 * UNITS), leaf(3 * UNITS)]
    for op, shared in itertools.product((gru, augru, aigru), (False, True)):
        if shared and (op is gru or (rows and not histories)):
            continue  # gru has no attention to tell rows of one history apart; a row needs a history
        count = histories if shared else rows
        history = {"history": torch.zeros(rows, dtype=torch.long)} if shared else {}
        for name, layout in layouts(count, steps):
            lead, per_row = ((count * steps,), (rows * steps,)) if name == "jagged" else ((count, steps), (rows, steps))
            attention = [] if op is gru else [leaf(*per_row)]
            run = partial(op, reset=reset, **layout, **history)
            with use_gates(gates):
                check(run, [leaf(*lead, UNITS), *attention, *weights], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["inner", "bilinear", "din"])
@pytest.mark.parametrize(("rows", "steps", "histories"), EMPTY)
def test_attention_scores(rows: int, steps: int, histories: int, kind: str, target: str) -> None:
    for normalize, shared in itertools.product(("softmax", None), (False, True)):
        if shared and rows and not histories:
            continue
        count = histories if shared else rows
        for name, layout in layouts(count, steps):
            options: dict = {"normalize": normalize, **layout}
            if shared:
                options["history"] = torch.zeros(rows, dtype=torch.long)
                options |= {"rows_total": rows * steps} if name == "jagged" else {}
            lead = (count * steps,) if name == "jagged" else (count, steps)
            weights = {"inner": [], "bilinear": [leaf(UNITS, UNITS)], "din": [leaf(3, 4 * UNITS), leaf(1, 3)]}[kind]

            def run(target: Tensor, states: Tensor, *weights: Tensor, options: dict = options) -> Tensor:
                if kind == "din":
                    return attention_scores(target, states, weights, kind="din", **options)
                return attention_scores(target, states, *weights, **options)

            check(run, [leaf(rows, UNITS), leaf(*lead, UNITS), *weights], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["inner", "mlp"])
@pytest.mark.parametrize(("rows", "steps"), [(0, 0), (0, 3), (2, 0), (2, 1)])
def test_auxiliary_loss(rows: int, steps: int, kind: str, target: str) -> None:
    weights = [] if kind == "inner" else [leaf(3, 2 * UNITS), leaf(1, 3)]
    for shift, (name, layout) in itertools.product((True, False), layouts(rows, steps)):
        lead = (rows * steps,) if name == "jagged" else (rows, steps)

        options = {"kind": kind, "shift": shift, **layout}

        def run(*leaves: Tensor, options: dict = options) -> Tensor:
            return auxiliary_loss(*leaves[:3], leaves[3:], **options)

        check(run, [*(leaf(*lead, UNITS) for _ in range(3)), *weights], target)
