"""Triton without a GPU: its interpreter in a process of its own, and stand-ins for ``_triton.launch``."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from dien_kernels.ops import _triton
from tests import sass

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.interpreter
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be compiled")
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
COMPILER_OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")
# Bytes of shared memory that one program may have, by architecture.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def speed_up_interpreter() -> None:
    """Make Triton's interpreter about twice as fast.

    It replaces the functions of Triton's language again in each call of a device function, which takes half of its
    time. Once for each launch is enough, because all functions of this package see the same two modules. A version of
    Triton whose interpreter has other parts stays as it is.
    """
    from triton import language
    from triton.runtime import interpreter

    function = getattr(interpreter, "InterpretedFunction", None)
    if function is None or not hasattr(interpreter, "_patch_lang") or not hasattr(function, "rewrite"):
        return

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        modules = [m for m in self.fn.__globals__.values() if m is language or m is language.core]
        if any(language.core.is_builtin(module.load) for module in modules):  # not replaced yet
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **named)

    function.__call__ = call


class Launched(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    values: dict[str, Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    def aligned(self) -> list[str]:
        """The tensors that start at a multiple of 16 bytes, for which Triton makes wider accesses."""
        tensors = ((name, self.values[name]) for name in self.signature)
        return [name for name, t in tensors if isinstance(t, torch.Tensor) and t.data_ptr() % 16 == 0]


def describe(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Launched:
    """As Triton's launcher sees it: tensors and sizes are arguments; None, and what the kernel says, are constants."""
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    values = {name: arguments[name] for name in kernel.arg_names if name in arguments and name not in constant}
    options = {name: value for name, value in arguments.items() if name not in values}
    signature = {
        name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        for name, value in values.items()
        if value is not None
    }
    compiler = {name: options[name] for name in COMPILER_OPTIONS if name in options}
    constants = {name: value for name, value in options.items() if name not in compiler}
    constants |= {name: None for name, value in values.items() if value is None}
    return Launched(kernel, grid, values, signature, constants, compiler)


@contextmanager
def launching(launch: Any, architecture: int) -> Iterator[None]:
    """Tensors on the CPU are taken, and every launch is handed to ``launch(Launched)``."""

    def stand_in(kernel: Any, grid: tuple[int, ...], like: Any, **arguments: Any) -> None:
        launch(describe(kernel, grid, arguments))

    with (
        mock.patch.object(_triton, "INTERPRETED", True),
        mock.patch.object(_triton, "launch", stand_in),
        mock.patch.object(_triton, "shared_memory_of", return_value=SHARED_MEMORY[architecture]),
    ):
        yield


def simulator(ptxsim: ModuleType) -> Callable[[Launched], None]:
    """Runs a launch as PTX for sm_80, with races on shared memory looked for."""

    def simulate(launched: Launched) -> None:
        options = dict(launched.options)
        kernel = ptxsim.load_triton(
            launched.kernel,
            signature=launched.signature,
            constexprs=launched.constants,
            arch="sm_80",
            num_warps=options.pop("num_warps"),
            options=options,
            divisible=launched.aligned(),
            race=True,
        )
        kernel(launched.grid, {name: launched.values[name] for name in launched.signature})

    return simulate


class Code(NamedTuple):
    """What ptxas made of a kernel; figures of a step are those of the main loop, for each warp.

    Of an unrolled loop the remainder is the loop for the steps that do not fill it; 0 where there is none.
    """

    registers: int
    spills: int  # loads and stores of local memory
    shared: int
    instructions: float
    barriers: float
    remainder: int


def compile_for(launched: Launched, architecture: int) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launched.kernel.arg_names
    source = ASTSource(
        fn=launched.kernel,
        signature={name: launched.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launched.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launched.aligned()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launched.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert registers is not None
    every, loop, rest = _instructions(listing.stdout)
    unroll = launched.constants.get("UNROLL", 1)
    return Code(
        int(registers[1]),
        sum(word in ("LDL", "STL") for word in every),
        built.metadata.shared,
        len(loop) / unroll,
        loop.count("BAR") / unroll,
        len(rest) if unroll > 1 else 0,
    )


def _instructions(listing: str) -> tuple[list[str], list[str], list[str]]:
    """All instructions, those of the largest loop (with a product in it, if any has), and of the next beside it."""
    words, loops = sass.read(listing)
    products = [loop for loop in loops if any(words[i].endswith("MMA") for i in loop)]
    ranked = sorted(products or loops, key=len, reverse=True) or [range(0)]
    main = ranked[0]
    beside = [loop for loop in ranked if loop.stop <= main.start or loop.start >= main.stop] or [range(0)]
    return words, [words[i] for i in main], [words[i] for i in beside[0]]
