"""What a user's type checker says of calls of the package, and how many arguments of a function go by position."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_POSITIONAL = 10  # torch.nn.GRU takes nine by position beside self, and layers.GRU takes them as it does

RIGHT = """
import torch
from dien_kernels import Histories, augru, use_backend, use_gates
from dien_kernels.batch import Schema
from dien_kernels.layers import AUGRU
from dien_kernels.models import DIEN, AttentionOptions

x, a, w_ih, w_hh = torch.randn(2, 5, 3), torch.rand(2, 5), torch.randn(12, 3), torch.randn(12, 4)
augru(x, a, w_ih, w_hh, form="paper", reset="before", histories=Histories.of(lengths=torch.tensor([5, 2])))
AUGRU(3, 4, "tied", form="authors", padded="carry")
DIEN(Schema({"item": 10}), attention={"kind": "din"})
DIEN(Schema({"item": 10}), attention=AttentionOptions(kind="din"))
with use_backend("torch"), use_gates("recompute"):
    pass
"""

WRONG = [
    'augru(x, a, w_ih, w_hh, form="papr")',
    'augru(x, a, w_ih, w_hh, backend="cpuu")',
    'AUGRU(3, 4, form="papr")',
    'AUGRU(3, 4, "twice")',
    'use_backend("cpuu")',
    'use_gates("kep")',
    'AttentionOptions(kind="dot")',
    'DIEN(Schema({"item": 10}), attention="din")',
    'DIEN(Schema({"item": 10}), atention={"kind": "din"})',
]


@pytest.mark.slow
def test_a_type_checker_refuses_wrong_options_and_no_right_ones(tmp_path: Path) -> None:
    right = RIGHT.strip().splitlines()
    (tmp_path / "calls.py").write_text("\n".join([*right, *WRONG]) + "\n")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "calls.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "[import-" not in run.stdout, (
        f"mypy does not find the package in this environment; set it up again with make:\n{run.stdout}{run.stderr}"
    )
    refused = {int(line) for line in re.findall(r"^calls\.py:(\d+): error:", run.stdout, re.MULTILINE)}
    assert refused == set(range(len(right) + 1, len(right) + 1 + len(WRONG))), run.stdout + run.stderr


def positional(path: Path) -> list[tuple[str, int]]:
    """The functions of a file and how many arguments each may be given by position.

    The device functions of Triton are not counted: they are compiled in the form in which they are written.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            found.append((f"{path.relative_to(ROOT)}: {node.name}", len(node.args.posonlyargs) + len(node.args.args)))
    return found


def test_no_function_takes_many_arguments_by_position() -> None:
    functions = [f for path in sorted((ROOT / "dien_kernels").rglob("*.py")) for f in positional(path)]
    assert len(functions) > 500
    assert [f for f in functions if f[1] > MOST_POSITIONAL] == []
