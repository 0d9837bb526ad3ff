"""Settings that belong to the running context, in a form that ``torch.compile`` can follow.

Room card. Lives here: ``Setting``, the mechanism behind ``use_backend`` and ``use_gates``. May import: torch. Must not
be here: what a setting means, or which values it may take.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class _Traced(threading.local):
    """The value of the innermost block that ``torch.compile`` is tracing in this thread, or None outside of one."""

    def __init__(self) -> None:
        self.value: str | None = None  # an entry of its own in every thread, which Dynamo can guard and restore


def _reader(variable: ContextVar[Any]) -> Any:
    """An object whose attribute ``word`` is what the variable holds in the running context, or no string at all."""

    class Reader:
        word = property(variable.get)  # called with the object, which ContextVar.get takes for its default value

    return Reader()


class Setting:
    """A word that holds inside ``with setting.block(word)`` and is ``default`` everywhere else.

    A block belongs to the context in which it is entered, as ``contextvars`` has it. Other threads do not see it, and
    neither do asyncio tasks that run at the same time; a task that is created inside a block begins with its word. A
    thread that is started inside a block begins with ``default`` (before Python 3.14; since then Python's own
    ``thread_inherit_context`` says): ``contextvars.copy_context().run`` takes the word along.
    A block that ends takes away its own word and no other, even where blocks of one context overlap without
    being nested, as those of two generators can.

    Dynamo, the tracer of ``torch.compile``, can neither call ``ContextVar.get`` nor guard its result. It does guard
    the attributes of an object, and it evaluates a property whose getter is a builtin function without tracing into it,
    both while it traces and each time it checks the guard. So the value is read through such a property: a compiled
    function is traced again where the word is another one, in whichever thread or task it runs.
    Dynamo cannot follow ``ContextVar.set`` either. A block inside a compiled function therefore sets an attribute of a
    thread-local object while it is being traced; Dynamo restores that attribute itself.

    Args:
        name: of the context variable, for its ``repr``.
        default: the word outside of all blocks.
    """

    def __init__(self, name: str, default: str) -> None:
        self.default = default
        self._blocks: ContextVar[tuple[tuple[object, str], ...]] = ContextVar(f"{name}_blocks", default=())
        self._variable: ContextVar[Any] = ContextVar(name)
        self._reader = _reader(self._variable)
        self._traced = _Traced()

    def word(self) -> str:
        """The word of the innermost block of this context, or ``default``."""
        traced = self._traced.value
        if traced is not None:
            return traced
        word: str | object = self._reader.word
        return word if isinstance(word, str) else self.default

    @contextmanager
    def block(self, word: str) -> Iterator[None]:
        """Give the setting this word in the running context until the block ends."""
        traced = self._traced.value
        if torch.compiler.is_dynamo_compiling():
            self._traced.value = word
            try:
                yield
            finally:
                self._traced.value = traced
            return
        # A compiled function whose graph is broken can be inside a traced block while this ordinary one begins.
        self._traced.value = None
        mine = object()
        self._set((*self._blocks.get(), (mine, word)))
        try:
            yield
        finally:
            self._set(tuple(block for block in self._blocks.get() if block[0] is not mine))
            self._traced.value = traced

    def _set(self, blocks: tuple[tuple[object, str], ...]) -> None:
        self._blocks.set(blocks)
        word = blocks[-1][1] if blocks else self.default
        # As in a context without blocks, so that a block of the default word needs no other graph.
        self._variable.set(self._reader if word == self.default else word)
