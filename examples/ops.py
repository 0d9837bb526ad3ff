"""What the package does, in less than a minute: ragged histories, the same numbers, the time they take.

Errors are against the ``reference`` backend in float64; times are medians over rounds in which every variant
runs once, so that a busy moment of the machine hits all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import dien_kernels
from dien_kernels import _native, augru, gru

BATCH, STEPS, SIZE = 256, 100, 36  # 36: two embeddings of 18, as in the DIEN paper
ROUNDS = 9


def histories(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Behaviours, their number in each row (a quarter of the longest on average), and attention over them."""
    lengths = torch.empty(BATCH).exponential_(4 / STEPS, generator=generator).long().clamp(1, STEPS)
    x = torch.randn(BATCH, STEPS, SIZE, generator=generator)
    logits = torch.randn(BATCH, STEPS, generator=generator)
    past = torch.arange(STEPS) >= lengths[:, None]
    return x, lengths, torch.softmax(logits.masked_fill(past, -torch.inf), dim=1)


def largest_errors(x: Tensor, lengths: Tensor, attention: Tensor, weights: list[Tensor]) -> list[float]:
    """The largest relative error of the AUGRU's states and of its gradients, float32 against float64."""
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "auto")):
        arguments = [t.detach().to(dtype).requires_grad_() for t in (x, attention, *weights)]
        y, h_n = augru(*arguments, lengths=lengths, backend=backend)
        gradients = torch.autograd.grad(y.square().sum() + h_n.sum(), arguments)
        results.append([y.detach(), *gradients])
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each variant, interleaved; the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x, lengths, attention = histories(generator)
    layer = torch.nn.GRU(SIZE, SIZE, batch_first=True)
    weights = [p.detach().clone() for p in layer.parameters()]
    versions = f"dien_kernels {dien_kernels.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads")
    print(f"native code: {_native.cpu_isa() if _native.available() else f'absent, {_native.reason()}'}")
    mean = lengths.float().mean()
    print(f"{BATCH} histories of 1 to {STEPS} behaviours, {mean:.1f} on average; I = H = {SIZE}\n")

    states, *gradients = largest_errors(x, lengths, attention, weights)
    print("AUGRU in float32 against the float64 reference, relative to the largest value:")
    print(f"  states {states:.1e}, the worst of {len(gradients)} gradients {max(gradients):.1e}\n")

    trained = [w.clone().requires_grad_() for w in weights]
    inputs = x.clone().requires_grad_()

    def packed() -> Tensor:
        sequence = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        states: Tensor = layer(sequence)[0].data
        return states

    rows: dict[str, Any] = {"lengths": lengths}
    plain = rows | {"backend": "torch"}
    variants: dict[str, Callable[[], Tensor]] = {
        "GRU    dien_kernels": lambda: gru(inputs, *trained, **rows)[0],
        "GRU    torch.nn.GRU, packed": packed,
        "GRU    torch.nn.GRU, padded": lambda: layer(inputs)[0],
        "GRU    plain torch": lambda: gru(inputs, *trained, **plain)[0],
        "AUGRU  dien_kernels": lambda: augru(inputs, attention, *trained, **rows)[0],
        "AUGRU  plain torch": lambda: augru(inputs, attention, *trained, **plain)[0],
    }

    def inference(variant: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(variant)

    def training(variant: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: variant().sum().backward()

    forward = medians({name: inference(v) for name, v in variants.items()})
    both = medians({name: training(v) for name, v in variants.items()})
    print(f"{'median of ' + str(ROUNDS) + ', ms':<28} {'forward':>10} {'fwd + bwd':>10}")
    for name in variants:
        print(f"{name:<28} {forward[name]:>10.2f} {both[name]:>10.2f}")
    print("\nThe padded nn.GRU also computes the padding: its last states are those after it.")


if __name__ == "__main__":
    main()
