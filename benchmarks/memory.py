"""How much memory one call needs at its peak, beyond its inputs: measured in a process of its own.

The growth of the process's resident memory during the first call at full size: the highest value Linux saw
within the call (``VmHWM``, reset just before it) less that before it. So it counts what is touched, whoever
allocated it (tensors, autograd's saved ones, results and gradients, workspaces in C++, MKL's buffers), and
not what is merely reserved. A call at a tiny size comes first, so that loading code is not counted, and the
allocator hands freed memory back. Good to about a megabyte; huge pages count whole where they are in use.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.registry import Case

ROOT = Path(__file__).resolve().parents[1]
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_mb(case: Case, provider: str, threads: int) -> str:
    """Megabytes (1e6 bytes) as text; empty where the system cannot tell. ``RuntimeError`` if the process fails."""
    if not _RESET.exists():
        return ""
    # A fixed threshold: every larger block is mapped for itself and given back when it is freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [case.op, case.mode, *map(str, case.size), case.length_distribution, case.dtype, provider, str(threads)]
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(_reason(done.stderr) or f"exit status {done.returncode}")
    return done.stdout.strip()


def _reason(stderr: str) -> str:
    """The first line of the last exception, as lines of advice may follow it; without a traceback, the last line."""
    exceptions = re.findall(r"^Traceback \(most recent call last\):\n(?: .*\n)*(\S.*)", stderr, re.MULTILINE)
    return (exceptions or stderr.strip().splitlines() or [""])[-1]


def _status_kb(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")


def release_freed_memory() -> None:
    """Returns freed memory to the system, even if the allocator was told to keep it. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _main(op: str, mode: str, *rest: str) -> None:
    import torch

    from benchmarks.programs import build, draw

    *size, length_distribution, dtype, provider, threads = rest
    batch, steps, inputs_size, hidden = map(int, size)
    case = Case("", op, mode, batch, steps, inputs_size, hidden, length_distribution, dtype, (provider,))
    torch.set_num_threads(int(threads))
    with torch.inference_mode(case.infers):
        for at in (case._replace(batch=2 * int(threads), steps=2), case):
            with torch.inference_mode(False):
                inputs = draw(at)
                step = build(at, provider, inputs).step(at, inputs)
            release_freed_memory()
            _RESET.write_text("5")  # see proc_pid_clear_refs(5): makes the peak the present value
            before = _status_kb("VmRSS")
            result = step()
            peak = _status_kb("VmHWM")
            del result, step, inputs
    print(f"{(peak - before) * 1024 / 1e6:.1f}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
