"""The one check that layers share and that needs the ops: whether there is a backend of that name."""

from __future__ import annotations

from typing import Any

from dien_kernels.checks import check_option
from dien_kernels.ops._dispatch import BACKENDS


def check_backend(backend: Any) -> None:
    """As the ops do, but when the layer is built and not at its first call."""
    check_option("backend", backend, ("auto", *BACKENDS))
