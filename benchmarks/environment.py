"""The machine, software and allocator setting with which a row was measured."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import dien_kernels
from dien_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
# What changes a measurement when it changes; results and pages do not.
MEASURED = ("dien_kernels", "csrc", "setup.py", "benchmarks", ":!benchmarks/results", ":!benchmarks/*.md")


def environment(allocator: str) -> dict[str, str]:
    """The columns of a row that name its environment; ``allocator`` is the choice given to ``set_allocator``."""
    return {
        "isa": _native.cpu_isa() or "none",
        "machine": _cpu(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": _mkl(),
        "dien_kernels": dien_kernels.__version__,
        "git_sha": _sha(),
        "allocator": f"{allocator}, huge pages {_huge_pages()}",
    }


def set_allocator(choice: str) -> None:
    """``keep``: freed memory stays with the process, for every provider alike.

    Fresh pages are several times slower to write than used ones, so glibc's default, which returns large freed blocks
    to the system, slows the providers that allocate much, mostly the peers. ``default`` leaves it so.
    """
    if choice == "keep":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0)):
            raise OSError("mallopt refused the setting; use --allocator default")


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    name, family, model = (match[1] if match else "" for match in found.values())
    return f"{name} (family {family} model {model})" if name else platform.machine()


def _mkl() -> str:
    found = re.search(r"Math Kernel Library Version (\S+?)(-Product)?\s", torch.__config__.show())
    return found[1] if found else "none"


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else "unknown"


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _sha() -> str:
    sha = _git("rev-parse", "--short=10", "HEAD")
    if sha is None:
        return "unknown"
    return sha + "+dirty" if _git("status", "--porcelain", "--", *MEASURED) else sha
