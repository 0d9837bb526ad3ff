"""attention_scores on every backend against its definition: values, layouts, NaN, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dien_kernels.ops._mlp import mlp
from dien_kernels.ops.attention import attention_scores, torch_backend
from tests.attention_cases import ACTIVATIONS, Shape, call, cast, compare, layers_of, leaves, make, run, shapes
from tests.cases import running_on, target_params
from tests.ops.conftest import UNIT_TARGETS, takes, unit_on
from tests.unit_cases import raggedness

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "history"])
@pytest.mark.parametrize("layout", ["full", "lengths", "mask", "jagged"])
@pytest.mark.parametrize("normalize", ["softmax", None])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_layouts(kind: str, normalize: str | None, layout: str, shared: bool, target_dtype: torch.dtype) -> None:
    for steps in (5, 19):  # both forms of the first layer
        case = make(kind, batch=5, steps=steps, histories=4 if shared else None, normalize=normalize, size=2)
        history = torch.tensor([3, 0, 2, 2, 1]) if shared else None
        valid = raggedness(layout, len(case["states"]), steps)
        compare(case, layout, valid, history, target_dtype, f"{kind} {layout} T={steps}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bilinear", "din"])
@pytest.mark.parametrize("name", target_params(UNIT_TARGETS))
def test_dtypes(name: str, kind: str, dtype: torch.dtype, record_combination: Callable[..., None]) -> None:
    record_combination("attention_scores", name, kind, dtype)
    takes(name, dtype)
    with unit_on(name, torch_backend):
        for layout in ("lengths", "jagged"):
            case = make(kind, batch=12, steps=20, hidden=8, sizes=(16, 8), scale=1 / math.sqrt(8))
            compare(case, layout, raggedness("lengths", 12, 20), None, dtype, f"{kind} {layout} {dtype}")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_more_steps_than_a_chunk_of_the_compiled_kernels(kind: str) -> None:
    for layout in ("lengths", "mask", "jagged"):
        case = make(kind, batch=3, steps=300, histories=2, scale=0.1)
        history = torch.tensor([1, 0, 1])
        compare(case, layout, raggedness("full", 2, 300), history, torch.float64, f"{kind} {layout} full")
        valid = torch.arange(300) < torch.tensor([[131], [290]])
        compare(case, layout, valid, history, torch.float64, f"{kind} {layout}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "sizes, bias", [*product(((), (5,), (6, 4)), ("all", "some", "none")), ((20, 33), "all")], ids=str
)
def test_layers(sizes: tuple[int, ...], bias: str, activation: str | None, target_dtype: torch.dtype) -> None:
    for slope in ("channel", "one", "scalar") if activation == "prelu" else ("channel",):
        case = make(sizes=sizes, bias=bias, activation=activation, slope=slope)
        for layout in ("lengths", "jagged"):
            compare(case, layout, raggedness("lengths", 4, 5), None, target_dtype, f"{sizes} {bias} {activation}")


def test_inner_product_and_one_matrix_in_a_list(target_dtype: torch.dtype) -> None:
    case = make("bilinear", scale=None, dtype=target_dtype)
    target, states, w = case["target"], case["states"], case["weights"]
    plain = attention_scores(target, states, normalize=None)
    torch.testing.assert_close(plain, torch.einsum("bth,bh->bt", states, target))
    assert torch.equal(attention_scores(target, states, [w]), attention_scores(target, states, w))
    grads = torch.autograd.grad(plain.sum(), (target, states))
    torch.testing.assert_close(grads[0], states.sum(1))
    torch.testing.assert_close(grads[1], target.unsqueeze(1).expand_as(states))


def test_other_orders_of_the_concatenation_are_shuffles_of_the_weight() -> None:
    case = make(scale=None, normalize=None)
    q, k = case["target"].unsqueeze(1).expand_as(case["states"]), case["states"]
    inputs = torch.cat((k, q, k - q, k * q), 2)
    want = mlp(inputs.flatten(0, 1), layers_of(case), case["activation"]).view(inputs.shape[:2])
    a, b, c, d = case["weights"][0].chunk(4, 1)
    case["weights"][0] = torch.cat((b, a, -c, d), 1)
    torch.testing.assert_close(call(case), want)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_three_hidden_layers(activation: str | None) -> None:
    case = make(sizes=(5, 4, 3), activation=activation)
    for layout in ("lengths", "jagged"):
        compare(case, layout, raggedness("lengths", 4, 5), None, torch.float64, f"3 layers {activation} {layout}")


@pytest.mark.usefixtures("target")
def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "TILE", {"cpu": 64, "cuda": 64})
    for kind in ("bilinear", "din"):
        for layout in ("full", "lengths", "mask", "jagged"):
            for steps in (4, 17):
                case = make(kind, batch=11, steps=steps, histories=7)
                history = torch.randint(0, 7, (11,))
                valid = raggedness(layout, 7, steps)
                compare(case, layout, valid, history, torch.float64, f"{kind} {layout} tiles")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=shapes(layers=3), target=st.sampled_from([t for t in UNIT_TARGETS if t != "cpu-avx512"]))
def test_any_shape(shape: Shape, target: str) -> None:
    with unit_on(target, torch_backend):
        compare(*shape, torch.float64, "hypothesis")


@pytest.mark.parametrize("steps", [5, 19])
@pytest.mark.parametrize("normalize", ["softmax", None])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
@pytest.mark.parametrize("layout", ["lengths", "mask"])
def test_nan_in_padding_changes_nothing(
    layout: str, kind: str, normalize: str | None, steps: int, target_dtype: torch.dtype
) -> None:
    for histories in (None, 4):
        case = make(kind, steps=steps, normalize=normalize, histories=histories)
        history = None if histories is None else torch.tensor([2, 0, 3, 3])
        valid = raggedness(layout, 4, steps)
        clean, dirty = cast(case, target_dtype), cast(case, target_dtype)
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
        for x, y in zip(
            torch.autograd.grad(a, leaves(clean), g),
            torch.autograd.grad(b, leaves(dirty), dirty_g),
            strict=True,
        ):
            assert torch.equal(x, y)


def test_nan_in_a_history_no_row_names_jagged(target_dtype: torch.dtype) -> None:
    case = make(histories=4, steps=5, dtype=target_dtype)
    valid = raggedness("full", 4, 5)
    history = torch.tensor([2, 0, 3, 3])
    with torch.no_grad():
        case["states"][1] = math.nan
    out = run(case, "jagged", valid, history)[0]
    for g in torch.autograd.grad(out.sin().sum(), leaves(case)):
        assert g.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["lengths", "mask", "jagged"])
@pytest.mark.parametrize("normalize", ["softmax", None])
def test_nan_in_a_valid_step_reaches_its_row_and_every_weight(normalize, layout, activation, target_dtype) -> None:
    for kind in ("din", "bilinear"):
        case = make(kind, steps=5, activation=activation, normalize=normalize, dtype=target_dtype)
        valid = raggedness("lengths", 4, 5)
        with torch.no_grad():
            case["states"][2, 3, 0] = math.nan
        out = run(case, layout, valid, None)[0]
        assert out[2].isnan().sum() == (5 if normalize == "softmax" else 1)
        assert out[[0, 1, 3]].isfinite().all()
        grads = torch.autograd.grad(out.sum(), leaves(case))
        weights = grads[2 : 2 + (3 if kind == "din" else 1)]
        if normalize is None:  # the last layer's product is where a NaN activation always lands
            assert weights[-1].isnan().any()
            weights = weights[:-1] if activation in ("relu", None, "prelu") else weights
            if kind == "din" and activation is not None:
                assert all(w.isnan().any() for w in weights)
        else:
            assert all(w.isnan().any() for w in weights)
        assert grads[1][[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["lengths", "mask"])
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_nan_in_a_target_leaves_the_gradient_of_padding_zero(kind: str, layout: str, target_dtype: torch.dtype) -> None:
    for steps in (5, 19):
        case = make(kind, steps=steps, dtype=target_dtype)
        valid = raggedness(layout, 4, steps)
        with torch.no_grad():
            case["target"][3] = math.nan
        valid[3, 0], valid[3, -1] = True, False
        out = run(case, layout, valid, None)[0]
        assert out[3][valid[3]].isnan().all()
        (g,) = torch.autograd.grad(out.sum(), case["states"])
        assert g[3][valid[3]].isnan().all()
        assert not g[~valid].any()


@pytest.mark.usefixtures("target_dtype")
@pytest.mark.parametrize("units", [4, 7, 8, 16])  # whole vectors and padded ones, for every instruction set
def test_what_overflows_stays_in_its_own_unit(units: int) -> None:
    weights = [torch.full((units, 16), 1e30), torch.full((units, units), -1e30), torch.ones(1, units)]
    weights[0][:, 8:12] = 0  # with q - k among the inputs, infinity would be subtracted from infinity
    biases = [torch.zeros(units), torch.zeros(units), torch.tensor([0.5])]
    out = attention_scores(
        torch.ones(1, 4), torch.full((1, 1, 4), 1e10), weights, biases, kind="din", activation="relu", normalize=None
    )
    assert out.item() == 0.5  # the second layer is minus infinity, and so 0


@pytest.mark.usefixtures("target_dtype")
def test_nan_in_a_valid_step_leaves_invalid_scores_zero() -> None:
    states = torch.ones(2, 3, 2)
    states[1, 0, 0] = math.nan
    out = attention_scores(torch.ones(2, 2), states, lengths=torch.tensor([3, 1]))
    assert out[1, 0].isnan()
    assert not out[1, 1:].any()


@pytest.mark.native
@pytest.mark.parametrize("size", [2**60, 2**61, 2**62])
def test_a_size_beyond_any_memory_is_refused(size: int) -> None:
    with running_on("cpu"), pytest.raises(MemoryError):
        attention_scores(torch.zeros(1, 1).expand(1, size), torch.zeros(1, 1, 1).expand(1, 1, size), backend="cpu")


@pytest.mark.usefixtures("target_dtype")
def test_softmax_of_large_scores_and_of_rows_without_a_step() -> None:
    states = torch.full((2, 3, 2), 1e18, dtype=torch.float32).requires_grad_()
    target = torch.full((2, 2), 1e18, dtype=torch.float32).requires_grad_()
    for lengths in ([3, 0], [0, 0]):
        out = attention_scores(target, states, lengths=torch.tensor(lengths))
        third = torch.full((3,), 1 / 3)
        torch.testing.assert_close(out[0], third if lengths[0] else torch.zeros(3))
        assert not out[1].any()
        for g in torch.autograd.grad(out.sum(), (target, states)):
            assert g.isfinite().all()
