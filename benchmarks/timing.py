"""From a case to its rows: every provider is built and found right, takes its turns, and gets its numbers."""

from __future__ import annotations

import statistics
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import limits, memory, ours, peers
from benchmarks.clock import Samples, Step, Turns, more_calls, quantiles, range_of, ratios, together
from benchmarks.inputs import Inputs, Program, draw, largest_error
from benchmarks.registry import MODELS, OTHER_WORK, OWN, Case, as_computed

# The error, relative to the largest value of a tensor, above which a result is wrong and gets no number. This
# is a gate against a provider that computes something else; accuracy is judged by the tests, more strictly.
WRONG = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 5e-2}
OF_A_SUM = 10  # times as much for gradients, sums over up to thousands of steps, and for whole models
SGEMM, COPY = "sgemm", "copy"  # they take turns with the providers: see limits.py
SITTINGS = 10
LEAST_SITTINGS = 3  # after so many even a slow provider was visited twice
P99_ROUNDS = 100  # fewer know no 99th percentile


def _fractions(work: limits.Work, own: Samples, sgemm: Samples, copy: Samples) -> dict[str, str]:
    """How near the case's least work comes to what the machine did in the same rounds."""

    def share(least: float, limit: float, limited: Samples) -> float:
        return statistics.median(least / a / (limit / b) for a, b in together(own.seconds, limited.seconds))

    def rate(amount: float, samples: Samples) -> float:
        return amount / statistics.median(samples.seconds.values()) / 1e9

    found = {
        "gflops": f"{rate(work.flops, own):.2f}",
        "of_peak": f"{share(work.flops, limits.SGEMM_FLOPS, sgemm):.4f}",
        "peak_gflops": f"{rate(limits.SGEMM_FLOPS, sgemm):.1f}",
        "bandwidth_gbs": f"{rate(limits.COPY_BYTES, copy):.1f}",
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
    """The rows of one case alone, whose sittings follow one another."""
    measurement = Measurement(case, threads, with_memory)
    for _ in range(SITTINGS):
        measurement.sit(budget_s)
    return measurement.rows()


class Measurement:
    """One case at so many threads: its providers, admitted when it is made, their sittings, and in the end their rows.

    Those of one number of threads may take turns: some peers keep that number for the whole process.
    """

    def __init__(self, case: Case, threads: int, with_memory: bool = False) -> None:
        torch.set_num_threads(threads)
        self.case, self.threads = case, threads
        steps, self.notes = _admitted(case)
        self.work = {name: _work_of(case, name) for name in steps}
        if any(work is not None for work in self.work.values()):
            steps |= {SGEMM: Step(limits.sgemm(), limits.CALLS, limits.CALLS), COPY: Step(limits.copy(), most=1)}
        self.turns = Turns(steps, case.infers)
        self.memory = {name: _memory(case, name, threads) for name in self.work} if with_memory else {}

    @property
    def finished(self) -> bool:
        """Whether there is nothing (more) to be timed."""
        return self.turns.sat >= SITTINGS or not self.turns.steps

    def sit(self, budget_s: float) -> None:
        """One of the sittings, with its part of the budget."""
        if not self.finished:
            self.turns.sit(budget_s / SITTINGS)

    def rows(self) -> list[dict[str, Any]]:
        """One for each provider; those that are absent or wrong, or failed, have a note instead of numbers."""
        case, samples = self.case, self.turns.samples
        base = samples.get(case.providers[0])
        rows = []
        for name in case.providers:
            row: dict[str, Any] = {"provider": name, "note": self.notes[name]}
            if name in self.turns.failed:
                row["note"] = _failure(self.turns.failed[name])
            if name in samples:
                row |= _numbers(samples[name], base) | {"sittings": self.turns.sat}
                work = self.work[name]
                row |= {} if work is None else _fractions(work, samples[name], samples[SGEMM], samples[COPY])
                if case.mode == "request":
                    row |= _slowest(self.turns.steps[name], samples[name], name == case.providers[0])
                found = self.memory.get(name, {})
                row |= found | {"note": "; ".join(filter(None, (row["note"], found.get("note"))))}
            rows.append(row)
        return rows


def _admitted(case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    """What takes part: steps of those that compute the case, and of each provider what is to be said."""
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
            notes[provider] = _failure(error)
    return steps, notes


def _work_of(case: Case, provider: str) -> limits.Work | None:
    """What a row is compared with the machine's limits by, if its provider does the work of the case."""
    own = as_computed(case, provider)
    other = provider in OTHER_WORK and (case.trains or case.op not in MODELS)
    return None if other else limits.work(own, inputs_of(own))


def _slowest(step: Step, samples: Samples, complete: bool) -> dict[str, str]:
    """The 99th percentile; where the rounds were too few, nothing, or from more calls if it is to be ``complete``."""
    seconds = list(samples.seconds.values())
    if complete:
        seconds += more_calls(step, P99_ROUNDS - len(seconds))
    if len(seconds) < P99_ROUNDS:
        return {}
    return {"p99_us": f"{1e6 * statistics.quantiles(seconds, n=100, method='inclusive')[-1]:.2f}"}


def _memory(case: Case, provider: str, threads: int) -> dict[str, Any]:
    try:
        return {"peak_mem_mb": memory.peak_mb(as_computed(case, provider), provider, threads)}
    except RuntimeError as failure:
        return {"note": f"peak memory unknown: {failure}"}


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _numbers(own: Samples, base: Samples | None) -> dict[str, Any]:
    seconds = list(own.seconds.values())
    numbers: dict[str, Any] = {f"{name}_us": f"{1e6 * s:.2f}" for name, s in quantiles(seconds)._asdict().items()}
    if base is not None:
        ratio, (low, high) = ratios(own, base), range_of(own, base)
        found = {
            "ratio": ratio.p50,
            "ratio_p20": ratio.p20,
            "ratio_p80": ratio.p80,
            "ratio_low": low,
            "ratio_high": high,
        }
        numbers |= {name: f"{value:.3f}" for name, value in found.items()}
    return numbers | {"rounds": len(seconds), "calls": own.calls}
