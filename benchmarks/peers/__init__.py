"""What people use instead. A peer is one small module here that calls an installed package:

    absent() -> str | None                    why it cannot run on this machine; None if it can
    build(case, inputs) -> Program            the same function of the same inputs, result in the same layout

An absent peer gives a row that says so.
"""

from __future__ import annotations

import importlib
from typing import Any


def load(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
