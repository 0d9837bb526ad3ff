"""Single providers under pytest-benchmark: ``pytest benchmarks --benchmark-only``, for comparing commits.

Ratios come from the interleaving runner instead. Threads are those of OMP_NUM_THREADS.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.registry import Case, cases
from benchmarks.timing import fault, prepare, truth

CASES = [(case, provider) for case in cases("all") for provider in case.providers]


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("case, provider", CASES, ids=lambda v: v if isinstance(v, str) else str(v).replace(" ", "-"))
def test_speed(case: Case, provider: str, benchmark: Any) -> None:
    benchmark.group = str(case)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    inputs = truth(case)[0]
    try:
        program = prepare(case, provider, inputs)
    except LookupError as reason:
        pytest.skip(f"{provider} is absent: {reason}")
    assert fault(program, case) is None
    with torch.inference_mode(not case.trains):
        benchmark(program.step(case, inputs))
