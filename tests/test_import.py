"""Importing the package never fails, builds, or touches a GPU; it remembers what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import dien_kernels


def run(code: str, **variables: str) -> str:
    """The output of a fresh interpreter that runs ``code`` with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIEN_KERNELS_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATE = "from dien_kernels import _native; print(_native.available(), _native.reason())"


def test_version_is_the_distribution_s() -> None:
    assert dien_kernels.__version__ == importlib.metadata.version("dien_kernels")


def test_missing_library_is_remembered_and_the_ops_still_run(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.so")
    code = f"""{STATE}
import torch
y, _ = dien_kernels.gru(torch.ones(1, 2, 3), torch.ones(12, 3), torch.ones(12, 4))
print(tuple(y.shape))
try:
    dien_kernels.gru(torch.ones(1, 2, 3), torch.ones(12, 3), torch.ones(12, 4), backend="cpu")
except RuntimeError as error:
    print("there is no such file" in str(error))
"""
    lines = run("import dien_kernels\n" + code, DIEN_KERNELS_LIB=missing).splitlines()
    assert lines == [f"False DIEN_KERNELS_LIB={missing}: there is no such file", "(1, 2, 4)", "True"]


def test_reason_comes_from_what_the_build_wrote(tmp_path: Path) -> None:
    """A package installed without native code says so."""
    (tmp_path / "_build.json").write_text(json.dumps({"absent": "built with DIEN_KERNELS_BUILD=none"}))
    code = f"""
import pathlib
from dien_kernels import _native
_native._HERE, _native._reason = pathlib.Path({str(tmp_path)!r}), "before"
_native.load()
print(_native.available(), _native.reason(), _native.cpu_isa())
"""
    assert run(code) == "False built with DIEN_KERNELS_BUILD=none None"


def test_unloadable_library_gives_the_loader_s_words(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    output = run(STATE, DIEN_KERNELS_LIB=str(tmp_path / "_C.so"))
    assert output.startswith("False DIEN_KERNELS_LIB=")
    assert "does not load in torch" in output


def test_library_for_a_newer_torch_is_not_even_tried(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    (tmp_path / "_build.json").write_text(json.dumps({"abi_target": "99.0"}))
    output = run(STATE, DIEN_KERNELS_LIB=str(tmp_path / "_C.so"))
    assert output.startswith("False built for the ABI of torch 99.0 and newer, this is torch ")


def test_import_leaves_cuda_and_triton_alone() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import dien_kernels"
    code += "; print(torch.cuda.is_initialized(), ('triton' in sys.modules) == before)"
    assert run(code) == "False True"


def test_import_without_triton() -> None:
    assert run("import sys; sys.modules['triton'] = None; import dien_kernels; print('done')") == "done"


def test_info_names_the_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.so")
    report = run(
        "import runpy, sys; sys.argv = ['', 'info']; runpy.run_module('dien_kernels', run_name='__main__')",
        DIEN_KERNELS_LIB=missing,
    )
    assert "there is no such file" in report
    assert f"DIEN_KERNELS_LIB={missing}" in report
    assert "reference  yes" in report
