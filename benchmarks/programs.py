"""The inputs of every case and the program of every provider."""

from __future__ import annotations

from benchmarks import dien_model, loading, peers, provider_dien_kernels
from benchmarks.inputs import Inputs, Program
from benchmarks.inputs import draw as _draw_op
from benchmarks.registry import LOADERS, MODELS, OWN, Case


def draw(case: Case) -> Inputs:
    """The inputs of any case, the same whenever they are drawn."""
    if case.op in MODELS:
        return dien_model.draw(case)
    return loading.draw(case) if case.op in LOADERS else _draw_op(case)


def build(case: Case, provider: str, inputs: Inputs) -> Program:
    """The provider's program. ``LookupError`` with the reason if the provider is absent on this machine."""
    if provider in OWN:
        return provider_dien_kernels.build(case, inputs, provider)
    peer = peers.load(provider)
    reason = peer.absent()
    if reason is not None:
        raise LookupError(reason)
    program: Program = peer.build(case, inputs)
    return program
