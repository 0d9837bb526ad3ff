"""What nvcc makes of the CUDA kernels: registers, spills and the instructions of a time step, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tests import sass

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 86, 89, 90, 100, 120)
# The time loops of a kernel: the reset after or before the product, the input scaled by the attention or not; of
# forward16 also W_ih x in the loop, and each for tiles of which eight rows exist.
FORMS = ("after", "after_scaled", "before", "before_scaled")
LOOPS = tuple(f"{form}{rows}" for rows in ("", "_eights") for form in (*FORMS, "fused"))
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
    loops: dict[str, Loop]  # some of LOOPS


def missing() -> str | None:
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    return "nvdisasm is neither on PATH nor in an installed Triton" if disassembler() is None else None


def disassembler() -> str | None:
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    return shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=str(folder)) if folder else None)


@lru_cache
def version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


class Compiled:
    """``csrc/cuda/<file>.cu`` for one size: as in ``setup.py`` one PTX, from which each architecture's code comes."""

    def __init__(self, file: str, padded: int) -> None:
        self.file, self.padded = file, padded
        self.folder = tempfile.TemporaryDirectory()
        self.ptx = Path(self.folder.name) / "code.ptx"
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=compute_{ARCHS[0]}", f"-DDIEN_ONLY={padded}", "-ptx"]
        subprocess.run([*command, str(ROOT / "csrc" / "cuda" / f"{file}.cu"), "-o", str(self.ptx)], check=True)

    def codes(self, arch: int) -> list[Code]:
        """Its kernels on one architecture."""
        cubin = self.ptx.with_suffix(".cubin")
        done = subprocess.run(
            ["ptxas", "-v", "-O3", f"-arch=sm_{arch}", str(self.ptx), "-o", str(cubin)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        tool = disassembler()
        assert tool is not None
        listing = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        usage = {}
        for block in done.stderr.split("Compiling entry function '")[1:]:
            spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
            registers, shared = re.search(r"Used (\d+) registers", block), re.search(r"(\d+) bytes smem", block)
            assert spilled is not None, block
            assert registers is not None, block
            stack, stores, loads = map(int, spilled.groups())
            usage[block.partition("'")[0]] = (int(registers[1]), stack, stores + loads, int(shared[1]) if shared else 0)
        codes = []
        for section in re.split(r"\.section\s+\.text\.", listing)[1:]:
            name = section.partition(",")[0]
            kernel = re.search(r"(forward16|forward8|backward16)", name)
            assert kernel is not None, name
            codes.append(Code(kernel[1], *usage[name], self._loops(section, kernel[1])))
        return codes

    def _loops(self, section: str, kernel: str) -> dict[str, Loop]:
        words, ranges = sass.read(section)
        products = [(loop, body) for loop in ranges for body in [Counter(words[i] for i in loop)] if body["HMMA"]]
        time = [(loop, body) for loop, body in products if body["BAR"]]
        found = {}
        most = max(body["MUFU"] for _, body in time)
        for rows in (16, 8):  # eight of sixteen rows have half of the activations, padding less than that
            some = [(loop, body) for loop, body in time if (body["MUFU"] > 0.75 * most) == (rows == 16)]
            fused = [(loop, body) for loop, body in some if kernel == "forward16" and body["LDGSTS"]]
            forms = [(loop, body) for loop, body in some if (loop, body) not in fused]
            # What the reset reads twice makes more matrix loads, scaling more multiplications.
            steps = [self._step(loop, body, products, rows) for loop, body in forms]
            steps.sort(key=lambda step: (step["LDSM"], step["FFMA"] + step["FMUL"]))
            named = dict(zip(FORMS, steps, strict=True)) if rows == 16 or some else {}
            for loop, body in fused:
                named["fused"] = self._step(loop, body, products, rows)
            suffix = "" if rows == 16 else "_eights"
            found |= {name + suffix: Loop(sum(step.values()), step["BAR"]) for name, step in named.items()}
        return found

    def _step(
        self, loop: range, body: Counter[str], products: list[tuple[range, Counter[str]]], rows: int
    ) -> Counter[str]:
        """What one step executes, where a loop holds one or two, and loops over a product inside it."""
        # A size of 8 leaves out half of the sixteen units, and some of their activations.
        steps = max(1, round(body["MUFU"] / (MUFU_OF_A_STEP * rows // 16)))
        total = Counter({word: number / steps for word, number in body.items()})
        parts = 2 if self.file.endswith("f32") else 1  # of an operand, each with a matrix load for 32 bytes of a row
        loads = -(-self.padded * (4 if parts == 2 else 2) // 32) * parts
        for other, inner in products:
            if other != loop and other.start >= loop.start and other.stop <= loop.stop:
                assert loads % inner["LDSM"] == 0, inner
                more = loads // inner["LDSM"] - 1
                total.update({word: more * number / steps for word, number in inner.items()})
        return total
