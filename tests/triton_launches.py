"""Stand-ins for ``triton_launch._launch``: what a launch would compile, for machines without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from dien_kernels.ops.recurrence import triton_launch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
COMPILER_OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")
# Bytes of shared memory that one program may have, by architecture.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


class Launched(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    values: dict[str, Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def describe(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Launched:
    """As Triton's launcher sees it: None and keywords are constants, tensors and sizes are arguments."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
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

    def stand_in(kernel: Any, grid: tuple[int, ...], like: Any, *arguments: Any, **options: Any) -> None:
        launch(describe(kernel, grid, arguments, options))

    with (
        mock.patch.object(triton_launch, "_INTERPRETED", True),
        mock.patch.object(triton_launch, "_launch", stand_in),
        mock.patch.object(triton_launch, "shared_memory_of", return_value=SHARED_MEMORY[architecture]),
    ):
        yield


class Code(NamedTuple):
    """What ptxas made of a kernel; figures of a step are those of the main loop, for each warp."""

    registers: int
    spills: int  # loads and stores of local memory
    shared: int
    instructions: float
    barriers: float


def compile_for(launched: Launched, architecture: int) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launched.kernel.arg_names
    source = ASTSource(
        fn=launched.kernel,
        signature={name: launched.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launched.constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in launched.signature.items()
            if kind.startswith("*")
        },
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
    every, loop = _instructions(listing.stdout)
    unroll = launched.constants.get("UNROLL", 1)
    return Code(
        int(registers[1]),
        sum(word in ("LDL", "STL") for word in every),
        built.metadata.shared,
        len(loop) / unroll,
        loop.count("BAR") / unroll,
    )


def _instructions(listing: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the largest loop with a product in it."""
    words: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(words)
            continue
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line)
        if not found:
            continue
        words.append(found[1])
        target = re.search(r"(\.L_\w+)", line) if found[1] == "BRA" else None
        if target and target[1] in labels:
            body = words[labels[target[1]] :]
            if len(body) > len(loop) and any(word.endswith("MMA") for word in body):
                loop = body
    return words, loop
