"""No ``assert`` in the package: what a user can cause gets an error with words, and types are for mypy to know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dien_kernels"


def asserts_of(source: str) -> list[int]:
    """The lines with an ``assert`` statement; calls such as Triton's ``tl.static_assert`` are none."""
    return sorted(node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_assert_speaks_to_a_user(path: Path) -> None:
    assert not asserts_of(path.read_text()), "raise an error that names the argument, or use cast for mypy"


def test_the_reader_of_asserts_sees_every_one() -> None:
    source = "def f(x):\n    assert x\n    if x: assert x, 'words'\n    tl.static_assert(x)\n"
    assert asserts_of(source) == [2, 3]
