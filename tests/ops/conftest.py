"""What the tests of attention scores and auxiliary loss share: where a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from dien_kernels import use_backend
from dien_kernels.ops._cpu import refuses_cpu
from dien_kernels.ops._dispatch import Call
from dien_kernels.ops.attention import torch_backend as attention
from tests.cases import ISAS, running_on, target_params

# The definition, both paths of the torch backend ("reads": index tensors may be read on the host, as on a CPU; "blind":
# they may not, as on a GPU), and the compiled kernels.
UNIT_TARGETS = ("reference", "torch-reads", "torch-blind", *(f"cpu-{isa}" for isa in ISAS))


@contextmanager
def unit_on(target: str, torch_backend: ModuleType) -> Iterator[None]:
    """Run every op inside of the block on the target, or skip the test with the reason why that is impossible.

    ``torch_backend`` is the module of that name of the op under test.
    """
    backend, _, variant = target.partition("-")
    with pytest.MonkeyPatch.context() as patch:
        if variant == "blind":
            patch.setattr(torch_backend, "reads_are_free", lambda device: False)
        with running_on(target if backend == "cpu" else backend), use_backend(backend):
            yield


@pytest.fixture(params=target_params(UNIT_TARGETS))
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each target; its module imports the ``torch_backend`` of its op."""
    with unit_on(request.param, request.module.torch_backend):
        yield request.param


@pytest.fixture(params=target_params((*UNIT_TARGETS, "triton")))
def target_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Run a test of attention scores on each target, and on Triton's interpreter; gives the target's widest dtype."""
    with unit_on(request.param, attention):
        yield torch.float32 if request.param == "triton" else torch.float64


def takes(target: str, dtype: torch.dtype) -> None:
    """Skip where the target's backend has no such dtype, with its reason."""
    reason = refuses_cpu(Call("attention_scores", "cpu", dtype, 1, 1)) if target.startswith("cpu") else None
    if reason is not None:
        pytest.skip(reason)
