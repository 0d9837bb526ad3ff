"""What the tests of the layers share: twins of torch.nn.GRU, gradients by name, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.layers import GRU
from tests.tolerances import assert_close_to

I, H = 3, 5  # noqa: E741
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OURS = ("reset", "update", "padded", "backend")  # the options torch.nn.GRU does not have
Twin = tuple[GRU, torch.nn.GRU, torch.nn.GRU]
Bad = tuple[str, Callable[[], Any], type[Exception], str]  # a name, a call, and what it raises


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that depend on the seed alone, rounded to ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)


def twins(dtype: torch.dtype = torch.float64, **options: Any) -> Twin:
    """Our layer, torch's with the same weights in the same dtype, and torch's in float64.

    float64 unless a test is about dtypes: it shows the smallest slip, and the ops' own tests judge rounding.
    """
    torch.manual_seed(1)
    mine = GRU(I, H, dtype=dtype, **options)
    rest = {name: value for name, value in options.items() if name not in OURS}
    plain, exact = torch.nn.GRU(I, H, dtype=dtype, **rest), torch.nn.GRU(I, H, dtype=torch.float64, **rest)
    plain.load_state_dict(mine.state_dict())
    exact.load_state_dict({name: value.double() for name, value in mine.state_dict().items()})
    return mine, plain, exact


def data_of(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def results(
    layer: torch.nn.Module, call: Callable[..., tuple[Any, Tensor]], **inputs: Tensor | None
) -> dict[str, Tensor]:
    """y, h_n and the gradient of every input and parameter under fixed upstream gradients.

    ``call(layer, **inputs)`` runs the layer; inputs are cast to the dtype of its parameters.
    """
    dtype = next(layer.parameters()).dtype
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items() if t is not None}
    y, h_n = call(layer, **{name: leaves.get(name) for name in inputs})
    y = data_of(y)
    wanted = leaves | dict(layer.named_parameters())
    upstream = tuple(randn(*t.shape, seed=50 + i).to(t.dtype) for i, t in enumerate((y, h_n)))
    grads = torch.autograd.grad((y, h_n), tuple(wanted.values()), upstream, materialize_grads=True)
    found = {"y": y.detach(), "h_n": h_n.detach()}
    return found | {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def assert_same(mine: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor within the tolerance rule, and in the dtype of the plain one."""
    assert list(mine) == list(plain) == list(exact)
    for name, tensor in mine.items():
        assert tensor.dtype == plain[name].dtype, f"{name}: {tensor.dtype}"
        assert_close_to(tensor, exact[name], plain[name], name)


def assert_twins_agree(
    twin: Twin,
    call: Callable[..., tuple[Any, Tensor]],
    oracle: Callable[..., tuple[Any, Tensor]] | None = None,
    **inputs: Tensor | None,
) -> None:
    """Our layer under ``call`` against torch's under ``oracle`` (None: the same call)."""
    mine, plain, exact = twin
    oracle = oracle or call
    stored = {name: None if t is None else t.to(next(mine.parameters()).dtype) for name, t in inputs.items()}
    assert_same(results(mine, call, **stored), results(plain, oracle, **stored), results(exact, oracle, **stored))


def bits(*tensors: Any) -> list[Tensor]:
    """The outputs of a layer as a flat list, for comparing bit by bit."""
    return [data_of(t).detach() for t in tensors]


def assert_equal_bits(mine: Any, other: Any) -> None:
    for one, two in zip(bits(*mine), bits(*other), strict=True):
        assert torch.equal(one, two)


def z(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, for inputs whose values do not matter."""
    return torch.zeros(size, dtype=dtype)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def bad(*cases: Bad) -> Any:
    """Parametrize a test by bad calls."""
    return pytest.mark.parametrize("call, error, message", [pytest.param(*case[1:], id=case[0]) for case in cases])


def expect(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Exactly this error (no subclass) with a message that matches."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
