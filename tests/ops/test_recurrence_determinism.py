"""The same bits from run to run and for any number of threads, and a search over shapes and options."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dien_kernels import use_gates
from tests.cases import (
    DTYPES,
    KINDS,
    Case,
    actual,
    assert_matches,
    assert_matches_by_chance,
    running_on,
    target_params,
)

NATIVE = tuple(f"cpu-{isa}" for isa in ("portable", "avx2", "avx2x2", "avx512"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Ragged and larger than the blocks, the groups and the chunks of time; histories read by several rows.
MANY = [
    Case("aigru", torch.float32, 260, 12, 5, 20, reset="before"),
    Case("authors", torch.float32, 260, 12, 5, 20, history=True),
    Case("paper", torch.bfloat16, 200, 9, 8, 17, "jagged", history=True),
    Case("gru", torch.float64, 200, 9, 3, 6, "jagged"),
    Case("agru", torch.float32, 600, 5, 3, 4, "mask"),
    Case("gru", torch.float32, 230, 40, 24, 36, reverse=True),
    # Three chunks of 512 steps of all rows; the exact result takes time that grows with the square of the steps.
    pytest.param(Case("aigru", torch.float32, 3, 400, 20, 20, "full"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("target", target_params(NATIVE))
@pytest.mark.parametrize("case", MANY, ids=str)
@pytest.mark.parametrize("gates", ["recompute", "keep"])
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads(case: Case, gates: str, target: str) -> None:
    with running_on(target, case) as backend, use_gates(gates):
        results = []
        for count in (1, 2, 1, 3, 2):
            torch.set_num_threads(count)
            assert torch.get_num_threads() == count
            results.append((count, actual(case, backend)))
    for count, result in results[1:]:
        for name, tensor in result:
            assert torch.equal(tensor, results[0][1].tensors[name]), f"{name} with {count} threads"


@pytest.mark.parametrize("target", target_params(NATIVE[1:2]))
@pytest.mark.parametrize("case", MANY, ids=str)
@pytest.mark.usefixtures("threads")
def test_many_rows_are_right(case: Case, target: str) -> None:
    torch.set_num_threads(2)
    with running_on(target, case) as backend:
        assert_matches(case, actual(case, backend))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_torch_repeats_itself(backend: str) -> None:
    case = Case("aigru", torch.float32, 20, 6, 5, 20, history=True)
    first, second = actual(case, backend), actual(case, backend)
    for name, tensor in first:
        assert torch.equal(tensor, second.tensors[name]), name


@st.composite
def cases(draw: st.DrawFn, largest: int) -> Case:
    kind = draw(st.sampled_from(KINDS))
    ragged = draw(st.sampled_from(("full", "lengths", "empty", "mask", "left", "jagged")))
    masked = ragged in ("mask", "left")
    size = st.integers(1, largest)
    return Case(
        kind,
        draw(st.sampled_from(DTYPES)),
        draw(size),
        draw(st.integers(1, 7)),
        draw(size),
        draw(size),
        ragged,
        history=kind != "gru" and draw(st.booleans()),
        reverse=not masked and draw(st.booleans()),
        time_major=not masked and ragged != "jagged" and draw(st.booleans()),
        reset=draw(st.sampled_from(("after", "before"))),
        update=draw(st.sampled_from((None, "keep", "candidate"))),
        bias=draw(st.sampled_from(("both", "none", "ih", "hh"))),
        h0=draw(st.booleans()),
        strides=draw(st.sampled_from(("contiguous", "sliced", "offset", "transposed", "expanded"))),
        scalars=draw(st.sampled_from(("compute", "storage"))),
        seed=draw(st.integers(0, 1000)),
    )


def search(target: str, largest: int, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(cases(largest), st.booleans())
    def run(case: Case, keep: bool) -> None:
        with use_gates("keep" if keep else "recompute"):
            assert_matches_by_chance(case, actual(case, target.partition("-")[0]))

    with running_on(target):
        run()


@pytest.mark.without("triton")  # test_recurrence_triton.py searches among the dtypes and sizes that it takes
@pytest.mark.parametrize("target", target_params())
@pytest.mark.usefixtures("one_thread")
def test_search(target: str) -> None:
    """Hypothesis looks for shapes, lengths and options that break the tolerance rule."""
    search(target, 20, 150)


@pytest.mark.sweep
@pytest.mark.without("triton")
@pytest.mark.parametrize("target", target_params())
def test_long_search(target: str) -> None:
    search(target, 70, 3000)
