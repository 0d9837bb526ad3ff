"""The import contract: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dien_kernels.ops import _dispatch

PACKAGE = Path(__file__).resolve().parents[1] / "dien_kernels"
# Higher rooms import lower ones; rooms on one floor are strangers.
FLOORS = (
    {"_native", "_options", "checks"},
    {"index_checks"},
    {"histories"},
    {"ops"},
    {"layers", "batch"},
    {"models", "data"},
    {"training", "serving", "integrations"},
    {"cli", "_info", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> list[str]:
    """A file's module as words: dien_kernels/ops/x.py is ["dien_kernels", "ops", "x"]."""
    words = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return words[:-1] if words[-1] == "__init__" else words


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, absolute, anywhere in it; ``from a import b`` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                here = module_of(path) + (["__init__"] if path.name == "__init__.py" else [])
                base = here[: -node.level] + base
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def backend_of(file: str) -> str | None:
    """The backend whose file this is, by its name: cuda_launch, triton_kernel_wide, _torch_mlp, reference; or None."""
    first = file.lstrip("_").partition("_")[0]
    return first if first in _dispatch.BACKENDS else None


def room_of(words: list[str]) -> str:
    return words[1] if len(words) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_lower_rooms(path: Path) -> None:
    room = room_of(module_of(path))
    if room == "":
        return  # the package's own front door may show every room
    assert room in FLOOR_OF, f"the room {room!r} has no floor: give it one in FLOORS and in docs/design.md"
    if FLOOR_OF[room] == len(FLOORS) - 1:
        return  # the top floor may import all
    for name in imports_of(path):
        words = name.split(".")
        if words[0] == "dien_kernels" and room_of(words) != room:
            below = FLOOR_OF.get(room_of(words), len(FLOORS))  # the front door's own names count as above
            assert below < FLOOR_OF[room], f"{path.name} imports {name}, which is not below {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_special_imports_stay_in_their_files(path: Path) -> None:
    for name in imports_of(path):
        words = name.split(".")
        assert words[0] not in ("benchmarks", "tests"), f"{path.name} imports {name}"
        if words[0] == "triton":
            assert path.stem.startswith("triton_kernel"), f"{path.name} imports {name}"
        if words[:2] == ["torch", "library"]:
            assert path.name == "_register.py", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_library_is_used_only_in_register(path: Path) -> None:
    """``import torch`` is enough to reach torch.library, so look at the uses too."""
    if path.name == "_register.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "library":
            assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_backends_are_strangers(path: Path) -> None:
    backend = backend_of(path.stem)
    if "ops" not in module_of(path) or backend is None:
        return
    for name in imports_of(path):
        words = name.split(".")
        if words[0] == "dien_kernels":
            others = {backend_of(word) for word in words[2:]} - {backend, None}
            assert not others, f"{path.name} imports {name}"


def test_reader_of_imports_sees_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract is only as good as its reader."""
    folder = tmp_path / "dien_kernels" / "ops"
    folder.mkdir(parents=True)
    source = "import triton.language\ndef f():\n    from .. import layers\n    from ._dispatch import select\n"
    (folder / "op.py").write_text(source)
    monkeypatch.setitem(globals(), "PACKAGE", folder.parent)
    expected = {"triton.language", "dien_kernels.layers", "dien_kernels.ops._dispatch.select"}
    assert imports_of(folder / "op.py") == expected
