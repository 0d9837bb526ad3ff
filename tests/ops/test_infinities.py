"""Infinite inputs: the CPU kernels make NaN of them only where the mathematics does.

The kernels pad units to whole vectors, with zeros in the lanes past the last unit. An infinity times such a zero is
NaN: harmless in a lane that nobody reads, but a sum over all lanes must leave it out. So the sizes here fill whole
vectors of the portable instruction set, which then pads nothing and is what the wider instruction sets are compared
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dien_kernels import aigru, attention_scores, auxiliary_loss, use_backend, use_gates
from tests.cases import ISAS, Case, make, result_of, running_on, target_params
from tests.cases import call as recurrence_of

WIDER = target_params(tuple(f"cpu-{isa}" for isa in ISAS if isa != "portable"))
UNPADDED = {torch.float64: 2, torch.float32: 4, torch.bfloat16: 4}  # values in a vector of the portable kernels
POISONED = ("x", "attention", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "dy", "dh_n")


def assert_same_numbers(results: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """NaN and infinities stand in the same places, and what is a number agrees but for rounding."""
    for name, tensor in expected.items():
        assert torch.equal(results[name].isnan(), tensor.isnan()), f"{name}: NaN in other places than on {what}"
        tolerance = 0.02 if tensor.dtype == torch.bfloat16 else 1e-4  # other sums differ in rounding, and only in that
        torch.testing.assert_close(results[name], tensor, rtol=tolerance, atol=tolerance, equal_nan=True)


def recurrence_results(case: Case, backend: str, where: str) -> dict[str, Tensor]:
    """y, h_n and all gradients, with an infinity in one of the inputs."""
    inputs = make(case)
    poisoned = {"dy": inputs.dy, "dh_n": inputs.dh_n}.get(where, inputs.leaves.get(where))
    assert poisoned is not None
    with torch.no_grad():
        poisoned[(1, 0, 0)[: poisoned.dim()]] = math.inf
    return result_of(recurrence_of(case, inputs, backend), inputs, inputs.leaves).tensors


@pytest.mark.parametrize("target", WIDER)
@pytest.mark.parametrize("dtype", list(UNPADDED), ids=str)
@pytest.mark.parametrize("kind", ["paper", "authors", "agru", "aigru"])
@pytest.mark.parametrize("history", [False, True])
def test_recurrence(history: bool, kind: str, dtype: torch.dtype, target: str) -> None:
    """All results in float64. In float32 a saturated gate's slope is rounded to 0 on one instruction set and not on
    another, and 0 times an infinity is NaN: there only the sum over units that no slope enters is compared.
    """
    names = None if dtype == torch.float64 else ["y"] if kind == "aigru" else ["y", "d_attention"]
    size = UNPADDED[dtype]
    for reset in ("after", "before"):
        case = Case(kind, dtype, 4, 3, size, size, ragged="full", history=history, reset=reset)
        for gates in ("keep", "recompute"):
            for where in POISONED:
                with running_on("cpu-portable", case) as backend, use_gates(gates):
                    expected = recurrence_results(case, backend, where)
                with running_on(target, case) as backend, use_gates(gates):
                    results = recurrence_results(case, backend, where)
                expected = {name: expected[name] for name in names or expected}
                assert_same_numbers(results, expected, f"portable: {case}, {gates}, {where}")


@pytest.mark.parametrize("target", target_params(tuple(f"cpu-{isa}" for isa in ISAS)))
@pytest.mark.parametrize("units", [1, 3, 8, 13])
@pytest.mark.parametrize("kind", ["paper", "authors", "agru"])
def test_the_gradient_of_attention_with_an_infinite_x_is_the_references(kind: str, units: int, target: str) -> None:
    case = Case(kind, torch.float32, 4, 3, units, units, ragged="full")
    expected = {"d_attention": recurrence_results(case, "reference", "x")["d_attention"]}
    assert not expected["d_attention"].isnan().any()
    for gates in ("keep", "recompute"):
        with running_on(target, case) as backend, use_gates(gates):
            assert_same_numbers(recurrence_results(case, backend, "x"), expected, "the reference")


@pytest.mark.parametrize("target", target_params(tuple(f"cpu-{isa}" for isa in ISAS)))
@pytest.mark.parametrize("history", [None, torch.tensor([0])])
def test_a_gradient_that_overflows_is_no_nan_in_that_of_attention(history: Tensor | None, target: str) -> None:
    """AIGRU: d(attention) is x times d(x), and d(x) is infinite here because the reset gate's gradient overflows."""
    x, attention = torch.ones(1, 1, 1), torch.ones(1, 1, requires_grad=True)
    w_ih, w_hh = torch.tensor([[1.0], [0.0], [0.0]]), torch.zeros(3, 1)
    b_ih, b_hh = torch.tensor([-1.0, 0.0, -20.0]), torch.tensor([0.0, 0.0, 40.0])  # r is 1/2, and n is tanh(-20 + 40 r)
    with running_on(target) as backend:
        y, _ = aigru(x, attention, w_ih, w_hh, b_ih, b_hh, history=history, backend=backend)
        y.backward(torch.full_like(y, 3e38))
    assert attention.grad.item() == math.inf


