"""The interleaving clock: providers take turns in one process, visit by visit, after each was found right.

A visit is a few calls in a row, long enough to be timed; a round is one visit to every provider, in an order
that changes from round to round. A busy moment of the machine so hits all providers alike, and the ratio of
two of them is taken within a round. Garbage collection is off; untimed visits warm every provider up.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import limits, memory, ours, peers
from benchmarks.inputs import Inputs, Program, draw, largest_error
from benchmarks.registry import MODELS, OTHER_WORK, OWN, Case, as_computed

VISIT_S = 5e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 500
SLOW_S, SLOW_ROUNDS = 0.8, 3  # whoever takes longer for a call is visited in the first rounds only
# The error, relative to the largest value of a tensor, above which a result is wrong and gets no number. This
# is a gate against a provider that computes something else; accuracy is judged by the tests, more strictly.
WRONG = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 5e-2}
OF_A_SUM = 10  # times as much for gradients, sums over up to thousands of steps, and for whole models
SGEMM, COPY = "sgemm", "copy"  # they take turns with the providers: see limits.py
P99_ROUNDS = 100  # fewer know no 99th percentile


class Quantiles(NamedTuple):
    p20: float
    p50: float
    p80: float


class Samples(NamedTuple):
    calls: int  # in one visit
    seconds: list[float]  # per call, one entry a round


def quantiles(values: list[float]) -> Quantiles:
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])


def visit(step: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - started) / calls


class Step(NamedTuple):
    """The thing to be timed, and how many of it a visit may be: all that fit by default."""

    call: Callable[[], object]
    least: int = 1
    most: int | None = None


@contextmanager
def uncollected() -> Iterator[None]:
    """Garbage is collected now, and not again until the end."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(steps: dict[str, Step], inference: bool, budget_s: float) -> dict[str, Samples]:
    """Rounds until the budget is used, but at least ``MIN_ROUNDS``."""
    with uncollected(), torch.inference_mode(inference):
        first = {name: _calls(step) for name, step in steps.items()}
        samples = {name: Samples(calls, []) for name, (calls, _) in first.items()}
        slow = {name for name, (_, seconds) in first.items() if seconds > SLOW_S}
        names, order, started = list(steps), random.Random(0), time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() - started > budget_s:
                break
            order.shuffle(names)
            for name in names:
                if name in slow and done >= SLOW_ROUNDS:
                    continue
                samples[name].seconds.append(visit(steps[name].call, samples[name].calls))
    return samples


def more_calls(step: Step, count: int) -> list[float]:
    """Seconds of calls one after another, where the rounds were too few for a 99th percentile."""
    with uncollected(), torch.inference_mode():
        return [visit(step.call, 1) for _ in range(count)]


def _calls(step: Step) -> tuple[int, float]:
    """How many calls make a visit long enough, and the seconds of one. The first guess is corrected once."""
    once = visit(step.call, 1)
    if once <= 2 * SLOW_S:  # a second one of the slowest would tell nothing that the rounds do not
        once = visit(step.call, 1)
    calls = max(step.least, math.ceil(VISIT_S / once))
    if calls > 1:
        once = visit(step.call, calls)
        calls = max(step.least, math.ceil(VISIT_S / once))
    return calls if step.most is None else min(step.most, calls), once


def ratios(theirs: Samples, base: Samples) -> Quantiles:
    """Their time over the base's within each round that has both: how many times faster the base is."""
    return quantiles([a / b for a, b in zip(theirs.seconds, base.seconds, strict=False)])


def _fractions(work: limits.Work, own: Samples, sgemm: Samples, copy: Samples) -> dict[str, str]:
    """How near the case's least work comes to what the machine did in the same rounds."""

    def share(least: float, limit: float, limited: Samples) -> float:
        return statistics.median(least / a / (limit / b) for a, b in zip(own.seconds, limited.seconds, strict=False))

    found = {
        "gflops": f"{work.flops / statistics.median(own.seconds) / 1e9:.2f}",
        "of_peak": f"{share(work.flops, limits.SGEMM_FLOPS, sgemm):.4f}",
        "peak_gflops": f"{limits.SGEMM_FLOPS / statistics.median(sgemm.seconds) / 1e9:.1f}",
        "bandwidth_gbs": f"{limits.COPY_BYTES / statistics.median(copy.seconds) / 1e9:.1f}",
    }
    if work.bytes is not None:
        found["of_bandwidth"] = f"{share(work.bytes, limits.COPY_BYTES, copy):.4f}"
    return found


Truth = tuple[Inputs, Tensor, dict[str, Tensor]]


def _problem(case: Case) -> Case:
    return case._replace(suite="", mode=case.mode if case.infers and case.op in MODELS else "fwd+bwd", providers=())


@lru_cache(maxsize=len(MODELS))
def _draw(problem: Case) -> Inputs:
    return draw(problem)


def inputs_of(case: Case) -> Inputs:
    """The inputs; the last problems' are kept."""
    return _draw(_problem(case))


