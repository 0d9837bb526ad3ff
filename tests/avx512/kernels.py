"""The native library with its AVX-512 kernels in the emulator.

The library keeps a table of function pointers for each instruction set (``IsaKernels`` in csrc/cpu/isa.h). While the
library is told to run on ``portable``, the table of the portable kernels is overwritten with that of the AVX-512
kernels, in which every pointer leads to the emulator. All else is the library as it is, from the raw ops to the plans
of memory. Nothing here knows how the table or the structs behind its arguments are laid out, except that a table is
made of numbers and of pointers to functions, which take at most six integers and pointers and return nothing, one
integer, or a struct of more than two integers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dien_kernels import _native
from tests.avx512.emulator import ARGUMENTS, Emulator

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * len(ARGUMENTS))


def tables(library: Path) -> dict[str, tuple[int, int]]:
    """Address and bytes of each instruction set's table in this process, by the name of the instruction set."""
    found = {}
    base = min(start for start, _, path in _mappings() if path == str(library))
    listing = subprocess.run(["nm", "-S", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        words = line.split()
        for name in ("portable", "avx512"):
            if words[-1] == f"_ZN4dien{len(name) + 8}{name}_kernelsE":
                found[name] = (base + int(words[0], 16), int(words[1], 16))
    if len(found) != 2:
        raise RuntimeError(f"{library} does not name the tables of its kernels: was it stripped?")
    return found


def _mappings() -> list[tuple[int, int, str]]:
    """Start, end and file of what is mapped into this process."""
    rows = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        rows.append((start, end, path[0] if path else ""))
    return rows


class EmulatedKernels:
    """What makes the CPU backend of this process run its AVX-512 kernels in the emulator, while it is asked to."""

    def __init__(self) -> None:
        library = Path(os.environ.get("DIEN_KERNELS_LIB") or Path(_native.__file__).with_name("_C.so")).resolve()
        self.emulator = Emulator()
        found = tables(library)
        (self._portable, size), (avx512, other) = found["portable"], found["avx512"]
        if size != other:
            raise RuntimeError(f"the tables of kernels have {size} and {other} bytes: are they one struct?")
        code = [(start, end) for start, end, path in _mappings() if path == str(library)]
        self._real = ctypes.string_at(self._portable, size)
        self._trampolines = []  # kept, as nobody else holds them
        self.not_called: set[int] = set()  # functions of the table that no call has reached
        words = list((ctypes.c_uint64 * (size // 8)).from_address(avx512))
        for i, word in enumerate(words):
            if any(start <= word < end for start, end in code):
                self.not_called.add(word)
                self._trampolines.append(FUNCTION(self._emulated(word)))
                words[i] = ctypes.cast(self._trampolines[-1], ctypes.c_void_p).value or 0
        self._emulated_table = bytes((ctypes.c_uint64 * len(words))(*words))
        self.error: Exception | None = None

    def _emulated(self, function: int):  # type: ignore[no-untyped-def]
        def call(*arguments: int) -> int:
            self.not_called.discard(function)
            try:
                return self.emulator.call(function, arguments)
            except Exception as error:  # an exception cannot pass through the library's frames
                self.error = self.error or error
                return 0

        return call

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the backend ``cpu`` is the emulated AVX-512; one thread, as the emulator is one processor."""
        isa, threads, self.error = torch.ops.dien_kernels._cpu_isa(), torch.get_num_threads(), None
        torch.ops.dien_kernels._set_cpu_isa("portable")
        torch.set_num_threads(1)
        self._write(self._emulated_table)
        try:
            yield
        finally:
            self._write(self._real)
            torch.set_num_threads(threads)
            torch.ops.dien_kernels._set_cpu_isa(isa)
            if self.error is not None:  # the reason of whatever else went wrong
                raise self.error

    def _write(self, table: bytes) -> None:
        """Over the portable kernels' table, which lies in memory that is read-only once the library is loaded."""
        first = self._portable // mmap.PAGESIZE * mmap.PAGESIZE
        length, libc = self._portable + len(table) - first, ctypes.CDLL(None, use_errno=True)
        for write, protection in ((False, mmap.PROT_READ | mmap.PROT_WRITE), (True, mmap.PROT_READ)):
            if write:
                ctypes.memmove(self._portable, table, len(table))
            if libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(length), protection) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
