"""Autograd Functions of the ops: what none has, forward mode and second derivatives, is refused wherever asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dien_kernels import attention_scores, augru, auxiliary_loss
from dien_kernels.ops._dispatch import use_backend
from dien_kernels.ops._op import Op
from dien_kernels.ops.attention.op import ATTENTION
from dien_kernels.ops.auxiliary_loss.op import AUXILIARY_LOSS
from dien_kernels.ops.recurrence.op import RECURRENCE

REFUSAL, NO_FORWARD = "differentiated once, not twice", "must implement the jvp function"
STATES = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scalars() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each op as a scalar function of its states alone, which is where a raw op would do without autograd."""
    g = torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w_ih, w_hh, attention, target, other = values(15, 3), values(15, 5), values(2, 4), values(2, 3), values(2, 4, 3)
    return {
        "augru": lambda x: augru(x, attention, w_ih, w_hh)[1].sum(),
        "attention_scores": lambda x: attention_scores(target, x, normalize=None).square().sum(),
        "auxiliary_loss": lambda x: auxiliary_loss(x, other, other.flip(0)),
    }


@pytest.fixture(params=["auto", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", list(scalars()))
def test_forward_mode(name: str, backend: str) -> None:
    function, tangent = scalars()[name], torch.ones_like(STATES)
    with use_backend(backend):
        with pytest.raises(NotImplementedError, match=NO_FORWARD):
            torch.func.jvp(function, (STATES,), (tangent,))
        with pytest.raises(NotImplementedError, match=NO_FORWARD), forward_ad.dual_level():
            function(forward_ad.make_dual(STATES, tangent))
        with forward_ad.dual_level():  # nothing dual in it: as always
            assert torch.equal(function(STATES), function(STATES.clone()))


def penalty(function: Callable[[Tensor], Tensor], layer: torch.nn.Module) -> Tensor:
    """A gradient penalty behind a layer: the gradient is taken by the layer's input."""
    leaf = STATES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(layer(leaf)), leaf, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("name", list(scalars()))
def test_second_derivative(name: str, backend: str) -> None:
    function, layer = scalars()[name], torch.nn.Linear(3, 3, dtype=torch.float64)
    leaf = STATES.clone().requires_grad_()
    with use_backend(backend):
        with pytest.raises(RuntimeError, match=REFUSAL):
            penalty(function, layer).backward()
        with pytest.raises(RuntimeError, match=REFUSAL):
            penalty(function, layer).backward(inputs=[layer.weight])
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.grad(penalty(function, layer), [layer.weight])
        (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.autograd.functional.hessian(function, STATES)
        with pytest.raises(RuntimeError, match=REFUSAL):
            torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())(STATES)


@pytest.mark.parametrize("name", list(scalars()))
def test_first_derivative_with_a_graph_is_the_same(name: str, backend: str) -> None:
    function, leaf = scalars()[name], STATES.clone().requires_grad_()
    with use_backend(backend):
        (plain,) = torch.autograd.grad(function(leaf), leaf)
        (graph,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        assert torch.equal(plain, graph)
        assert torch.equal(plain, torch.func.grad(function)(STATES))


@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("op", [RECURRENCE, ATTENTION, AUXILIARY_LOSS], ids=lambda op: op.name)
def test_arguments_by_position_are_bound_as_by_inspect(op: Op, more: int) -> None:
    signature = inspect.signature(op.function.forward)
    parameters = list(signature.parameters.values())
    assert all(parameter.default is parameter.empty for parameter in parameters)
    plain = inspect.Signature(parameters)
    fixed = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    given = tuple(range(fixed + more))
    if more and fixed == len(parameters):
        with pytest.raises(TypeError, match="too many positional arguments"):
            signature.bind(*given)
    else:
        bound, wanted = signature.bind(*given), plain.bind(*given)
        bound.apply_defaults()
        wanted.apply_defaults()
        assert (bound.args, bound.kwargs) == (wanted.args, wanted.kwargs) == (given, {})
    with pytest.raises(TypeError, match="missing a required argument"):
        signature.bind(*given[: fixed - 1])
    replaced = signature.replace(parameters=parameters[:1])
    assert list(replaced.parameters) == [parameters[0].name]
