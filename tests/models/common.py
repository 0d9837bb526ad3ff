"""Small batches as ``Batch`` and as plain lists; models with every weight away from its starting value."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dien_kernels._options import plain as plain_options
from dien_kernels.batch import Batch, Schema, Sequence
from dien_kernels.models import MODELS, AuxiliaryOptions, RankingModel, build
from dien_kernels.models.options import merge
from tests.models.transcription import History, Plain

SCHEMA = Schema(items={"item": 13, "cat": 5}, users={"user": 7}, dense=("price",))
# Everything that a behaviour and an item may carry.
RICH = Schema(
    items={"item": 13, "cat": 5, "tag": 9},
    users={"user": 7},
    dense=("price", "age"),
    several={"tag": 3},
    behaviours={"action": 4, "page": 6},
    behaviour_dense=("dwell", "rating"),
    sequences=("buys", "saved"),
)
STATISTICS: dict[str, dict[str, Any]] = {
    "price": {"mean": 3.5, "std": 1.5, "missing": 0.2, "log": True, "quantiles": [5.0, 20.0, 60.0]},
    "age": {"mean": 41.0, "std": 13.0, "missing": 0.0, "log": False, "quantiles": [20.0, 40.0, 60.0]},
    "dwell": {"mean": 2.5, "std": 1.25, "missing": 0.1, "log": True, "quantiles": [1.0, 10.0]},
    "rating": {"mean": 3.0, "std": 0.75, "missing": 0.0, "log": False, "quantiles": [2.0, 4.0]},
}
# Widths that differ from one another, so that no two of them can be mistaken for each other.
SMALL: dict[str, Any] = {"embedding.size": {"item": 3, "cat": 2, "user": 4}, "head.units": (7, 6)}
SMALL_OF = {
    name: SMALL
    | ({"attention.units": (6, 4)} if "attention" in model.options() else {})
    | ({"auxiliary.units": (6, 3)} if model.options().get("auxiliary") is not None else {})
    for name, model in MODELS.items()
}


RICH_SIZES = {"item": 3, "cat": 2, "tag": 4, "user": 4, "action": 2, "page": 1}


def random_batch(
    lengths: Listed[int], history_of: Listed[int] | None = None, *, negatives: int = 2, seed: int = 0
) -> Batch:
    """Histories of ``lengths``, one row each or those of ``history_of``."""
    generator = torch.Generator().manual_seed(seed)
    n, rows = sum(lengths), len(lengths if history_of is None else history_of)

    def ids(sizes: dict[str, int], *shape: int) -> dict[str, Tensor]:
        return {name: torch.randint(size, shape, generator=generator) for name, size in sizes.items()}

    items, users = dict(SCHEMA.items), dict(SCHEMA.users)
    return Batch(
        history=ids(items, n),
        offsets=torch.tensor([0, *torch.tensor(list(lengths)).cumsum(0).tolist()]),
        target=ids(items, rows),
        label=(torch.arange(rows) % 2).float(),
        history_of=None if history_of is None else torch.tensor(history_of),
        negatives=ids(items, n, negatives) if negatives else None,
        users=ids(users, rows),
        dense=torch.randn(rows, 1, generator=generator),
    )


def rich_steps(lengths: Listed[int], history_of: Listed[int] | None, negatives: int, seed: int) -> Sequence:
    """Histories of ``RICH`` of ``lengths``, with a missing dwell time for about every fifth behaviour."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def ids(sizes: Any, *shape: int) -> dict[str, Tensor]:
        found = {}
        for name, size in sizes.items():
            several = (RICH.several[name],) if name in RICH.several else ()
            found[name] = torch.randint(size, (*shape, *several), generator=generator)
        return found

    numbers = torch.rand(n, 2, generator=generator) * torch.tensor([60.0, 5.0])
    numbers[:, 0].masked_fill_(torch.rand(n, generator=generator) < 0.2, float("nan"))
    return Sequence(
        history=ids(RICH.items, n),
        offsets=torch.tensor([0, *torch.tensor(list(lengths)).cumsum(0).tolist()]),
        history_of=None if history_of is None else torch.tensor(history_of),
        negatives=ids(RICH.items, n, negatives) if negatives else None,
        behaviours=ids(RICH.behaviours, n),
        behaviour_dense=numbers,
    )