@lru_cache(maxsize=1 + len(ours.VARIANTS))
def _truth(problem: Case, variant: str) -> Truth:
    inputs = _draw(problem)
    exact = inputs.to(torch.float64)
    program = ours.build(problem, exact, backend="reference", variant=variant)
    result = program.step(problem, exact)().detach()
    gradients = {name: leaf.grad for name, leaf in program.leaves.items() if leaf.grad is not None}
    return inputs, result, gradients


def truth(case: Case, variant: str = "") -> Truth:
    """The inputs, and result and gradients by the float64 reference; the last problems' are kept."""
    return _truth(_problem(case), variant)


def prepare(case: Case, provider: str, inputs: Inputs) -> Program:
    """The provider's program; ``LookupError`` with the reason if it is absent."""
    if provider in OWN:
        return ours.build(case, inputs, provider)
    peer = peers.load(provider)
    reason = peer.absent()
    if reason is not None:
        raise LookupError(reason)
    program: Program = peer.build(case, inputs)
    return program


def fault(program: Program, case: Case) -> str | None:
    """What is wrong with the program's result or, then, gradients; None if they are those of the reference."""
    if program.check is not None:
        return program.check()
    inputs, exact, gradients = truth(case, program.variant)
    with torch.inference_mode(case.infers):
        result = program.step(case, inputs)()
        result = program.padded(result.detach())
    pairs: dict[str, tuple[Tensor | None, Tensor, Tensor | None]] = {"result": (result, exact, inputs.valid)}
    if case.trains:
        found = {name: leaf.grad.to_dense() for name, leaf in program.leaves.items() if leaf.grad is not None}
        found = program.as_inputs(found)
        pairs |= {name: (found.get(name), exact, None) for name, exact in gradients.items()}
    for name, (actual, wanted, valid) in pairs.items():
        if actual is None or actual.shape != wanted.shape:
            shape = None if actual is None else tuple(actual.shape)
            return f"{name} has shape {shape}, not {tuple(wanted.shape)}"
        error = largest_error(actual, wanted, valid)
        summed = case.op in MODELS or name != "result"
        if not error <= WRONG[case.dtype] * (OF_A_SUM if summed else 1):
            return f"{name} is off by {error:.1e} of its largest value"
    return None


def measure(case: Case, threads: int, budget_s: float, with_memory: bool) -> list[dict[str, Any]]:
    """One row of results for each provider; those that are absent or wrong have a note instead of numbers."""
    torch.set_num_threads(threads)
    inputs = inputs_of(case)
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for provider in case.providers:
        own = as_computed(case, provider)
        try:
            program = prepare(own, provider, inputs_of(own))
            wrong = fault(program, own)
            marked = wrong is not None and program.mark != "" and not wrong.startswith("result")
            notes[provider] = program.note if wrong is None else f"wrong: {wrong}"
            if marked:
                notes[provider] = f"{program.mark}: {wrong}; {program.note}"
            if wrong is None or marked:
                most = 1 if case.mode == "request" else None  # so that slow calls are seen
                steps[provider] = Step(program.step(own, inputs_of(own)), program.least_calls, most)
        except LookupError as reason:
            notes[provider] = f"absent: {reason}"
        except Exception as error:  # a peer may raise whatever it likes: that is a result too
            first_line = str(error).strip().partition("\n")[0]
            notes[provider] = f"failed: {type(error).__name__}: {first_line}"
    if steps and limits.work(case, inputs) is not None:
        steps |= {SGEMM: Step(limits.sgemm(), limits.CALLS, limits.CALLS), COPY: Step(limits.copy(), most=1)}
    samples = interleave(steps, case.infers, budget_s) if steps else {}
    rows = []
    for provider in case.providers:
        row: dict[str, Any] = {"provider": provider, "note": notes[provider]}
        if provider in samples:
            row |= _numbers(samples[provider], samples.get(case.providers[0]))
            own = as_computed(case, provider)
            other = provider in OTHER_WORK and (case.trains or case.op not in MODELS)
            work = None if other else limits.work(own, inputs_of(own))
            row |= {} if work is None else _fractions(work, samples[provider], samples[SGEMM], samples[COPY])
            seconds = list(samples[provider].seconds)
            if case.mode == "request" and provider == case.providers[0]:
                seconds += more_calls(steps[provider], P99_ROUNDS - len(seconds))
            if case.mode == "request" and len(seconds) >= P99_ROUNDS:
                row["p99_us"] = f"{1e6 * statistics.quantiles(seconds, n=100, method='inclusive')[-1]:.2f}"
            if with_memory:
                try:
                    row["peak_mem_mb"] = memory.peak_mb(own, provider, threads)
                except RuntimeError as failure:
                    row["note"] = "; ".join(filter(None, (row["note"], f"peak memory unknown: {failure}")))
        rows.append(row)
    return rows


def _numbers(own: Samples, base: Samples | None) -> dict[str, Any]:
    times = quantiles(own.seconds)
    numbers: dict[str, Any] = {f"{name}_us": f"{1e6 * value:.2f}" for name, value in times._asdict().items()}
    if base is not None:
        ratio = ratios(own, base)
        numbers |= {
            "ratio": f"{ratio.p50:.3f}",
            "ratio_p20": f"{ratio.p20:.3f}",
            "ratio_p80": f"{ratio.p80:.3f}",
        }
    return numbers | {"rounds": len(own.seconds), "calls": own.calls}
