"""The demo on data that are prepared already, and beside folders that are not its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dien_kernels.data import Prepared

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DEMO), *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_demo(prepared: Prepared, tmp_path: Path) -> None:
    words = ["--data", str(prepared.path), "--out", str(tmp_path), "--epochs", "1"]
    earlier = tmp_path / "average"
    earlier.mkdir()
    (earlier / "thesis.txt").write_text("mine")
    run = demo(*words)
    assert run.returncode == 2
    assert "is there and no run of dien-kernels" in run.stderr
    assert (earlier / "thesis.txt").exists()
    (earlier / "config.yaml").write_text("")  # now it looks like one of an earlier demo
    run = demo(*words)
    assert run.returncode == 0, run.stderr
    assert "average pooling 0." in run.stdout
    assert (tmp_path / "dien" / "report.html").exists()
    assert not (earlier / "thesis.txt").exists()
