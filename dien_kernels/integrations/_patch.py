"""``patch`` and ``accelerate``: put replacements in, watch their calls, and take them out again.

Room card. Lives here: finding classes now and when they are imported later, the guards around a replaced method, undo.
May import: torch, this room. Must not be here: a host's mathematics.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd import forward_ad

from dien_kernels.integrations._report import Report
from dien_kernels.integrations._target import Fallback, Target, print_of
from dien_kernels.integrations._verify import difference

HOSTS = {"torch": "torch_gru", "deepctr_torch": "deepctr_torch"}
Unknown = Literal["skip", "verify"]
_active: list[Report] = []
_MARK = "__dien_kernels__"
_comparing = threading.local()


class Patch(Report):
    """The ``Report`` of ``patch``; as a context manager it undoes the patch at the end."""

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(*names: str, unknown: Unknown = "skip", verify: bool = True) -> Patch:
    """Let classes of other libraries run on our ops.

    Methods of the hosts' classes are replaced, in modules that are imported already and in those that will be. Their
    parameters are read where they lie: state_dict keys, the identity of parameters, optimisers, hooks and pickles stay
    as they are. What our code does not take (and whatever it raises an error for) the original runs.

    Args:
        names: hosts, keys of ``HOSTS``: "torch" for ``torch.nn.GRU``, "deepctr_torch"; none: all.
        unknown: what to do with a method whose text is of no release that is known: ``"skip"`` it, or ``"verify"``:
            take ours, and compare on the first call.
        verify: whether the first call of each method runs the original, too, and compares outputs and gradients on the
            user's own batch: where they differ, the original is taken from then on.

    Returns a ``Report``, which is also a context manager. Raises ``ValueError`` for an unknown name or option.

    >>> with patch("torch") as report:
    ...     y, h_n = torch.nn.GRU(3, 4)(torch.randn(5, 2, 3))
    >>> report.calls
    Counter({'torch.nn.modules.rnn.GRU.forward': 1})
    """
    report, targets = Patch(), targets_of(names, unknown)
    done: list[tuple[Any, Target, Any, Any]] = []

    def apply(module: ModuleType, target: Target) -> None:
        owner = getattr(module, target.owner, None)
        original: Any = None if owner is None else vars(owner).get(target.method)
        why = reason_against(original, target, unknown)
        if why is not None:
            report.skipped[target.name] = why
            return
        unlike = target.prints is not None and print_of(target, original) not in target.prints
        ours = Guarded(target, original, report, verify or unlike).method()
        setattr(owner, target.method, ours)
        report.patched.append(target.name)
        done.append((owner, target, original, ours))

    later: dict[str, list[Target]] = {}
    for target in targets:
        if target.module in sys.modules:
            apply(sys.modules[target.module], target)
        else:
            later.setdefault(target.module, []).append(target)
    finder = _Finder(later, apply)
    if later:
        sys.meta_path.insert(0, finder)

    def undo() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        foreign = []
        while done:
            owner, target, original, ours = done.pop()
            if vars(owner).get(target.method) is ours:
                setattr(owner, target.method, original)
            else:
                foreign.append(target.name)
        if report in _active:
            _active.remove(report)
        _refuse(foreign)

    report._undo = undo
    _active.append(report)
    return report


def accelerate(model: nn.Module, *names: str, unknown: Unknown = "skip", verify: bool = True) -> Report:
    """The same for the modules of one model alone: their methods are put on the instances, and no class changes.

    Args:
        model: a module; all modules in it whose class a host file knows are taken.
        names, unknown, verify: as in ``patch``.

    A pickle or deep copy of the model has the original methods. Raises ``TypeError`` for what is no module, and as
    ``patch``.

    >>> model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4))
    >>> print(accelerate(model))
    patched: 1 (torch.nn.modules.rnn.GRU.forward), 0 calls
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report, done = Report(), []
    for path, module in model.named_modules():
        for target in targets_of(names, unknown):
            kind = type(module)
            if (kind.__module__, kind.__qualname__) != (target.module, target.owner):
                continue
            name = f"{path or '(model)'} ({target.name})"
            original: Any = vars(kind).get(target.method)
            why = reason_against(vars(module).get(target.method, original), target, unknown)
            if why is not None:
                report.skipped[name] = why
                continue
            unlike = target.prints is not None and print_of(target, original) not in target.prints
            ours = _OnInstance(
                module, target.method, Guarded(target, original, report, verify or unlike, name).method()
            )
            object.__setattr__(module, target.method, ours)
            report.patched.append(name)
            done.append((module, target.method, ours))

    def undo() -> None:
        foreign = []
        while done:
            module, method, ours = done.pop()
            if vars(module).get(method) is ours:
                del vars(module)[method]
            else:
                foreign.append(f"{type(module).__qualname__}.{method}")
        _refuse(foreign)

    report._undo = undo
    return report


