"""The tolerance rule must fail when it should."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import FACTOR, assert_close_to, floor_of

EXACT = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)


def plain_with(error: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    plain = EXACT.to(dtype, copy=True)
    plain[1] += error * 2.0  # relative to the maximum, which is 2
    return plain


def test_exact_result_passes() -> None:
    assert_close_to(EXACT.float(), EXACT, EXACT.float(), "y")


@pytest.mark.parametrize("times, passes", [(1.9, True), (2.1, False)])
def test_error_is_measured_against_twice_plain_torch(times: float, passes: bool) -> None:
    plain, actual = plain_with(1e-3), plain_with(times * 1e-3)
    if passes:
        assert_close_to(actual, EXACT, plain, "y")
    else:
        words = r"^dw_hh: error 0\.0021 is above the limit 0\.002.*worst at \[1\]"
        with pytest.raises(AssertionError, match=words):
            assert_close_to(actual, EXACT, plain, "dw_hh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("times, passes", [(0.9, True), (1.6, False)])
def test_floor_where_plain_is_lucky(dtype: torch.dtype, times: float, passes: bool) -> None:
    actual = plain_with(times * floor_of(dtype), dtype)
    if passes:
        assert_close_to(actual, EXACT, EXACT.to(dtype), "y")
    else:
        with pytest.raises(AssertionError, match="above the limit"):
            assert_close_to(actual, EXACT, EXACT.to(dtype), "y")


@pytest.mark.parametrize("summed, passes", [(1.0, False), (10.0, False), (20.0, True)])
def test_floor_of_a_sum_that_cancels_is_that_of_its_terms(summed: float, passes: bool) -> None:
    actual = plain_with(8 * floor_of(torch.float32))  # the tensor's own size is 2
    if passes:
        assert_close_to(actual, EXACT, EXACT.float(), "y", summed)
    else:
        with pytest.raises(AssertionError, match="above the limit"):
            assert_close_to(actual, EXACT, EXACT.float(), "y", summed)


def test_rule_does_not_depend_on_the_size_of_the_tensor() -> None:
    for size in (1e-20, 1.0, 1e20):
        exact = EXACT * size
        with pytest.raises(AssertionError, match="above the limit"):
            assert_close_to((exact * (1 + 1e-4)).float(), exact, exact.float(), "y")
        assert_close_to((exact * (1 + 1e-7)).float(), exact, exact.float(), "y")


def test_zero_exact_has_an_absolute_floor() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert_close_to(torch.full((3,), 1e-7), zero, zero.float(), "y")
    with pytest.raises(AssertionError, match="above the limit"):
        assert_close_to(torch.full((3,), 1e-6), zero, zero.float(), "y")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", ["actual", "plain", "exact"])
def test_values_must_be_finite(value: float, who: str) -> None:
    tensors = {"actual": EXACT.float(), "exact": EXACT.clone(), "plain": EXACT.float()}
    tensors[who][2] = value
    with pytest.raises(AssertionError, match=f"y: 1 of 4 values of {who} are not finite"):
        assert_close_to(tensors["actual"], tensors["exact"], tensors["plain"], "y")


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape of actual"):
        assert_close_to(EXACT.float().view(2, 2), EXACT, EXACT.float(), "y")
    with pytest.raises(AssertionError, match="shape of plain"):
        assert_close_to(EXACT.float(), EXACT, EXACT.float()[:1], "y")
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to(EXACT.bfloat16(), EXACT, EXACT.float(), "y")
    with pytest.raises(AssertionError, match="must be float64"):
        assert_close_to(EXACT.float(), EXACT.float(), EXACT.float(), "y")


def test_empty_tensors_are_close() -> None:
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert_close_to(empty.float(), empty, empty.float(), "y")


def test_factor_is_the_issue_s() -> None:
    assert FACTOR == 2.0
