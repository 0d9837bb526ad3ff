"""What the build promises: no Python symbols, a baseline without wide registers, errors in one line."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from dien_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(os.environ.get("DIEN_KERNELS_LIB") or Path(_native.__file__).with_name("_C.so"))
WIDE_NAMESPACES = ("dien::avx2", "dien::avx512")
WIDE_REGISTER = re.compile(r"%[yz]mm\d|%k[0-7]\b")


def tool(*command: str) -> str:
    """The output of a binutils program on the library; skips where one of them is absent."""
    if not _native.available():
        pytest.skip(f"native code is absent: {_native.reason()}")
    if any("-fsanitize" in flag for flag in _native.build_info().get("flags", [])):
        pytest.skip("the sanitizers' library is not the one that is shipped")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([*command, str(LIBRARY)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.native
def test_library_needs_no_python_symbols() -> None:
    undefined = tool("nm", "-D", "--undefined-only").split()
    assert not [symbol for symbol in undefined if re.match(r"_?Py[A-Z_]", symbol)]


@pytest.mark.native
def test_library_needs_only_the_stable_abi() -> None:
    """No C++ symbol of torch: those change between releases."""
    undefined = tool("nm", "-D", "-C", "--undefined-only")
    assert not re.findall(r"\b(?:at|c10|torch)::\S+", undefined)


@pytest.mark.native
def test_baseline_has_no_wide_registers() -> None:
    """A processor without AVX must be able to run all that is outside the namespaces of AVX2 and AVX-512."""
    function, wide = "", {}
    for line in tool("objdump", "-d", "-C", "--no-show-raw-insn").splitlines():
        if line.endswith(">:"):
            function = line.partition(" <")[2][:-2]
        elif WIDE_REGISTER.search(line) and not any(space in function for space in WIDE_NAMESPACES):
            wide.setdefault(function, line.strip())
    assert not wide


@pytest.mark.native
def test_disassembly_shows_the_wide_paths() -> None:
    """The test above sees something: where AVX-512 was compiled, its namespace uses its registers."""
    if "avx512" not in _native.build_info().get("isas", {}):
        pytest.skip("this machine's build has no AVX-512 path")
    assert re.search(r"%zmm\d", tool("objdump", "-d", "--no-show-raw-insn"))


def test_setup_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 150


def functions_of_setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``setup.py`` as a module: nothing is built."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_dien_kernels", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_object_serves_until_a_file_it_includes_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so many headers that the compiler writes its depfile in several lines."""
    setup = functions_of_setup(monkeypatch)
    if setup.compiler() is None:
        pytest.skip("there is no C++ compiler")
    compiled, run = [], setup.run
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "run", lambda *words: (compiled.append(words), run(*words)))
    source, headers = tmp_path / "unit.cpp", [tmp_path / f"header with a long name {n}.h" for n in range(3)]
    source.write_text("".join(f'#include "{header.name}"\n' for header in headers))
    for path in (source, *headers):
        path.touch()
        os.utime(path, (0, 0))

    target = setup.compile_object(source, setup.compiler(), "1.0")
    assert "\\\n" in target.with_suffix(".d").read_text()
    assert setup.compile_object(source, setup.compiler(), "1.0") == target
    assert len(compiled) == 1
    for count, changed in enumerate((source, *headers), 2):
        os.utime(changed, ns=(target.stat().st_mtime_ns,) * 2)
        setup.compile_object(source, setup.compiler(), "1.0")
        assert len(compiled) == count, changed
    assert setup.compile_object(source, setup.compiler(), "1.1") != target  # another version of the compiler
    headers[-1].unlink()
    with pytest.raises(SystemExit, match="compiling unit.cpp failed"):
        setup.compile_object(source, setup.compiler(), "1.0")


def build(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the build into a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIEN_KERNELS_")}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_build_none_leaves_only_the_reason(tmp_path: Path) -> None:
    done = build(tmp_path, DIEN_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "dien_kernels").iterdir()] == ["_build.json"]
    assert "DIEN_KERNELS_BUILD=none" in (tmp_path / "dien_kernels" / "_build.json").read_text()


def test_a_build_is_as_old_as_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make compares it with the sources: one that is edited during the build must count as newer."""
    setup = functions_of_setup(monkeypatch)
    edited = tmp_path / "edited.h"

    def while_it_builds() -> tuple[list[str], str]:
        time.sleep(0.02)  # the clock of files may lag behind by some milliseconds
        edited.touch()
        return [], "a test"

    monkeypatch.setattr(setup, "plan", while_it_builds)
    command = setup.BuildNative(setuptools.Distribution())
    command.inplace, command.editable_mode, command.build_lib = False, False, str(tmp_path)
    command.run()
    assert (tmp_path / "dien_kernels" / "_build.json").stat().st_mtime_ns < edited.stat().st_mtime_ns


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"DIEN_KERNELS_BUILD": "all"}, "must be auto, cpu, cuda or none"),
        ({"DIEN_KERNELS_BUILD": "cpu", "CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"DIEN_KERNELS_BUILD": "cpu", "CXX": "false"}, "failed"),
    ],
)
def test_failed_build_ends_with_one_clear_line(tmp_path: Path, variables: dict[str, str], words: str) -> None:
    done = build(tmp_path, **variables)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("dien_kernels: ")
    assert words in line
    assert line.endswith("set DIEN_KERNELS_BUILD=none to install without native code")
