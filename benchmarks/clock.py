"""The interleaving clock: providers take turns in one process, visit by visit.

A visit is a few calls in a row, long enough to be timed; a round is one visit to every provider, in an order
that changes from round to round. So a busy moment of the machine hits all providers alike, and the ratio of
two of them is taken within a round. What other programs do to the machine's caches and memory changes by the minute,
though, and hits providers differently: so the rounds of a case come in several sessions, with other cases in between.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

VISIT_S = 5e-3
SESSIONS = 10
MIN_SESSIONS = 3  # after so many even a slow provider was visited twice
MAX_ROUNDS = 100  # in a session
SLOW_S = 0.8  # a provider that takes longer for a call is visited once in every second session


class Quantiles(NamedTuple):
    p20: float
    p50: float
    p80: float


class Samples(NamedTuple):
    calls: int  # in one visit
    sessions: list[dict[int, float]]  # of each, seconds per call by the number of the round

    @property
    def seconds(self) -> dict[int, float]:
        return {number: s for session in self.sessions for number, s in session.items()}


class Step(NamedTuple):
    """What is timed, and how many calls of it make a visit: at least ``least``, at most ``most`` (None: no limit)."""

    call: Callable[[], object]
    least: int = 1
    most: int | None = None


def quantiles(values: list[float]) -> Quantiles:
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])


def visit(step: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - started) / calls


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Garbage is collected now, and not again until the context ends."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Turns:
    """The providers of one case, and what their rounds took so far."""

    def __init__(self, steps: dict[str, Step], inference: bool) -> None:
        self.steps, self.inference = steps, inference
        self.samples: dict[str, Samples] = {}
        self.failed: dict[str, Exception] = {}  # those that raised when timed: they are left out from then on
        self.sessions_done = 0
        self._slow: set[str] = set()
        self._order, self._round = random.Random(0), 0

    def run_session(self, budget_s: float) -> None:
        """Rounds until the budget is used, but at least one. The first visits, which warm up, do not count."""
        with no_garbage_collection(), torch.inference_mode(self.inference):
            if self.samples:
                for name in self.samples.keys() - self._slow:
                    self._visit(name, 1)
            else:
                self._begin()
            started, first = time.perf_counter(), self._round
            for samples in self.samples.values():
                samples.sessions.append({})
            while self._round == first or (
                time.perf_counter() - started < budget_s and self._round - first < MAX_ROUNDS
            ):
                names = list(self.samples)
                self._order.shuffle(names)
                for name in names:
                    if name in self._slow and (self.sessions_done % 2 or self._round > first):
                        continue
                    own = self.samples[name]
                    seconds = self._visit(name, own.calls)
                    if seconds is not None:
                        own.sessions[-1][self._round] = seconds
                self._round += 1
            self.sessions_done += 1

    def _begin(self) -> None:
        for name, step in self.steps.items():
            try:
                calls, seconds = _calls(step)
            except Exception as error:
                self.failed[name] = error
                continue
            self.samples[name] = Samples(calls, [])
            if seconds > SLOW_S:
                self._slow.add(name)

    def _visit(self, name: str, calls: int) -> float | None:
        try:
            return visit(self.steps[name].call, calls)
        except Exception as error:  # a peer may raise whatever it likes: the others go on
            self.failed[name] = error
            del self.samples[name]
            return None


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


def more_calls(step: Step, count: int) -> list[float]:
    """Seconds of calls one after another, where the rounds were too few for a 99th percentile."""
    with no_garbage_collection(), torch.inference_mode():
        return [visit(step.call, 1) for _ in range(count)]


def common_rounds(a: dict[int, float], b: dict[int, float]) -> list[tuple[float, float]]:
    """Seconds of both, for each round in which both were visited."""
    return [(seconds, b[number]) for number, seconds in a.items() if number in b]


def ratios(theirs: Samples, base: Samples) -> Quantiles:
    """Their time over the base's within each round that has both: how many times faster the base is."""
    return quantiles([a / b for a, b in common_rounds(theirs.seconds, base.seconds)])


def ratio_range(theirs: Samples, base: Samples) -> tuple[float, float]:
    """The lowest and the highest median that ``ratios`` has in a single session."""
    pairs = (common_rounds(a, b) for a, b in zip(theirs.sessions, base.sessions, strict=True))
    medians = [statistics.median(a / b for a, b in both) for both in pairs if both]
    return min(medians), max(medians)
