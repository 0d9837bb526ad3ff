"""The attention kernels without a GPU: in Triton's interpreter, in ptxsim, and as compiled code.

The interpreter must be switched on before Triton is imported. So its tests, those of tests/ops/test_attention*.py among
them, carry the marker ``interpreter`` and run in processes of their own, which ``make test`` starts.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dien_kernels import attention_scores
from dien_kernels.histories import Histories
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops._mlp import Layers
from dien_kernels.ops.attention import triton_launch
from dien_kernels.ops.attention.contract import Inputs, Options
from tests.attention_cases import Shape, compare, make, shapes
from tests.triton_launches import (
    compiled,
    in_the_interpreter,
    launching,
    simulator,
)
from tests.unit_cases import raggedness

pytestmark = pytest.mark.usefixtures("one_thread")
STORED = (torch.float32, torch.bfloat16, torch.float16)


def a_call(**other: object) -> Call:
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
    assert words in str(triton_launch.refuses(a_call(**other)))


def test_starts_that_nobody_checked_stay_inside_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets that fall are not read on a GPU: a row's start is a sum of lengths, and must not lie before the first."""
    monkeypatch.setattr(triton_launch, "check_index_values", lambda *_: None)
    offsets, history = torch.tensor([6, 0, 8]), torch.tensor([0, 1])
    inputs = Inputs(torch.zeros(2, 4), torch.zeros(8, 4), Layers([], [], []))
    options = Options(rows_total=2, bilinear=True, activation=0, scale=1.0, softmax=False)
    job = triton_launch._Problem(inputs, Histories(None, offsets, history), options)
    assert job.y_start is not None
    assert job.y_start.tolist() == [0, 0]


@compiled
def test_takes() -> None:
    pytest.importorskip("triton")
    assert triton_launch.refuses(a_call(hidden_size=256, widths=())) is None
    for widths in ((1000,), (1000, 128)):
        assert triton_launch.refuses(a_call(hidden_size=128, widths=widths)) is None


@pytest.mark.parametrize("hidden", [1, 16, 17, 36, 64, 65, 128, 129, 256])
def test_every_size_has_a_configuration(hidden: int) -> None:
    for bilinear in (False, True):
        if bilinear or hidden <= triton_launch.MAX_DIN:
            assert triton_launch.configuration(hidden, bilinear).steps >= 16


def on_triton(*arguments: object, **options: object) -> dict:
    return make(*arguments, **options) | {"backend": "triton"}  # type: ignore[arg-type]


# Around the sizes at which kernels change, odd ones, and every dtype.
SIZES = [
    *(("bilinear", hidden, torch.float32) for hidden in (1, 3, 36, 100, 108, 256)),
    *(("bilinear", hidden, torch.bfloat16) for hidden in (3, 36, 100, 108, 130)),
    *(("din", hidden, torch.float32) for hidden in (1, 3, 36, 100, 108)),
    *(("din", hidden, torch.bfloat16) for hidden in (3, 36, 100, 108)),
    *((kind, 36, torch.float16) for kind in ("bilinear", "din")),
]


@in_the_interpreter
@pytest.mark.parametrize("kind, hidden, dtype", SIZES, ids=str)
def test_sizes_and_dtypes(kind: str, hidden: int, dtype: torch.dtype) -> None:
    for steps, layout in ((1, "full"), (18, "jagged")):
        case = on_triton(kind, batch=3, steps=steps, hidden=hidden, sizes=(20, 18), scale=1 / math.sqrt(hidden))
        compare(case, layout, raggedness(layout, 3, steps), None, dtype, f"{kind} {hidden} {dtype} T={steps}")


@in_the_interpreter
@pytest.mark.parametrize("kind", ["bilinear", "din"])
def test_more_steps_than_a_block(kind: str) -> None:
    """And more rows than programs, whose partial sums are added."""
    for layout in ("full", "mask", "jagged"):
        case = on_triton(kind, batch=7, steps=40, histories=5)
        history = torch.tensor([3, 0, 2, 2, 0, 4, 1])
        compare(case, layout, raggedness(layout, 5, 40), history, torch.float32, f"{kind} {layout}")


@in_the_interpreter
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes(layers=2, widest=20, steps=33), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape(shape: Shape, dtype: torch.dtype) -> None:
    case, *where = shape
    compare(case | {"backend": "triton"}, *where, dtype, "hypothesis")


@in_the_interpreter
@pytest.mark.parametrize("units", [4, 7, 8, 16])
def test_an_infinite_state_stays_in_the_units_that_exist(units: int) -> None:
    weights = [torch.cat((torch.zeros(units, 4), torch.ones(units, 4), torch.zeros(units, 8)), 1), torch.ones(1, units)]
    states = torch.full((1, 2, 4), math.inf)
    out = attention_scores(
        torch.ones(1, 4), states, weights, kind="din", activation="sigmoid", normalize=None, backend="triton"
    )
    assert (out == units).all()  # each unit is a whole sigmoid


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
    case = on_triton(kind, 4, 40, hidden, sizes=sizes, histories=3 if shared else None)
    history = torch.tensor([2, 0, 2, 1]) if shared else None
    with launching(simulator(ptxsim), 80):
        compare(case, layout, raggedness(layout, 3 if shared else 4, 40), history, dtype, f"{kind} {dtype}")


def test_processors_of_the_interpreter_make_partial_sums() -> None:
    assert _triton.processors_of(torch.zeros(1)) > 1
