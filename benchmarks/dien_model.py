"""A whole DIEN: its weights, one batch of ids, and the package's model as a provider of steps and of scores.

The model is DeepCTR-Torch's function, so that gradients and not only times can be compared: extractor with two biases
on the keep side, DIN attention, the paper's AUGRU with one bias in both places, auxiliary MLP under one mean over
positives and negatives, ReLU, and the sum of the cross entropy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled import compiled
from benchmarks.inputs import SEED, Inputs, Program, draw_lengths
from benchmarks.registry import AUXILIARY_WIDTHS, DIN_WIDTHS, ITEM_FIELDS, MLP_WIDTHS, OURS, USER_FIELDS, Case
from dien_kernels import use_backend
from dien_kernels.batch import Batch, Schema
from dien_kernels.models import (
    DIEN,
    AttentionOptions,
    ClickOptions,
    EmbeddingOptions,
    EvolutionOptions,
    HeadOptions,
)
from dien_kernels.ops._dispatch import AUTO_ORDER
from dien_kernels.training.optimizer import make_optimizer

PLAIN_TORCH = AUTO_ORDER["cpu"][-1]  # the backend in plain torch, which every call can fall back to


def widths(case: Case) -> dict[str, int]:
    """Of every table: the fields of an item share I features, a user has as many as the first of them."""
    first = case.inputs // 2
    return {"item": first, "category": case.inputs - first, "user": first}


def model_of(case: Case, schema: Schema, sparse: bool) -> DIEN:
    sizes = widths(case)
    tables = {name: sizes[name] for name in (*schema.items, *schema.users)}
    return DIEN(
        schema,
        embedding=EmbeddingOptions(size=tables, std=1.0, sparse=sparse),
        head=HeadOptions(units=MLP_WIDTHS, activation="relu"),
        click=ClickOptions(reduction="sum"),
        attention=AttentionOptions(kind="din", units=DIN_WIDTHS),
        evolution=EvolutionOptions(update="candidate", bias="tied"),
        auxiliary={
            "kind": case.op.removeprefix("dien_"),
            "units": AUXILIARY_WIDTHS,
            "normalizer": "joint",
            "eps": "clamp",
        },
    )


def draw(case: Case) -> Inputs:
    """B histories for B targets; with mode "request" one history for all."""
    generator = torch.Generator().manual_seed(SEED)
    schema = Schema(ITEM_FIELDS, USER_FIELDS)
    histories = 1 if case.mode == "request" else case.batch
    ragged = case.length_distribution == "ragged"
    lengths = draw_lengths(histories, case.steps, generator) if ragged else torch.full((histories,), case.steps)
    total = int(lengths.sum())

    def ids(fields: Mapping[str, int], *shape: int) -> dict[str, Tensor]:
        return {name: torch.randint(1, rows, shape, generator=generator) for name, rows in fields.items()}

    batch = Batch(
        history=ids(schema.items, total),
        offsets=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))),
        target=ids(schema.items, case.batch),
        label=torch.randint(2, (case.batch,), generator=generator).float(),
        history_of=torch.zeros(case.batch, dtype=torch.int64) if case.mode == "request" else None,
        negatives=ids(schema.items, total, 1),
        users={
            name: i[:1].expand(case.batch) if histories == 1 else i for name, i in ids(schema.users, case.batch).items()
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(2018)
        leaves = dict(model_of(case, schema, sparse=False).named_parameters())
    dresult = torch.ones(case.batch) if case.mode == "request" else torch.ones(())
    return Inputs(leaves, lengths, dresult, None, batch).to(getattr(torch, case.dtype))


def padded_ids(case: Case, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Histories and negatives as the peers want them, [B, T] a field with zeros at the end, and the lengths [B]."""
    length = batch.offsets.diff()
    valid = torch.arange(case.steps) < length.unsqueeze(1)

    def padded(flat: Tensor) -> Tensor:
        out = torch.zeros(valid.shape, dtype=torch.int64)
        out[valid] = flat
        return out if batch.history_of is None else out[batch.history_of]

    history = {name: padded(ids) for name, ids in batch.history.items()}
    negatives = {name: padded(ids[:, 0]) for name, ids in (batch.negatives or {}).items()}
    return history, negatives, length if batch.history_of is None else length[batch.history_of]


@torch.no_grad()
def copy_weights(leaves: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, leaf in into.items():
        leaf.copy_(leaves[name])


def build(case: Case, inputs: Inputs, provider: str = OURS, backend: str = "auto", variant: str = "") -> Program:
    sparse = provider == "step_sparse"
    batch: Batch = inputs.data
    model = model_of(case, Schema(ITEM_FIELDS, USER_FIELDS), sparse).to(inputs.dresult.dtype)
    leaves = dict(model.named_parameters())
    copy_weights(inputs.leaves, leaves)
    if provider == "step_reference":  # the name is that of the stored rows: see benchmarks/README.md
        backend = PLAIN_TORCH
    compile_it = provider.endswith("_compiled")
    if case.mode == "request":
        return _requests(model, batch, backend, compile_it)
    optimizer = make_optimizer(model) if sparse else torch.optim.Adam(model.parameters(), fused=True)

    def forward() -> Tensor:
        with use_backend(backend) if backend != "auto" else nullcontext():
            loss = model.loss(model(batch), batch.label)
            return loss.click if variant == "no_auxiliary" else loss.total

    note = "sparse gradients, lazy Adam on the tables" if sparse else "dense gradients, fused Adam"
    note += ", torch.compile" * compile_it
    return Program(compiled(forward) if compile_it else forward, leaves, note, optimise=optimizer.step)


def _requests(model: DIEN, batch: Batch, backend: str, compile_it: bool) -> Program:
    user = {name: ids[:1] for name, ids in batch.users.items()}

    def forward() -> Tensor:
        with use_backend(backend) if backend != "auto" else nullcontext():
            return model.score(batch.history, batch.target, users=user)

    if compile_it:
        return Program(compiled(forward), {}, "torch.compile")
    return Program(forward, {}, parts(model, forward) if backend == "auto" else "")


def parts(model: DIEN, call: Callable[[], object], calls: int = 7) -> str:
    """Where the time of ``call``'s forwards goes, in words: medians."""
    spent: dict[str, list[float]] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent.setdefault(name, []).append(time.perf_counter() - started)

    before: Any = model.part
    model.part = part
    for _ in range(calls):
        call()
    model.part = before
    return ", ".join(f"{name} {1e3 * median(times):.2f} ms" for name, times in spent.items())
