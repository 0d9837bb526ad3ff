"""layers.GRU on lengths, masks and offsets: every row alone through torch.nn.GRU, put where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dien_kernels.layers import GRU
from tests.layers.support import DTYPES, H, I, assert_twins_agree, randn, twins

pytestmark = pytest.mark.usefixtures("one_thread")
B, T = 5, 4
STEPS = {  # the valid steps of each row
    "lengths": [[0, 1], [], [0], [0, 1, 2, 3], [0, 1, 2]],
    "left": [[2, 3], [], [3], [0, 1, 2, 3], [1, 2, 3]],
    "holes": [[0, 3], [], [2], [0, 1, 2, 3], [1, 3]],
    "empty": [[]] * B,
    "full": [list(range(T))] * B,
}
STACKS: list[dict[str, Any]] = [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}]
IDS = ["one", "both-ways", "two-both-ways"]


def mask_of(steps: list[list[int]]) -> Tensor:
    mask = torch.zeros(len(steps), T, dtype=torch.bool)
    for row, valid in enumerate(steps):
        mask[row, valid] = True
    return mask


def row_by_row(steps: list[list[int]], padded: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """torch.nn.GRU on each row's valid steps alone; batch first. Empty rows end in hx."""

    def run(layer: torch.nn.GRU, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        directions = 2 if layer.bidirectional else 1
        out = 0 * input.sum() + input.new_zeros(len(steps), T, directions * H)  # in the graph, empty or not
        last = []
        for row, valid in enumerate(steps):
            y, h = input.new_zeros(0, directions * H), hx[:, row]
            if valid:
                y, h = layer(input[row, valid], hx[:, row].contiguous())
            last.append(h)
            for t in range(T):
                parts = []
                for d in range(directions):
                    before = [i for i, s in enumerate(valid) if (s <= t if d == 0 else s >= t)]
                    own = y[:, d * H : (d + 1) * H]
                    if t in valid or (padded == "carry" and before):
                        parts.append(own[before[-1] if d == 0 else before[0]])
                    elif padded == "carry":
                        parts.append(hx[len(hx) - directions + d, row])
                    else:
                        parts.append(own.new_zeros(H))
                out = out.index_put((torch.tensor(row), torch.tensor(t)), torch.cat(parts))
        return out, torch.stack(last, 1)

    return run


def described(kind: str, index: torch.dtype = torch.int64) -> dict[str, Tensor]:
    if kind in ("lengths", "empty"):
        return {"lengths": torch.tensor([len(s) for s in STEPS[kind]], dtype=index)}
    return {} if kind == "full" else {"mask": mask_of(STEPS[kind])}


def first(options: dict[str, Any]) -> Tensor:
    return randn(options.get("num_layers", 1) * (1 + options.get("bidirectional", False)), B, H, seed=4)


@pytest.mark.parametrize("padded", ["zero", "carry"])
@pytest.mark.parametrize("options", STACKS, ids=IDS)
@pytest.mark.parametrize("kind", STEPS)
def test_batch_first(kind: str, options: dict[str, Any], padded: str) -> None:
    twin = twins(batch_first=True, padded=padded, **options)
    assert_twins_agree(
        twin,
        lambda layer, input, hx: layer(input, hx, **described(kind)),
        row_by_row(STEPS[kind], padded),
        input=randn(B, T, I),
        hx=first(options),
    )


@pytest.mark.parametrize("padded", ["zero", "carry"])
@pytest.mark.parametrize("kind", ["lengths", "holes"])
def test_time_major(kind: str, padded: str) -> None:
    """lengths and mask are the same; input and output are transposed, in memory too."""

    def oracle(layer: torch.nn.GRU, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n = row_by_row(STEPS[kind], padded)(layer, input.transpose(0, 1), hx)
        return y.transpose(0, 1), h_n

    options = {"num_layers": 2, "bidirectional": True}
    assert_twins_agree(
        twins(padded=padded, **options),
        lambda layer, input, hx: layer(input, hx, **described(kind, torch.int32)),
        oracle,
        input=randn(T, B, I),
        hx=first(options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["lengths", "holes"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    assert_twins_agree(
        twins(dtype, batch_first=True, bidirectional=True, padded="carry"),
        lambda layer, input, hx: layer(input, hx, **described(kind)),
        row_by_row(STEPS[kind], "carry"),
        input=randn(B, T, I),
        hx=randn(2, B, H, seed=4),
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", STACKS, ids=IDS)
def test_jagged(options: dict[str, Any], batch_first: bool) -> None:
    """[N, I] and offsets, whatever batch_first says; the same numbers as lengths."""
    steps = STEPS["lengths"]
    offsets = torch.tensor([0, *(len(s) for s in steps)]).cumsum(0)
    valid = mask_of(steps)

    def oracle(layer: torch.nn.GRU, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        x = input.new_zeros(B, T, I).index_put(valid.nonzero(as_tuple=True), input)
        y, h_n = row_by_row(steps, "zero")(layer, x, hx)
        return y[valid], h_n

    assert_twins_agree(
        twins(batch_first=batch_first, **options),
        lambda layer, input, hx: layer(input, hx, offsets=offsets),
        oracle,
        input=randn(int(offsets[-1]), I),
        hx=first(options),
    )


@pytest.mark.parametrize("kind", ["lengths", "left", "holes"])
@pytest.mark.parametrize("padded", ["zero", "carry"])
def test_nan_in_padding_reaches_nothing(kind: str, padded: str) -> None:
    layer = GRU(I, H, 2, batch_first=True, bidirectional=True, padded=padded)
    outside = ~mask_of(STEPS[kind]).unsqueeze(2)
    found = []
    for filler in (0.0, float("nan")):
        x = randn(B, T, I).masked_fill(outside, filler).requires_grad_()
        y, h_n = layer(x, **described(kind))
        grads = torch.autograd.grad((y.square().sum() + h_n.sum()), (x, *layer.parameters()))
        found.append((y, h_n, *grads))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)
    assert not found[1][2].masked_select(outside).any()


def test_left_padding_is_the_row_without_it() -> None:
    """The same steps, shifted: the same last state and the same outputs, shifted."""
    layer = GRU(I, H, batch_first=True, bidirectional=True)
    x = randn(1, 3, I)
    alone, h_alone = layer(x)
    shifted = torch.cat((torch.full((1, 2, I), 7.0), x), 1)
    y, h_n = layer(shifted, mask=torch.tensor([[False, False, True, True, True]]))
    torch.testing.assert_close(y[:, 2:], alone)
    torch.testing.assert_close(h_n, h_alone)
    assert not y[:, :2].any()


def test_no_steps_at_all() -> None:
    for layer in (GRU(I, H, 2, batch_first=True, bidirectional=True), GRU(I, H, 2, bidirectional=True)):
        hx = randn(4, B, H)
        shape = (B, 0, I) if layer.batch_first else (0, B, I)
        for extra in ({}, {"lengths": torch.zeros(B).long()}, {"mask": torch.zeros(B, 0).bool()}):
            y, h_n = layer(torch.empty(shape), hx, **extra)
            assert y.shape == (*shape[:2], 2 * H)
            assert torch.equal(h_n, hx)
    y, h_n = GRU(I, H)(torch.empty(0, I), offsets=torch.zeros(4).long())
    assert (y.shape, h_n.shape) == ((0, H), (1, 3, H))
    assert not h_n.any()
