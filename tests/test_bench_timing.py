"""What the benchmarks' clock does with peers that are absent, wrong, or slow."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import clock, measurement, memory, peers, provider_dien_kernels
from benchmarks.inputs import Inputs, Program
from benchmarks.registry import OURS, Case

CASE = Case("speed", "gru", "fwd+bwd", 2, 3, 4, 4, "full", "float32", (OURS, "peer"))


class Doubled(torch.autograd.Function):
    """Its forward changes nothing; its gradient is twice the right one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * dy


def row_of(monkeypatch: pytest.MonkeyPatch, change: Any, mark: str = "", absent: str | None = None) -> dict[str, Any]:
    """The row of a peer that is our op, with ``change`` applied to its result."""

    def build(case: Case, inputs: Inputs) -> Program:
        program = provider_dien_kernels.build(case, inputs)
        return program._replace(forward=lambda: change(program.forward()), note="a peer", mark=mark)

    monkeypatch.setattr(peers, "load", lambda name: SimpleNamespace(absent=lambda: absent, build=build))
    return measurement.measure(CASE, 1, 0.0, with_memory=False)[1]


@pytest.mark.slow
def test_a_right_peer_has_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(monkeypatch, lambda y: y)
    assert row["note"] == "a peer"
    assert float(row["ratio"]) > 0


@pytest.mark.parametrize("mark", ["", "wrong-gradient"])
def test_a_wrong_result_has_none(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    row = row_of(monkeypatch, lambda y: 2 * y, mark)
    assert row["note"].startswith("wrong: result is off by")
    assert "p50_us" not in row


@pytest.mark.slow
def test_a_wrong_gradient_has_numbers_only_where_it_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(monkeypatch, Doubled.apply)
    assert row["note"].startswith("wrong: x is off by")
    assert "p50_us" not in row
    row = row_of(monkeypatch, Doubled.apply, mark="wrong-gradient")
    assert row["note"].startswith("wrong-gradient: x is off by 1.0e+00")
    assert float(row["ratio"]) > 0


def test_an_absent_peer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_of(monkeypatch, lambda y: y, absent="not here") == {"provider": "peer", "note": "absent: not here"}


@pytest.mark.parametrize(
    "stderr, reason",
    [
        (
            "Traceback (most recent call last):\n  File 'a.py', line 1\n    f()\nKeyError: 'x'\n\n"
            "During handling of the above exception, another exception occurred:\n\n"
            "Traceback (most recent call last):\n  File 'a.py', line 2\n    g()\n    ^^^\n"
            "torch._dynamo.exc.Unsupported: no such op: x\nHint: write another.\nSee https://pytorch.org/docs\n",
            "torch._dynamo.exc.Unsupported: no such op: x",
        ),
        ("Traceback (most recent call last):\n  File 'a.py', line 1\nMemoryError\n", "MemoryError"),
        ("a warning\nlibgomp: out of threads\n", "libgomp: out of threads"),
        ("", "exit status 3"),
    ],
    ids=["advice", "name alone", "no traceback", "nothing said"],
)
def test_unknown_memory_is_explained_by_the_exception(
    stderr: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_RESET", tmp_path)  # only its being there is asked
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3, "", stderr))
    with pytest.raises(RuntimeError) as failed:
        memory.peak_mb(CASE, "peer", 1)
    assert str(failed.value) == reason


def test_a_slow_provider_is_visited_less_and_compared_in_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SLOW_S", 0.02)
    steps = {"fast": clock.Step(lambda: time.sleep(0.01)), "slow": clock.Step(lambda: time.sleep(0.03))}
    turns = clock.Turns(steps, True)
    for _ in range(4):
        turns.run_session(0.0)
    assert [list(session) for session in turns.samples["fast"].sessions] == [[0], [1], [2], [3]]
    assert [list(session) for session in turns.samples["slow"].sessions] == [[0], [], [2], []]


def samples(*sessions: dict[int, float]) -> clock.Samples:
    return clock.Samples(1, list(sessions))


def test_ratios_are_of_common_rounds_and_their_range_is_of_sessions() -> None:
    base = samples({0: 1.0, 1: 2.0}, {2: 100.0}, {3: 4.0, 4: 1.0, 5: 1.0})
    slow = samples({0: 3.0}, {}, {3: 8.0})
    assert clock.ratios(slow, base).p50 == pytest.approx(2.5)
    assert clock.ratio_range(slow, base) == (2.0, 3.0)
    often = samples({0: 3.0, 1: 2.0}, {2: 300.0}, {3: 4.0, 4: 5.0, 5: 6.0})  # 3 1 | 3 | 1 5 6
    assert clock.ratios(often, base).p50 == pytest.approx(3.0)
    assert clock.ratio_range(often, base) == (2.0, 5.0)


class Clock:
    """Time passes in steps only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def step(self, seconds: float) -> clock.Step:
        def pass_time() -> None:
            self.now += seconds

        return clock.Step(pass_time)


def test_a_session_lasts_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = clock.Turns({"step": Clock(monkeypatch).step(0.01)}, True)
    for budget in (0.095, 0.0, 100.0):
        turns.run_session(budget)
    assert [len(session) for session in turns.samples["step"].sessions] == [10, 1, clock.MAX_ROUNDS]
    assert turns.samples["step"].calls == 1


@pytest.mark.parametrize("after", [0, 3, 9])
def test_who_fails_when_timed_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    steps, done = Clock(monkeypatch), []

    def fail() -> None:
        steps.now += 0.01
        done.append(1)
        if len(done) > after:
            raise MemoryError("no more")

    turns = clock.Turns({"well": steps.step(0.01), "ill": clock.Step(fail)}, True)
    for _ in range(3):
        turns.run_session(0.05)
    assert all(len(session) >= 2 for session in turns.samples["well"].sessions)
    assert set(turns.samples) == {"well"}
    assert str(turns.failed["ill"]) == "no more"
