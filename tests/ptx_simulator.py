"""Where the PTX simulator is: beside the repository, or where the environment variable PTXSIM says."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType


def folder() -> Path:
    return Path(os.environ.get("PTXSIM", Path(__file__).resolve().parents[2] / "shared" / "ptxsim"))


def missing() -> str | None:
    """Why it cannot be loaded, or None."""
    return None if (folder() / "__init__.py").exists() else "ptxsim is not there: set PTXSIM to its folder"


@lru_cache
def loaded() -> ModuleType:
    sys.path.insert(0, str(folder().parent))
    try:
        return __import__(folder().name)
    finally:
        sys.path.remove(str(folder().parent))
