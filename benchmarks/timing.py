"""From a case to its rows: whoever is admitted takes its turns and gets its numbers."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import limits, memory
from benchmarks.admission import admitted, failure, inputs_of
from benchmarks.clock import Samples, Step, Turns, more_calls, quantiles, range_of, ratios, together
from benchmarks.registry import MODELS, OTHER_WORK, Case, as_computed

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
        steps, self.notes = admitted(case)
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
                row["note"] = failure(self.turns.failed[name])
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
