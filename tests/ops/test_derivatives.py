"""Autograd Functions of the ops: derivatives of higher order, ``torch.func``, and forward mode, which is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dien_kernels import agru, aigru, attention_scores, augru, auxiliary_loss, gru
from dien_kernels.layers import GRU
from dien_kernels.ops._dispatch import use_backend
from dien_kernels.ops._op import Op
from dien_kernels.ops.attention.op import ATTENTION
from dien_kernels.ops.auxiliary_loss.op import AUXILIARY_LOSS
from dien_kernels.ops.recurrence.forms import FORMS
from dien_kernels.ops.recurrence.op import RECURRENCE

NO_FORWARD = "must implement the jvp function"
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
def test_second_derivatives_wherever_they_are_asked_for(name: str, backend: str) -> None:
    function, layer = scalars()[name], torch.nn.Linear(3, 3, dtype=torch.float64)
    with use_backend(backend):
        (wanted,) = torch.autograd.grad(penalty(function, layer), [layer.weight])
        step = 1e-6 * torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            layer.weight += step
        above = float(penalty(function, layer).detach())
        with torch.no_grad():
            layer.weight -= 2 * step
        below = float(penalty(function, layer).detach())
        with torch.no_grad():
            layer.weight += step
        # A central difference: its error is the square of the step, beside rounding of some 1e-16 / 1e-6.
        assert (above - below) / 2 == pytest.approx(float((wanted * step).sum()), rel=1e-5, abs=1e-14)
        for inputs in (None, [layer.weight]):
            layer.weight.grad = None
            penalty(function, layer).backward(inputs=inputs)
            torch.testing.assert_close(
                layer.weight.grad, wanted, rtol=1e-9, atol=1e-12
            )  # the weight was moved and back
        hessian = torch.autograd.functional.hessian(function, STATES)
        leaf = STATES.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        (twice,) = torch.autograd.grad(grad.square().sum(), leaf)
        n = STATES.numel()
        by_hessian = 2 * hessian.reshape(n, n) @ grad.detach().flatten()
        torch.testing.assert_close(twice.flatten(), by_hessian, rtol=1e-10, atol=1e-12)
        by_func = torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())(STATES)
        torch.testing.assert_close(by_func, twice, rtol=1e-10, atol=1e-12)


def problems() -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """The ops as functions of all tensors that they have a derivative by, in small sizes."""
    g = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    lengths, offsets, history = torch.tensor([3, 1]), torch.tensor([0, 3, 4]), torch.tensor([1, 0, 1, 1])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    weights = [leaf(9, 2), leaf(9, 3), leaf(9), leaf(9)]
    x, a, h0 = leaf(2, 3, 2), leaf(2, 3), leaf(2, 3)
    q, s, e, n = leaf(2, 3), leaf(2, 3, 3), leaf(2, 3, 3), leaf(2, 3, 3)
    found: dict[str, tuple[Callable[..., object], list[Tensor]]] = {
        "gru": (lambda x, h0, *w: gru(x, *w, h0=h0, lengths=lengths), [x, h0, *weights]),
        "gru, one bias": (lambda x, u, v, b: gru(x, u, v, b, b), [x, *weights[:3]]),
        "agru": (lambda x, a, *w: agru(x, a, *w, reset="before", lengths=lengths), [x, a, *weights]),
        "aigru": (lambda x, a, *w: aigru(x, a, *w, mask=mask, padded="carry"), [x, a, *weights]),
        "jagged": (lambda x, a, *w: augru(x, a, *w, offsets=offsets, history=history), [leaf(4, 2), leaf(6), *weights]),
        "bilinear": (lambda q, s, w: attention_scores(q, s, w, lengths=lengths), [q, s, leaf(3, 3)]),
        "din": (
            lambda q, s, u, v, b, c, p: attention_scores(
                q, s, [u, v], [b, c], slopes=[p], kind="din", activation="prelu", lengths=lengths
            ),
            [q, s, leaf(4, 12), leaf(1, 4), leaf(4), leaf(1), leaf(4)],
        ),
        "inner": (lambda s, e, n: auxiliary_loss(s, e, n, lengths=lengths), [s, e, n]),
        "mlp": (
            lambda s, e, n, u, v, b, c: auxiliary_loss(s, e, n, [u, v], [b, c], kind="mlp", lengths=lengths),
            [s, e, n, leaf(4, 6), leaf(2, 4), leaf(4), leaf(2)],
        ),
    }
    for form in FORMS:
        found[form] = (lambda x, a, *w, form=form: augru(x, a, *w, lengths=lengths, form=form), [x, a, *weights])
    return found


@pytest.mark.parametrize("name", list(problems()))
def test_gradgradcheck(name: str, backend: str) -> None:
    function, leaves = problems()[name]
    with use_backend(backend):
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_the_third_derivative_is_that_of_nn_gru() -> None:
    cell, x = torch.nn.GRU(3, 4, batch_first=True, dtype=torch.float64), STATES.clone().requires_grad_()
    found = []
    for function in (cell, lambda x: gru(x, *cell.all_weights[0])):
        value = function(x)[1].square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        found.append(grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


# vmap runs a raw backward over one element after another, and says that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", list(problems()))
def test_vmap(name: str) -> None:
    """Over every tensor at once: values, gradients through it, and gradients inside it."""
    function, leaves = problems()[name]
    several = [torch.stack([t.detach() * (1 + 0.1 * k) for k in range(3)]).requires_grad_() for t in leaves]

    def scalar(*tensors: Tensor) -> Tensor:
        result = function(*tensors)
        return sum(part.sin().sum() for part in (result if isinstance(result, tuple) else (result,)))  # type: ignore[attr-defined, no-any-return]

    wanted = torch.stack([scalar(*(t[k] for t in several)) for k in range(3)])
    got = torch.func.vmap(scalar)(*several)
    assert torch.equal(got, wanted)
    slopes = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradients = torch.autograd.grad(wanted, several, slopes, allow_unused=True, materialize_grads=True)
    for mine, other in zip(
        torch.autograd.grad(got, several, slopes, allow_unused=True, materialize_grads=True), gradients, strict=True
    ):
        assert torch.equal(mine, other)
    inside = torch.func.vmap(torch.func.grad(scalar, tuple(range(len(several)))))(*(t.detach() for t in several))
    for mine, other in zip(inside, gradients, strict=True):
        torch.testing.assert_close(mine * slopes.view(3, *(1,) * (mine.dim() - 1)), other, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_has_gradients() -> None:
    layers = [GRU(3, 4, dtype=torch.float64) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    states = torch.func.vmap(lambda p: torch.func.functional_call(layers[0], p, (STATES,))[0])(parameters)
    assert torch.equal(states, torch.stack([layer(STATES)[0] for layer in layers]))
    states.square().sum().backward()
    for number, layer in enumerate(layers):
        layer(STATES)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameters[name].grad[number], parameter.grad, rtol=1e-12, atol=1e-14)


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
