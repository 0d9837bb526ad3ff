"""What the tests of attention scores and of the auxiliary loss share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def raggedness(layout: str, rows: int, steps: int, *, kept: float = 0.5) -> Tensor:
    """valid [rows, steps] with lengths 0, 1 and all steps among others, or holes: ``kept`` of the steps are left."""
    if layout == "full":
        return torch.ones(rows, steps, dtype=torch.bool)
    if layout == "mask":
        valid = torch.rand(rows, steps) < kept
        valid[:1] = False
        return valid
    lengths = torch.randint(0, steps + 1, (rows,))
    lengths[: min(3, rows)] = torch.tensor([0, 1, steps])[: min(3, rows)].clamp(max=steps)
    return torch.arange(steps) < lengths.unsqueeze(1)


def assert_compiles(f: Callable[[dict], Tensor], values: dict, inputs: list[Tensor]) -> None:
    """``f`` of ``values`` is one graph; its value and the gradients of ``inputs`` are those without a compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    want = [f(values), *torch.autograd.grad(f(values), inputs)]
    got = [compiled(values), *torch.autograd.grad(compiled(values), inputs)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
