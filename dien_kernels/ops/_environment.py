"""Choices from environment variables (docs/env.md)."""

from __future__ import annotations

import os
import warnings


def choice(variable: str, allowed: tuple[str, ...], default: str) -> str:
    """The variable's value; ``default`` where it is unset or empty, and with a warning where it is none of ``allowed``.

    No error: ``import dien_kernels`` never fails.
    """
    value = os.environ.get(variable) or default
    if value in allowed:
        return value
    warnings.warn(
        f"environment variable {variable} must be one of {allowed}, got {value!r}: {default!r} is used", stacklevel=2
    )
    return default


# Of the Triton kernels' activations. Read at import, not at the first launch, so that a wrong value is told at once.
FAST = choice("DIEN_KERNELS_FAST", ("0", "1"), "0") == "1"
