"""What nvcc makes of the CUDA kernels: registers, spills and the instructions of a time step, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests import sass

ROOT = Path(__file__).resolve().parents[1]
MUFU_OF_A_STEP = 24  # two for each of three activations of a thread's four values


class Loop(NamedTuple):
    """Of one time step and warp."""

    instructions: float
    barriers: float


class Code(NamedTuple):
    kernel: str
    registers: int
    stack: int  # bytes, and those of spill stores and loads together
    spills: int
    shared: int
    after: Loop  # the reset after the product
    after_scaled: Loop  # ... and the input scaled
    before: Loop
    before_scaled: Loop


def missing() -> str | None:
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    return "nvdisasm is neither on PATH nor in an installed Triton" if disassembler() is None else None


def disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    return shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=str(folder)) if folder else None)


def version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def compile_file(file: str, padded: int, arch: int) -> list[Code]:
    """The kernels of ``csrc/cuda/<file>.cu`` for one size."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "code.cubin"
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", f"-DDIEN_ONLY={padded}", "-Xptxas=-v", "-cubin"]
        done = subprocess.run(
            [*command, str(ROOT / "csrc" / "cuda" / f"{file}.cu"), "-o", str(cubin)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        tool = disassembler()
        assert tool is not None
        listing = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    usage = {}
    for block in done.stderr.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers, shared = re.search(r"Used (\d+) registers", block), re.search(r"(\d+) bytes smem", block)
        assert None not in (spilled, registers, shared), block
        stack, stores, loads = map(int, spilled.groups())
        usage[block.partition("'")[0]] = (int(registers[1]), stack, stores + loads, int(shared[1]))
    codes = []
    for section in re.split(r"\.section\s+\.text\.", listing)[1:]:
        name = section.partition(",")[0]
        kernel = re.search(r"(forward16|forward8|backward16)", name)
        assert kernel is not None, name
        codes.append(Code(kernel[1], *usage[name], *_loops(section)))
    return codes


def _loops(section: str) -> list[Loop]:
    """The four time loops: what the reset reads twice makes more matrix loads, scaling more multiplications."""
    words, ranges = sass.read(section)
    loops = [body for body in (Counter(words[i] for i in loop) for loop in ranges) if body["HMMA"]]
    assert len(loops) == 4, [sum(body.values()) for body in loops]
    loops.sort(key=lambda body: (body["LDSM"], body["FFMA"] + body["FMUL"]))
    # A size of 8 leaves out half of the sixteen units, and some of their activations.
    steps = [max(1, round(body["MUFU"] / MUFU_OF_A_STEP)) for body in loops]
    return [Loop(sum(body.values()) / n, body["BAR"] / n) for body, n in zip(loops, steps, strict=True)]
