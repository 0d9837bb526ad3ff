"""The members of the recurrence's family by name, and what a raw recurrence op is told beside its tensors.

Every list of kinds or forms in the package comes from this file. Equation numbers are those of docs/math.md.

Room card. Lives here: ``KINDS``, ``FORMS``, ``form_of``, ``Options``, ``check_index_values``. May import: torch,
``histories``; every backend and every layer may import this file. Must not be here: the mathematics of a step, anything
that one backend alone needs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from dien_kernels.histories import Histories

Reset = Literal["after", "before"]
Update = Literal["keep", "candidate"]
Padded = Literal["zero", "carry"]
AUGRUForm = Literal["paper", "authors", "prediction_flow"]

FORMS: tuple[str, ...] = get_args(AUGRUForm)
"""The forms of AUGRU: different functions of the attention."""

KINDS = ("gru", "aigru", "agru", *FORMS)
"""Every recurrence: a name that ``form_of`` knows."""


class Form(NamedTuple):
    """The coefficients of one member of the family and the convention of its users' weights.

    With a the attention of a row and step: alpha = alpha0 + alpha1 a, beta = beta0 + beta1 a, and gamma = a if
    ``scale_input``, else 1; equation (9).
    """

    alpha0: float
    alpha1: float
    beta0: float
    beta1: float
    scale_input: bool
    update: str  # the side on which its users store the update gate: "keep" or "candidate"


def form_of(kind: str) -> Form:
    """The coefficients of a member of the family.

    They are written as literals in the branches, not kept in a table: Dynamo makes symbols of floats in a table.
    """
    if kind == "gru":
        return Form(0.0, 0.0, 1.0, 0.0, False, "keep")
    if kind == "aigru":
        return Form(0.0, 0.0, 1.0, 0.0, True, "keep")
    if kind == "paper":
        return Form(0.0, 0.0, 0.0, 1.0, False, "candidate")
    if kind == "authors":
        return Form(0.0, 1.0, 1.0, -1.0, False, "keep")
    if kind == "prediction_flow":
        return Form(1.0, -1.0, 0.0, 1.0, False, "keep")
    if kind == "agru":
        return Form(0.0, 1.0, 0.0, 0.0, False, "keep")
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


class Options(NamedTuple):
    """What a raw recurrence op is told beside its tensors, in the order of its schema."""

    alpha0: float
    alpha1: float
    beta0: float
    beta1: float
    scale_input: bool
    keep_side: bool  # whether the weights store the update gate on the side of what is kept
    reset_before: bool  # whether the reset gate multiplies the state before the recurrent product
    reverse: bool
    time_major: bool
    kept_units: int  # to which kept gates are padded; 0: the backward recomputes them


def check_index_values(x: Tensor, attention: Tensor | None, histories: Histories, *, time_major: bool) -> None:
    """Check the values of lengths, offsets and history, and that a jagged attention fits them.

    Only index tensors on the CPU are read. Raises ``ValueError`` naming the argument.
    """
    if histories.jagged:
        histories.check_values(total=x.shape[0])
        if attention is not None:
            histories.check_attention_rows(attention.shape[0])
    else:
        count, steps = histories.count(x, time_major), histories.steps(x, time_major)
        histories.check_values(histories=count, steps=steps)
