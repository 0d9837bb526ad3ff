"""Public docstrings can be read from the source, name every parameter, and say the same where they say it twice."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import dien_kernels
from dien_kernels import layers

ROOMS = ["dien_kernels", "dien_kernels.layers", "dien_kernels.ops", "dien_kernels.models", "dien_kernels.training"]
OPS = ["gru", "augru", "agru", "aigru"]
LAYERS = ["AUGRU", "AGRU", "AIGRU"]


def public() -> dict[str, Any]:
    """Every function and class in an ``__all__``, once, by its name in the package."""
    found: dict[int, tuple[str, Any]] = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(id(value), (f"{room}.{name}", value))
    return dict(found.values())


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that are written in the class itself or in a base class of the package."""
    for owner in cls.__mro__:
        if not owner.__module__.startswith("dien_kernels"):
            continue
        for name, value in vars(owner).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            function = function.fget if isinstance(function, property) else function
            # What a dataclass or a NamedTuple adds has no source.
            if not name.startswith("_") and inspect.isfunction(function) and function.__module__ == owner.__module__:
                yield f"{owner.__module__}.{owner.__qualname__}.{name}", function


PUBLIC = public()
METHODS: dict[str, tuple[Any, type]] = {}  # each with the first public class that has it
for _cls in filter(inspect.isclass, PUBLIC.values()):
    for _name, _function in methods(_cls):
        METHODS.setdefault(_name, (_function, _cls))


def in_source(value: Any) -> str | None:
    """The docstring as tools see it that read the source and do not run it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return ast.get_docstring(node)


def parameters(value: Any) -> list[str]:
    """The parameters of a call."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        value = value.__init__
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls", "args", "kwargs")]


def unnamed(value: Any, words: str) -> list[str]:
    """The parameters that the words do not name."""
    return [name for name in parameters(value) if not re.search(rf"\b{name}\b", words)]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_in_the_source_and_names_every_parameter(name: str) -> None:
    words = in_source(PUBLIC[name])
    assert words, "there is no docstring in the source"
    assert words == inspect.cleandoc(PUBLIC[name].__doc__)
    assert unnamed(PUBLIC[name], words) == []


@pytest.mark.parametrize("name", METHODS)
def test_docstring_of_a_method_is_in_the_source_and_names_every_parameter(name: str) -> None:
    function, cls = METHODS[name]
    words = in_source(function)
    if words is None:
        # A method that a base class explains means the same here, and help() shows that text.
        inherited = [vars(base)[function.__name__] for base in cls.__mro__ if function.__name__ in vars(base)]
        words = next(filter(None, map(inspect.getdoc, inherited)), None)
    if function.__name__ == "forward":  # the class says what its inputs are, as those of torch.nn do
        words = f"{words}\n{in_source(cls)}"
    assert words, "there is no docstring in the source"
    assert unnamed(function, words) == []


def arguments(value: Any) -> dict[str, str]:
    """What a docstring says of each argument: the entries of its sections, by name and without line breaks."""
    said: dict[str, str] = {}
    entry = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)
    for names, text in entry.findall(in_source(value) or ""):
        for name in names.split(", "):
            said.setdefault(name, " ".join(text.split()))
    return said


@pytest.mark.parametrize(
    "values",
    [[getattr(dien_kernels, name) for name in OPS], [getattr(layers, name) for name in LAYERS]],
    ids=["ops", "layers"],
)
def test_shared_arguments_have_the_same_words(values: list[Any]) -> None:
    said = {value.__name__: arguments(value) for value in values}
    last = said[values[-1].__name__]
    for value in values:
        expected = set(parameters(value))
        if inspect.isclass(value):
            expected |= set(parameters(value.forward))
        assert expected == set(said[value.__name__]) & expected
        for name in expected & set(last):
            if (value.__name__, name) == ("gru", "histories"):
                continue  # no shared histories there: its words leave out ``history``
            assert said[value.__name__][name] == last[name], f"{name} of {value.__name__}"
