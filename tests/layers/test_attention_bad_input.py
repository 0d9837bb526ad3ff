"""AUGRU, attention units, Dice: a message names the argument, says what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from dien_kernels.layers import AUGRU, BilinearAttention, Dice, DINAttention
from tests.layers.support import bad, expect, index, z

pytestmark = pytest.mark.usefixtures("one_thread")
I, H, B, T = 3, 4, 2, 5  # noqa: E741


def augru(**options: Any) -> AUGRU:
    return AUGRU(I, H, **options)


def bilinear(**options: Any) -> BilinearAttention:
    return BilinearAttention(2, H, **options)


def din(**options: Any) -> DINAttention:
    return DINAttention(H, (6,), **options)


A, Y = z(B, T), z(B, T, I)


class Packed(nn.Module):
    """A linear layer as quantisation leaves it: the weight is read by a method."""

    def weight(self) -> Tensor:
        return z(6, 4 * H)


def converted(activation: str) -> DINAttention:
    unit = din(activation=activation)
    unit.linears[0] = Packed()
    return unit


@bad(
    ("no-tensor", lambda: augru()(None, A), TypeError, "x must be a torch.Tensor, got NoneType"),
    (
        "size",
        lambda: augru()(z(B, T, 5), A),
        ValueError,
        "x must have input_size = 3 features last, got shape",
    ),
    (
        "dtype",
        lambda: augru()(Y.double(), A),
        TypeError,
        r"x must have the dtype of the weights, torch\.float32",
    ),
    (
        "device",
        lambda: augru()(Y.to("meta"), A),
        ValueError,
        "x must be on the device of the weights, cpu, got meta",
    ),
    ("attention", lambda: augru()(Y, z(T, B)), ValueError, r"attention .*\[B, T\] = \(2, 5\), got \(5, 2\)"),
    ("attention-none", lambda: augru()(Y, None), TypeError, "attention must be a torch.Tensor, got NoneType"),
    (
        "h0",
        lambda: augru()(Y, A, h0=z(B, 5)),
        ValueError,
        r"h0 must have shape \[B, H\] = \(2, 4\), got \(2, 5\)",
    ),
    (
        "history",
        lambda: augru()(Y, A, history=index(0, 2)),
        ValueError,
        "history must lie between 0 and U - 1 = 1",
    ),
    (
        "lengths",
        lambda: augru()(Y, A, lengths=index(6, 0)),
        ValueError,
        "lengths must lie between 0 and T = 5",
    ),
)
def test_attention_grus(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    expect(call, error, message)


S, Q2, QH = z(B, T, H), z(B, 2), z(B, H)
FLAT, OFF = z(7, H), index(0, 3, 7)


def dice() -> DINAttention:
    return din(activation="dice")


@bad(
    (
        "target",
        lambda: bilinear()(z(B, 5), S),
        ValueError,
        "target must have target_size = 2 features last, got",
    ),
    (
        "states",
        lambda: bilinear()(Q2, z(B, T, 3)),
        ValueError,
        "states must have hidden_size = 4 features last, got",
    ),
    ("target-list", lambda: bilinear()([1], S), TypeError, "target must be a torch.Tensor, got list"),
    (
        "states-dtype",
        lambda: bilinear()(Q2, S.double()),
        TypeError,
        "states must have the dtype of the weights",
    ),
    (
        "rows",
        lambda: bilinear()(z(3, 2), S),
        ValueError,
        r"target must have shape \[B, D\] = \(2, 2\), got \(3, 2\)",
    ),
    ("din-target", lambda: din()(Q2, S), ValueError, "target must have hidden_size = 4 features last, got"),
    (
        "din-states",
        lambda: din()(QH, z(B, T, 3)),
        ValueError,
        "states must have hidden_size = 4 features last, got",
    ),
    (
        "dice-target",
        lambda: dice()(z(3, H), S),
        ValueError,
        r"target must have shape \[B, H\] = \(2, 4\), got \(3, 4\)",
    ),
    (
        "dice-target-1-d",
        lambda: dice()(z(H), S),
        ValueError,
        r"target must have shape \[B, H\] = \(2, 4\), got \(4,\)",
    ),
    (
        "dice-lengths",
        lambda: dice()(QH, S, lengths=index(6, 1)),
        ValueError,
        "lengths must lie between 0 and T = 5",
    ),
    (
        "dice-history",
        lambda: dice()(QH, S, history=index(0, 2)),
        ValueError,
        "history must lie between 0 and U - 1 = 1",
    ),
    (
        "dice-history-low",
        lambda: dice()(QH, S, history=index(0, -1)),
        ValueError,
        "history must lie between 0 and",
    ),
    (
        "dice-offsets",
        lambda: dice()(QH, FLAT, offsets=index(0, 3, 6)),
        ValueError,
        "offsets must end with N = 7",
    ),
    (
        "dice-mask",
        lambda: dice()(QH, S, mask=z(T, B).bool()),
        ValueError,
        r"mask must have shape \[B, T\] = \(2, 5\)",
    ),
    (
        "dice-two",
        lambda: dice()(QH, S, lengths=index(1, 1), mask=z(B, T).bool()),
        ValueError,
        "at most one of lengths, offsets and mask may be given, got lengths and mask",
    ),
    (
        "dice-total-extra",
        lambda: dice()(QH, S, rows_total=3),
        ValueError,
        "rows_total must be None unless offsets and history are given, got 3",
    ),
    (
        "dice-total-missing",
        lambda: dice()(QH, FLAT, offsets=OFF, history=index(0, 1)),
        ValueError,
        "rows_total must be given with offsets and history: the steps of all rows, got None",
    ),
    (
        "dice-total-wrong",
        lambda: dice()(QH, FLAT, offsets=OFF, history=index(1, 1), rows_total=7),
        ValueError,
        "rows_total must be 8, the steps of the histories named, got 7",
    ),
    (
        "dice-total-type",
        lambda: dice()(QH, FLAT, offsets=OFF, history=index(1, 1), rows_total=8.0),
        TypeError,
        "rows_total must be an int, got float",
    ),
    *(
        (
            f"converted-{activation}",
            lambda activation=activation: converted(activation)(QH, S),
            TypeError,
            r"linears\[0\]\.weight must be a torch\.Tensor, got method",
        )
        for activation in ("sigmoid", "dice")
    ),
    ("dice-list", lambda: Dice(3)([1.0]), TypeError, "s must be a torch.Tensor, got list"),
    ("dice-3-d", lambda: Dice(3)(z(2, 2, 3)), ValueError, r"s must have shape \[P, 3\], got \(2, 2, 3\)"),
    ("dice-size", lambda: Dice(3)(z(2, 4)), ValueError, r"s must have shape \[P, 3\], got \(2, 4\)"),
)
def test_attention_units(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    expect(call, error, message)
