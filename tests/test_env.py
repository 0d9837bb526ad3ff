"""docs/env.md names every environment variable of the project, once, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"\bDIEN_KERNELS_[A-Z][A-Z_]*\b")
# Folders that hold what is made, not what is written.
MADE = {"build", "dist", "results", "node_modules", "__pycache__"}
WRITTEN = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".yml", ".yaml", ".sh", ""}


def written_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name != ".ci"
            if not (hidden or path.name in MADE or path.name.endswith(".egg-info")):
                yield from written_files(path)
        elif path.suffix in WRITTEN:
            yield path


def documented() -> list[str]:
    rows = re.findall(r"^\| `(DIEN_KERNELS_\w+)`", (ROOT / "docs" / "env.md").read_text(), re.MULTILINE)
    return [str(row) for row in rows]


def test_each_variable_is_documented_once() -> None:
    names = documented()
    assert len(names) == len(set(names))


def test_code_and_document_name_the_same_variables() -> None:
    used: dict[str, str] = {}
    for path in written_files(ROOT):
        if path != ROOT / "docs" / "env.md":
            for name in NAME.findall(path.read_text(errors="ignore")):
                used.setdefault(name, str(path.relative_to(ROOT)))
    strays = {name: where for name, where in used.items() if name not in documented()}
    assert not strays, f"not in docs/env.md: {strays}"
    unused = set(documented()) - set(used)
    assert not unused, f"in docs/env.md, but nowhere else: {unused}"
