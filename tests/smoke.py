"""The smallest proof that an installed package works; needs nothing but the package. Run: python smoke.py"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dien_kernels
from dien_kernels import _native, augru, gru


def results(op: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Both outputs of an op and the gradients of a weighted sum of them."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, h_n = op(*leaves, **options)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + h_n.square().sum()
    return [y, h_n, *torch.autograd.grad(loss, leaves)]


def main() -> None:
    torch.manual_seed(0)
    batch, steps, size, hidden = 5, 7, 6, 10
    x, attention = torch.randn(batch, steps, size), torch.rand(batch, steps)
    weights = [
        0.4 * torch.randn(shape) for shape in ((3 * hidden, size), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    ]
    lengths = torch.tensor([7, 0, 3, 1, 5])

    assert _native.available(), _native.reason()
    for op, inputs in ((gru, [x, *weights]), (augru, [x, attention, *weights])):
        native = results(op, inputs, lengths=lengths, backend="cpu")
        reference = results(op, inputs, lengths=lengths, backend="reference")
        for ours, theirs in zip(native, reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    info = subprocess.run(
        [sys.executable, "-m", "dien_kernels", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert "recurrence" in info, info
    print(info)
    print(f"smoke: ok, {dien_kernels.__version__} from {Path(dien_kernels.__file__).parent}")


if __name__ == "__main__":
    main()
