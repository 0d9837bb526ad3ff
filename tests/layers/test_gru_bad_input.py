"""GRU and all constructors: a message names the argument, says what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from dien_kernels.layers import AGRU, AIGRU, AUGRU, GRU, BilinearAttention, Dice, DINAttention
from dien_kernels.ops.recurrence.forms import FORMS
from tests.layers.support import Bad, bad, expect, index, z

pytestmark = pytest.mark.usefixtures("one_thread")
I, H, B, T = 3, 4, 2, 5  # noqa: E741


def sizes(name: str, make: Callable[..., Any]) -> list[Bad]:
    """A size must be an int of at least 1."""
    return [
        (f"{name}-float", lambda: make(2.0), TypeError, rf"{name} must be an int, got float"),
        (f"{name}-bool", lambda: make(True), TypeError, rf"{name} must be an int, got bool"),
        (f"{name}-zero", lambda: make(0), ValueError, rf"{name} must be at least 1, got 0"),
    ]


def option(name: str, layer: Callable[..., Any], allowed: str) -> Bad:
    bad = (lambda: layer(**{name: "some"}), ValueError, rf"{name} must be one of \({allowed}\), got 'some'")
    return (f"{getattr(layer, '__name__', 'layer')}-{name}", *bad)


def gru(**options: Any) -> GRU:
    return GRU(I, H, **options)


def augru(**options: Any) -> AUGRU:
    return AUGRU(I, H, **options)


def bilinear(**options: Any) -> BilinearAttention:
    return BilinearAttention(2, H, **options)


def din(**options: Any) -> DINAttention:
    return DINAttention(H, (6,), **options)


SIDES = "None, 'keep', 'candidate'"


@bad(
    *sizes("input_size", lambda n: GRU(n, H)),
    *sizes("hidden_size", lambda n: GRU(I, n)),
    *sizes("num_layers", lambda n: GRU(I, H, n)),
    *sizes("input_size", lambda n: AUGRU(n, H)),
    *sizes("hidden_size", lambda n: AIGRU(I, n)),
    *sizes("target_size", lambda n: BilinearAttention(n, H)),
    *sizes("hidden_size", lambda n: BilinearAttention(2, n)),
    *sizes("hidden_size", lambda n: DINAttention(n)),
    *sizes(r"units\[1\]", lambda n: DINAttention(H, (4, n))),
    *sizes("size", Dice),
    option("reset", gru, "'after', 'before'"),
    option("update", gru, SIDES),
    option("padded", gru, "'zero', 'carry'"),
    option("reset", augru, "'after', 'before'"),
    option("update", augru, SIDES),
    option("padded", augru, "'zero', 'carry'"),
    option("form", augru, ", ".join(map(repr, FORMS))),
    option("bias", augru, "True, False, 'single', 'tied'"),
    option("normalize", bilinear, "'softmax', None"),
    option("normalize", din, "'softmax', None"),
    option("activation", din, "'sigmoid', 'relu', 'prelu', 'dice', None"),
    ("bias", lambda: gru(bias="tied"), TypeError, "bias must be a bool or 'single', got 'tied'"),
    (
        "gate_bias",
        lambda: gru(bias=False, gate_bias=1.0),
        ValueError,
        "gate_bias must be None for a recurrence without",
    ),
    ("weight_init", lambda: gru(weight_init="zeros"), ValueError, "weight_init must be one of"),
    ("batch_first", lambda: gru(batch_first=1), TypeError, "batch_first must be a bool, got int"),
    (
        "bidirectional",
        lambda: gru(bidirectional=None),
        TypeError,
        "bidirectional must be a bool, got NoneType",
    ),
    (
        "dropout-type",
        lambda: gru(dropout="0.5"),
        TypeError,
        "dropout must be a number between 0 and 1, got str",
    ),
    (
        "dropout-bool",
        lambda: gru(dropout=True),
        TypeError,
        "dropout must be a number between 0 and 1, got bool",
    ),
    ("dropout-range", lambda: gru(dropout=1.5), ValueError, "dropout must lie between 0 and 1, got 1.5"),
    ("bias-none", lambda: AGRU(I, H, None), TypeError, "bias must be one of .*, got NoneType"),
    ("din-bias", lambda: din(bias="tied"), TypeError, "bias must be a bool, got str"),
    ("units", lambda: DINAttention(H, 4), TypeError, "units must be a sequence of ints, got int"),
    ("scale", lambda: bilinear(scale="1"), TypeError, "scale must be a number or None, got str"),
    ("din-scale", lambda: din(scale=True), TypeError, "scale must be a number or None, got bool"),
    *(
        (f"{make.__name__}-{case}", lambda make=make, options=options: make(**options), error, message)
        for make in (gru, augru, bilinear, din)
        for case, options, error, message in (
            ("backend", {"backend": "gpu"}, ValueError, "backend must be one of .*'auto'.*, got 'gpu'"),
            ("dtype", {"dtype": torch.int64}, TypeError, r"dtype must be float32, .*, got torch\.int64"),
        )
    ),
    ("dice-eps", lambda: Dice(3, eps="a"), TypeError, "eps must be a number, got str"),
    ("dice-eps-low", lambda: Dice(3, eps=-1), ValueError, "eps must be above 0 and finite, got -1"),
    ("dice-momentum", lambda: Dice(3, momentum=2.0), ValueError, "momentum must lie between 0 and 1, got 2.0"),
    ("dice-dtype", lambda: Dice(3, dtype=torch.int64), TypeError, r"dtype must be float32, .*, got torch\.int64"),
)
def test_constructors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    expect(call, error, message)


X = z(T, B, I)


@bad(
    ("no-tensor", lambda: gru()([1.0]), TypeError, "input must be a torch.Tensor, got list"),
    ("int", lambda: gru()(X.long()), TypeError, r"input must have dtype float32, .*, got torch\.int64"),
    (
        "dtype",
        lambda: gru()(X.double()),
        TypeError,
        r"input must have the dtype of the weights, torch\.float32, got",
    ),
    (
        "device",
        lambda: gru()(X.to("meta")),
        ValueError,
        "input must be on the device of the weights, cpu, got meta",
    ),
    (
        "size",
        lambda: gru()(z(T, B, 7)),
        ValueError,
        r"input must have input_size = 3 features last, got .*7\)",
    ),
    (
        "scalar",
        lambda: gru()(z()),
        ValueError,
        r"input must have input_size = 3 features last, got shape \(\)",
    ),
    (
        "1-d",
        lambda: gru()(z(I)),
        ValueError,
        r"input must be \[T, I\] or have 3 dimensions, got shape \(3,\)",
    ),
    (
        "4-d",
        lambda: gru()(z(1, T, B, I)),
        ValueError,
        r"input must be .* 3 dimensions, got shape \(1, 5, 2, 3\)",
    ),
    ("hx-list", lambda: gru()(X, [0.0]), TypeError, "hx must be a torch.Tensor, got list"),
    (
        "hx",
        lambda: gru()(X, z(1, B, 5)),
        ValueError,
        r"hx must have .*\[directions \* num_layers, B, H\] = \(1, 2, 4\)",
    ),
    (
        "hx-layers",
        lambda: gru(num_layers=2)(X, z(1, B, H)),
        ValueError,
        r"hx .* = \(2, 2, 4\), got \(1, 2, 4\)",
    ),
    ("hx-2-d", lambda: gru()(X, z(1, H)), ValueError, r"hx must have shape .* = \(1, 2, 4\), got \(1, 4\)"),
    (
        "hx-3-d",
        lambda: gru()(X[:, 0], z(1, 1, H)),
        ValueError,
        r"hx .*layers, H\] = \(1, 4\), got \(1, 1, 4\)",
    ),
    (
        "hx-dtype",
        lambda: gru()(X, z(1, B, H).double()),
        TypeError,
        r"hx must have dtype torch\.float32, got torch\.float64",
    ),
    (
        "hx-device",
        lambda: gru()(X, z(1, B, H).to("meta")),
        ValueError,
        "hx must be on the device of input, cpu",
    ),
    (
        "two",
        lambda: gru()(X, lengths=index(1, 2), mask=z(B, T).bool()),
        ValueError,
        "at most one .* lengths and mask",
    ),
    (
        "lengths-B",
        lambda: gru()(X, lengths=index(1, 2, 3)),
        ValueError,
        r"lengths must have shape .*, got \(3,\)",
    ),
    (
        "lengths-dtype",
        lambda: gru()(X, lengths=z(B)),
        TypeError,
        "lengths must have dtype int64 or int32, got",
    ),
    ("lengths-list", lambda: gru()(X, lengths=[1, 2]), TypeError, "lengths must be a torch.Tensor, got list"),
    (
        "lengths-low",
        lambda: gru()(X, lengths=index(-1, 2)),
        ValueError,
        "lengths must lie between 0 and T = 5",
    ),
    (
        "lengths-high",
        lambda: gru()(X, lengths=index(6, 2)),
        ValueError,
        "lengths must lie between 0 and T = 5",
    ),
    (
        "mask-shape",
        lambda: gru()(X, mask=z(T, B).bool()),
        ValueError,
        r"mask .*\[B, T\] = \(2, 5\), got \(5, 2\)",
    ),
    (
        "mask-dtype",
        lambda: gru()(X, mask=z(B, T)),
        TypeError,
        r"mask must have dtype bool, got torch\.float32",
    ),
    (
        "offsets-3-d",
        lambda: gru()(X, offsets=index(0, 5)),
        ValueError,
        r"input must be \[N, features\] with offsets",
    ),
    ("offsets-end", lambda: gru()(X[:, 0], offsets=index(0, 4)), ValueError, "offsets must end with N = 5"),
    (
        "offsets-down",
        lambda: gru()(X[:, 0], offsets=index(0, 3, 2, 5)),
        ValueError,
        "offsets must be ascending",
    ),
    (
        "unbatched-lengths",
        lambda: gru()(X[:, 0], lengths=index(3)),
        ValueError,
        "lengths must be None for a 2-D input",
    ),
    (
        "unbatched-mask",
        lambda: gru()(X[:, 0], mask=z(5).bool()),
        ValueError,
        "mask must be None for a 2-D input",
    ),
    (
        "packed-sizes",
        lambda: gru()(PackedSequence(z(5, I), torch.tensor([3.0, 2.0]))),
        TypeError,
        r"input.batch_sizes must be int64 of shape \[T\], got torch\.float32 \(2,\)",
    ),
)
def test_gru(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    expect(call, error, message)


def _replaced(layer: nn.Module, name: str, value: torch.Tensor) -> nn.Module:
    setattr(layer, name, nn.Parameter(value))
    return layer


@pytest.mark.parametrize("name", ["weight_hh_l1_reverse", "bias_ih_l1_reverse", "weight_ih_l1"])
def test_a_parameter_that_does_not_fit_is_named_as_the_module_names_it(name: str) -> None:
    def layer() -> GRU:
        return gru(num_layers=2, bidirectional=True)

    good = getattr(layer(), name).detach()
    first = r"input, torch\.float32" if "bias" not in name else r"dtype torch\.float32"
    expect(lambda: _replaced(layer(), name, good[1:])(X), ValueError, rf"{name} must have shape \[3 \* H.* got")
    expect(lambda: _replaced(layer(), name, good.double())(X), TypeError, rf"{name} must have .*{first}, got")
    expect(
        lambda: _replaced(layer(), name, good.to("meta"))(X),
        ValueError,
        f"{name} must be on the device of input, cpu, got meta",
    )


@pytest.mark.parametrize("name", ["weight_hh", "bias_hh"])
def test_a_parameter_of_an_attention_gru_is_named_too(name: str) -> None:
    good = getattr(augru(), name).detach()
    x, a = z(B, T, I), z(B, T)
    expect(lambda: _replaced(augru(), name, good[1:])(x, a), ValueError, rf"{name} must have shape \[3H.* got")
    expect(lambda: _replaced(augru(), name, good.double())(x, a), TypeError, rf"{name} must have .*float32, got")
