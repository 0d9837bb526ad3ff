"""From a case to its rows: every provider's program is built, validated against the reference, and timed in turns."""

from __future__ import annotations

import statistics
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, provider_dien_kernels, roofline
from benchmarks.clock import (
    SESSIONS,
    Samples,
    Step,
    Turns,
    common_rounds,
    more_calls,
    quantiles,
    ratio_range,
    ratios,
)
from benchmarks.inputs import Inputs, Program, relative_error
from benchmarks.programs import build, draw
from benchmarks.registry import DIFFERENT_WORK, MODELS, Case, case_for

# The largest error, relative to the largest value of a tensor, of a result that counts as right. This only finds a
# provider that computes another function; accuracy is judged by the tests of the package, more strictly.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 5e-2}
SUM_FACTOR = 10  # tolerance of gradients, which are sums over up to thousands of steps, and of whole models
SGEMM, COPY = "sgemm", "copy"  # measured in the same rounds as the providers: see roofline.py
MIN_CALLS_FOR_P99 = 100

Expected = tuple[Inputs, Tensor, dict[str, Tensor]]


# Inputs, programs and their validation.


def _problem(case: Case) -> Case:
    """What cases with the same inputs have in common."""
    return case._replace(suite="", mode=case.mode if case.infers and case.op in MODELS else "fwd+bwd", providers=())


@lru_cache(maxsize=len(MODELS))
def _inputs(problem: Case) -> Inputs:
    return draw(problem)


def inputs_of(case: Case) -> Inputs:
    """The inputs; those of the last few problems are cached."""
    return _inputs(_problem(case))


@lru_cache(maxsize=1 + len(provider_dien_kernels.VARIANTS))
def _expected(problem: Case, variant: str) -> Expected:
    inputs = _inputs(problem)
    exact = inputs.to(torch.float64)
    program = provider_dien_kernels.build(problem, exact, backend="reference", variant=variant)
    result = program.step(problem, exact)().detach()
    gradients = {name: leaf.grad for name, leaf in program.leaves.items() if leaf.grad is not None}
    return inputs, result, gradients


def expected(case: Case, variant: str = "") -> Expected:
    """Inputs, and the result and gradients that the float64 reference makes of them; the last few are cached."""
    return _expected(_problem(case), variant)


def validate(program: Program, case: Case) -> str | None:
    """What differs from the reference, the result or (only if that is right) a gradient; None if nothing does."""
    if program.check is not None:
        return program.check()
    inputs, result, gradients = expected(case, program.variant)
    with torch.inference_mode(case.infers):
        actual = program.padded(program.step(case, inputs)().detach())
    tolerance = TOLERANCE[case.dtype]
    of_result = tolerance * (SUM_FACTOR if case.op in MODELS else 1)
    wrong = mismatch({"result": actual}, {"result": result}, of_result, inputs.valid)
    if wrong is not None or not case.trains:
        return wrong
    found = {name: leaf.grad.to_dense() for name, leaf in program.leaves.items() if leaf.grad is not None}
    return mismatch(program.as_inputs(found), gradients, tolerance * SUM_FACTOR)


def mismatch(
    actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, valid: Tensor | None = None
) -> str | None:
    """In words, the first tensor whose error exceeds ``tolerance`` times its largest value; None if there is none.

    With ``valid``, a mask, tensors are compared only where it is true.
    """
    for name, right in wanted.items():
        own = actual.get(name)
        if own is None or own.shape != right.shape:
            return f"{name} has shape {None if own is None else tuple(own.shape)}, not {tuple(right.shape)}"
        error = relative_error(own, right, valid)
        if not error <= tolerance:
            return f"{name} is off by {error:.1e} of its largest value"
    return None


