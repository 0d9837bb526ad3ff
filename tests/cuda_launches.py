"""A stand-in for ``cuda_launch._launch``: the compiled kernels in ptxsim, for machines without a GPU."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dien_kernels.ops import _dispatch
from dien_kernels.ops._register import raw
from dien_kernels.ops.recurrence import cuda_launch
from dien_kernels.ops.recurrence.cuda_launch import Numbers, Tiles
from tests import ptx_simulator

ROOT = Path(__file__).resolve().parents[1]
STORE = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
SEEDS = (0, 1, 5)  # ptxsim's orders of threads and blocks: as they are, reversed, shuffled


def missing() -> str | None:
    """Why nothing can be simulated here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    return ptx_simulator.missing()


@lru_cache(maxsize=8)
def module_of(name: str, padded: int, race: bool, prof: bool = False) -> Any:
    """One file of kernels for one size, translated for the simulator."""
    flags = [f"-DDIEN_ONLY={padded}", "-std=c++20"]
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    return ptx_simulator.loaded().load(
        source, arch="sm_80", flags=flags, race=race, prof=prof, optimise="-O0"
    )  # it compiles longer


def _pointers(tensors: list[Tensor | None]) -> bytes:
    return struct.pack(f"<{len(tensors)}Q", *(0 if t is None else t.data_ptr() for t in tensors))


