"""``torch.compile`` for programs that stay alive side by side."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function's copy, compiled as one graph for the sizes it meets first.

    Dynamo keeps graphs by code object, only a few of each, and looks through all of them in every call: so each
    program has a code object of its own.
    """
    assert isinstance(function, FunctionType)
    code, scope = function.__code__.replace(), function.__globals__
    copy = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False)
