"""Options as frozen dataclasses: made of plain mappings, and checked against the types they are annotated with.

Room card. Lives here: what configs of runs and options of models have in common. May import: the standard library.
Must not be here: any particular option.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

_Group = TypeVar("_Group")
_UNIONS = (typing.Union, types.UnionType)


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> ValueError:
    """The error for a misspelt name, with the nearest ones or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return ValueError(f"unknown {kind} {where}{'.' if where else ''}{name}: {hint}")


def user_path(path: str | Path, name: str = "path") -> Path:
    """A path that a user gives: ``~`` is the home folder, in config files and in Python as in a shell.

    ``name`` is what errors call it. Raises ``TypeError`` for what is no path, ``ValueError`` for the home of a user
    that there is not.

    >>> user_path("runs/first").name
    'first'
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{name} must be a path, text or a pathlib.Path, got {type(path).__name__}")
    if "\0" in str(path):
        raise ValueError(f"{name} must be a path without the character NUL, got {str(path)!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}; a file of that name is ./{path}") from None


def names_of(kind: type) -> list[str]:
    """The names of a dataclass's options."""
    return list(_hints(kind))


def from_mapping(
    kind: type[_Group], values: Any, where: str, default: _Group | None = None, word: str = "key"
) -> _Group:
    """``kind`` with the options of a mapping, the others as in ``default`` (None: as the class has them).

    Raises ``ValueError`` for what is no mapping and for an unknown name, with the nearest ones; and what the class
    raises for values, see ``check_fields``.
    """
    known = names_of(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a section with keys, {', '.join(known)}, got {values!r}")
    for key in values:
        if key not in known:
            raise unknown_name(word, str(key), known, where)
    return kind(**values) if default is None else replace(default, **values)  # type: ignore[type-var]


def check_fields(group: Any, where: str) -> None:
    """For the ``__post_init__`` of a frozen dataclass: every option must be of the type it is annotated with.

    Types are int, float, bool, str, None, ``Literal`` of words, sequences of int, mappings with names as keys, and
    unions of these. A whole number is turned into a float where a float is wanted, a list into a tuple. Raises
    ``ValueError`` naming ``where.option``, what was given and what is allowed.
    """
    kind: type = type(group)
    for name, hint in _hints(kind).items():
        value = getattr(group, name)
        options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
        for option in options:
            fits, result = _fit(option, value)
            if fits:
                if result is not value:
                    object.__setattr__(group, name, result)
                break
        else:
            allowed = " or ".join(_words(option) for option in options)
            raise ValueError(f"{where}.{name} must be {allowed}, got {value!r}")


def plain(group: Any) -> dict[str, Any]:
    """The options as plain data, for YAML, JSON and checkpoints: tuples become lists."""
    return {f.name: _plain(getattr(group, f.name)) for f in fields(group)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fit(option: Any, value: Any) -> tuple[bool, Any]:
    """Whether ``value`` is of one type without alternatives, and the value to keep."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(option), value
    if option is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return fits, float(value) if fits else None
    if option is int:
        return _is_int(value), value
    if origin is Sequence:
        fits = isinstance(value, (list, tuple)) and all(_is_int(inner) for inner in value)
        return fits, tuple(value) if fits else None
    if origin in (dict, Mapping):
        fits = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        if fits and typing.get_args(option)[1] is int:
            fits = all(_is_int(inner) for inner in value.values())
        return fits, dict(value) if fits else None
    return isinstance(value, option), value


def _words(option: Any) -> str:
    origin = typing.get_origin(option)
    if origin is Literal:
        words = [repr(word) for word in typing.get_args(option)]
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin is Sequence:
        return "a list of integers"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(option, "a mapping from names to values")