class Simulator:
    """Runs every launch. Tensors end at an unmapped page; results start as NaN where kernels must write them all."""

    def __init__(
        self, seed: int = 0, race: bool = True, tiles: Tiles | None = None, fused: bool = True, prof: bool = False
    ) -> None:
        """``tiles`` in place of the host's choice; ``fused`` False: the input projection is always made before."""
        self.seed, self.race, self.tiles, self.fused, self.prof = seed, race, tiles, fused, prof
        self.launches: list[tuple[str, int, int]] = []  # kernel, padded size, rows of a tile
        self.fusions = 0  # launches that made the input projection themselves

    def __call__(self, name: str, **arguments: Any) -> None:
        """As the raw op would be called: every argument by a name of its schema."""
        names = [argument.name for argument in raw(f"_cuda_recurrence_{name}")._schema.arguments]
        assert set(names) == set(arguments)
        getattr(self, name)(*(arguments[name] for name in names))

    def _inputs(self, arguments: tuple[Any, ...]) -> tuple[list[Tensor | None], Callable[[list[Tensor | None]], bytes]]:
        """The tensors of ``cuda_launch._INPUTS`` and how they become ``Inputs`` of csrc/cuda/params.h."""
        tensors, numbers, coefficients = list(arguments[:11]), *arguments[11:13]
        hidden = tensors[7].shape[1]

        def packed(t: list[Tensor | None]) -> bytes:
            rows = _pointers(t[:5]) + struct.pack("<5q2i", *numbers[:7])
            return rows + struct.pack("<4f4i", *coefficients, *numbers[7:10], hidden) + _pointers(t[5:])

        return tensors, packed

    def _guard(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else ptx_simulator.loaded().guard(t) for t in tensors]

    def _run(
        self, file: str, kernel: str, padded: int, grid: Any, threads: int, params: bytes, tensors: Any,
        dynamic: int = 0,
    ) -> None:  # fmt: skip
        run = module_of(file, padded, self.race, self.prof).kernel(kernel)
        reachable = [t for t in tensors if t is not None]
        run(grid, threads, [params], smem=dynamic, seed=self.seed, reachable=reachable)

    def forward(self, *arguments: Any) -> None:
        inputs, packed = self._inputs(arguments)
        numbers: Numbers = arguments[11]
        padded, rows, tiles_of_8 = numbers.padded, numbers.rows, numbers.tiles_of_8
        w_ih, streamed, y, h_n = arguments[13:]
        inputs = self._guard(inputs)
        w_ih, streamed = self._guard([w_ih, streamed])
        # All of y is written only where no row can end early; elsewhere it comes as zeros, which must stay.
        everything = y is not None and inputs[1] is None and inputs[2] is None
        results = self._guard([y.fill_(float("nan")) if everything else y, h_n.fill_(float("nan"))])
        self.launches.append(("forward", padded, rows))
        self.fusions += w_ih is not None
        threads = (padded // 8 if rows == 16 else (padded + 15) // 16) * 32
        # Forward::resident: a device may have room for all three gates or for one.
        resident = 0 if streamed is None else 2 - self.seed % 2
        params = packed(inputs) + _pointers([*results, w_ih])
        params += struct.pack("<2i", 0 if w_ih is None else w_ih.shape[1], tiles_of_8)
        params += _pointers([streamed]) + struct.pack("<if", resident, (1 if numbers.keep_side else -1) / math.log(2))
        self._run(
            f"forward_{STORE[h_n.dtype]}", f"forward{rows}", padded,
            -(-numbers.batch // rows) + min(-(-tiles_of_8 // 2), -(-numbers.batch // 16)), threads, params,
            (*inputs, *results, w_ih, streamed), resident * 4 * padded * padded,
        )  # fmt: skip
        if y is not None:
            y.copy_(results[0])
        h_n.copy_(results[1])

    def backward(self, *arguments: Any) -> None:
        inputs, packed = self._inputs(arguments)
        numbers: Numbers = arguments[11]
        given, outputs = arguments[13:17], arguments[17:]
        padded = numbers.padded
        inputs, given = self._guard(inputs), self._guard(list(given))
        gates, states, d_attention, d_bias, dh0 = outputs
        everything = inputs[1] is None and inputs[2] is None
        for t in (gates, states, d_attention) if everything else ():
            if t is not None:
                t.fill_(float("nan"))
        for t in (d_bias, dh0):
            t.fill_(float("nan"))
        results = self._guard(list(outputs))
        self.launches.append(("backward", padded, 16))
        dynamic = cuda_launch.backward_dynamic(gates.dtype, padded)
        self._run(
            f"backward_{STORE[gates.dtype]}", "backward16", padded, -(-numbers.batch // 16), padded // 8 * 32,
            packed(inputs) + _pointers([*given, *results]), (*inputs, *given, *results), dynamic,
        )  # fmt: skip
        for t, result in zip(outputs, results, strict=True):
            if t is not None:
                t.copy_(result)

    def sum_rows_of_history(self, gates: Tensor, dgx: Tensor, rows: Tensor, first: Tensor, *rest: Any) -> None:
        lengths, offsets, y_start, numbers = rest
        width = gates.stride(0)
        whole = gates.as_strided((gates.shape[0], width - gates.storage_offset()), (width, 1))
        tensors = self._guard([lengths, offsets, y_start, rows, first])
        params = _pointers([None, *tensors[:2], None, tensors[2]]) + struct.pack("<5q2i", *numbers[:7])
        params += _pointers([whole, dgx, *tensors[3:]]) + struct.pack("<2i", dgx.shape[1], width)
        mangled = {torch.bfloat16: "8BFloat16", torch.float16: "7Float16", torch.float32: "7Float32"}[gates.dtype]
        self.launches.append(("sum_rows_of_history", 0, 0))
        self._run("sum_rows_of_history", mangled, 0, (numbers.histories, 3), 128, params, (*tensors, whole, dgx))


@contextmanager
def simulating(simulator: Simulator) -> Iterator[None]:
    """Tensors on the CPU are taken by the backend ``cuda``."""
    fuses, tiles_of = cuda_launch.fuses, cuda_launch.tiles_of
    with (
        mock.patch.dict(_dispatch._refusals["recurrence"], cuda=lambda call: None),
        mock.patch.object(cuda_launch, "_launch", simulator),
        mock.patch.object(cuda_launch, "fuses", lambda problem: simulator.fused and fuses(problem)),
        mock.patch.object(cuda_launch, "tiles_of", lambda *facts: simulator.tiles or tiles_of(*facts)),
    ):
        yield
