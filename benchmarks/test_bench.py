"""Single providers under pytest-benchmark: ``pytest benchmarks --benchmark-only``, for comparing commits.

The stored ratios come from ``python -m benchmarks run`` instead, which interleaves the providers. The number of threads
is OMP_NUM_THREADS. ``pytest benchmarks -k tiny`` tries every provider at tiny sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.clock import no_garbage_collection
from benchmarks.measurement import inputs_of, measure, validate
from benchmarks.programs import build
from benchmarks.registry import MODELS, OURS, Case, case_for, cases, tiny

CASES = [(case, provider) for case in cases("all") for provider in case.providers]


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    with no_garbage_collection():
        yield


@pytest.mark.parametrize("case, provider", CASES, ids=lambda v: v if isinstance(v, str) else str(v).replace(" ", "-"))
def test_speed(case: Case, provider: str, benchmark: Any) -> None:
    benchmark.group = str(case)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    case = case_for(case, provider)
    inputs = inputs_of(case)
    try:
        program = build(case, provider, inputs)
    except LookupError as reason:
        pytest.skip(f"{provider} is absent: {reason}")
    wrong = validate(program, case)
    assert wrong is None or (program.mark and not wrong.startswith("result")), wrong
    with torch.inference_mode(case.infers):
        benchmark(program.step(case, inputs))


WHOLE_MODELS = list(dict.fromkeys(tiny(case) for suite in ("step", "loader", "score") for case in cases(suite)))
TINY = list(dict.fromkeys((tiny(case)._replace(providers=()), provider) for case, provider in CASES))
# Whatever torch.compile makes takes half a minute: one case each is enough to see that it runs.
COMPILED = [(case, provider) for case, provider in TINY if "compiled" in provider]
TINY = [pair for pair in TINY if pair not in COMPILED] + list({pair[1]: pair for pair in COMPILED}.values())


@pytest.mark.parametrize("case, provider", TINY, ids=lambda v: v if isinstance(v, str) else str(v).replace(" ", "-"))
def test_tiny(case: Case, provider: str) -> None:
    """The provider is right, where it is there at all, and has numbers."""
    alone = case._replace(providers=tuple(dict.fromkeys((OURS, provider))))
    row = measure(alone, 1, 0.0, with_memory=False)[-1]
    if row["note"].startswith("absent"):
        pytest.skip(f"{provider} is {row['note']}")
    assert float(row["p50_us"]) > 0, row
    assert ("p99_us" in row) == (case.mode == "request" and provider == OURS)
    assert row["note"].startswith("wrong-gradient") == (
        (case.op, case.trains, provider) == ("augru", True, "onednn")
    ), row


# Those with our parameters, each under dense Adam: RecBole and FuxiCTR have one bias more.
SAME_WEIGHTS = ("step_reference", "deepctr_dien")


@pytest.mark.parametrize("op", MODELS)
def test_tiny_steps_go_the_same_way(op: str) -> None:
    """Ten steps of Adam: the loss falls, and by the same steps for every provider with dense gradients."""
    case = next(c for c in WHOLE_MODELS if c.suite == "step" and c.op == op and c.length_distribution == "ragged")
    inputs, losses = inputs_of(case), {}
    for provider in case.providers:
        if provider == "step_compiled":
            continue
        try:
            step = build(case, provider, inputs).step(case, inputs)
        except LookupError:
            continue
        losses[provider] = [float(step().detach()) for _ in range(10)]
    for provider, falling in losses.items():
        assert falling[-1] < falling[0], provider
        if provider in SAME_WEIGHTS:
            assert falling == pytest.approx(losses["dien_kernels"], rel=1e-3)


def test_tiny_weights_come_back_from_deepctr() -> None:
    """The peer has our weights: its cell, read by the loader of the layers, is our evolution."""
    from benchmarks.peers import deepctr_dien
    from dien_kernels.layers import AUGRU, from_deepctr_torch

    if deepctr_dien.absent():
        pytest.skip(str(deepctr_dien.absent()))
    case = next(c for c in WHOLE_MODELS if "deepctr_dien" in c.providers)
    inputs = inputs_of(case)
    leaves = deepctr_dien.build(case, inputs).leaves
    names = ("weight_ih", "weight_hh", "bias_ih")
    layer = AUGRU.from_weights(from_deepctr_torch(*(leaves[f"evolution.{n}"].detach() for n in names)))
    for name in names:
        torch.testing.assert_close(getattr(layer, name), inputs.leaves[f"evolution.{name}"])
    assert layer.bias_hh is layer.bias_ih


def test_tiny_step_of_onednn_frees_its_result() -> None:
    """Without a collection of garbage, which is off here and while the clock runs: the peer would fill the memory."""
    from benchmarks.peers import onednn

    if onednn.absent():
        pytest.skip(str(onednn.absent()))
    case = next(tiny(c) for c in cases("peers") if c.trains)
    inputs = inputs_of(case)
    result = weakref.ref(onednn.build(case, inputs).step(case, inputs)())
    assert result() is None
