"""oneDNN's ``lbr_gru`` and ``lbr_augru`` primitives, through a driver in C++ that is built when it is first wanted.

They are time-major, so the tensors are laid out so beforehand, and they know no lengths: ragged rows are computed to
the end, and compared on valid steps. The threads are those of TBB, as many as torch has.

``lbr_augru`` is the authors' form, not the paper's: its forward is compared with that. Its backward is not the gradient
of its forward where the attention is not zero; it is timed all the same, and its row marked.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Program, Tensors
from benchmarks.registry import COMPUTES_PADDING, WRONG_GRADIENT, Case

PACKAGES = ("onednn", "onednn-devel", "tbb-devel", "intel-opencl-rt")
SOURCE = Path(__file__).with_name("onednn_rnn.cpp")
BUILT = Path(__file__).resolve().parents[2] / "build" / "peers"


def library_file(package: str, name: str) -> Path:
    for file in importlib.metadata.files(package) or ():
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise LookupError(f"{package} has no {name}")


@lru_cache
def absent() -> str | None:
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"no package {package} (make bench-peers installs it)"
    try:
        _library()
    except (LookupError, OSError, subprocess.CalledProcessError) as error:
        return f"the driver cannot be built: {getattr(error, 'stderr', '') or error}".strip().partition("\n")[0]
    return None


@lru_cache
def _library() -> Any:
    """The driver. It is linked so that its neighbours are found where the packages are, and nowhere else."""
    header = library_file("onednn-devel", "dnnl.hpp")
    include = next(folder for folder in header.parents if folder.name == "include")
    lib = library_file("onednn", "libdnnl.so").parent
    # The primitives' CPU engine is a device of OpenCL, whose driver no system folder names.
    os.environ.setdefault("OCL_ICD_FILENAMES", str(library_file("intel-opencl-rt", "libintelocl.so")))
    target = BUILT / f"onednn_rnn-{importlib.metadata.version('onednn')}.so"
    if not target.exists() or target.stat().st_mtime < SOURCE.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        rpath = f"-Wl,--disable-new-dtags,-rpath,{lib},--allow-shlib-undefined"
        words = [os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-shared", "-fPIC", str(SOURCE), f"-I{include}"]
        words += [f"-L{lib}", rpath, "-ldnnl", "-ltbb", "-o", str(target)]
        subprocess.run(words, check=True, capture_output=True, text=True)
    library = ctypes.CDLL(str(target))
    library.rnn_create.restype = ctypes.c_void_p
    return library


def _done(failed: int) -> None:
    if failed:
        raise RuntimeError("oneDNN refused the call; the reason is on stderr")


def set_threads(count: int) -> None:
    """Those of TBB, for whatever uses it in this process: the next to be built sets them anew."""
    _done(_library().rnn_set_threads(count))


class _Rnn:
    """One primitive (in training a pair) for one size."""

    def __init__(self, case: Case) -> None:
        self.library = _library()
        set_threads(torch.get_num_threads())
        sizes = [ctypes.c_long(n) for n in (case.steps, case.batch, case.inputs, case.hidden)]
        handle = self.library.rnn_create(case.op == "augru", case.trains, *sizes)
        if handle is None:
            raise RuntimeError("oneDNN has no such primitive; the reason is on stderr")
        self.handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self.library.rnn_destroy, self.handle)

    def __call__(self, name: str, *tensors: Tensor | None) -> None:
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        _done(getattr(self.library, name)(self.handle, *pointers))


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rnn: _Rnn, x: Tensor, a: Tensor | None, *weights: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:2], weights[1].shape[0])
        rnn("rnn_forward", x, a, *weights, y)
        ctx.rnn, ctx.tensors = rnn, (x, a, *weights, y)  # what the primitive's memories point to, until the backward
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = [None if t is None else torch.empty_like(t) for t in ctx.tensors[:-1]]
        ctx.rnn("rnn_backward", dy, *found)
        ctx.rnn = ctx.tensors = None  # the result names this node, which names the result: nobody else would free them
        return None, *found


def _urn(rows: Tensor) -> Tensor:
    """Gates r, u, n to u, r, n and back, along the first axis."""
    r, u, n = rows.chunk(3)
    return torch.cat((u, r, n))


def _plain(weight: Tensor) -> Tensor:
    """[3 H, n] to oneDNN's [n, 3, H]."""
    return _urn(weight).t().reshape(weight.shape[1], 3, -1).contiguous()


def _back(plain: Tensor) -> Tensor:
    return _urn(plain.flatten(1).t())


def _leaves(inputs: Inputs) -> Tensors:
    own = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    h = own["w_hh"].shape[1]
    both = _urn(own["b_ih"] + torch.cat((own["b_hh"][: 2 * h], own["b_hh"].new_zeros(h)))).view(3, h)
    leaves = {"x": own["x"].transpose(0, 1)}
    if "attention" in own:
        leaves["attention"] = own["attention"].t().unsqueeze(2)
    leaves |= {"w_ih": _plain(own["w_ih"]), "w_hh": _plain(own["w_hh"])}
    leaves["bias"] = torch.cat((both, own["b_hh"][2 * h :].unsqueeze(0)))
    return {name: leaf.clone(memory_format=torch.contiguous_format).requires_grad_() for name, leaf in leaves.items()}


def _gradients(found: Tensors) -> Tensors:
    """In the layout of the inputs. Both biases of two gates have the gradient of their sum."""
    ours = {"x": found["x"].transpose(0, 1), "w_ih": _back(found["w_ih"]), "w_hh": _back(found["w_hh"])}
    if "attention" in found:
        ours["attention"] = found["attention"].squeeze(2).t()
    u, r, n, n_hidden = found["bias"]
    return ours | {"b_ih": torch.cat((r, u, n)), "b_hh": torch.cat((r, u, n_hidden))}


def build(case: Case, inputs: Inputs) -> Program:
    rnn, leaves = _Rnn(case), _leaves(inputs)
    x, a = leaves["x"], leaves.get("attention")
    weights = [leaves[name] for name in ("w_ih", "w_hh", "bias")]
    notes = ["time-major", "" if inputs.lengths is None else COMPUTES_PADDING]
    if case.trains:
        notes.append("weights reordered in each call")
    else:
        rnn("rnn_set_weights", *weights[:2])
        notes.append("weights reordered beforehand")

    def forward() -> Tensor:
        y: Tensor = _Apply.apply(rnn, x, a, *weights)
        return y

    return Program(
        forward,
        leaves,
        "; ".join(filter(None, notes)),
        inputs.dresult.transpose(0, 1).contiguous(),
        lambda y: y.transpose(0, 1),
        _gradients,
        variant="authors" if case.op == "augru" else "",
        mark=WRONG_GRADIENT if case.op == "augru" else "",
    )
