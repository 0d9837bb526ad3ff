"""Finds and loads the shared library, or remembers the reason why it is not loaded.

Room card. Lives here: the path of ``_C.so``, how it was built, why it is absent. May import: torch.
Must not be here: schemas, building, anything that touches a GPU. Nothing here raises.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

# Instruction sets on which the stored benchmarks ran. The tests run on every instruction set: on AVX-512 where the
# processor has it, and elsewhere on an emulated processor (make test-avx512).
TIMED_ISAS = ("portable", "avx2", "avx2x2")

_HERE = Path(__file__).resolve().parent
_reason: str | None = "load() was not called"
_build_info: dict[str, Any] = {}


def load() -> None:
    """Load the library once, after the ops that it implements were defined. If that fails, remember the reason."""
    global _reason, _build_info
    if _reason is None:
        return
    override = os.environ.get("DIEN_KERNELS_LIB")
    library = Path(override) if override else _HERE / "_C.so"
    _build_info = _read_build_info(library.with_name("_build.json"))
    _reason = _try_load(library, f"DIEN_KERNELS_LIB={override}" if override else None)


def available() -> bool:
    """Whether the library is loaded."""
    return _reason is None


def reason() -> str | None:
    """Why the library is not loaded, in one line; None if it is."""
    return _reason


def build_info() -> dict[str, Any]:
    """What the build wrote beside the library (compiler, flags, backends ...); empty without a build."""
    return dict(_build_info)


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels use in this process; None if they cannot run."""
    return _ask_isa()[0]


def cpu_isa_reason() -> str | None:
    """Why the CPU kernels have no instruction set, in one line; None if they have one."""
    return _ask_isa()[1]


def _ask_isa() -> tuple[str | None, str | None]:
    if _reason is not None:
        return None, _reason
    try:
        return str(torch.ops.dien_kernels._cpu_isa()), None
    except (AttributeError, RuntimeError, NotImplementedError, ValueError) as error:
        # A library without the CPU backend, or DIEN_KERNELS_ISA names what this machine lacks.
        return None, str(error).strip().partition("\n")[0]


def cpu_isa_timed() -> bool:
    """Whether the stored benchmarks have timings of the instruction set in use."""
    return cpu_isa() in TIMED_ISAS


def _read_build_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _try_load(library: Path, asked: str | None) -> str | None:
    if not library.is_file():
        if asked is not None:
            return f"{asked}: there is no such file"
        return _build_info.get("absent") or (
            "no _C.so beside the package: run `make build` or `pip install . --no-build-isolation`"
        )
    target, built = _build_info.get("abi_target", "unknown"), _build_info.get("torch", "unknown")
    if _release(torch.__version__) < _release(target):
        return f"built for the ABI of torch {target} and newer, this is torch {torch.__version__}"
    try:
        torch.ops.load_library(str(library.resolve()))
    except (OSError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        return (
            f"{asked or '_C.so'} does not load in torch {torch.__version__} "
            f"(built against {built}, ABI target {target}): {first_line}"
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version, or () for a text that is no version; () is less than every version."""
    numbers = version.split(".")[:2]
    return tuple(map(int, numbers)) if all(n.isdigit() for n in numbers) else ()
