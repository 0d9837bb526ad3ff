"""What can be replaced: a method of a class of a host library, and how it is known again.

Room card. Lives here: ``Target``, ``Fallback``, ``fingerprint``. May import: the standard library. Must not be here:
any host, torch.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Fallback(Exception):
    """A call that our code does not take: the original runs it. The words say why."""


@dataclass(frozen=True)
class Target:
    """A method of a host that ``make`` has a replacement for.

    Attributes:
        host: the name that ``patch`` takes.
        module, owner, method: where it is found.
        replacement: ``replacement(self, *args, **kwargs)`` gives what the method gives, or raises ``Fallback``.
        prints: ``print_of`` every text that the replacement is known to equal, and the releases that have it. None: the
            interface is promised and tested by the host, and its text does not matter.
        inside: further methods, as (module, owner, method), whose work the replacement does as well.
    """

    host: str
    module: str
    owner: str
    method: str
    replacement: Callable[..., Any]
    prints: Mapping[str, str] | None = field(default_factory=dict)
    inside: tuple[tuple[str, str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.module}.{self.owner}.{self.method}"


def print_of(target: Target, original: Callable[..., Any]) -> str:
    """The ``fingerprint`` of a method and of all that is ``inside`` of it; empty where one of them has no text."""
    functions = [original]
    for module, owner, method in target.inside:
        functions.append(getattr(getattr(sys.modules.get(module), owner, None), method, None))  # type: ignore[arg-type]
    found = [fingerprint(function) for function in functions]
    return "" if "" in found else hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]


def fingerprint(function: Callable[..., Any]) -> str:
    """Sixteen hexadecimal digits of the syntax tree of a function without its docstring: comments, blank lines and line
    breaks do not matter. Empty where there is no text."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
