"""The definitions of attention scores and of the auxiliary loss, against numbers worked by hand and torch's modules.

Every other test takes these definitions for the truth, so nothing here uses one to judge the other. Those of the
recurrence have a file of their own, test_recurrence_reference.py.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor, nn

from dien_kernels import attention_scores, augru, auxiliary_loss, use_backend
from dien_kernels.ops._mlp import Layers, mlp

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def modules(widths: tuple[int, ...], activation: nn.Module | None, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        parts += [nn.Linear(inputs, outputs, bias=bias)]
        parts += [activation] if activation is not None and i < len(widths) - 2 else []
    return nn.Sequential(*parts).double()


def arguments(network: nn.Sequential) -> dict[str, list[Tensor]]:
    linear = [part for part in network if isinstance(part, nn.Linear)]
    biases = [part.bias for part in linear if part.bias is not None]
    slopes = [part.weight for part in network if isinstance(part, nn.PReLU)]
    return {"weights": [part.weight for part in linear], "biases": biases, "slopes": slopes}


ACTIVATIONS = [("sigmoid", nn.Sigmoid()), ("relu", nn.ReLU()), ("prelu", nn.PReLU(init=0.3)), (None, None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(5, 1), (5, 4, 1), (5, 4, 3, 1)], ids=str)
@pytest.mark.parametrize("name, activation", ACTIVATIONS)
def test_network_is_that_of_torchs_modules(name: str | None, activation: nn.Module, widths: tuple, bias: bool) -> None:
    """Equation (M1): values, and gradients by the input and every parameter."""
    network = modules(widths, activation, bias)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *network.parameters()]
    ours, theirs = mlp(x, Layers(**arguments(network)), name), network(x).squeeze(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    upstream = torch.randn(7, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@BACKENDS
def test_bilinear_scores_by_hand(backend: str) -> None:
    """H = 2, D = 1: row 0 has three steps and row 1 one; W = (0.5, -2), scale 0.25."""
    target, states = numbers(3.0, -1.0).view(2, 1), numbers(1, 2, 0, -1, 4, 0.5, 7, 3, 99, 99, 99, 99).view(2, 3, 2)
    w, lengths = numbers(0.5, -2).view(2, 1), torch.tensor([3, 1])
    e = [0.25 * 3 * (0.5 * a - 2 * b) for a, b in ((1, 2), (0, -1), (4, 0.5))]
    options = {"lengths": lengths, "scale": 0.25, "backend": backend}
    torch.testing.assert_close(
        attention_scores(target, states, w, normalize=None, **options),
        numbers(*e, 0.25 * -1 * (0.5 * 7 - 2 * 3), 0, 0).view(2, 3),
    )
    torch.testing.assert_close(attention_scores(target, states, w, **options), numbers(*softmax(e), 1, 0, 0).view(2, 3))


@BACKENDS
def test_din_scores_by_hand(backend: str) -> None:
    """H = 1 and one hidden unit: W_1 = (2, -1, 0.5, 3) on [q, k, q - k, q k], b_1 = 0.1, w_2 = -1.5, b_2 = 0.2."""
    q, steps = 0.4, (1.0, -0.7, 0.3)
    e = [-1.5 * sigmoid(2 * q - k + 0.5 * (q - k) + 3 * q * k + 0.1) + 0.2 for k in steps]
    weights, biases = [numbers(2, -1, 0.5, 3).view(1, 4), numbers(-1.5).view(1, 1)], [numbers(0.1), numbers(0.2)]
    arguments = (numbers(q).view(1, 1), numbers(*steps).view(1, 3, 1), weights, biases)
    scores = attention_scores(*arguments, kind="din", normalize=None, backend=backend)
    torch.testing.assert_close(scores, numbers(*e).view(1, 3))
    torch.testing.assert_close(
        attention_scores(*arguments, kind="din", backend=backend), numbers(*softmax(e)).view(1, 3)
    )


def one_term(logit: float, eps: float | str) -> float:
    if eps == "clamp":
        return min(-math.log(sigmoid(logit)), 100)
    return -math.log(sigmoid(logit) + eps)


@BACKENDS
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-2, "clamp"])
def test_inner_loss_by_hand(eps: float | str, shift: bool, backend: str) -> None:
    """H = 1, K = 2, T = 4: rows of 3, 1 and 2 steps. Two pairs, none and one; with behaviours in place, 3, 1 and 2."""
    lengths = [3, 1, 2]
    states, positive = ((torch.arange(12.0).double().view(3, 4, 1) * c).sin() for c in (1.3, 2.1))
    negative = (torch.arange(24.0).double().view(3, 4, 2, 1) * 0.7).cos()
    ahead = int(shift)
    positives: list[list[float]] = [[] for _ in lengths]  # what pairs of each row add: positives, both negatives
    negatives: list[list[float]] = [[] for _ in lengths]
    for b, length in enumerate(lengths):
        for t in range(length - ahead):
            h = float(states[b, t])
            positives[b].append(one_term(h * float(positive[b, t + ahead]), eps))
            negatives[b] += [one_term(-h * float(negative[b, t + ahead, k]), eps) for k in range(2)]
    p, n, pairs = (sum(map(sum, positives)), sum(map(sum, negatives)), sum(map(len, positives)))
    expected = {
        "joint": (p + n) / (3 * pairs),
        "separate": p / pairs + n / (2 * pairs),
        "padded": (p + n) / (3 * (4 - ahead)),
        "row": sum((sum(a) + sum(b)) / (3 * len(a)) for a, b in zip(positives, negatives, strict=True) if a) / 3,
    }
    for normalizer, value in expected.items():
        loss = auxiliary_loss(
            states, positive, negative, lengths=torch.tensor(lengths), normalizer=normalizer, eps=eps, shift=shift,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, numbers(value)[0], rtol=1e-12, atol=0, msg=normalizer)


@BACKENDS
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
def test_network_loss_is_torchs_cross_entropy(affine: bool, outputs: int, backend: str) -> None:
    """Positives are class 1 of a sigmoid, or class 0 of a softmax; an affine map acts on [h, e] before the network."""
    network = modules((5, 4, outputs), nn.PReLU(init=0.2))
    h, e, n = (torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (3, 2, 2))
    scale, move = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = [torch.cat((h, other), 2).flatten(0, 1) for other in (e, n)]
    x = [network(scale * part + move if affine else part) for part in x]
    if outputs == 1:
        ones = torch.ones(6, dtype=torch.float64)
        loss = nn.BCEWithLogitsLoss()(torch.cat(x).squeeze(1), torch.cat((ones, 0 * ones)))
    else:
        loss = nn.CrossEntropyLoss()(torch.cat(x), torch.tensor([0] * 6 + [1] * 6))
    ours = auxiliary_loss(
        h, e, n, **arguments(network), kind="mlp", activation="prelu", shift=False, backend=backend,
        affine=(scale, move) if affine else None,
    )  # fmt: skip
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    leaves = [h, e, n, *network.parameters(), *([scale, move] if affine else [])]
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in (ours, loss)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def scalars() -> dict[str, tuple[Tensor, object]]:
    g = torch.Generator().manual_seed(0)
    x, other, negative = (torch.randn(2, 4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    w_ih, w_hh = (torch.randn(9, 3, generator=g, dtype=torch.float64) for _ in range(2))
    attention, lengths = torch.rand(2, 4, generator=g, dtype=torch.float64), torch.tensor([4, 2])
    return {
        "recurrence": (x, lambda x: augru(x, attention, w_ih, w_hh, lengths=lengths)[0].sin().sum()),
        "attention": (x, lambda x: attention_scores(other[:, 0], x, lengths=lengths).sin().sum()),
        "auxiliary_loss": (x, lambda x: auxiliary_loss(x, other, negative, lengths=lengths)),
    }


@pytest.mark.parametrize("op", scalars())
def test_definition_is_differentiated_below_autograd(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in graphs of torch.compile: a raw op is called with autograd's dispatch keys excluded, and asks autograd."""
    x, function = scalars()[op]
    backend = importlib.import_module(f"dien_kernels.ops.{op}.reference_backend")
    evaluate = backend.outputs_and_gradients_of
    calls = []

    def below(*given: object) -> object:
        calls.append(op)
        with torch._C._AutoDispatchBelowAutograd():
            return evaluate(*given)

    monkeypatch.setattr(backend, "outputs_and_gradients_of", below)
    leaf = x.clone().requires_grad_()
    found = {}
    for name in ("torch", "reference"):
        with use_backend(name):
            (found[name],) = torch.autograd.grad(function(leaf), leaf)
    assert calls == [op]
    assert found["torch"].any()
    torch.testing.assert_close(found["reference"], found["torch"], rtol=1e-12, atol=1e-15)
