"""The text of ``python -m dien_kernels info``.

Room card. Lives here: words about versions, the build and the op x backend table. May import: all of ours.
Must not be here: decisions; the table is the dispatcher's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

import dien_kernels
from dien_kernels import _native
from dien_kernels.ops import _dispatch

ENVIRONMENT = "DIEN_KERNELS_"


def report() -> str:
    """Versions, the native library, the environment, and op x backend with the reason for each refusal."""
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines)
        for title, lines in (
            ("versions", _aligned(_versions())),
            ("native library", _aligned(_library())),
            ("environment", _environment()),
            ("backends (a float32 call)", _backends()),
        )
    )


def _aligned(pairs: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}}  {value}" for name, value in pairs]


def _versions() -> list[tuple[str, str]]:
    return [
        ("dien_kernels", dien_kernels.__version__),
        ("torch", torch.__version__),
        ("triton", _triton()),
        ("python", platform.python_version()),
        ("platform", f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"),
    ]


def _triton() -> str:
    # Found, not imported: importing Triton looks for GPU drivers.
    if importlib.util.find_spec("triton") is None:
        return "not installed (pip install 'dien_kernels[triton]')"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "present, of unknown version"


def _library() -> list[tuple[str, str]]:
    info = _native.build_info()
    pairs = [("loaded", "yes" if _native.available() else f"no: {_native.reason()}")]
    if _native.available():
        isa = _native.cpu_isa()
        if isa is None:
            isa = f"none: {_native.cpu_isa_reason()}"
        elif not _native.cpu_isa_timed():
            isa += " (tested, also on an emulated processor; never timed)"
        pairs.append(("instruction set", isa))
    for key, value in info.items():
        if key == "isas":
            value = [" ".join((isa, *flags)) for isa, flags in value.items()]
            pairs.append(("compiled for", "; ".join(value)))
        elif value:
            pairs.append((key.replace("_", " "), " ".join(value) if isinstance(value, list) else str(value)))
    return pairs


def _environment() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith(ENVIRONMENT))
    return [f"{name}={os.environ[name]}" for name in names] or ["no DIEN_KERNELS variable is set"]


def _backends() -> list[str]:
    rows = _dispatch.table()
    ops = max(len(op) for op, _, _ in rows)
    backends = max(len(backend) for _, backend, _ in rows)
    return [f"{op:<{ops}}  {backend:<{backends}}  {reason or 'yes'}" for op, backend, reason in rows]
