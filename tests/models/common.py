"""Small batches as ``Batch`` and as plain lists; models with every weight away from its starting value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dien_kernels._options import plain as plain_options
from dien_kernels.batch import Batch, Schema
from dien_kernels.models import MODELS, AuxiliaryOptions, RankingModel, build
from dien_kernels.models.options import merge
from tests.models.transcription import Plain

SCHEMA = Schema(items={"item": 13, "cat": 5}, users={"user": 7}, dense=("price",))
# Widths that differ from one another, so that no two of them can be mistaken for each other.
SMALL: dict[str, Any] = {"embedding.size": {"item": 3, "cat": 2, "user": 4}, "head.units": (7, 6)}
SMALL_OF = {
    name: SMALL
    | ({"attention.units": (6, 4)} if "attention" in model.options() else {})
    | ({"auxiliary.units": (6, 3)} if model.options().get("auxiliary") is not None else {})
    for name, model in MODELS.items()
}


def random_batch(
    lengths: Sequence[int], history_of: Sequence[int] | None = None, *, negatives: int = 2, seed: int = 0
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


def unshared(batch: Batch) -> Batch:
    """The same rows, each with a copy of its history."""
    assert batch.history_of is not None
    parts = [torch.arange(int(batch.offsets[u]), int(batch.offsets[u + 1])) for u in batch.history_of.tolist()]
    index = torch.cat(parts)
    assert batch.negatives is not None
    return Batch(
        history={name: ids[index] for name, ids in batch.history.items()},
        offsets=torch.tensor([0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]),
        target=batch.target,
        label=batch.label,
        negatives={name: ids[index] for name, ids in batch.negatives.items()},
        users=batch.users,
        dense=batch.dense,
    )


def plain(batch: Batch) -> Plain:
    """``batch`` without a tensor in it."""

    def item(fields: dict[str, Tensor], at: Any) -> dict[str, int]:
        return {name: int(ids[at]) for name, ids in fields.items()}

    bounds = batch.offsets.tolist()
    spans = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    drawn = batch.negatives or {name: ids.new_zeros(len(ids), 1) for name, ids in batch.history.items()}
    count = next(iter(drawn.values())).shape[1]
    assert batch.dense is not None
    assert batch.label is not None
    return Plain(
        histories=[[item(batch.history, t) for t in span] for span in spans],
        negatives=[[[item(drawn, (t, k)) for k in range(count)] for t in span] for span in spans],
        u=list(range(batch.rows)) if batch.history_of is None else batch.history_of.tolist(),
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
    name: str, options: dict[str, Any], preset: str | None = None, dtype: torch.dtype = torch.float64
) -> RankingModel:
    """A small model whose parameters are all random: no bias is 0, no scale is 1."""
    torch.manual_seed(1)
    model = build(name, SCHEMA, nested({**SMALL_OF[name], **options}), preset).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return model
