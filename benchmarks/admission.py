"""Who takes part in a case: its inputs, each provider's program, and whether that computes what it should."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks import loading, ours, peers, whole
from benchmarks.clock import Step
from benchmarks.inputs import Inputs, Program, largest_error
from benchmarks.inputs import draw as _draw_op
from benchmarks.registry import LOADERS, MODELS, OWN, Case, as_computed

# The error, relative to the largest value of a tensor, above which a result is wrong and gets no number. This
# is a gate against a provider that computes something else; accuracy is judged by the tests, more strictly.
WRONG = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 5e-2}
OF_A_SUM = 10  # times as much for gradients, sums over up to thousands of steps, and for whole models

Truth = tuple[Inputs, Tensor, dict[str, Tensor]]


def _problem(case: Case) -> Case:
    return case._replace(suite="", mode=case.mode if case.infers and case.op in MODELS else "fwd+bwd", providers=())


def draw(case: Case) -> Inputs:
    """The inputs of any case."""
    if case.op in MODELS:
        return whole.draw(case)
    return loading.draw(case) if case.op in LOADERS else _draw_op(case)


@lru_cache(maxsize=len(MODELS))
def _inputs(problem: Case) -> Inputs:
    return draw(problem)


def inputs_of(case: Case) -> Inputs:
    """The inputs; the last problems' are kept."""
    return _inputs(_problem(case))


@lru_cache(maxsize=1 + len(ours.VARIANTS))
def _truth(problem: Case, variant: str) -> Truth:
    inputs = _inputs(problem)
    exact = inputs.to(torch.float64)
    program = ours.build(problem, exact, backend="reference", variant=variant)
    result = program.step(problem, exact)().detach()
    gradients = {name: leaf.grad for name, leaf in program.leaves.items() if leaf.grad is not None}
    return inputs, result, gradients


def truth(case: Case, variant: str = "") -> Truth:
    """The inputs, and result and gradients by the float64 reference; the last problems' are kept."""
    return _truth(_problem(case), variant)


def prepare(case: Case, provider: str, inputs: Inputs) -> Program:
    """The provider's program; ``LookupError`` with the reason if it is absent."""
    if provider in OWN:
        return ours.build(case, inputs, provider)
    peer = peers.load(provider)
    reason = peer.absent()
    if reason is not None:
        raise LookupError(reason)
    program: Program = peer.build(case, inputs)
    return program


def fault(program: Program, case: Case) -> str | None:
    """What is wrong with the program's result or, then, gradients; None if they are those of the reference."""
    if program.check is not None:
        return program.check()
    inputs, exact, gradients = truth(case, program.variant)
    with torch.inference_mode(case.infers):
        result = program.step(case, inputs)()
        result = program.padded(result.detach())
    pairs: dict[str, tuple[Tensor | None, Tensor, Tensor | None]] = {"result": (result, exact, inputs.valid)}
    if case.trains:
        found = {name: leaf.grad.to_dense() for name, leaf in program.leaves.items() if leaf.grad is not None}
        found = program.as_inputs(found)
        pairs |= {name: (found.get(name), exact, None) for name, exact in gradients.items()}
    for name, (actual, wanted, valid) in pairs.items():
        if actual is None or actual.shape != wanted.shape:
            shape = None if actual is None else tuple(actual.shape)
            return f"{name} has shape {shape}, not {tuple(wanted.shape)}"
        error = largest_error(actual, wanted, valid)
        summed = case.op in MODELS or name != "result"
        if not error <= WRONG[case.dtype] * (OF_A_SUM if summed else 1):
            return f"{name} is off by {error:.1e} of its largest value"
    return None


def admitted(case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    """What takes part: steps of those that compute the case, and of each provider what is to be said."""
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    for provider in case.providers:
        own = as_computed(case, provider)
        try:
            program = prepare(own, provider, inputs_of(own))
            wrong = fault(program, own)
            marked = wrong is not None and program.mark != "" and not wrong.startswith("result")
            notes[provider] = program.note if wrong is None else f"wrong: {wrong}"
            if marked:
                notes[provider] = f"{program.mark}: {wrong}; {program.note}"
            if wrong is None or marked:
                most = 1 if case.mode == "request" else None  # so that slow calls are seen
                steps[provider] = Step(program.step(own, inputs_of(own)), program.least_calls, most)
        except LookupError as reason:
            notes[provider] = f"absent: {reason}"
        except Exception as error:  # a peer may raise whatever it likes: that is a result too
            notes[provider] = failure(error)
    return steps, notes


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
