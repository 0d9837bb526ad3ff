"""The only user of ``torch.library``: private raw ops and their fakes.

Room card. Lives here: schemas become operators, fakes and Python implementations are attached. May import:
torch. Must not be here: mathematics, checks, the choice of a backend.

Schemas are defined in Python, so that the package imports and traces without native code; the C++ library
only adds implementations. Raw ops have no autograd formula: called directly with a tensor that needs a
gradient they would only warn, so their names start with an underscore and nothing outside ``ops/`` uses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "dien_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define_raw(name: str, schema: str, fake: Callable[..., Any] | None = None) -> None:
    """Define ``dien_kernels::<name><schema>`` and, where given, what it returns for fake tensors."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def implement_raw(name: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> None:
    """Attach a Python implementation to a raw op for one dispatch key.

    It runs outside autocast: the op was handed what it shall compute with, and autocast would cast once more.
    """

    @functools.wraps(function)
    def outside_autocast(*arguments: Any) -> Any:
        device = next(a for a in arguments if isinstance(a, torch.Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    _library.impl(name, outside_autocast, key)


def raw(name: str) -> Any:
    """The overload of a defined raw op, ready to call."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default
