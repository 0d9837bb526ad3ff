"""One object for each op: the schemas of its raw ops, what they return for fake tensors, and its backends.

Room card. Lives here: ``Op``, the one place in which raw ops are defined, implemented and entered with the
dispatcher. May import: torch, ``_register``, ``_dispatch``, ``_autograd``. Must not be here: what one op alone needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dien_kernels.ops._autograd import Evaluate, distinct, function_of
from dien_kernels.ops._dispatch import Refuses, register_backend
from dien_kernels.ops._register import define_raw, implement_raw, raw


class Pass(NamedTuple):
    """One of an op's raw ops, which every backend has under a name of its own.

    A schema is a flat list of tensors and numbers. ``grouped`` turns such a list into the few values, most of them
    named tuples, that ``fake`` and the backends written in Python take, and ``flat`` turns what they return into what
    the schema promises; ``fake`` returns tensors of the results' shapes and dtypes.
    """

    schema: str
    grouped: Callable[..., tuple[Any, ...]]
    fake: Callable[..., Any]
    flat: Callable[[Any], Any]


class Op:
    """An op: its passes, the backends that were entered, and its derivative.

    Args:
        name: as users see it, in errors and in ``python -m dien_kernels info``.
        raw_name: what the names of its raw ops are made of: ``_<raw_name>_<backend>_<pass>``.
        passes: by name; ``"fwd"`` is the one that runs where no gradient is asked for.
    """

    def __init__(self, name: str, raw_name: str, passes: dict[str, Pass]) -> None:
        self.name = name
        self.raw_name = raw_name
        self.passes = passes
        self.raw: dict[str, dict[str, Any]] = {name: {} for name in passes}
        self.function: Any = None

    def backend(self, name: str, refuses: Refuses, implementation: Any = None) -> None:
        """Enter a backend: ``refuses`` says why it does not run a call, or None if it does.

        ``implementation`` is a module or object with a function for each pass; None where the native library implements
        the raw ops.
        """
        for key, op_pass in self.passes.items():
            raw_name = f"_{self.raw_name}_{name}_{key}"
            define_raw(raw_name, op_pass.schema, _flattened(op_pass.fake, op_pass))
            if implementation is not None:
                implement_raw(raw_name, _flattened(getattr(implementation, key), op_pass))
            self.raw[key][name] = raw(raw_name)
        register_backend(self.name, name, refuses)

    def derivative(
        self,
        forward: Callable[..., Any],
        kept: Callable[[tuple[Any, ...]], tuple[Any, ...]],
        backward: Callable[..., Sequence[Tensor | None]],
        evaluate: Evaluate,
        *,
        outputs: int,
    ) -> None:
        """Give the op its derivative; the arguments are those of ``function_of``."""
        self.function = function_of(forward, kept, backward, evaluate, outputs=outputs)

    def apply(self, backend: str, groups: Any, options: Any, tensors: tuple[Tensor | None, ...]) -> Any:
        """Run the op through its ``autograd.Function``."""
        return self.function.apply(backend, groups, options, *distinct(tensors))


def _flattened(function: Callable[..., Any], op_pass: Pass) -> Callable[..., Any]:
    """``function`` of groups as a function of the raw op's flat arguments."""

    def flattened(*arguments: Any) -> Any:
        return op_pass.flat(function(*op_pass.grouped(*arguments)))

    return flattened