def _refuse(foreign: Sequence[str]) -> None:
    """Raise ``RuntimeError`` naming the methods that an undo found replaced by somebody else."""
    if foreign:
        raise RuntimeError(f"{', '.join(foreign)} was replaced by somebody else after our patch, and left as it is")


def active() -> list[Report]:
    """The reports of the patches that are in force, the oldest first."""
    return list(_active)


def targets_of(names: Sequence[str], unknown: str) -> list[Target]:
    """The targets of some hosts, of all of them without names."""
    for name in names:
        if name not in HOSTS:
            raise ValueError(f"names must be of {list(HOSTS)}, got {name!r}")
    if unknown not in ("skip", "verify"):
        raise ValueError(f"unknown must be one of ('skip', 'verify'), got {unknown!r}")
    found: list[Target] = []
    for name in dict.fromkeys(names or HOSTS):
        found += importlib.import_module(f"dien_kernels.integrations.{HOSTS[name]}").TARGETS
    return found


def reason_against(original: Any, target: Target, unknown: str) -> str | None:
    """Why a method is not replaced; None where it is."""
    if original is None:
        return f"there is no such method in this release of {target.host}"
    if hasattr(original, _MARK):
        return "it runs our code already"
    if target.prints is None or unknown == "verify":
        return None
    found = print_of(target, original)
    if found in target.prints:
        return None
    known = ", ".join(dict.fromkeys(target.prints.values()))
    return (
        f"its text is of no release that is known ({known}); unknown='verify' tries it (fingerprint {found or 'none'})"
    )


class Guarded:
    """A replaced method with what stands around it: who may call it, the comparison of the first call, the counts."""

    def __init__(self, target: Target, original: Any, report: Report, verify: bool, name: str | None = None) -> None:
        self.target, self.original, self.report = target, original, report
        self.name, self.unchecked, self.lock = name or target.name, verify, threading.Lock()

    def method(self) -> Callable[..., Any]:
        original, ours = self.original, self.target.replacement

        @functools.wraps(original)
        def method(module: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(_comparing, "on", False):  # inside an original that is compared, everything is original
                return original(module, *args, **kwargs)
            if torch.compiler.is_compiling():  # neither counted nor compared: a graph is made of it
                try:
                    return ours(module, *args, **kwargs)
                except Fallback:
                    return original(module, *args, **kwargs)
            reason = "it was withdrawn" if self.name in self.report.withdrawn else _elsewhere(args, kwargs)
            if reason is None and self.unchecked:
                reason = self.check(module, args, kwargs)
            if reason is None:
                try:
                    result = ours(module, *args, **kwargs)
                    self.report.called(self.name)
                    return result
                except Fallback as error:
                    reason = str(error)
                except Exception as error:  # whatever is refused is refused in the original's words
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.report.fell_back(self.name, reason)
            return original(module, *args, **kwargs)

        setattr(method, _MARK, self.target.host)
        return method

    def check(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """Compare the first call with the original's; why our code may not take it, or None."""
        with self.lock:
            if not self.unchecked:
                return None
            try:
                trouble = difference(self._alone, self.target.replacement, module, args, kwargs)
            except Exception as error:
                return f"{type(error).__name__}: {error}".splitlines()[0]  # compared at the next call
            self.unchecked = False
            if trouble is None:
                return None
            self.report.withdrawn[self.name] = f"on the first call {trouble}"
            return "it was withdrawn"

    def _alone(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The original, with the originals of all other methods inside of it."""
        _comparing.on = True
        try:
            return self.original(module, *args, **kwargs)
        finally:
            _comparing.on = False


def _elsewhere(args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Why a call is of another world than that of eager tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside torch.func"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit"
    if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
        return "inside torch.fx"
    return None


class _OnInstance:
    """A method on one module. Its pickle is the class's own method, so that our names are in no file."""

    def __init__(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        self.module, self.name, self.method = module, name, method
        setattr(self, _MARK, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self.module, self.name)


class _Finder(importlib.abc.MetaPathFinder):
    """Patches modules of hosts when they are imported."""

    def __init__(self, later: dict[str, list[Target]], apply: Callable[[ModuleType, Target], None]) -> None:
        self.later, self.apply = later, apply

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.later:
            return None
        for finder in self._others():
            spec: importlib.machinery.ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, lambda module: self.done(name, module))
                return spec
        return None

    def _others(self) -> Iterator[Any]:
        return (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))

    def done(self, name: str, module: ModuleType) -> None:
        for target in self.later.pop(name, ()):
            self.apply(module, target)


class _Loader(importlib.abc.Loader):
    """A loader that tells when its module has run."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
