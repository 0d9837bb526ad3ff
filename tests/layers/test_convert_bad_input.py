"""Loaders and from_weights: a message names the argument, says what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dien_kernels.layers import (
    AGRU,
    AUGRU,
    GRU,
    from_deepctr_torch,
    from_fuxictr,
    from_graphcore,
    from_keras,
    from_onednn,
    from_openvino,
    from_rechub,
    from_rows,
    from_tf,
)
from tests.layers.support import bad, expect, z

pytestmark = pytest.mark.usefixtures("one_thread")
I, H = 3, 4  # noqa: E741

GOOD: dict[Callable[..., Any], dict[str, tuple[int, ...]]] = {
    from_rows: {"weight_ih": (12, I), "weight_hh": (12, H), "bias_ih": (12,), "bias_hh": (12,)},
    from_deepctr_torch: {"weight_ih": (12, I), "weight_hh": (12, H), "bias_ih": (12,), "bias_hh": (12,)},
    from_fuxictr: {"x2h_weight": (12, I), "h2h_weight": (12, H), "x2h_bias": (12,), "h2h_bias": (12,)},
    from_tf: {"gates_kernel": (7, 8), "candidate_kernel": (7, H), "gates_bias": (8,), "candidate_bias": (H,)},
    from_graphcore: {"kernel": (7, 12), "bias": (12,)},
    from_keras: {"kernel": (I, 12), "recurrent_kernel": (H, 12), "bias": (2, 12)},
    from_rechub: {n: (I, H) if n[0] == "W" else (H, H) if n[0] == "U" else (1, H)
                  for n in ("Wu", "Uu", "bu", "Wr", "Ur", "br", "Wh", "Uh", "bh")},
    from_onednn: {"weights_layer": (I, 3, H), "weights_iter": (H, 3, H), "bias": (3, H)},
    from_openvino: {"w": (12, I), "r": (12, H), "b": (12,)},
}  # fmt: skip
ARGUMENTS = [pytest.param(f, n, id=f"{f.__name__}-{n}") for f, names in GOOD.items() for n in names]


@pytest.mark.parametrize("load, name", ARGUMENTS)
def test_loaders_name_the_tensor_that_does_not_fit(load: Callable[..., Any], name: str) -> None:
    good = {n: z(*size) for n, size in GOOD[load].items()}
    load(**good)
    wrong_shapes = [(), (5,), (2, 5), (3, 5, 7), (7, 2, 3, 5)]
    for size in wrong_shapes:
        # One matrix alone says what H is, so the message may name its partner: one of the two, and a shape.
        partners = {n for n in good if n[0].lower() not in "b" and "bias" not in n}
        names = {name} if name not in partners else partners
        with pytest.raises(ValueError) as caught:
            load(**(good | {name: z(*size)}))
        words = str(caught.value)
        assert words.split()[0] in names, words
        assert " must " in words, words
        assert ", got " in words, words
        assert name not in partners or size not in ((), (5,)) or words.startswith(name), words
    for value, kind in ((1.5, "float"), ([1.0], "list")):
        expect(
            lambda v=value: load(**(good | {name: v})),
            TypeError,
            rf"{name} must be a torch\.Tensor, got {kind}",
        )
    integers = z(*GOOD[load][name], dtype=torch.int64)
    expect(
        lambda: load(**(good | {name: integers})),
        TypeError,
        rf"{name} must have dtype float32.* got torch\.int64",
    )


ROWS = from_rows(z(12, I), z(12, H), z(12))


@bad(
    (
        "rows-update",
        lambda: from_rows(z(12, I), z(12, H), update="x"),
        ValueError,
        "update must be one of .*'x'",
    ),
    (
        "rows-form",
        lambda: from_rows(z(12, I), z(12, H), form="x"),
        ValueError,
        "form must be one of .*got 'x'",
    ),
    (
        "rows-reset",
        lambda: from_rows(z(12, I), z(12, H), reset="x"),
        ValueError,
        "reset must be one of .*got 'x'",
    ),
    (
        "graphcore-reset",
        lambda: from_graphcore(z(7, 12), reset=True),
        ValueError,
        "reset must be one of .*got True",
    ),
    (
        "keras-reset",
        lambda: from_keras(z(I, 12), z(H, 12), reset=0),
        ValueError,
        "reset must be one of .*got 0",
    ),
    (
        "keras-one",
        lambda: from_keras(z(I, 12), z(H, 12), z(12)),
        ValueError,
        r"bias .*\[2, 3H\] = \(2, 12\), got",
    ),
    (
        "keras-two",
        lambda: from_keras(z(I, 12), z(H, 12), z(2, 12), reset="before"),
        ValueError,
        r"bias must have shape \[3H\] = \(12,\), got \(2, 12\)",
    ),
    (
        "graphcore-two",
        lambda: from_graphcore(z(7, 12), z(3, 2, 4)),
        ValueError,
        r"bias .* or \[3, H\], H = 4, got",
    ),
    (
        "tf-one",
        lambda: from_tf(z(7, 8), z(7, 4), z(8)),
        ValueError,
        "candidate_bias must be given .*, got None",
    ),
    (
        "tf-other",
        lambda: from_tf(z(7, 8), z(7, 4), None, z(4)),
        ValueError,
        "gates_bias must be given .*, got None",
    ),
    ("tf-no-x", lambda: from_tf(z(4, 8), z(4, 4)), ValueError, "candidate_kernel .* with I >= 1, got"),
    (
        "onednn-lbr",
        lambda: from_onednn(z(I, 12), z(H, 12), z(3, H), lbr=True),
        ValueError,
        r"bias must have shape \[4, H\] = \(4, 4\) or \[4 \* H\], got \(3, 4\)",
    ),
    (
        "openvino-linear",
        lambda: from_openvino(z(12, I), z(12, H), z(12), linear_before_reset=True),
        ValueError,
        r"b must have shape \[4, H\] = \(4, 4\) or \[4 \* H\], got \(12,\)",
    ),
    ("rows-empty", lambda: from_rows(z(0, I), z(0, 0)), ValueError, r"weight_hh .*each size at least 1, got \(0, 0\)"),
    ("rows-no-input", lambda: from_rows(z(12, 0), z(12, H)), ValueError, "weight_ih .*each size at least 1, got"),
    ("keras-empty", lambda: from_keras(z(I, 0), z(0, 0)), ValueError, "recurrent_kernel .*each size at least 1, got"),
    *(
        (f"{cls.__name__}-none", lambda cls=cls: cls.from_weights(None), TypeError, "weights must be .*, got NoneType")
        for cls in (GRU, AGRU, AUGRU)
    ),
    ("side", lambda: ROWS.as_update("x"), ValueError, "side must be one of .*, got 'x'"),
    (
        "reset",
        lambda: AGRU.from_weights(ROWS, reset="before"),
        ValueError,
        "reset must be 'after', .* got 'before'",
    ),
    (
        "gru-reset",
        lambda: GRU.from_weights(ROWS, reset="before"),
        ValueError,
        "reset must be 'after', .* got 'before'",
    ),
    ("update", lambda: AGRU.from_weights(ROWS, update="x"), ValueError, "update must be one of .*, got 'x'"),
    ("form", lambda: AUGRU.from_weights(ROWS), ValueError, "form must be given.*, got None"),
    (
        "layers",
        lambda: GRU.from_weights(ROWS, num_layers=2),
        ValueError,
        "num_layers must be left alone.* got 2",
    ),
    (
        "bidirectional",
        lambda: GRU.from_weights(ROWS, bidirectional=True),
        ValueError,
        "bidirectional must be left alone.* got True",
    ),
)
def test_conversions(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    expect(call, error, message)


@pytest.mark.parametrize("load, name", ARGUMENTS)
def test_loaders_take_one_dtype_and_one_device(load: Callable[..., Any], name: str) -> None:
    """Matrices share a dtype, biases share one, all share a device; what differs is named, or what it differs from."""
    good = {n: z(*size) for n, size in GOOD[load].items()}
    is_bias = name[0] == "b" or "bias" in name
    partners = [n for n in good if (n[0] == "b" or "bias" in n) == is_bias]
    if len(partners) > 1:
        expect(
            lambda: load(**(good | {name: good[name].double()})),
            TypeError,
            rf"({'|'.join(partners)}) must have the dtype of ({'|'.join(partners)}), torch.float.*, got torch.float",
        )
    if len(good) > 1:
        expect(
            lambda: load(**(good | {name: good[name].to("meta")})),
            ValueError,
            rf"({'|'.join(good)}) must be on the device of ({'|'.join(good)}), (cpu|meta), got (meta|cpu)",
        )
