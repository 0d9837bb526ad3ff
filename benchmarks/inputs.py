"""The tensors of a case, the same for every provider, and what a provider makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import AUXILIARY_WIDTHS, DIN_WIDTHS, Case

SEED = 2018  # every provider, process and commit measures the same numbers


class Inputs(NamedTuple):
    leaves: dict[str, Tensor]  # what is differentiated, by name
    lengths: Tensor | None  # [B]; None where every row is full
    dresult: Tensor  # the gradient that comes from above; zero past each length
    valid: Tensor | None  # where results are compared; None: everywhere
    data: Any = None  # what is read and has no derivative: a batch of ids, a log

    def to(self, dtype: torch.dtype) -> Inputs:
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        return self._replace(leaves=leaves, dresult=self.dresult.to(dtype))


Tensors = dict[str, Tensor]


def _unchanged(result: Any) -> Any:
    return result


class Program(NamedTuple):
    """What a provider builds: a call without arguments, and its own leaves under the names of the inputs'."""

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    note: str = ""
    dresult: Tensor | None = None  # where the result has another layout than the inputs' dresult
    padded: Callable[[Tensor], Tensor] = _unchanged  # brings such a result back, for the comparison
    as_inputs: Callable[[Tensors], Tensors] = _unchanged  # brings gradients into the inputs' layout
    optimise: Callable[[], object] | None = None  # with mode "step"
    check: Callable[[], str | None] | None = None  # says what is wrong; used instead of the comparison
    least_calls: int = 1  # in a visit
    variant: str = ""  # which of ``provider_dien_kernels.VARIANTS`` it computes, where not the case's own function
    mark: str = ""  # with it, what has wrong gradients is timed all the same, and its row says so

    def step(self, case: Case, inputs: Inputs) -> Callable[[], Tensor]:
        """The thing to be timed: the forward, or forward and backward with fresh gradients."""
        if not case.trains:
            return self.forward
        leaves = tuple(self.leaves.values())
        dresult = inputs.dresult if self.dresult is None else self.dresult

        def train() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            result = self.forward()
            torch.autograd.backward(result, dresult)
            if self.optimise is not None:
                self.optimise()
            return result

        return train


def relative_error(actual: Tensor, wanted: Tensor, valid: Tensor | None = None) -> float:
    """Relative to the largest value wanted; where that vanishes by mathematics (a bias before a softmax), absolute."""
    difference = actual.double() - wanted.double()
    difference = difference if valid is None else torch.where(valid, difference, 0)
    size = float(wanted.abs().max())
    return float(difference.abs().max()) / (size if size > 1e-12 else 1.0)


def draw_lengths(batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Geometric-like: exponential with mean T/4, rounded up, cut at T; one row has all T steps."""
    lengths = torch.empty(batch).exponential_(4 / steps, generator=generator).ceil().long().clamp(1, steps)
    lengths[torch.randint(batch, (), generator=generator)] = steps
    return lengths


def draw(case: Case) -> Inputs:
    """Of an op; models and loaders draw their own (``programs.draw``)."""
    generator = torch.Generator().manual_seed(SEED)
    batch, steps, _, hidden = case.size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weight(*shape: int, fan: int) -> Tensor:
        return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(fan)

    lengths = draw_lengths(batch, steps, generator) if case.length_distribution == "ragged" else None
    valid = None if lengths is None else torch.arange(steps) < lengths[:, None]
    leaves = _LEAVES[case.op](case, normal, weight)
    if case.op.startswith("auxiliary"):
        dresult, valid = torch.ones(()), None
    else:
        scores = case.op.startswith("attention")
        dresult = normal(batch, steps) if scores else normal(batch, steps, hidden)
        valid = valid if valid is None or scores else valid.unsqueeze(2).expand(batch, steps, hidden)
        dresult = dresult if valid is None else torch.where(valid, dresult, 0)
    return Inputs(leaves, lengths, dresult, valid).to(getattr(torch, case.dtype))


def _gru(case: Case, normal: Callable[..., Tensor], weight: Callable[..., Tensor]) -> dict[str, Tensor]:
    batch, steps, size, hidden = case.size
    return {
        "x": normal(batch, steps, size),
        "w_ih": weight(3 * hidden, size, fan=hidden),
        "w_hh": weight(3 * hidden, hidden, fan=hidden),
        "b_ih": weight(3 * hidden, fan=hidden),
        "b_hh": weight(3 * hidden, fan=hidden),
    }


def _augru(case: Case, normal: Callable[..., Tensor], weight: Callable[..., Tensor]) -> dict[str, Tensor]:
    return _gru(case, normal, weight) | {"attention": normal(case.batch, case.steps).sigmoid()}


def _shared(case: Case, normal: Callable[..., Tensor], weight: Callable[..., Tensor]) -> dict[str, Tensor]:
    """One history for the attention of all rows."""
    leaves = _gru(case._replace(batch=1), normal, weight)
    return leaves | {"attention": normal(case.batch, case.steps).sigmoid()}


def _layers(inputs: int, widths: tuple[int, ...], weight: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The layers of an MLP with one output: w0, b0, w1, b1, ..."""
    leaves: dict[str, Tensor] = {}
    for i, (fan, width) in enumerate(zip((inputs, *widths), (*widths, 1), strict=True)):
        leaves |= {f"w{i}": weight(width, fan, fan=fan), f"b{i}": weight(width, fan=fan)}
    return leaves


def _attention(case: Case, normal: Callable[..., Tensor], weight: Callable[..., Tensor]) -> dict[str, Tensor]:
    batch, steps, size, hidden = case.size
    leaves = {"target": normal(batch, size), "states": normal(batch, steps, hidden)}
    if case.op == "attention_din":
        return leaves | _layers(4 * hidden, DIN_WIDTHS, weight)
    return leaves | {"w0": weight(hidden, size, fan=hidden)}


def _auxiliary(case: Case, normal: Callable[..., Tensor], weight: Callable[..., Tensor]) -> dict[str, Tensor]:
    batch, steps, size, hidden = case.size
    leaves = {"states": normal(batch, steps, hidden) / math.sqrt(hidden)}
    leaves |= {"positive": normal(batch, steps, size), "negative": normal(batch, steps, size)}
    if case.op == "auxiliary_mlp":
        return leaves | _layers(hidden + size, AUXILIARY_WIDTHS, weight)
    return leaves


_LEAVES = {
    "gru": _gru,
    "augru": _augru,
    "augru_shared": _shared,
    "attention_bilinear": _attention,
    "attention_din": _attention,
    "auxiliary_inner": _auxiliary,
    "auxiliary_mlp": _auxiliary,
}


def layers_of(leaves: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and the biases among the leaves, in order."""
    names = sorted(leaves)
    return [leaves[n] for n in names if n[0] == "w" and n[1:].isdigit()], [
        leaves[n] for n in names if n[0] == "b" and n[1:].isdigit()
    ]
