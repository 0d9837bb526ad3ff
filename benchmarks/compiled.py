"""``torch.compile`` for programs that stay alive side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """The function's copy, compiled for the sizes it meets first.

    Dynamo keeps graphs by code object, only a few of each, and looks through all of them in every call: so each
    program has a code object of its own. (What it calls after a break of the graph has not: see ``forget``.)
    """
    assert isinstance(function, FunctionType)
    code, scope = function.__code__.replace(), function.__globals__
    copy = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(copy, fullgraph=fullgraph, dynamic=False)


def forget() -> None:
    """Of programs that are gone their graphs are left, and count."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
