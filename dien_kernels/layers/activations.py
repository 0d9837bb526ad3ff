"""Activations with state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dien_kernels.checks import check_dtype, check_number, check_size, check_tensor


class Dice(nn.Module):
    """The data-adaptive PReLU of arXiv 1706.06978, equation 3, over the last dimension.

    ::

        f(s) = p(s) * s + (1 - p(s)) * alpha * s,   p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps))

    E and Var are each channel's statistics over the batch in training, moving averages in evaluation, as in
    ``torch.nn.BatchNorm1d`` (the buffers live in ``bn``). A batch of fewer than two rows has no variance: the
    moving averages are used and left alone, so that nothing is ever NaN.

    Args:
        size: channels, M.
        eps: added to the variance; above 0.
        momentum: of the moving averages, between 0 and 1.
        device, dtype: of ``alpha`` [M], which starts at 0, and of the buffers.

    Inputs: ``s`` [P, M], valid rows only: padding would enter the statistics. Returns [P, M]. Raises
    ``ValueError`` for another shape, ``TypeError`` for no tensor; of the constructor's arguments for a wrong type or
    value.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-8,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("size", size)
        check_number("eps", eps)
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be above 0 and finite, got {eps}")
        check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
        check_dtype(dtype)
        self.bn = nn.BatchNorm1d(size, eps=eps, momentum=momentum, affine=False, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``alpha`` is 0; the moving averages are those of no batch, mean 0 and variance 1."""
        nn.init.zeros_(self.alpha)
        self.bn.reset_parameters()

    def forward(self, s: Tensor) -> Tensor:
        check_tensor("s", s)
        if s.dim() != 2 or s.shape[1] != self.alpha.shape[0]:
            raise ValueError(f"s must have shape [P, {self.alpha.shape[0]}], got {tuple(s.shape)}")
        bn = self.bn
        if self.training and s.shape[0] > 1:
            normal = bn(s)
        else:  # called directly: a module's call costs as much as the operation on the few rows of a request
            normal = nn.functional.batch_norm(s, bn.running_mean, bn.running_var, eps=bn.eps)
        p = torch.sigmoid(normal)
        return (p + (1 - p) * self.alpha) * s
