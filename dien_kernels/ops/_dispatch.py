"""Which backend runs a call: a pure function of ``Call``, and the two ways to overrule it.

Room card. Lives here: ``Call`` (what is known of a call), ``select`` (the choice, with every refusal's reason),
``use_backend``. May import: nothing of ours. Must not be here: tensors, launches, mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch

from dien_kernels.ops._environment import choice
from dien_kernels.ops._setting import Setting

BackendName = Literal["auto", "cpu", "cuda", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = get_args(BackendName)[1:]
AUTO_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}


class Call(NamedTuple):
    """What a backend may look at to accept or refuse a call; no tensors."""

    op: str
    device: str
    dtype: torch.dtype
    input_size: int
    hidden_size: int
    option: str = ""
    widths: tuple[int, ...] = ()  # of the hidden layers of a network
    backward: bool = False  # whether a gradient will be asked for


Refuses = Callable[[Call], "str | None"]
_refusals: dict[str, dict[str, Refuses]] = {}


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where} must be one of {('auto', *BACKENDS)}, got {name!r}")
    return name


_forced = Setting("backend", choice("DIEN_KERNELS_BACKEND", ("auto", *BACKENDS), "auto"))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on backend ``name`` unless the call names another one itself.

    ``name`` is ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``. As with the ``backend``
    argument, a named backend runs or raises; only ``"auto"`` may move on to the next one. The block holds for the
    thread or asyncio task that enters it, and for no other (``Setting`` has the rules). A function compiled by
    ``torch.compile`` follows it. Raises ``ValueError`` for an unknown name.

    >>> with use_backend("reference"):
    ...     pass
    """
    with _forced.block(_checked(name, "use_backend(name)")):
        yield


def register_backend(op: str, backend: str, refuses: Refuses) -> None:
    """Tell the dispatcher that ``backend`` implements ``op``, and how it refuses calls."""
    _refusals.setdefault(op, {})[backend] = refuses


def select(call: Call, backend: str) -> str:
    """The backend that runs ``call``; ``backend`` is the caller's argument.

    Raises ``ValueError`` for an unknown name and ``RuntimeError`` with the reason when a named backend refuses.
    """
    if backend == "auto":
        backend = _forced.word()
    if backend == "auto":
        implementations = _refusals[call.op]
        for name in AUTO_ORDER.get(call.device, ("torch",)):
            if name in implementations and implementations[name](call) is None:
                return name
        return "torch"
    reason = refusal(call, _checked(backend, "backend"))
    if reason is not None:
        raise RuntimeError(f"{call.op}: backend {backend!r} refuses this call: {reason}")
    return backend


def refusal(call: Call, backend: str) -> str | None:
    """Why ``backend`` cannot run ``call``, or None if it can."""
    refuses = _refusals[call.op].get(backend)
    if refuses is None:
        return f"there is no {backend} implementation of {call.op} yet"
    return refuses(call)


def table() -> list[tuple[str, str, str | None]]:
    """(op, backend, reason it is absent or None) for a typical float32 call, for ``python -m dien_kernels info``."""
    rows = []
    for op in _refusals:
        for backend in BACKENDS:
            call = Call(op, "cuda" if backend in ("cuda", "triton") else "cpu", torch.float32, 64, 64)
            reason = refusal(call, backend)
            # Without a CUDA device there are no CUDA tensors; only Triton's interpreter can run the op, on the CPU.
            if reason is None and call.device == "cuda" and not torch.cuda.is_available():
                elsewhere = refusal(call._replace(device="cpu"), backend)
                reason = elsewhere and "needs a CUDA device, and torch sees none"
            rows.append((op, backend, reason))
    return rows
