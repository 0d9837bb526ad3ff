"""The pages docs/add-*.md are followed: every edit they name is made in a copy of the project, and checked there.

A page says an edit in one line, with the code in a block under it:

- New file `path`:
- In `path`, after (before, instead of) the line with `text`:
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dien_kernels", "tests", "docs", "benchmarks", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
EDIT = re.compile(
    r"^(?:New file `(?P<new>[^`\n]+)`|In `(?P<path>[^`\n]+)`,\s(?P<where>after|before|instead\sof)\sthe\sline\swith\s"
    r"`(?P<line>[^\n]+)`):\n\n```\w*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
pytestmark = pytest.mark.slow  # copies of the package, and processes
Run = Callable[..., str]
Follow = Callable[..., Run]


class Edit(NamedTuple):
    path: str
    where: str  # new, after, before or instead of
    line: str
    code: str


def edits_of(page: str, until: str | None = None) -> list[Edit]:
    """The edits that a page names, in order, up to the section ``until``."""
    text = (ROOT / "docs" / page).read_text()
    if until is not None:
        text, heading, _ = text.partition(f"\n## {until}\n")
        assert heading, f"{page} has no section {until!r}"
    found = [Edit(m["new"] or m["path"], m["where"] or "new", m["line"] or "", m["code"]) for m in EDIT.finditer(text)]
    said = re.findall(r"^(?:New file|In) `.*:$", text, re.MULTILINE)
    assert len(found) == len(said) > 0, f"{page} names an edit in other words than {EDIT.pattern}"
    return found


def make(edit: Edit, root: Path) -> None:
    path = root / edit.path
    if edit.where == "new":
        assert not path.exists(), f"{edit.path} is there already"
        path.parent.mkdir(exist_ok=True)
        path.write_text(edit.code)
        return
    lines = path.read_text().splitlines(keepends=True)
    places = [n for n, line in enumerate(lines) if edit.line in line]
    assert len(places) == 1, f"{edit.path} must have one line with {edit.line!r}, it has {len(places)}"
    at = places[0]
    lines[at + (edit.where == "after") : at + (edit.where != "before")] = [edit.code]
    path.write_text("".join(lines))


@pytest.fixture
def follow(tmp_path: Path) -> Follow:
    """Make a page's edits in a copy; returns a function that runs ``python`` there and gives its output."""

    def followed(page: str, most: int | None, until: str | None = None) -> Run:
        skip = shutil.ignore_patterns("__pycache__")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tmp_path / name, ignore=skip)
            else:
                shutil.copy(source, tmp_path / name)
        edits = edits_of(page, until)
        for edit in edits:
            make(edit, tmp_path)
        touched = {edit.path for edit in edits}
        assert most is None or len(touched) <= most, f"{page} promises {most} files, and names {sorted(touched)}"

        def run(*arguments: str, **variables: str) -> str:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", **variables},
                capture_output=True,
                text=True,
                timeout=900,  # the compilation of the kernels takes a minute where nothing else runs
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            return done.stdout

        return run

    return followed


def passed(output: str) -> int:
    """How many tests a run of pytest has passed."""
    found = re.search(r"^(\d+) passed", output, re.MULTILINE)
    assert found, output[-2000:]
    return int(found[1])


def test_a_form_in_five_files(follow: Follow) -> None:
    run = follow("add-a-form.md", 5)
    grid = run("-m", "pytest", "-q", "tests/ops/test_recurrence.py", "-k", "matches_reference and mean-f32")
    assert passed(grid) >= 2 * 2 * 2  # resets, sides; reference and torch, and the instruction sets there are
    by_hand = run("-m", "pytest", "-q", "tests/ops/test_recurrence_reference.py", "-k", "two_steps_by_hand and mean")
    assert passed(by_hand) == 4
    assert passed(run("-m", "pytest", "-q", "tests/layers/test_attention_gru.py", "-k", "every_option and mean")) == 1
    assert passed(run("-m", "pytest", "-q", "tests/models/test_transcription.py", "-k", "form and mean")) == 1
    # A list of forms that a test has of its own breaks here.
    run("-m", "pytest", "-q", "--collect-only", "tests")
    assert passed(run("-m", "pytest", "-q", "tests/layers/test_gru_bad_input.py", "-k", "form")) >= 1


