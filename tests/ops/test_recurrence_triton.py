"""The Triton kernels without a GPU: in Triton's interpreter, in ptxsim, and as compiled code.

The interpreter must be switched on before Triton is imported. So its tests, those of the grid among them, carry the
marker ``interpreter`` and run in processes of their own, which ``make test`` starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle, product
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dien_kernels.histories import Histories
from dien_kernels.ops import _triton
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops.recurrence import op, triton_launch
from dien_kernels.ops.recurrence.forms import form_of
from dien_kernels.ops.recurrence.order import longest_first
from tests.cases import (
    KINDS,
    Case,
    actual,
    assert_matches,
    assert_matches_by_chance,
    call,
    exact,
    make,
    plain,
    result_of,
    running_on,
)
from tests.tolerances import assert_close_to
from tests.triton_launches import (
    ROOT,
    compiled,
    in_the_interpreter,
    launching,
    simulator,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def a_call(**other: object) -> Call:
    return Call("recurrence", "cuda", torch.float32, 64, 64)._replace(**other)  # type: ignore[arg-type]


@compiled
def test_refuses() -> None:
    pytest.importorskip("triton")
    assert triton_launch.refuses(a_call()) is None
    assert triton_launch.refuses(a_call(hidden_size=256, input_size=1000, dtype=torch.float16)) is None
    assert "hidden=257 is above the 256" in str(triton_launch.refuses(a_call(hidden_size=257)))
    assert "float64" in str(triton_launch.refuses(a_call(dtype=torch.float64)))
    assert "the tensors are on cpu" in str(triton_launch.refuses(a_call(device="cpu")))


@compiled
def test_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "ABSENT", True)
    assert "triton is not installed" in str(triton_launch.refuses(a_call()))


@pytest.mark.parametrize("shared_memory", [0, 101_376, 166_912, 232_448])
@pytest.mark.parametrize("hidden", [1, 16, 17, 36, 64, 65, 128, 129, 256])
def test_every_size_has_a_configuration(hidden: int, shared_memory: int) -> None:
    for itemsize in (2, 4):
        for backward in (False, True):
            launch = triton_launch.configuration(hidden, itemsize, backward, shared_memory)
            assert _triton.padded_size(hidden) >= max(16, hidden, launch.chunk)


@pytest.mark.parametrize("itemsize, odd, whole", [(2, 100, 128), (4, 36, 64)])
def test_sizes_that_do_not_fill_their_padding_have_their_own_backward(itemsize: int, odd: int, whole: int) -> None:
    """With the launch of the size that does, ptxas spills on sm_90: 9 accesses at 100, 4 at 36."""
    for shared_memory, differs in ((232_448, True), (0, False)):
        launches = [triton_launch.configuration(h, itemsize, True, shared_memory) for h in (odd, whole)]
        assert (launches[0] != launches[1]) == differs


# What the grid does not hold: float16, and the sizes around those at which the kernels change.
INTERPRETED_CASES = [
    *(Case(kind, torch.float16, reset=reset) for kind, reset in zip(KINDS, cycle(("after", "before")), strict=False)),
    Case("authors", torch.float16, 6, 4, 3, 9, "jagged", history=True, scalars="storage"),
    Case("gru", B=1, T=1, I=1, H=1),
    Case("authors", torch.bfloat16, B=3, T=1, I=3, H=3),
    Case("paper", B=17, T=3, I=3, H=3, ragged="jagged"),
    Case("prediction_flow", B=33, T=2, I=5, H=17, ragged="mask"),
    Case("authors", torch.bfloat16, B=3, T=3, I=36, H=36),
    Case("aigru", B=9, T=4, I=40, H=64, reset="before"),
    Case("aigru", B=2, T=3, I=100, H=100, reset="before"),
    Case("aigru", torch.bfloat16, B=18, T=3, I=8, H=108, ragged="jagged"),
    Case("authors", B=2, T=3, I=300, H=108, history=True, reverse=True),
    Case("agru", torch.bfloat16, B=2, T=2, I=3, H=130, reset="before", h0=False),
    Case("gru", B=2, T=2, I=3, H=256, bias="none", time_major=True),
    Case("authors", torch.bfloat16, B=17, T=4, I=3, H=200, ragged="jagged", history=True),
    Case("aigru", B=17, T=4, I=3, H=140, reset="before", reverse=True),
    Case("aigru", B=4, H=9, bias="hh", strides="sliced", scalars="storage"),
    Case("aigru", torch.bfloat16, B=4, H=9, bias="ih", h0=False, strides="transposed"),
    Case("paper", B=4, H=9, bias="none", strides="expanded", reset="before"),
    Case("authors", B=4, H=9, strides="offset", reset="before"),
]


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
def test_matches_reference(case: Case, target: str, record_combination: Callable[..., None]) -> None:
    record_combination("recurrence", target, case.kind, case.dtype)
    with running_on(target, case) as backend:
        assert_matches(case, actual(case, backend))


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 1, 3, 2)], ids=str)
def test_single_numbers_in_bfloat16(size: tuple[int, int, int, int], target: str) -> None:
    """Where an attention's gradient is one number, plain torch may be exact by luck: the rule holds for 16 draws."""
    draws = [Case("aigru", torch.bfloat16, *size, ragged="mask", seed=seed) for seed in range(16)]
    results = [(actual(case, target).tensors, exact(case).tensors, plain(case).tensors) for case in draws]
    for name in results[0][0]:
        together = (torch.cat([result[name].flatten() for result in of_all]) for of_all in zip(*results, strict=True))
        assert_close_to(*together, name)


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
def test_any_shape(target: str) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(cases())
    def check(case: Case) -> None:
        assert_matches_by_chance(case, actual(case, target))

    check()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any combination of the grid at any small size. Masks and jagged batches have no reverse and no time-major."""
    ragged = draw(st.sampled_from(["full", "lengths", "mask", "left", "jagged", "empty"]))
    plain = ragged in ("full", "lengths", "empty")
    kind = draw(st.sampled_from(KINDS))
    return Case(
        kind,
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
        *(draw(st.integers(low, high)) for low, high in ((1, 20), (1, 4), (1, 20), (1, 40))),
        ragged=ragged,
        history=kind != "gru" and draw(st.booleans()),  # which has no attention, and so no rows of its own
        reverse=plain and draw(st.booleans()),
        time_major=plain and draw(st.booleans()),
        reset=draw(st.sampled_from(["after", "before"])),
        update=draw(st.sampled_from([None, "keep", "candidate"])),
        bias=draw(st.sampled_from(["both", "none", "ih", "hh"])),
        h0=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
def test_order_is_that_of_a_stable_sort(target: str) -> None:
    for batch in (0, 1, 31, 32, 300):
        lengths = torch.randint(0, 6, (batch,), generator=torch.Generator().manual_seed(batch))
        assert torch.equal(longest_first(lengths), lengths.argsort(descending=True, stable=True))
        torch.library.opcheck(longest_first, (lengths,), test_utils=("test_schema", "test_faketensor"))


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
def test_repeats_itself(target: str) -> None:
    case = Case("aigru", torch.float32, 40, 4, 5, 9, history=True)
    first, second = actual(case, target), actual(case, target)
    for name, tensor in first:
        assert torch.equal(tensor, second.tensors[name]), name


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("ragged", ["full", "lengths", "jagged"])
def test_nan_in_a_history_that_nobody_reads_changes_nothing(ragged: str, target: str) -> None:
    case = Case("authors", B=12, T=4, H=5, ragged=ragged, history=True, seed=1)
    inputs = make(case)
    unread = next(u for u in range(case.histories) if u not in inputs.rows and inputs.steps[u])
    poisoned = inputs.leaves["x"].detach().clone()
    if inputs.offsets is None:
        poisoned[unread] = float("nan")
    else:
        poisoned[inputs.offsets[unread] : inputs.offsets[unread + 1]] = float("nan")
    expected = actual(case, target)
    leaves = inputs.leaves | {"x": poisoned.requires_grad_()}
    for name, tensor in result_of(call(case, inputs, target, **leaves), inputs, leaves):
        assert torch.equal(tensor, expected.tensors[name]), name


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("kind, ragged", [("gru", "full"), ("gru", "lengths"), ("aigru", "jagged")])
def test_raw_ops_pass_opcheck(kind: str, ragged: str, target: str) -> None:
    """What they return has the shapes and dtypes that their fakes promise, with either upstream gradient alone."""
    utils = ("test_schema", "test_faketensor")
    inputs = make(Case(kind, torch.bfloat16, B=3, T=2, ragged=ragged, history=kind != "gru", bias="ih", h0=False))
    weights = (inputs.leaf("w_ih"), inputs.leaf("w_hh"), inputs.leaf("b_ih"), None, None)
    tensors = [inputs.leaf("x"), inputs.leaf("attention"), *weights, inputs.lengths, inputs.offsets, inputs.history]
    tensors = [None if t is None else t.detach() for t in tensors] + [None]
    if ragged != "full":  # as the core hands it on: the rows in the order in which the loop takes them
        tensors[-1] = Histories(*tensors[7:10]).order()
    options = (*form_of(kind)[:5], True, False, False, False, 0)
    torch.library.opcheck(op._FWD[target], (*tensors, *options), test_utils=utils)
    y, h_n, kept = op._FWD[target](*tensors, *options)
    for dy, dh_n, need_dx in ((inputs.dy, None, True), (None, inputs.dh_n, False)):
        arguments = (dy, dh_n, *tensors, y, kept, need_dx, *options)
        torch.library.opcheck(op._BWD[target], arguments, test_utils=utils)


@in_the_interpreter
@pytest.mark.parametrize("target", ["triton"])
@pytest.mark.parametrize("rows, ragged", [((3, 0), "lengths"), ((0, 2), "lengths"), ((0,), "offsets")], ids=str)
def test_raw_forward_without_a_step_passes_opcheck(rows: tuple[int, ...], ragged: str, target: str) -> None:
    """A compiled graph relies on the shapes that the fake promises."""
    lengths = torch.zeros(rows[0], dtype=torch.int64) if ragged == "lengths" else None
    offsets = torch.zeros(4, dtype=torch.int64) if ragged == "offsets" else None
    tensors = (
        torch.zeros(*rows, 2),
        None,
        torch.zeros(9, 2),
        torch.zeros(9, 3),
        *[None] * 3,
        lengths,
        offsets,
        None,
        None,
    )
    options = (*form_of("gru")[:5], True, False, False, False, 0)
    torch.library.opcheck(op._FWD[target], (*tensors, *options), test_utils=("test_schema", "test_faketensor"))


SIMULATED = [
    Case("authors", torch.float32, B=17, T=6, I=8, H=16, history=True, ragged="jagged"),
    Case("aigru", torch.bfloat16, B=18, T=5, I=8, H=36, reset="before"),
    Case("paper", torch.bfloat16, B=5, T=3, I=8, H=100),
    Case("prediction_flow", torch.float16, B=5, T=4, I=8, H=20, ragged="jagged", history=True),
    Case("aigru", torch.float32, B=3, T=3, I=8, H=200, reset="before"),
    Case("authors", torch.bfloat16, B=12, T=3, I=8, H=136),  # of fewer, plain torch is too exact by luck
    Case("aigru", torch.float16, B=3, T=3, I=8, H=136, reset="before"),
    Case("gru", torch.float16, B=5, T=3, I=8, H=20),
]


@compiled
def test_every_kernel_is_simulated_in_every_dtype() -> None:
    pytest.importorskip("triton")
    launched: set[tuple[str, torch.dtype]] = set()
    for case in SIMULATED:
        with launching(lambda launch, case=case: launched.add((launch.kernel.__name__, case.dtype)), 80):
            actual(case, "triton")
    kernels = ("recurrence_forward", "recurrence_backward", "recurrence_backward_wide", "operands")
    assert launched >= set(product(kernels, (torch.float32, torch.bfloat16, torch.float16)))
    assert {kernel for kernel, _ in launched} == {*kernels, "length_order", "sum_rows_of_history"}


@compiled
@pytest.mark.ptx
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_simulated_code_matches_reference(case: Case, ptxsim: ModuleType) -> None:
    """What Triton compiles for sm_80, with races on shared memory looked for, TF32x3 products and chunks included."""

    with launching(simulator(ptxsim), 80):
        assert_matches(case, actual(case, "triton"))


@compiled
@pytest.mark.ptx
def test_simulated_approximations_are_near(ptxsim: ModuleType) -> None:
    """DIEN_KERNELS_FAST is read once, so in a process of its own: its results are near the reference, and others."""
    code = """
from tests.cases import Case, actual, exact
from tests import ptx_simulator
from tests.triton_launches import launching, simulator
case = Case("authors", B=5, T=4, I=8, H=16)
with launching(simulator(ptx_simulator.loaded()), 80):
    found = actual(case, "triton")
print(max(float((t.double() - e).abs().max() / e.abs().max()) for (_, t), (_, e) in zip(found, exact(case))))
"""
    environment = os.environ | {"DIEN_KERNELS_FAST": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1e-5 < float(done.stdout.split()[-1]) < 1e-2, done.stdout
