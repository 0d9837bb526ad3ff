"""Markers, shared fixtures and the table of cells at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from dien_kernels.ops import _dispatch

Cell = tuple[str, str, str, str, str]  # op, backend, instruction set, form, dtype
CELL = pytest.StashKey[Cell]()
_outcomes: dict[Cell, Counter[str]] = {}
_reasons: dict[Cell, set[str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: runs the C++ library; make test-asan selects these")
    config.addinivalue_line("markers", "sweep: a long search, run only when asked for with -m sweep")
    config.addinivalue_line("markers", "ptx: every compiled kernel in ptxsim, run only by make test-ptx (-m ptx)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unasked = [name for name in ("sweep", "ptx") if name not in config.getoption("-m")]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small shapes, where threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def record_cell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Say which cell of the grid a test runs, before anything can skip it: the table counts its outcome."""

    def record(op: str, target: str, form: str, dtype: torch.dtype) -> None:
        backend, _, isa = target.partition("-")
        request.node.stash[CELL] = (op, backend, isa or "-", form, str(dtype).removeprefix("torch."))

    return record


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    cell = item.stash.get(CELL, None)
    if cell is None or report.when != "call":
        return
    _outcomes.setdefault(cell, Counter())[report.outcome] += 1
    if report.skipped and isinstance(report.longrepr, tuple):
        _reasons.setdefault(cell, set()).add(report.longrepr[2].removeprefix("Skipped: "))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _outcomes:
        return
    write = terminalreporter.write_line
    terminalreporter.section("cells of the grid: number of tests passed, failed, skipped")
    lines, notes = table(_outcomes, _reasons)
    for line in lines + absent({(cell[0], cell[1]) for cell in _outcomes}) + notes:
        write(line)


def table(outcomes: dict[Cell, Counter[str]], reasons: dict[Cell, set[str]]) -> tuple[list[str], list[str]]:
    """One line for each op x backend x instruction set x form, one column for each dtype, and the reasons."""
    dtypes = sorted({cell[4] for cell in outcomes})
    rows = sorted({cell[:4] for cell in outcomes})
    notes: list[str] = []
    body = [("op", "backend", "isa", "form", *dtypes)]
    for row in rows:
        body.append((*row, *(_entry((*row, dtype), outcomes, reasons, notes) for dtype in dtypes)))
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    lines = ["  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)) for line in body]
    return lines, [f"({i}) {note}" for i, note in enumerate(notes, 1)]


def _entry(cell: Cell, outcomes: dict[Cell, Counter[str]], reasons: dict[Cell, set[str]], notes: list[str]) -> str:
    counts = outcomes.get(cell)
    if counts is None:
        return "not run"
    words = [f"{counts['passed']} passed"] if counts["passed"] else []
    words += [f"{counts['failed']} FAILED"] if counts["failed"] else []
    if counts["skipped"]:
        marks = []
        for reason in sorted(reasons.get(cell, {"no reason was given"})):
            notes += [] if reason in notes else [reason]
            marks.append(f"({notes.index(reason) + 1})")
        words.append(f"{counts['skipped']} skipped {''.join(marks)}")
    return " ".join(words)


def absent(ran: set[tuple[str, str]]) -> list[str]:
    """Cells of the dispatcher's own table that no test touched, with the dispatcher's reason."""
    ops = {op for op, _ in ran}
    return [
        f"{op}  {backend}: {reason or 'no test of this run'}"
        for op, backend, reason in _dispatch.table()
        if op in ops and (op, backend) not in ran
    ]
