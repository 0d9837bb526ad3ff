"""Functions of this process on Bochs' emulated x86-64 processor, which has AVX-512.

The emulated processor sees the memory of this process at the same addresses, so a function that is called in it works
on the same tensors and the same stack of calls as on the processor itself. It cannot make system calls.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

PAGE, LARGE_PAGE = 1 << 12, 1 << 21
PRESENT_WRITABLE, LARGE = 0b011, 1 << 7  # flags of entries of page tables
TABLES_END = LARGE_PAGE  # physical memory: page tables first, then one large page after the other
STACK_BYTES = 8 << 20
ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
SYS_ARCH_PRCTL, ARCH_GET_FS = 158, 0x1003


def import_bochs() -> Any:
    """The module ``bochscpu``; where the C library is older than its wheel, with what that one lacks."""
    try:
        importlib.import_module("bochscpu")
    except ImportError as error:
        if "__isoc23" not in str(error):
            raise
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "glibc_2_38.so"
            compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[:1]
            source = Path(__file__).with_name("glibc_2_38.c")
            subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, source], check=True)
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for part in ("cpu", "memory"):
        importlib.import_module(f"bochscpu.{part}")
    return importlib.import_module("bochscpu")


class Emulator:
    """One emulated processor, in long mode with paging, in this process' address space."""

    def __init__(self) -> None:
        self._bochs = import_bochs()
        self._memory = self._bochs.memory
        self._session = self._bochs.Session()
        self._session.missing_page_handler = self._provide_page
        self._keep = [mmap.mmap(-1, size) for size in (TABLES_END, STACK_BYTES, PAGE)]
        self._tables, stack, halt = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self._keep)
        self._top_of_stack = stack + STACK_BYTES - 256
        self._keep[2][0] = 0xF4  # hlt, where functions return to
        self._halt = halt
        self._used_tables = 0
        self._root = self._new_table()
        self._regions: list[int] = []  # the virtual address of each large page of physical memory, from TABLES_END on
        self._mapped: set[int] = set()
        self._readable: list[tuple[int, int]] = []
        self._trouble: str | None = None
        self.calls = 0

    def call(self, function: int, arguments: tuple[int, ...]) -> int:
        """The result (rax) of the function at an address, whose arguments are integers and pointers, six at most.

        Raises RuntimeError where the function meets an exception of the processor or memory that is not there.
        """
        self._map_everything()
        self._session.cpu.state = self._state(function, arguments)
        self._trouble = None
        hook = self._bochs.Hook()
        hook.exception = self._stop_at_exception
        hook.hlt = lambda session, _: session.stop()
        self._session.run([hook])
        if self._trouble is None and self._session.cpu.rip - self._halt not in (0, 1):
            self._trouble = f"stopped at {self._session.cpu.rip:#x}"
        if self._trouble is not None:
            raise RuntimeError(f"in the emulated processor: {self._trouble}")
        self.calls += 1
        return int(self._session.cpu.rax)

    def _stop_at_exception(self, session: Any, _: int, vector: int, code: int) -> None:
        state = session.cpu.state
        self._trouble = f"exception {vector} (code {code}) at {session.cpu.rip:#x}, cr2 {state.cr2:#x}"
        session.stop()

    def _state(self, function: int, arguments: tuple[int, ...]) -> Any:
        cpu = self._bochs.cpu
        state = self._bochs.State()
        cpu.set_long_mode(state)
        state.cr3 = self._root
        write_protect, alignment_mask, monitor = 1 << 16, 1 << 18, 1 << 1
        state.cr0 = (state.cr0 | monitor) & ~(write_protect | alignment_mask)
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # OSFXSR, OSXMMEXCPT, OSXSAVE
        state.xcr0 = 0b1110_0111  # x87, SSE, AVX and the three states of AVX-512
        state.mxcsr, state.mxcsr_mask = 0x1F80, 0xFFFF
        state.fpcw, state.fptw = 0x37F, 0xFFFF
        state.cs = self._segment(0x10, "P S E R A L")
        for name in ("ds", "es", "ss", "gs"):
            setattr(state, name, self._segment(0x18, "P S W A DB"))
        # The thread's own storage, such as errno, lies relative to fs.
        fs_base = ctypes.c_ulong(0)
        ctypes.CDLL(None).syscall(ctypes.c_long(SYS_ARCH_PRCTL), ctypes.c_int(ARCH_GET_FS), ctypes.byref(fs_base))
        state.fs = self._segment(0x18, "P S W A DB", fs_base.value)
        stack = (self._top_of_stack & ~63) - 8  # as after a call: the address to return to lies on an aligned stack
        ctypes.c_uint64.from_address(stack).value = self._halt
        state.rsp, state.rip, state.rflags = stack, function, 2
        for name, value in zip(ARGUMENTS, arguments, strict=False):
            setattr(state, name, value)
        return state

    def _segment(self, selector: int, flags: str, base: int = 0) -> Any:
        attributes = self._bochs.cpu.SegmentFlags()
        for flag in flags.split():
            setattr(attributes, flag, True)
        segment = self._bochs.Segment()
        segment.base, segment.limit, segment.selector, segment.present = base, 0xFFFF_FFFF, selector, True
        segment.attr = int(attributes)
        return segment

    def _new_table(self) -> int:
        """The physical address of an empty page table."""
        address = self._used_tables = self._used_tables + PAGE
        if address >= TABLES_END:
            raise MemoryError("this process uses more address space than the page tables can describe")
        self._memory.page_insert(address, self._tables + address)
        return address

    def _entry(self, table: int, index: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self._tables + table + 8 * index)

    def _map_everything(self) -> None:
        """Entries in the page tables for all that this process has mapped; the memory follows when it is asked for."""
        self._readable = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, permissions, *_ = line.split()
                start, end = (int(address, 16) for address in span.split("-"))
                if permissions.startswith("r") and end < 1 << 47:
                    self._readable.append((start, end))
                    for region in range(start // LARGE_PAGE * LARGE_PAGE, end, LARGE_PAGE):
                        if region not in self._mapped:
                            self._map(region)

    def _map(self, region: int) -> None:
        table = self._root
        for shift in (39, 30):
            entry = self._entry(table, region >> shift & 511)
            if entry.value == 0:
                entry.value = self._new_table() | PRESENT_WRITABLE
            table = entry.value & ~(PAGE - 1)
        physical = TABLES_END + len(self._regions) * LARGE_PAGE
        self._entry(table, region >> 21 & 511).value = physical | LARGE | PRESENT_WRITABLE
        self._regions.append(region)
        self._mapped.add(region)

    def _provide_page(self, physical: int) -> None:
        """The memory of this process that stands behind a physical page."""
        page = physical // PAGE * PAGE
        region = (page - TABLES_END) // LARGE_PAGE
        address = self._regions[region] + page % LARGE_PAGE if 0 <= region < len(self._regions) else 0
        if not any(start <= address < end for start, end in self._readable):
            self._trouble = f"address {address:#x} is not memory of this process"
            self._session.stop()
            address = self._halt
        self._memory.page_insert(page, address)
