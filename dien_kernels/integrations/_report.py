"""``Report``: what was patched, what was not and why, and how the calls went."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable


class Report:
    """What a patch did.

    Attributes:
        patched: names of the methods that run our code.
        skipped: name to the reason why it was left alone.
        withdrawn: name to the reason why our code was taken out again, after its first call gave something else.
        calls: name to the number of calls that our code took.
        fallbacks: (name, reason) to the number of calls that the original took.

    ``undo`` puts the originals back. ``print(report)`` says all of it. Threads may call patched code at once.
    """

    def __init__(self) -> None:
        self.patched: list[str] = []
        self.skipped: dict[str, str] = {}
        self.withdrawn: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._undo: Callable[[], None] = lambda: None

    def undo(self) -> None:
        """Put the identical original methods back.

        Raises ``RuntimeError`` naming the methods that somebody else has replaced since: these are left alone, all
        others are put back.
        """
        self._undo()

    def called(self, name: str) -> None:
        with self._lock:
            self.calls[name] += 1

    def fell_back(self, name: str, reason: str) -> None:
        with self._lock:
            self.fallbacks[name, reason] += 1

    def __str__(self) -> str:
        lines = [f"patched: {name}, {self.calls[name]:,} calls" for name in self.patched]
        lines += [f"withdrawn: {name}: {why}" for name, why in self.withdrawn.items()]
        lines += [f"skipped: {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"left to the original: {n:,} calls of {name}: {why}" for (name, why), n in self.fallbacks.items()]
        return "\n".join(lines) if lines else "nothing was patched"
