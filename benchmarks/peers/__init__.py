"""What people use instead. A peer is one small module here that calls an installed package:

    absent() -> str | None                    why it cannot run on this machine; None if it can
    build(case, inputs) -> Program            the same function of the same inputs, result in the same layout

An absent peer gives a row that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any


def load(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def missing(modules: Sequence[str], package: str) -> str | None:
    """Why a peer that imports ``modules`` is absent; None if all are there."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            return f"no module {name}, which {package} needs (make bench-peers installs it)"
    return None


def stub_module(name: str, **attributes: Any) -> None:
    """An empty module in the place of ``name``, which a peer imports and its model has no use for."""
    empty: Any = types.ModuleType(name)
    vars(empty).update(attributes)
    sys.modules.setdefault(name, empty)
