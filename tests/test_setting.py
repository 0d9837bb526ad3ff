"""``use_backend`` and ``use_gates`` belong to a context: threads, tasks and generators, eager and compiled."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dien_kernels import use_backend, use_gates
from dien_kernels.ops import _dispatch, _gates
from dien_kernels.ops._setting import Setting


class Public(NamedTuple):
    """One of the public settings: its block, how the ops read it, and two of its words."""

    block: Callable[[str], AbstractContextManager[None]]
    read: Callable[[], str]
    words: tuple[str, str]


def gates() -> str:
    return "keep" if _gates.kept_units() else "recompute"


BACKEND = Public(use_backend, lambda: _dispatch._forced.word(), ("reference", "cpu"))
GATES = Public(use_gates, gates, ("recompute", "keep"))
settings = pytest.mark.parametrize("setting", [BACKEND, GATES], ids=["use_backend", "use_gates"])


@settings
def test_blocks_nest_and_end_with_an_error(setting: Public) -> None:
    before, (one, other) = setting.read(), setting.words
    with setting.block(one):
        with pytest.raises(KeyError, match=other), setting.block(other):
            raise KeyError(setting.read())
        assert setting.read() == one
    assert setting.read() == before


@settings
def test_blocks_of_two_threads_that_overlap(setting: Public) -> None:
    """The first block ends inside the second: with one word for the process, the second would bring the first back."""
    before, (one, other) = setting.read(), setting.words
    entered, left = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        assert entered.wait(60)
        seen.append(setting.read())
        with setting.block(other):
            left.set()
            assert joined.wait(60)
            seen.append(setting.read())
        seen.append(setting.read())

    joined = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(second)
        with setting.block(one):
            entered.set()
            assert left.wait(60)
            seen.append(setting.read())
        joined.set()
        done.result(60)
    assert seen == [before, one, other, before]
    assert setting.read() == before


@settings
def test_tasks_that_overlap(setting: Public) -> None:
    before, (one, other) = setting.read(), setting.words

    async def task(word: str, first: int, last: int) -> list[str]:
        """In a block from turn ``first`` to turn ``last``; what is read at each of 6 turns."""
        seen = []
        for turn in range(6):
            if turn == first:
                with setting.block(word):
                    for _ in range(first, last):
                        seen.append(setting.read())
                        await asyncio.sleep(0)
            if not first <= turn < last:
                seen.append(setting.read())
                await asyncio.sleep(0)
        return seen

    async def both() -> list[list[str]]:
        return await asyncio.gather(task(one, 1, 4), task(other, 2, 5))

    assert asyncio.run(both()) == [[before, *[one] * 3, before, before], [before, before, *[other] * 3, before]]
    assert setting.read() == before


@settings
def test_a_task_begins_with_the_word_of_the_block_that_creates_it(setting: Public) -> None:
    before, (one, _) = setting.read(), setting.words

    async def read() -> str:
        return setting.read()

    async def main() -> list[str]:
        with setting.block(one):
            task = asyncio.create_task(read())
        return [await task, setting.read()]

    assert asyncio.run(main()) == [one, before]


@settings
def test_blocks_of_two_generators_that_overlap(setting: Public) -> None:
    """Generators share their caller's context. Each block takes away its own word, whatever order they end in."""
    before, (one, other) = setting.read(), setting.words

    def inside(word: str) -> Iterator[str]:
        with setting.block(word):
            yield setting.read()

    first, second = inside(one), inside(other)
    assert [next(first), next(second)] == [one, other]
    first.close()
    assert setting.read() == other
    second.close()
    assert setting.read() == before


@settings
def test_a_block_that_ends_in_another_context_changes_nothing_there(setting: Public) -> None:
    def inside() -> Iterator[None]:
        with setting.block(setting.words[0]):
            yield

    blocks = inside()
    contextvars.copy_context().run(next, blocks)
    with setting.block(setting.words[1]):
        blocks.close()
        assert setting.read() == setting.words[1]


CHOICE = Setting("of_these_tests", "none")


def step(x: Tensor) -> Tensor:
    """1 is added outside of all blocks, 2 in a block of "two", 3 in one of "three"."""
    return x + {"none": 1, "two": 2, "three": 3}[CHOICE.word()]


class Compiled:
    """``function`` under ``torch.compile``, with the number of graphs that were made of it."""

    def __init__(self, function: Callable[[Tensor], Tensor], fullgraph: bool = True) -> None:
        torch.compiler.reset()
        self.graphs = 0
        self._run = torch.compile(function, backend=self._count, fullgraph=fullgraph, dynamic=True)

    def _count(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph

    def __call__(self) -> float:
        return float(self._run(torch.zeros(1)))


def test_compiled_functions_follow_blocks() -> None:
    compiled = Compiled(step)
    for _ in range(2):
        assert compiled() == 1
        with CHOICE.block("two"):
            assert compiled() == 2
            with CHOICE.block("none"):
                assert compiled() == 1
            with CHOICE.block("three"):
                assert compiled() == 3
            assert compiled() == 2
    assert compiled.graphs == 3, "a graph for each word, made once"


def test_compiled_functions_follow_threads() -> None:
    compiled, barrier = Compiled(step), threading.Barrier(2)

    def run(word: str) -> list[float]:
        seen = []
        with CHOICE.block(word):
            for _ in range(3):
                barrier.wait(60)
                seen.append(compiled())
        return [*seen, compiled()]

    with ThreadPoolExecutor(2) as pool, CHOICE.block("three"):
        assert compiled() == 3
        assert list(pool.map(run, ("two", "three"))) == [[2, 2, 2, 1], [3, 3, 3, 1]]
        assert compiled() == 3


def test_compiled_functions_follow_tasks() -> None:
    compiled = Compiled(step)

    async def task(word: str) -> list[float]:
        seen = []
        with CHOICE.block(word):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(compiled())
        return seen

    async def both() -> list[list[float]]:
        return await asyncio.gather(task("two"), task("three"))

    assert asyncio.run(both()) == [[2, 2, 2], [3, 3, 3]]


def test_blocks_inside_of_a_compiled_function() -> None:
    def function(x: Tensor) -> Tensor:
        with CHOICE.block("two"):
            y = step(x)
            with CHOICE.block("three"):
                y = y + 10 * step(x)
            y = y + 100 * step(x)
        return y + 1000 * step(x)

    compiled = Compiled(function)
    assert compiled() == 1232
    with CHOICE.block("three"):
        assert compiled() == 3232
    assert compiled() == 1232
    assert compiled.graphs == 2
    assert CHOICE.word() == "none"


def test_an_error_ends_a_block_inside_of_a_compiled_function() -> None:
    def function(x: Tensor) -> Tensor:
        try:
            with CHOICE.block("two"):
                y = step(x)
                raise KeyError
        except KeyError:
            return y + 10 * step(x)

    assert Compiled(function)() == 12


def test_an_ordinary_block_in_a_break_of_the_graph_of_a_compiled_one() -> None:
    @torch.compiler.disable
    def ordinary(x: Tensor) -> Tensor:
        y = step(x)
        with CHOICE.block("three"):
            y = y + 10 * step(x)
        return y + 100 * step(x)

    def function(x: Tensor) -> Tensor:
        with CHOICE.block("two"):
            y = ordinary(x)
            y = y + 1000 * step(x)
        return y + 10_000 * step(x)

    assert Compiled(function, fullgraph=False)() == 12_232
    assert CHOICE.word() == "none"