def test_a_backend_in_three_files_beside_its_kernel(follow: Follow) -> None:
    run = follow("add-a-backend.md", 1 + 3)
    grid = run("-m", "pytest", "-q", "tests/ops/test_recurrence.py", "-k", "matches_reference and eager")
    assert passed(grid) >= 6 * 4 * 2  # kinds, resets and sides, dtypes
    assert (
        passed(run("-m", "pytest", "-q", "tests/test_rooms.py", "tests/test_grid.py", "tests/test_dispatch.py")) > 100
    )
    assert re.search(r"recurrence +eager +yes", run("-m", "dien_kernels", "info"))
    refused = run(
        "-c",
        "import torch; from dien_kernels import gru\n"
        "try: gru(torch.ones(1, 2, 3).half(), torch.ones(6, 3).half(), torch.ones(6, 2).half(), backend='eager')\n"
        "except RuntimeError as error: print(error)",
    )
    assert "torch.float16 is not among its dtypes" in refused


def test_an_op(follow: Follow) -> None:
    run = follow("add-an-op.md", None, until="Kernels for the CPU")
    assert passed(run("-m", "pytest", "-q", "tests/ops/test_decayed_sum.py")) == 6
    assert passed(run("-m", "pytest", "-q", "tests/test_grid.py", "-k", "decayed_sum")) >= 9
    assert passed(run("-m", "pytest", "-q", "tests/test_rooms.py", "-k", "decayed_sum")) >= 20
    code = "import doctest; from dien_kernels.ops.decayed_sum import op; print(doctest.testmod(op))"
    assert run("-c", code) == "TestResults(failed=0, attempted=2)\n"
    run("-m", "ruff", "check", ".")
    run("-m", "ruff", "format", "--check", ".")


def test_an_op_with_kernels_for_the_cpu(follow: Follow, tmp_path: Path) -> None:
    """The whole library of the copy is compiled, but without optimisation, which takes most of the time."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    run = follow("add-an-op.md", None)
    hurried = tmp_path / "hurried"  # its flags are the last ones, which win
    hurried.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0 -w\n')
    hurried.chmod(0o755)
    run("setup.py", "-q", "build_ext", "--inplace", CXX=shlex.quote(str(hurried)), DIEN_KERNELS_BUILD="cpu")
    tests = ("tests/ops/test_decayed_sum.py", "tests/test_rooms.py", "tests/test_grid.py", "tests/test_dispatch.py")
    output = run("-m", "pytest", "-q", *tests, DIEN_KERNELS_LIB="")
    assert passed(output) > 100
    assert "skipped" not in output
    assert passed(run("-m", "pytest", "-q", tests[0], "-k", "cpu-portable", DIEN_KERNELS_LIB="")) == 3
    code = "import torch; from dien_kernels.ops import decayed_sum\n"
    code += "with torch.profiler.profile() as p: decayed_sum(torch.ones(1, 3, 2), 0.5)\nprint(p.events())"
    assert "_decayed_sum_cpu_fwd" in run("-c", code, DIEN_KERNELS_LIB="")
    run("-m", "ruff", "check", ".")
    run("-m", "ruff", "format", "--check", ".")


def test_a_model(follow: Follow) -> None:
    run = follow("add-a-model.md", None)
    files = ("tests/models/test_transcription.py", "tests/models/test_models.py", "tests/training/test_step.py")
    assert passed(run("-m", "pytest", "-q", *files, "-k", "gru_sum")) > 10
    code = """
import torch
from dien_kernels.models import build
from tests.models.common import SCHEMA, random_batch
model, batch = build("gru_sum", SCHEMA, preset="paper"), random_batch([3, 0, 2])
optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
for _ in range(20):
    losses.append(model.loss(model(batch), batch.label).total)
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < losses[0], losses
"""
    run("-c", code)


def test_a_log_format_in_two_files_and_a_test(follow: Follow) -> None:
    run = follow("add-a-log-format.md", 2 + 1)
    assert passed(run("-m", "pytest", "-q", "tests/data/test_formats.py", "-k", "test_lines or test_taobao")) == 2
    run("-m", "mypy", "dien_kernels/data")
    code = """
import json
from pathlib import Path
from dien_kernels.data import prepare
lines = [json.dumps({"u": n % 20, "i": n % 37, "t": n}) for n in range(200)]
bad = ['{"u": 99999999999999999999, "i": 1, "t": 1}', '{"u": 1, "i": Infinity, "t": 1}']
bad += ['{"u": 1.7, "i": true, "t": 1}', "[" * 100_000, "no JSON", json.dumps({"u": 1})]
Path("log.ndjson").write_text("\\n".join([*bad, *lines]))
prepared = prepare("log.ndjson", "prepared", progress=False, max_bad_lines=len(bad))
print(prepared.split_size("train"), prepared.schema.items["item"])
try:
    prepare("log.ndjson", "again", progress=False, max_bad_lines=len(bad) - 1)
except ValueError as error:
    print(str(error).count("log.ndjson:"))
"""
    assert run("-c", code).split() == ["16", "38", "6"]  # of 20 users, 37 items beside "unknown", and the bad lines
