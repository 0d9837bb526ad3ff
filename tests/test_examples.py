"""What the README and the folder examples show runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_python_block_of_the_readme_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["states"].shape == names["evolved"].shape == (128, 50, 36)
    assert names["attention"].shape == (128, 50)
    assert names["interest"].shape == (128, 36)
    gradients = [weight.grad for weight in names["weights"]]
    assert len(gradients) == 4
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.slow
def test_the_example_of_the_ops_runs() -> None:
    run = subprocess.run([sys.executable, ROOT / "examples" / "ops.py"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    table = re.findall(r"^(A?U?GRU) +(.+?) +[\d.]+ +[\d.]+$", run.stdout, re.MULTILINE)
    assert [op for op, _ in table] == ["GRU"] * 4 + ["AUGRU"] * 2, run.stdout
