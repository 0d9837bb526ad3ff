"""The attention kernels without a GPU: in Triton's interpreter, in ptxsim, and as compiled code.

The interpreter must be switched on before Triton is imported, so its tests run in a process of their own.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dien_kernels import attention_scores
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops.attention import op, triton_launch
from tests.attention_cases import ACTIVATIONS, call, cast, compare, layouts, leaves, make, raggedness, run
from tests.triton_launches import (
    compiled,
    in_the_interpreter,
    launching,
    passed_in_the_interpreter,
    simulator,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STORED = (torch.float32, torch.bfloat16, torch.float16)


def facts(**other: object) -> Call:
    whole = Call("attention_scores", "cuda", torch.float32, 64, 64, "din", (80, 40))
    return whole._replace(**other)  # type: ignore[arg-type]


@compiled
@pytest.mark.parametrize(
    "other, words",
    [
        ({"hidden_size": 257}, "hidden=257 is above the 256"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "cpu"}, "the tensors are on cpu"),
        ({"hidden_size": 129}, "hidden=129 is above the 128 of the Triton kernels for hidden layers"),
        ({"widths": (4, 4, 4)}, "3 hidden layers are above the 2"),
        ({"widths": (4, 129)}, "a second hidden layer of 129 units is above the 128"),
    ],
)
def test_refuses(other: dict[str, object], words: str) -> None:
    pytest.importorskip("triton")
    assert words in str(triton_launch.refuses(facts(**other)))


@compiled
def test_takes() -> None:
    pytest.importorskip("triton")
    assert triton_launch.refuses(facts(hidden_size=256, widths=())) is None
    for widths in ((1000,), (1000, 128)):
        assert triton_launch.refuses(facts(hidden_size=128, widths=widths)) is None


@pytest.mark.parametrize("hidden", [1, 16, 17, 36, 64, 65, 128, 129, 256])
def test_every_size_has_a_configuration(hidden: int) -> None:
    for bilinear in (False, True):
        if bilinear or hidden <= triton_launch.MAX_DIN:
            assert triton_launch.configuration(hidden, bilinear).steps >= 16


@compiled
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert passed_in_the_interpreter([Path(__file__)]) > 60


def on_triton(*arguments: object, **options: object) -> dict:
    return make(*arguments, **options) | {"backend": "triton"}  # type: ignore[arg-type]


@in_the_interpreter
@pytest.mark.parametrize("shared", [False, True], ids=["own", "history"])
@pytest.mark.parametrize("layout", ["full", "lengths", "mask", "jagged"])
@pytest.mark.parametrize("normalize", ["softmax", None])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_layouts(kind: str, normalize: str | None, layout: str, shared: bool) -> None:
    """More than one block of steps, of hidden units and of rows a program."""
    histories = 4 if shared else None
    case = on_triton(kind, batch=5, steps=20, histories=histories, normalize=normalize, size=2, sizes=(18, 17))
    history = torch.tensor([3, 0, 2, 2, 0]) if shared else None
    valid = raggedness(layout, len(case["states"]), 20)
    compare(case, layout, valid, history, torch.float32, f"{kind} {layout}")


# Around the sizes at which kernels change, odd ones, and every dtype.
SIZES = [
    *(("bilinear", hidden, torch.float32) for hidden in (1, 3, 36, 100, 108, 256)),
    *(("bilinear", hidden, torch.bfloat16) for hidden in (3, 36, 130)),
    *(("din", hidden, torch.float32) for hidden in (1, 3, 36, 100)),
    *(("din", hidden, torch.bfloat16) for hidden in (3, 36, 108)),
    *((kind, 36, torch.float16) for kind in ("bilinear", "din")),
]


@in_the_interpreter
@pytest.mark.parametrize("kind, hidden, dtype", SIZES, ids=str)
def test_sizes_and_dtypes(kind: str, hidden: int, dtype: torch.dtype) -> None:
    for steps, layout in ((1, "full"), (18, "jagged")):
        case = on_triton(kind, batch=3, steps=steps, hidden=hidden, sizes=(20, 18), scale=1 / math.sqrt(hidden))
        compare(case, layout, raggedness(layout, 3, steps), None, dtype, f"{kind} {hidden} {dtype} T={steps}")


@in_the_interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(), (5,), (20,), (6, 4), (20, 33)], ids=str)
def test_layers(sizes: tuple[int, ...], activation: str | None) -> None:
    kinds = ("channel", "one", "scalar") if activation == "prelu" else ("channel",)
    for bias, slope in zip(("all", "some", "none"), kinds * 3, strict=False):
        case = on_triton(sizes=sizes, bias=bias, activation=activation, slope=slope)
        compare(case, "lengths", raggedness("lengths", 4, 5), None, torch.float32, f"{sizes} {bias} {activation}")


@in_the_interpreter
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["bilinear", "din"]),
    layout=st.sampled_from(["full", "lengths", "mask", "jagged"]),
    batch=st.integers(0, 6),
    steps=st.integers(0, 33),
    hidden=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 20), max_size=2),
    histories=st.integers(1, 4) | st.none(),
    seed=st.integers(0, 99),
)
def test_any_shape(kind, layout, batch, steps, hidden, sizes, histories, seed) -> None:
    # Small scores: where one step takes all of a softmax its gradient cancels, and then plain torch's error is luck.
    case = on_triton(kind, batch, steps, hidden, sizes=tuple(sizes), histories=histories, scale=0.1, seed=seed)
    history = None if histories is None else torch.randint(0, histories, (batch,))
    compare(case, layout, raggedness(layout, len(case["states"]), steps), history, torch.float32, "hypothesis")


@in_the_interpreter
def test_inner_product() -> None:
    case = on_triton("bilinear", dtype=torch.float32)
    plain = attention_scores(case["target"], case["states"], normalize=None, backend="triton")
    torch.testing.assert_close(plain, torch.einsum("bth,bh->bt", case["states"], case["target"]))
    grads = torch.autograd.grad(plain.sum(), (case["target"], case["states"]))
    torch.testing.assert_close(grads[0], case["states"].sum(1))
    torch.testing.assert_close(grads[1], case["target"].unsqueeze(1).expand_as(case["states"]))


@in_the_interpreter
@pytest.mark.parametrize("layout", ["lengths", "mask"])
@pytest.mark.parametrize("normalize", ["softmax", None])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_nan_where_nothing_is_changes_nothing(kind: str, normalize: str | None, layout: str) -> None:
    for histories in (None, 4):
        case = on_triton(kind, steps=5, normalize=normalize, histories=histories)
        history = None if histories is None else torch.tensor([2, 0, 3, 3])
        valid = raggedness(layout, 4, 5)
        clean, dirty = cast(case, torch.float32), cast(case, torch.float32)
        with torch.no_grad():
            dirty["states"][~valid] = math.nan
            if history is None:
                dirty["target"][~valid.any(1)] = math.nan  # the target of a row without a step
            else:
                dirty["states"][1] = math.nan  # a history that no row names
        a, b = run(clean, layout, valid, history)[0], run(dirty, layout, valid, history)[0]
        assert torch.equal(a, b)
        g = torch.randn_like(a)
        dirty_g = torch.where(valid if history is None else valid[history], g, math.nan)
        of_clean, of_dirty = (
            torch.autograd.grad(out, leaves(values), upstream)
            for out, values, upstream in ((a, clean, g), (b, dirty, dirty_g))
        )
        assert all(torch.equal(x, y) for x, y in zip(of_clean, of_dirty, strict=True))


@in_the_interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", ["softmax", None])
def test_nan_in_a_valid_step_reaches_its_row_and_every_weight(normalize: str | None, activation: str | None) -> None:
    for kind in ("din", "bilinear"):
        case = cast(on_triton(kind, steps=5, activation=activation, normalize=normalize), torch.float32)
        valid = raggedness("lengths", 4, 5)
        with torch.no_grad():
            case["states"][2, 3, 0] = math.nan
        out = run(case, "lengths", valid, None)[0]
        assert out[2].isnan().sum() == (5 if normalize == "softmax" else 1)
        assert out[[0, 1, 3]].isfinite().all()
        grads = torch.autograd.grad(out.sum(), leaves(case))
        weights = grads[2 : 2 + (3 if kind == "din" else 1)]
        if normalize is None and kind == "din" and activation is None:
            weights = weights[1:]  # the first layer's gradient does not read the states twice
        assert all(w.isnan().any() for w in (weights if normalize == "softmax" else weights[-1:]))
        assert grads[1][[0, 1, 3]].isfinite().all()


@in_the_interpreter
def test_nan_in_a_target_leaves_the_gradient_of_padding_zero() -> None:
    for kind, layout in (("bilinear", "mask"), ("din", "lengths")):
        case = cast(on_triton(kind, steps=5), torch.float32)
        valid = raggedness(layout, 4, 5)
        valid[3] = torch.tensor([True, True, True, False, False])
        with torch.no_grad():
            case["target"][3] = math.nan
        out = run(case, layout, valid, None)[0]
        assert out[3][valid[3]].isnan().all()
        (g,) = torch.autograd.grad(out.sum(), case["states"])
        assert g[3][valid[3]].isnan().all()
        assert not g[~valid].any()


@in_the_interpreter
def test_softmax_of_large_scores_and_of_rows_without_a_step() -> None:
    states = torch.full((2, 3, 2), 1e18).requires_grad_()
    target = torch.full((2, 2), 1e18).requires_grad_()
    for lengths in ([3, 0], [0, 0]):
        out = attention_scores(target, states, lengths=torch.tensor(lengths), backend="triton")
        torch.testing.assert_close(out[0], torch.full((3,), 1 / 3) if lengths[0] else torch.zeros(3))
        assert not out[1].any()
        for g in torch.autograd.grad(out.sum(), (target, states)):
            assert g.isfinite().all()


@in_the_interpreter
def test_the_same_bits_again() -> None:
    case = on_triton(batch=12, steps=30, hidden=8, histories=5, dtype=torch.float32)
    history, lengths = torch.randint(0, 5, (12,)), torch.randint(0, 31, (5,))

    def once() -> list[Tensor]:
        out = call(case, history=history, lengths=lengths)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves(case))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@in_the_interpreter
def test_any_strides() -> None:
    case = on_triton(steps=6, dtype=torch.float32)
    lengths = torch.tensor([6, 0, 2, 5])
    want = call(case, lengths=lengths)
    case["states"] = case["states"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    case["weights"][0] = case["weights"][0].detach().t().contiguous().t().requires_grad_()
    got = call(case, lengths=lengths.int())
    assert torch.equal(got, want)
    assert torch.autograd.grad(got.sin().sum(), case["states"])[0].any()


@in_the_interpreter
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_raw_ops_pass_opcheck(kind: str) -> None:
    case = make(kind, bias="some", dtype=torch.bfloat16)
    w = [case["weights"]] if kind == "bilinear" else case["weights"]
    b = [torch.zeros(0) if v is None else v.float() for v in case["biases"]]
    for layout in layouts(case)[2:]:
        states, total = layout.get("states", case["states"]), layout.get("rows_total", -1)
        index = [layout.get(n) for n in ("lengths", "offsets", "mask", "history")]
        arguments = [t.detach() for t in (case["target"], states)]
        arguments += [[v.detach() for v in vs] for vs in (w, b, [])] + index
        options, tests = (total, kind == "bilinear", 0, 0.5, True), ("test_schema", "test_faketensor")
        torch.library.opcheck(op._FWD["triton"], (*arguments, *options), test_utils=tests)
        out = op._FWD["triton"](*arguments, *options)
        torch.library.opcheck(
            op._BWD["triton"], (torch.randn_like(out), *arguments, out, *options), test_utils=tests
        )  # fmt: skip


# Each kernel in each dtype: every layout, both numbers of hidden layers, more blocks than one.
SIMULATED = [
    ("bilinear", torch.float32, 36, (), "mask", True),
    ("bilinear", torch.bfloat16, 20, (), "jagged", True),
    ("bilinear", torch.bfloat16, 130, (), "lengths", False),
    ("bilinear", torch.float16, 64, (), "lengths", False),
    ("din", torch.float32, 36, (20, 12), "lengths", False),
    ("din", torch.bfloat16, 20, (20, 12), "mask", False),
    ("din", torch.float16, 36, (20,), "jagged", True),
]


@compiled
@pytest.mark.ptx
@pytest.mark.parametrize("kind, dtype, hidden, sizes, layout, shared", SIMULATED)
def test_simulated_code_matches_reference(
    kind: str, dtype: torch.dtype, hidden: int, sizes: tuple[int, ...], layout: str, shared: bool, ptxsim: ModuleType
) -> None:
    """What Triton compiles for sm_80, with races on shared memory looked for."""
    # In float32 without a softmax, whose cancelling gradients leave nothing but noise to compare; other cells have it.
    normalize = None if (kind, dtype) == ("din", torch.float32) else "softmax"
    case = on_triton(kind, 4, 40, hidden, sizes=sizes, histories=3 if shared else None, normalize=normalize)
    history = torch.tensor([2, 0, 2, 1]) if shared else None
    with launching(simulator(ptxsim), 80):
        compare(case, layout, raggedness(layout, 3 if shared else 4, 40), history, dtype, f"{kind} {dtype}")


def test_processors_of_the_interpreter_make_partial_sums() -> None:
    assert _triton.processors_of(torch.zeros(1)) > 1
