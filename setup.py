"""Builds ``dien_kernels/_C.so``: one shared library without Python symbols, on torch's stable ABI.

Variables: docs/env.md. Object files in build/native are reused until command, compiler, torch or a source changes.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("DIEN_KERNELS_BUILD") or "auto"
JOBS = int(os.environ.get("DIEN_KERNELS_JOBS") or os.cpu_count() or 1)
SANITIZE = [f"-fsanitize={s}" for s in [os.environ.get("DIEN_KERNELS_SANITIZE")] if s]
CUDA_ARCHS = (os.environ.get("DIEN_KERNELS_CUDA_ARCHS") or "80 86 89 90 100 120").split()
CUDA_PTX = min(CUDA_ARCHS, key=lambda arch: int(arch.rstrip("af")))
# The PTX of the oldest architecture serves all, as the kernels use nothing newer; it is kept for devices not listed.
GENCODE = f"-gencode=arch=compute_{CUDA_PTX},code=[{','.join(f'sm_{arch}' for arch in CUDA_ARCHS)},compute_{CUDA_PTX}]"
X86 = platform.machine() in ("x86_64", "AMD64")
ABI_TARGET = "2.10"  # the oldest torch the library loads in: the first stable ABI with parallel_for

# No -march=native: the instruction set is chosen at run time. No -ffast-math: NaN must stay NaN.
CXXFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
CXXFLAGS += ["-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"]  # no wide vector is passed to a call
CXXFLAGS += [] if X86 else ["-DDIEN_NO_X86"]
CXXFLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else []
ISA_FLAGS = {  # by the suffix of a file's name; any other file is compiled for the baseline
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")), "-mfma", "-mprefer-vector-width=512"],
}
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
LINK = ["-shared", "-Wl,--no-undefined", "-Wl,--as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def fail(what):  # ends with one line and no traceback
    sys.exit(f"dien_kernels: {what}; set DIEN_KERNELS_BUILD=none to install without native code")


def compiler():
    """The C++ compiler as a command: CXX if set, else the first usual name found, else None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((command for command in map(shlex.split, names) if shutil.which(command[0])), None)


def plan():
    """The list of backends to build, and the reason if it is empty."""
    if MODE not in ("auto", "cpu", "cuda", "none"):
        fail(f"DIEN_KERNELS_BUILD must be auto, cpu, cuda or none, not {MODE!r}")
    if MODE == "none":
        return [], "built with DIEN_KERNELS_BUILD=none"
    if compiler() is None:
        if MODE == "auto":
            return [], "built with DIEN_KERNELS_BUILD=auto where no C++ compiler was found"
        fail("no C++ compiler was found (tried CXX, or g++, c++, clang++)")
    sources, nvcc = any(ROOT.glob("csrc/cuda/*.cu")), shutil.which("nvcc")
    if MODE == "cuda" and not (sources and nvcc):
        fail("cannot build for CUDA: " + ("nvcc is not on PATH" if sources else "no sources in csrc/cuda"))
    return ["cpu", "cuda"] if MODE != "cpu" and sources and nvcc else ["cpu"], None


def run(command, what):
    """Run a command. Its output is shown when it ends, so that the outputs of parallel commands do not mix."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode:
        fail(f"{what} failed")


def compile_object(source, command, *versions):
    """Compile one source, unless its object is newer than all files in its depfile (where a backslash joins lines)."""
    key = hashlib.sha256(repr((command, versions)).encode()).hexdigest()[:12]
    target = ROOT / "build/native" / key / f"{source.stem}.o"
    depfile, fresh = target.with_suffix(".d"), target.with_suffix(f".{os.getpid()}.o")
    if target.exists() and depfile.exists():
        made_of = [ROOT / name for name in shlex.split(depfile.read_text().replace("\\\n", " ").split(":", 1)[1])]
        if all(path.exists() and path.stat().st_mtime_ns < target.stat().st_mtime_ns for path in made_of):
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    name, started = source.relative_to(ROOT), time.time_ns()
    run([*command, "-MMD", "-MF", depfile, "-c", name, "-o", fresh], f"compiling {name}")
    os.utime(fresh, ns=(started, started))  # so that an edit during the compilation counts as newer
    return fresh.replace(target)


def build_native(out, backends):
    """Compile and link ``_C.so`` into the folder ``out``; returns what ``_build.json`` says about it."""
    spec = importlib.util.find_spec("torch") or fail("torch, whose headers the build needs, is not installed")
    torch, torch_version, cxx = Path(spec.origin).parent, importlib.metadata.version("torch"), compiler()
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    # The library contains no paths of the machine, so that equal sources give equal bytes.
    common = [*cxx, *CXXFLAGS, f"-ffile-prefix-map={torch}=torch", f"-ffile-prefix-map={ROOT}=."]
    torch_flags = [*TORCH_FLAGS, f"-isystem{torch}/include", *["-DDIEN_WITH_CUDA"] * ("cuda" in backends)]
    linker, libraries, jobs, isas = cxx, [*LINK, *SANITIZE, f"-L{torch}/lib"], [], {"portable": []}
    if "cuda" in backends:
        linker = ["nvcc", "-ccbin", cxx[-1], "-std=c++20"]  # it also links, as it knows where the static cudart is
        libraries = [word.replace("-Wl,", "-Xlinker=") for word in libraries]
        nvcc = [*linker, "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", GENCODE]
        nvcc_version = subprocess.getoutput("nvcc --version")
        jobs += [(source, nvcc, nvcc_version) for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        isa = source.stem.rpartition("_")[2]
        if isa not in ISA_FLAGS or X86:
            isas |= {isa: ISA_FLAGS[isa]} if isa in ISA_FLAGS else {}
            jobs.append((source, common + ISA_FLAGS.get(isa, [])))
    jobs += [(source, common + torch_flags) for source in sorted(ROOT.glob("csrc/torch/*.cpp"))]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: compile_object(*job, version, torch_version), jobs))
    fresh = out / f"_C.{os.getpid()}.so"  # moved into place, because a process may be using the old one
    run([*linker, *objects, *libraries, "-o", fresh], "linking _C.so")
    fresh.replace(out / "_C.so")
    info = {"isas": isas, "compiler": version, "flags": CXXFLAGS, "torch_flags": TORCH_FLAGS, "torch": torch_version}
    return info | ({"cuda_archs": CUDA_ARCHS, "cuda_ptx": CUDA_PTX} if "cuda" in backends else {})


class BuildNative(build_ext):
    """Leaves ``_build.json`` and, if there is anything to build, ``_C.so`` in the package's folder."""

    def run(self):
        out = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "dien_kernels"
        out.mkdir(parents=True, exist_ok=True)
        started, (backends, absent) = time.time_ns(), plan()
        info = {"mode": MODE, "backends": backends, "absent": absent, "abi_target": ABI_TARGET}
        info |= build_native(out, backends) if backends else {}
        if absent:
            (out / "_C.so").unlink(missing_ok=True)
        (out / "_build.json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
        os.utime(out / "_build.json", ns=(started, started))  # make compiles what was edited during the build again


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: py3-none-PLATFORM, or py3-none-any without native code."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2] if plan()[0] else "any")


setup(ext_modules=[Extension("dien_kernels._C", [])], cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
