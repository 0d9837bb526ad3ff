"""The one tolerance rule: as close to the float64 result as twice what plain torch manages in the same dtype.

A tolerance is measured, not chosen. A test brings three tensors: what is checked, the exact result (float64,
of the very same stored inputs) and the plain one, the same computation in ordinary torch in the dtype under
test (for 16-bit storage: 16-bit operands of the products, float32 state). All errors are relative to
the largest exact value, so a tensor's small entries are held to the accuracy of its large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How often plain torch's error is allowed: another order of summation may be unlucky where plain was lucky.
FACTOR = 2.0

# The floor, in units of rounding (eps) of the dtype. Plain torch may hit a small tensor exactly, and then
# twice its error says nothing.
FLOOR_UNITS = {
    # The functions of a step (two sigmoids and a tanh) are good to one and a half units each, and a product is one
    # chain of additions for each element, whatever tile it stands in: determinism costs MKL's blocked sums.
    torch.float32: 8.0,
    # Computed in float32 and rounded once: half a unit, and half more where the exact value lies between two.
    torch.bfloat16: 1.0,
    torch.float16: 1.0,
    # The "exact" result is itself a float64 computation, mostly the same one as the plain result: the rule
    # compares two roundings of one number and sees no error in plain. A thousand units are 2e-13.
    torch.float64: 1024.0,
}


def floor_of(dtype: torch.dtype) -> float:
    """The relative error that is always allowed to a tensor of ``dtype``."""
    return FLOOR_UNITS[dtype] * torch.finfo(dtype).eps


def relative_error(tensor: Tensor, exact64: Tensor) -> float:
    """max|tensor - exact64| / max|exact64|; absolute where the exact result is zero everywhere, 0 without elements."""
    if exact64.numel() == 0:
        return 0.0
    return float((tensor.detach().double() - exact64).abs().max()) / (float(exact64.abs().max()) or 1.0)


def assert_close_to(
    actual: Tensor, exact64: Tensor, plain: Tensor, name: str, summed: float = 0.0, plain_error: float = 0.0
) -> None:
    """Fail unless max|actual - exact64| <= 2 max|plain - exact64| + floor * max(max|exact64|, summed).

    ``plain_error``: a relative error of plain torch in other cases of the same kind, which counts where it is larger.

    ``summed``: the size of what the tensor is a sum of, where that cancels: no order of summation knows digits below
    the rounding of its terms.
    Where the exact result is zero everywhere the floor is absolute. Shapes must agree, every value must be
    finite, and the dtype of ``actual`` (which sets the floor) may not be coarser than that of ``plain``.
    """
    assert exact64.dtype == torch.float64, f"{name}: the exact result must be float64, got {exact64.dtype}"
    assert torch.finfo(actual.dtype).eps <= torch.finfo(plain.dtype).eps, (
        f"{name}: dtype {actual.dtype}, plain torch gives {plain.dtype}"
    )
    for who, tensor in (("actual", actual), ("plain", plain)):
        assert tensor.shape == exact64.shape, (
            f"{name}: shape of {who} {tuple(tensor.shape)}, exact {tuple(exact64.shape)}"
        )
    actual, exact64, plain = actual.detach(), exact64.detach(), plain.detach()
    for who, tensor in (("exact", exact64), ("plain", plain), ("actual", actual)):
        bad = int((~torch.isfinite(tensor)).sum())
        assert bad == 0, f"{name}: {bad} of {tensor.numel()} values of {who} are not finite"
    if exact64.numel() == 0:
        return
    size = float(exact64.abs().max())
    scale = size or 1.0
    difference = (actual.double() - exact64).abs()
    error = float(difference.max()) / scale
    plain_error = max(plain_error, relative_error(plain, exact64))
    floor = floor_of(actual.dtype) * max(1.0, summed / scale)
    limit = FACTOR * plain_error + floor
    if error > limit:
        at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name}: error {error:.3g} is above the limit {limit:.3g} = {FACTOR:g} * {plain_error:.3g} "
            f"(plain torch) + {floor:.3g} (floor of {actual.dtype}), relative to max|exact| = {size:.6g}; "
            f"worst at {list(at)}: {actual[at].item():.9g} instead of {exact64[at].item():.9g}"
        )
