"""What is folded into the weights before the kernels run, the affine map and the second output, is folded in float32.

With 16-bit storage every result is computed in float32 from the stored values. So the loss is that of the same values
stored in float32 but for float32's rounding, and a gradient is rounded once, when it is stored.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dien_kernels import auxiliary_loss, use_backend
from dien_kernels.ops._cpu import refuses_cpu
from dien_kernels.ops._dispatch import Call
from tests.cases import ISAS, running_on, target_params

FLOAT32_ROUNDING = 2e-5  # relative to the largest value: a few hundred units, for sums of a few hundred terms


def inputs_of(dtype: torch.dtype, sizes: tuple[int, ...], affine: bool, outputs: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    widths = (14, *sizes, outputs)
    shapes = {"states": (4, 6, 8), "positive": (4, 6, 6), "negative": (4, 6, 2, 6)}
    shapes |= {f"weight{i}": (widths[i + 1], widths[i]) for i in range(len(sizes) + 1)}
    shapes |= {f"bias{i}": (widths[i + 1],) for i in range(len(sizes) + 1)}
    shapes |= {"affine0": (14,), "affine1": (14,)} if affine else {}
    return {name: torch.randn(*shape, generator=g).mul(0.5).to(dtype) for name, shape in shapes.items()}


def loss_and_gradients(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}

    def tensors_named(prefix: str) -> list[Tensor]:
        return [t for name, t in inputs.items() if name.startswith(prefix)]

    options = {"kind": "mlp", "affine": tuple(tensors_named("affine")) or None}
    tensors = (inputs["states"], inputs["positive"], inputs["negative"], tensors_named("weight"), tensors_named("bias"))
    loss = auxiliary_loss(*tensors, **options)
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"loss": loss.detach()} | dict(zip(inputs, gradients, strict=True))


@pytest.mark.parametrize("target", target_params(("reference", *(f"cpu-{isa}" for isa in ISAS))))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(), (7,), (7, 5)])
@pytest.mark.parametrize(("affine", "outputs"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_16_bits_round_nothing_but_what_is_stored(
    affine: bool, outputs: int, sizes: tuple[int, ...], dtype: torch.dtype, target: str
) -> None:
    backend = target.partition("-")[0]
    reason = refuses_cpu(Call("auxiliary_loss", "cpu", dtype, 6, 8)) if backend == "cpu" else None
    if reason is not None:
        pytest.skip(reason)
    stored = inputs_of(dtype, sizes, affine, outputs)
    with running_on(target), use_backend(backend):
        actual = loss_and_gradients(stored)
        expected = loss_and_gradients({name: t.float() for name, t in stored.items()})
    for name, wanted in expected.items():
        size = float(wanted.abs().max())
        error = (actual[name].float() - wanted).abs()
        rounded = torch.finfo(actual[name].dtype).eps / 2 * wanted.abs()
        # Below float16's normal numbers its steps are all as wide.
        steps = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= rounded + steps + FLOAT32_ROUNDING * size).all(), f"{name}: off by up to {float(error.max())}"
