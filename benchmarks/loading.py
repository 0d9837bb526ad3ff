"""The loader as a provider: batches of a generated log, beside training steps on the same batches."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, count, cycle, islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.dien_model import model_of
from benchmarks.inputs import Inputs, Program
from benchmarks.registry import ITEM_FIELDS, OURS, Case
from dien_kernels.batch import Batch
from dien_kernels.training.optimizer import make_optimizer
from dien_kernels.training.step import training_step

VISIT = 64  # batches in a visit: workers have a few ready when it begins
KEPT = 16  # batches that the training steps take in turn


@lru_cache(maxsize=1)
def _prepared(users: int, events: int) -> Any:
    """A log whose users have 100 behaviours on average; every one of them is a sample."""
    from dien_kernels.data import prepare, synthetic

    folder = tempfile.TemporaryDirectory()
    table = synthetic(users=users, items=ITEM_FIELDS["item"], categories=ITEM_FIELDS["category"], events=events)
    prepared = prepare(table, folder.name, targets="every", progress=False)
    return prepared, folder


def draw(case: Case) -> Inputs:
    small = case.batch < 100
    prepared, _ = _prepared(50 if small else 3000, 500 if small else 300_000)
    return Inputs({}, None, torch.ones(()), None, prepared)


def _loader(case: Case, inputs: Inputs, workers: int = 0) -> Any:
    from dien_kernels.data import Loader

    return Loader(inputs.data, batch_size=case.batch, max_length=case.steps, workers=workers)


def build(case: Case, inputs: Inputs, provider: str = OURS) -> Program:
    if provider != OURS:
        return _steps(case, inputs, provider.removeprefix("step_"))
    workers = int(case.op.removeprefix("loader_"))
    loader = _loader(case, inputs, workers)
    batches: Iterator[Batch] = chain.from_iterable(loader.epoch(number) for number in count())

    def forward() -> Tensor:
        return next(batches).offsets

    def check() -> str | None:
        """The same batches as without workers, by number; ids fit the schema."""
        plain = _loader(case, inputs)
        for number, batch in enumerate(islice(loader.epoch(0), 2 + workers)):
            batch.check(inputs.data.schema)
            same = plain.batch(0, number)
            if not all(torch.equal(batch.history[n], same.history[n]) for n in same.history):
                return f"batch {number} depends on the workers"
        return None

    history = sum(loader.batch(0, i).history["item"].shape[0] for i in range(4)) / sum(
        loader.batch(0, i).offsets.shape[0] - 1 for i in range(4)
    )
    note = f"{workers} workers, {history:.0f} behaviours a history"
    return Program(forward, {}, note, check=check, least_calls=VISIT if case.batch >= 100 else 1)


def _steps(case: Case, inputs: Inputs, auxiliary: str) -> Program:
    """A training step of ours with the default optimiser: sparse tables and lazy Adam."""
    loader = _loader(case, inputs)
    batches = cycle([loader.batch(0, number) for number in range(min(KEPT, len(loader)))])
    torch.manual_seed(2018)
    model = model_of(case._replace(op=f"dien_{auxiliary}"), inputs.data.schema, sparse=True)
    optimizer = make_optimizer(model)

    def forward() -> Tensor:
        return training_step(model, [next(batches)], optimizer).total

    def check() -> str | None:
        return trouble(forward)

    return Program(forward, {}, f"auxiliary {auxiliary}, sparse tables, lazy Adam", check=check)


def trouble(step: Callable[[], Tensor], calls: int = 5) -> str | None:
    losses = [float(step()) for _ in range(calls)]
    return None if all(map(math.isfinite, losses)) else f"losses are {losses}"
