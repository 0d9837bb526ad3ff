"""Markers, shared fixtures and the table of combinations at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from dien_kernels.ops import _dispatch, _triton
from tests import ptx_simulator
from tests.cases import ISAS
from tests.targets import impossible, missing, refuses
from tests.triton_launches import INTERPRETED, speed_up_interpreter

Combination = tuple[str, str, str, str, str]  # op, backend, instruction set, form, dtype
COMBINATION = pytest.StashKey[Combination]()
PROPERTY = "combination of the grid"  # of a report: it travels from a worker process to the one that counts
_outcomes: dict[Combination, Counter[str]] = {}
_reasons: dict[Combination, set[str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED and not _triton.ABSENT:
        speed_up_interpreter()
    if config.getoption("-m") == "interpreter" and not INTERPRETED:
        raise pytest.UsageError("-m interpreter needs the environment variable TRITON_INTERPRET=1")
    for marker, what in ASKED_FOR.items():
        config.addinivalue_line("markers", f"{marker}: {what}, run only when asked for with -m {marker}")


# Tests that a plain run leaves out.
ASKED_FOR = {
    "sweep": "a long search",
    "ptx": "runs compiled kernels in a PTX simulator (make test-ptx)",
    "gpu": "needs a GPU (make test-gpu)",
    "avx512": "runs the AVX-512 kernels on an emulated processor (make test-avx512)",
    "interpreter": "runs in Triton's interpreter, with TRITON_INTERPRET=1 (the second run of make test)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skip", action="store_true", help="a test that is skipped has failed")
    parser.addoption("--avx512-cases", type=int, default=1000, help="random cases of each op (make test-avx512)")


@pytest.hookimpl(hookwrapper=True)
def pytest_pycollect_makeitem() -> Iterator[None]:
    """Make no tests that this process cannot run."""
    outcome = yield
    made = outcome.get_result()
    if isinstance(made, list):
        outcome.force_result([item for item in made if not (isinstance(item, pytest.Function) and impossible(item))])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without = {marker for marker in ASKED_FOR if marker not in config.getoption("-m")}
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in without)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small shapes, where threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ptxsim() -> ModuleType:
    """The PTX simulator beside the repository, or where the environment variable PTXSIM says."""
    pytest.importorskip("triton")
    reason = ptx_simulator.missing()
    if reason is not None:
        pytest.skip(reason)
    return ptx_simulator.loaded()


@pytest.fixture
def record_combination(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Say which combination of the grid a test runs, before anything can skip it: the table counts its outcome."""

    def record(op: str, target: str, form: str, dtype: torch.dtype) -> None:
        backend, _, isa = target.partition("-")
        request.node.stash[COMBINATION] = (op, backend, isa or "-", form, str(dtype).removeprefix("torch."))

    return record


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.config.getoption("--no-skip"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"with --no-skip: {reason}"
    combination = item.stash.get(COMBINATION, None)
    if combination is not None and report.when == "call":
        report.user_properties.append((PROPERTY, combination))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    combination = next((tuple(value) for name, value in report.user_properties if name == PROPERTY), None)
    if combination is None or report.when != "call":
        return
    _outcomes.setdefault(combination, Counter())[report.outcome] += 1
    if report.skipped and isinstance(report.longrepr, tuple):
        _reasons.setdefault(combination, set()).add(report.longrepr[2].removeprefix("Skipped: "))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _outcomes:
        return
    write = terminalreporter.write_line
    terminalreporter.section("combinations of the grid: number of tests passed, failed, skipped")
    lines, notes = table(_outcomes, _reasons)
    for line in lines + absent({combination[:3] for combination in _outcomes}) + notes:
        write(line)


def table(
    outcomes: dict[Combination, Counter[str]], reasons: dict[Combination, set[str]]
) -> tuple[list[str], list[str]]:
    """One line for each op x backend x instruction set x form, one column for each dtype, and the reasons."""
    dtypes = sorted({combination[4] for combination in outcomes})
    rows = sorted({combination[:4] for combination in outcomes})
    notes: list[str] = []
    body = [("op", "backend", "isa", "form", *dtypes)]
    for row in rows:
        body.append((*row, *(_entry((*row, dtype), outcomes, reasons, notes) for dtype in dtypes)))
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    lines = ["  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)) for line in body]
    return lines, [f"({i}) {note}" for i, note in enumerate(notes, 1)]


def _entry(
    combination: Combination,
    outcomes: dict[Combination, Counter[str]],
    reasons: dict[Combination, set[str]],
    notes: list[str],
) -> str:
    counts = outcomes.get(combination)
    if counts is None:
        _, backend, isa, _, dtype = combination
        reason = refuses(backend if isa == "-" else f"{backend}-{isa}", getattr(torch, dtype))
        return "not run" if reason is None else f"not run {_mark(reason, notes)}"
    words = [f"{counts['passed']} passed"] if counts["passed"] else []
    words += [f"{counts['failed']} FAILED"] if counts["failed"] else []
    if counts["skipped"]:
        marks = [_mark(reason, notes) for reason in sorted(reasons.get(combination, {"no reason was given"}))]
        words.append(f"{counts['skipped']} skipped {''.join(marks)}")
    return " ".join(words)


def _mark(reason: str, notes: list[str]) -> str:
    """The number of the note that gives the reason."""
    notes += [] if reason in notes else [reason]
    return f"({notes.index(reason) + 1})"


def absent(ran: set[tuple[str, str, str]]) -> list[str]:
    """What no test of this run touched, with the reason: backends of the dispatcher's table, and instruction sets."""
    lines = []
    for op, backend, reason in _dispatch.table():
        if not any(op == combination[0] for combination in ran):
            continue
        isas = ISAS if backend == "cpu" and any(combination[:2] == (op, "cpu") for combination in ran) else ("-",)
        for isa in isas:
            if not any(combination[:2] == (op, backend) and isa in (combination[2], "-") for combination in ran):
                here = missing(backend if isa == "-" else f"{backend}-{isa}")
                why = (here if backend in _dispatch._refusals[op] else None) or reason or "this run has no test of it"
                lines.append(f"{op}  {backend}  {isa}: not run here, because {why}")
    return lines