def validated_steps(case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of the providers that may be timed, and a note for each provider, timed or not."""
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for provider in case.providers:
        own = case_for(case, provider)
        try:
            program = build(own, provider, inputs_of(own))
            wrong = validate(program, own)
            only_gradients = wrong is not None and program.mark != "" and not wrong.startswith("result")
            notes[provider] = program.note if wrong is None else f"wrong: {wrong}"
            if only_gradients:
                notes[provider] = f"{program.mark}: {wrong}; {program.note}"
            if wrong is None or only_gradients:
                most = 1 if case.mode == "request" else None  # single calls, so that the slow ones are seen
                steps[provider] = Step(program.step(own, inputs_of(own)), program.least_calls, most)
        except LookupError as reason:
            notes[provider] = f"absent: {reason}"
        except Exception as error:  # whatever a peer raises is a result, too
            notes[provider] = failure(error)
    return steps, notes


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# Timing, and the rows that come of it.


def measure(case: Case, threads: int, budget_s: float, with_memory: bool) -> list[dict[str, Any]]:
    """The rows of one case alone, whose sessions follow one another."""
    measurement = Measurement(case, threads, with_memory)
    for _ in range(SESSIONS):
        measurement.run_session(budget_s)
    return measurement.rows()


class Measurement:
    """One case with one number of threads. The providers are validated when it is made, timed in sessions, and each
    has a row in the end.

    Cases that are measured alternately must have the same number of threads, as some peers set that number for the
    whole process.
    """

    def __init__(self, case: Case, threads: int, with_memory: bool = False) -> None:
        torch.set_num_threads(threads)
        self.case, self.threads = case, threads
        steps, self.notes = validated_steps(case)
        self.work = {name: _work_of(case, name) for name in steps}
        if any(work is not None for work in self.work.values()):
            steps |= {
                SGEMM: Step(roofline.sgemm(), roofline.CALLS, roofline.CALLS),
                COPY: Step(roofline.copy(), most=1),
            }
        self.turns = Turns(steps, case.infers)
        self.memory = {name: _memory(case, name, threads) for name in self.work} if with_memory else {}

    @property
    def finished(self) -> bool:
        """Whether there is nothing (more) to be timed."""
        return self.turns.sessions_done >= SESSIONS or not self.turns.steps

    def run_session(self, budget_s: float) -> None:
        """One of the sessions, with its part of the budget, which is for all of them, in seconds."""
        if not self.finished:
            self.turns.run_session(budget_s / SESSIONS)

    def rows(self) -> list[dict[str, Any]]:
        """One for each provider; those that are absent or wrong, or failed, have a note instead of numbers."""
        case, samples = self.case, self.turns.samples
        base = samples.get(case.providers[0])
        rows = []
        for name in case.providers:
            row: dict[str, Any] = {"provider": name, "note": self.notes[name]}
            if name in self.turns.failed:
                row["note"] = failure(self.turns.failed[name])
            if name in samples:
                row |= _numbers(samples[name], base) | {"sessions": self.turns.sessions_done}
                work = self.work[name]
                row |= {} if work is None else _fractions(work, samples[name], samples[SGEMM], samples[COPY])
                if case.mode == "request":
                    row |= _slowest(self.turns.steps[name], samples[name], name == case.providers[0])
                found = self.memory.get(name, {})
                row |= found | {"note": "; ".join(filter(None, (row["note"], found.get("note"))))}
            rows.append(row)
        return rows


def _work_of(case: Case, provider: str) -> roofline.Work | None:
    """The arithmetic and bytes of the case, if the provider does the work of the case."""
    own = case_for(case, provider)
    different = provider in DIFFERENT_WORK and (case.trains or case.op not in MODELS)
    return None if different else roofline.work(own, inputs_of(own))


def _fractions(work: roofline.Work, own: Samples, sgemm: Samples, copy: Samples) -> dict[str, str]:
    """The rates that a provider reached, and their share of what the machine did in the same rounds."""

    def share(least: float, limit: float, limited: Samples) -> float:
        return statistics.median(least / a / (limit / b) for a, b in common_rounds(own.seconds, limited.seconds))

    def rate(amount: float, samples: Samples) -> float:
        return amount / statistics.median(samples.seconds.values()) / 1e9

    found = {
        "gflops": f"{rate(work.flops, own):.2f}",
        "of_peak": f"{share(work.flops, roofline.SGEMM_FLOPS, sgemm):.4f}",
        "peak_gflops": f"{rate(roofline.SGEMM_FLOPS, sgemm):.1f}",
        "bandwidth_gbs": f"{rate(roofline.COPY_BYTES, copy):.1f}",
    }
    if work.bytes is not None:
        found["of_bandwidth"] = f"{share(work.bytes, roofline.COPY_BYTES, copy):.4f}"
    return found


def _slowest(step: Step, samples: Samples, complete: bool) -> dict[str, str]:
    """The 99th percentile. Where the rounds were too few: from more calls if ``complete``, otherwise none."""
    seconds = list(samples.seconds.values())
    if complete:
        seconds += more_calls(step, MIN_CALLS_FOR_P99 - len(seconds))
    if len(seconds) < MIN_CALLS_FOR_P99:
        return {}
    return {"p99_us": f"{1e6 * statistics.quantiles(seconds, n=100, method='inclusive')[-1]:.2f}"}


def _memory(case: Case, provider: str, threads: int) -> dict[str, Any]:
    try:
        return {"peak_mem_mb": memory.peak_mb(case_for(case, provider), provider, threads)}
    except RuntimeError as failed:
        return {"note": f"peak memory unknown: {failed}"}


def _numbers(own: Samples, base: Samples | None) -> dict[str, Any]:
    seconds = list(own.seconds.values())
    numbers: dict[str, Any] = {f"{name}_us": f"{1e6 * s:.2f}" for name, s in quantiles(seconds)._asdict().items()}
    if base is not None:
        ratio, (low, high) = ratios(own, base), ratio_range(own, base)
        found = {
            "ratio": ratio.p50,
            "ratio_p20": ratio.p20,
            "ratio_p80": ratio.p80,
            "ratio_low": low,
            "ratio_high": high,
        }
        numbers |= {name: f"{value:.3f}" for name, value in found.items()}
    return numbers | {"rounds": len(seconds), "calls": own.calls}