def poison_each(leaves: dict[str, Tensor], run: Callable[[dict[str, Tensor]], dict[str, Tensor]], target: str) -> None:
    """``run`` on the target as on the portable kernels, with an infinity in one leaf after the other."""
    for name, tensor in leaves.items():
        poisoned = tensor.clone()
        poisoned.view(-1)[0] = math.inf
        inputs = leaves | {name: poisoned}
        with running_on("cpu-portable"), use_backend("cpu"):
            expected = run(inputs)
        with running_on(target), use_backend("cpu"):
            assert_same_numbers(run(inputs), expected, f"portable: infinite {name}")


def layers_of(leaves: dict[str, Tensor], activation: str) -> dict:
    """The keyword arguments of an MLP."""
    parts = {part: [t for name, t in leaves.items() if name.startswith(part)] for part in ("weight", "bias", "slope")}
    slopes = parts["slope"] if activation == "prelu" else []
    return {"weights": parts["weight"], "biases": parts["bias"], "slopes": slopes, "activation": activation}


def random_leaves(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}


def mlp_shapes(inputs: int, size: int) -> dict[str, tuple[int, ...]]:
    widths = (inputs, size, size, 1)
    layers = {f"weight{i}": (widths[i + 1], widths[i]) for i in range(3)}
    return layers | {f"bias{i}": (widths[i + 1],) for i in range(3)} | {f"slope{i}": (size,) for i in range(2)}


def gradients_of(output: Tensor, upstream: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    found = {f"d_{name}": g for name, g in zip(inputs, grads, strict=True) if g is not None}
    return {"output": output.detach()} | found


@pytest.mark.parametrize("target", WIDER)
@pytest.mark.parametrize("dtype", list(UNPADDED), ids=str)
@pytest.mark.parametrize("kind", ["inner", "bilinear", "sigmoid", "relu", "prelu"])
@pytest.mark.parametrize("normalize", ["softmax", None])
def test_attention_scores(normalize: str | None, kind: str, dtype: torch.dtype, target: str) -> None:
    size = UNPADDED[dtype]
    shapes = {"target": (3, size), "states": (3, 5, size), "upstream": (3, 5)}
    if kind == "bilinear":
        shapes["weight"] = (size, size)
    elif kind != "inner":
        shapes |= mlp_shapes(4 * size, size)

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: t.requires_grad_() for name, t in values.items() if name != "upstream"}
        options = {} if kind in ("inner", "bilinear") else {"kind": "din", **layers_of(inputs, kind)}
        if kind == "bilinear":
            options["weights"] = inputs["weight"]
        scores = attention_scores(inputs["target"], inputs["states"], normalize=normalize, **options)
        return gradients_of(scores, values["upstream"].to(scores.dtype), inputs)

    poison_each(random_leaves(dtype, **shapes), run, target)


@pytest.mark.parametrize("target", WIDER)
@pytest.mark.parametrize("dtype", list(UNPADDED), ids=str)
@pytest.mark.parametrize("kind", ["inner", "sigmoid", "relu", "prelu"])
@pytest.mark.parametrize("eps", [0.0, "clamp"])
def test_auxiliary_loss(eps: float | str, kind: str, dtype: torch.dtype, target: str) -> None:
    size = UNPADDED[dtype]
    shapes = {"states": (3, 4, size), "positive": (3, 4, size), "negative": (3, 4, 2, size)}
    if kind != "inner":
        shapes |= mlp_shapes(2 * size, size)

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: t.requires_grad_() for name, t in values.items()}
        options = {"kind": "inner"} if kind == "inner" else {"kind": "mlp", **layers_of(inputs, kind)}
        behaviours = (inputs["positive"], inputs["negative"])
        loss = auxiliary_loss(inputs["states"], *behaviours, eps=eps, shift=False, **options)
        return gradients_of(loss, torch.ones_like(loss), inputs)

    poison_each(random_leaves(dtype, **shapes), run, target)
