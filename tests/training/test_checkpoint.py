"""Checkpoints under damage, kills and full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dien_kernels.training import CheckpointError
from dien_kernels.training import checkpoint as ck


def content(value: float) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((500,), float(value))},
        "state": {"total": int(value), "auc": -float("inf")},
    }


def value_of(found: tuple[dict[str, Any], Path] | None) -> float:
    assert found is not None
    return float(found[0]["model"]["w"][0])


def test_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        ck.save_step(tmp_path, step, content(step))
    assert [p.name for p in ck.steps(tmp_path)] == ["step-000000030.pt", "step-000000010.pt"]
    assert value_of(ck.load_latest(tmp_path)) == 30
    assert ck.load_latest(tmp_path / "none") is None


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, keep: float) -> None:
    ck.save_step(tmp_path, 1, content(1))
    last = ck.save_step(tmp_path, 2, content(2))
    size = last.stat().st_size
    os.truncate(last, keep if isinstance(keep, int) else int(keep * size))
    with pytest.warns(UserWarning, match=r"step-000000002\.pt is damaged.*the one before"):
        found = ck.load_latest(tmp_path)
    assert value_of(found) == 1


def test_any_flipped_byte_of_the_values_is_seen(tmp_path: Path) -> None:
    """torch.load alone would return the wrong numbers."""
    ck.save_step(tmp_path, 1, content(1))
    last = ck.save_step(tmp_path, 2, content(2))
    data = bytearray(last.read_bytes())
    place = data.index(torch.full((500,), 2.0).numpy().tobytes())
    data[place + 700] ^= 4
    last.write_bytes(data)
    assert not torch.equal(torch.load(last, weights_only=True)["model"]["w"], torch.full((500,), 2.0))
    with pytest.warns(UserWarning, match="the checksum of"):
        assert value_of(ck.load_latest(tmp_path)) == 1


def test_all_damaged(tmp_path: Path) -> None:
    os.truncate(ck.save_step(tmp_path, 1, content(1)), 10)
    with (
        pytest.warns(UserWarning, match="step-000000001"),
        pytest.raises(CheckpointError, match="every checkpoint"),
    ):
        ck.load_latest(tmp_path)


def test_damaged_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (10, 20):
        ck.save_step(tmp_path, step, content(step))
    os.truncate(tmp_path / "step-000000020.pt", 10)
    ck.save_step(tmp_path, 15, content(15))
    assert [p.name for p in ck.steps(tmp_path)] == ["step-000000015.pt", "step-000000010.pt"]


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": Evil()}, tmp_path / "step-000000001.pt")
    with pytest.raises(CheckpointError):
        ck.load(tmp_path / "step-000000001.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    ck.save_step(tmp_path, 1, content(1))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match="No space left"):
            ck.save_step(tmp_path, step, content(-1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert value_of(ck.load_latest(tmp_path)) == 1


_TOO_LARGE = """
import resource, sys, torch
from pathlib import Path
from dien_kernels.training import checkpoint as ck
folder = Path(sys.argv[1])
ck.save_step(folder, 1, {"w": torch.ones(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    ck.save_step(folder, 2, {"w": torch.ones(100_000)})
except ck.CheckpointError as error:
    print("refused:", error)
assert ck.load_latest(folder)[1].name == "step-000000001.pt"
"""


def test_a_write_that_the_system_refuses_half_way(tmp_path: Path) -> None:
    """A real failing write, inside torch's own writer: there the error takes other ways than Python's."""
    run = subprocess.run([sys.executable, "-c", _TOO_LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "refused: cannot write the checkpoint" in run.stdout
    assert "File too large" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
from dien_kernels.training import checkpoint as ck
os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
ck.save_step(Path(sys.argv[1]), 1, {"w": torch.zeros(10)})
"""


@pytest.mark.slow
def test_kill_before_the_rename(tmp_path: Path) -> None:
    ck.save_step(tmp_path, 1, content(1))
    run = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert value_of(ck.load_latest(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 2
    ck.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]