def rich_batch(
    lengths: Listed[int],
    history_of: Listed[int] | None = None,
    further: dict[str, tuple[Listed[int], Listed[int] | None, int]] | None = None,
    *,
    negatives: int = 2,
    seed: int = 0,
) -> Batch:
    """A batch of ``RICH``; ``further`` gives lengths, history_of and the number of negatives of each sequence."""
    rows = len(lengths if history_of is None else history_of)
    main = rich_steps(lengths, history_of, negatives, seed)
    targets = rich_steps([1] * rows, None, 0, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    dense = torch.rand(rows, 2, generator=generator) * torch.tensor([90.0, 70.0])
    dense[::3, 0] = float("nan")
    if further is None:
        further = {
            "buys": ([2, 0, 1], [0, 2, 1, 1, 2, 0, 0][:rows], 1),
            "saved": ([1, 2, 1, 0, 3, 1, 2][:rows], None, 0),
        }
    return Batch(
        history=main.history,
        offsets=main.offsets,
        target=targets.history,
        label=(torch.arange(rows) % 2).float(),
        history_of=main.history_of,
        negatives=main.negatives,
        users={"user": torch.randint(7, (rows,), generator=generator)},
        dense=dense,
        behaviours=main.behaviours,
        behaviour_dense=main.behaviour_dense,
        sequences={name: rich_steps(*given, seed + 3 + i) for i, (name, given) in enumerate(further.items())},
    )


def unshared(batch: Batch) -> Batch:
    """The same rows, each with a copy of its history."""
    own = {name: _unshared(each) for name, each in batch.sequences.items()}
    return replace(_unshared(batch), sequences=own)


def _unshared(batch: Any) -> Any:
    if batch.history_of is None:
        return batch
    parts = [torch.arange(int(batch.offsets[u]), int(batch.offsets[u + 1])) for u in batch.history_of.tolist()]
    index = torch.cat(parts)
    return replace(
        batch,
        history={name: ids[index] for name, ids in batch.history.items()},
        offsets=torch.tensor([0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]),
        history_of=None,
        rows_total=-1,
        negatives=None if batch.negatives is None else {name: ids[index] for name, ids in batch.negatives.items()},
        behaviours={name: ids[index] for name, ids in batch.behaviours.items()},
        behaviour_dense=None if batch.behaviour_dense is None else batch.behaviour_dense[index],
    )


def plain(batch: Batch) -> Plain:
    """``batch`` without a tensor in it."""

    def item(fields: dict[str, Tensor], at: Any) -> dict[str, Any]:
        return {name: ids[at].tolist() for name, ids in fields.items()}

    def steps(given: Any) -> History:
        bounds = given.offsets.tolist()
        spans = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        drawn = given.negatives
        count = 0 if drawn is None else next(iter(drawn.values())).shape[1]
        numbers = given.behaviour_dense
        return History(
            histories=[[item(given.history, t) for t in span] for span in spans],
            negatives=None
            if drawn is None
            else [[[item(drawn, (t, k)) for k in range(count)] for t in span] for span in spans],
            u=list(range(batch.rows)) if given.history_of is None else given.history_of.tolist(),
            behaviours=[[item(given.behaviours, t) for t in span] for span in spans],
            numbers=[[[] if numbers is None else numbers[t].tolist() for t in span] for span in spans],
        )

    assert batch.dense is not None
    assert batch.label is not None
    return Plain(
        steps=steps(batch),
        further={name: steps(each) for name, each in batch.sequences.items()},
        targets=[item(batch.target, b) for b in range(batch.rows)],
        users=[item(batch.users, b) for b in range(batch.rows)],
        dense=batch.dense.tolist(),
        labels=batch.label.tolist(),
    )


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """Options named "group.option", as tests name them, in the groups that models take; None leaves a group out."""
    found: dict[str, Any] = {}
    for path, value in options.items():
        group, dot, name = path.partition(".")
        if dot:
            found[group] = {**(found.get(group) or {}), name: value}
        else:
            found[group] = value
    return found


def resolved(name: str, options: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
    """Every option of a model with its value, named "group.option"."""
    cls = MODELS[name]
    chosen = merge(cls.PRESETS[preset] if preset else {}, nested(options))
    below = cls.options()
    if chosen.get("auxiliary") is not None:
        below["auxiliary"] = {**plain_options(AuxiliaryOptions()), **(below["auxiliary"] or {})}
    found: dict[str, Any] = {"evolution.kind": "gru", "evolution.form": "paper"} if name == "gru_attention" else {}
    for group, value in merge(below, chosen).items():
        found |= {f"{group}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {group: value}
    return found


def model_of(
    name: str,
    options: dict[str, Any],
    preset: str | None = None,
    dtype: torch.dtype = torch.float64,
    schema: Schema = SCHEMA,
) -> RankingModel:
    """A small model whose parameters are all random: no bias is 0, no scale is 1."""
    torch.manual_seed(1)
    options = {**SMALL_OF[name], **({} if schema is SCHEMA else {"embedding.size": RICH_SIZES}), **options}
    statistics = None if schema is SCHEMA else STATISTICS
    model = build(name, schema, nested(options), preset, statistics=statistics).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return model
