"""Readers of public data sets whose rows are samples: each has its own history, label and split.

Room card. Lives here: ``SAMPLE_FORMATS`` and the streams of samples. May import: numpy, polars, pyarrow, ``_csv``,
``log``. Must not be here: ids, samples of the prepared folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from dien_kernels.data._csv import csv_batches
from dien_kernels.data._files import find, size_of
from dien_kernels.data.columns import Roles
from dien_kernels.data.log import BadLines, Log

USER = "user_id"  # the user field that has the raw user; metrics of each user group by it
_SPLITS = {"train": 0, "valid": 1, "test": 2}
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


@dataclass(frozen=True)
class Form:
    """How the rows of a data set become samples. Values of the mappings are columns of its files.

    Attributes:
        endings: how the names of its files end.
        user, label: columns. item: one column, or several that together identify an item.
        history: for each column of ``item``, the one with the values of the history.
        item_fields: name to the columns of the target and of the history.
        behaviour_fields: name to the column of the history.
        sequence: a further sequence: its name and its column of items.
        user_fields, dense: columns, which keep their names.
        within: what stands between the values of a history.
        delimiter, names: of the files; ``names`` where they have no header.
    """

    endings: tuple[str, ...]
    user: str
    label: str
    item: tuple[str, ...]
    history: tuple[str, ...]
    item_fields: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    behaviour_fields: Mapping[str, str] = field(default_factory=dict)
    sequence: tuple[str, str] | None = None
    user_fields: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    within: str = "^"
    delimiter: str = ","
    names: tuple[str, ...] | None = None

    @property
    def lists(self) -> list[str]:
        """The columns that hold the values of the main history, all of one length."""
        fields = [history for _, history in self.item_fields.values()]
        return list(dict.fromkeys([*self.history, *fields, *self.behaviour_fields.values()]))

    @property
    def columns(self) -> list[str]:
        further = [self.sequence[1]] if self.sequence else []
        scalar = [*self.item, *(target for target, _ in self.item_fields.values()), *self.user_fields, *self.dense]
        return list(dict.fromkeys([self.label, self.user, *scalar, *self.lists, *further]))


SAMPLE_FORMATS: dict[str, Form] = {
    "authors": Form(
        ("splitbyuser",),
        "user",
        "label",
        ("item",),
        ("items",),
        {"category": ("category", "categories")},
        within="\x02",
        delimiter="\t",
        names=("label", "user", "item", "category", "items", "categories"),
    ),
    "amazon_x1": Form(
        (".csv",), "user_id", "label", ("item_id",), ("item_history",), {"category": ("cate_id", "cate_history")}
    ),
    "taobaoad_x1": Form(
        (".csv",),
        "userid",
        "clk",
        ("cate_id", "brand"),
        ("cate_his", "brand_his"),
        {"cate_id": ("cate_id", "cate_his"), "brand": ("brand", "brand_his")},
        {"btag": "btag_his"},
        user_fields=(
            "cms_segid",
            "cms_group_id",
            "final_gender_code",
            "age_level",
            "pvalue_level",
            "shopping_level",
            "occupation",
            "new_user_class_level",
            "adgroup_id",
            "campaign_id",
            "customer",
            "pid",
        ),
        dense=("price",),
    ),
    "kuaivideo_x1": Form(
        (".csv",), "user_id", "is_click", ("item_id",), ("pos_items",), sequence=("neg_items", "neg_items")
    ),
}
"""Every format of samples by its name: docs/data-sets.md."""


def open_samples(sources: str | Path | Sequence[str | Path], format: str, bad: BadLines) -> Log:
    """A stream of samples: record batches with user, target, label, split, ``history``, ``target.FIELD``,
    ``history.FIELD``, ``history.BEHAVIOUR``, ``further``, user fields and dense columns.

    Raises ``ValueError`` for a file whose name tells no split.
    """
    form = SAMPLE_FORMATS[format]
    paths = find(sources, form.endings, f"format {format!r} needs such files")
    paths = sorted(paths, key=split_of)
    splits = [split_of(path) for path in paths]
    if 0 not in splits:
        raise ValueError(f"{paths[0].parent}: no file of the training split, a name with 'train' is needed")

    def read() -> Iterator[pa.RecordBatch]:
        for path, split in zip(paths, splits, strict=True):
            names = None if form.names is None else list(form.names)
            for batch, line_of in csv_batches(log, path, form.columns, form.delimiter, names):
                frame = pl.DataFrame(batch).with_columns(pl.all().cast(pl.String).fill_null(""))
                reasons = _faults(frame, form)
                for row in np.flatnonzero(reasons.is_not_null().to_numpy()).tolist():
                    bad.add(path, line_of(row), reasons[row])
                kept = frame.filter(reasons.is_null())
                log.rows += kept.height
                yield _samples(kept, form, split)

    roles = Roles(
        label=form.label,
        item_fields={name: name for name in form.item_fields},
        user_fields={name: name for name in (USER, *form.user_fields)},
        dense={name: name for name in form.dense},
        behaviour_fields={name: name for name in form.behaviour_fields},
    )
    log = Log.of(roles, read, size_of(paths), bad)
    if form.sequence:
        log.sequences = ("main", form.sequence[0])
    return log


def split_of(path: Path) -> int:
    """The split that the name of a file tells: 0 train, 1 valid, 2 test."""
    found = [number for word, number in _SPLITS.items() if word in path.name.lower()]
    if len(found) != 1:
        raise ValueError(f"{path}: the name {path.name!r} tells no split; names with one of {list(_SPLITS)} do")
    return found[0]


def _length(name: str, within: str) -> pl.Expr:
    return pl.when(pl.col(name) == "").then(0).otherwise(pl.col(name).str.count_matches(within, literal=True) + 1)


def _faults(frame: pl.DataFrame, form: Form) -> pl.Series:
    """For each row why it cannot be used, null if it can."""
    first, *others = form.lists
    label = pl.col(form.label)
    found: Any = pl.when(~label.is_in(list(_LABELS))).then(
        pl.format("label (column '{}') '{}' is no label; labels are 0 and 1", pl.lit(form.label), label)
    )
    for name in (form.user, *form.item):
        found = found.when(pl.col(name) == "").then(pl.lit(f"column {name!r} is missing"))
    for name in others:
        found = found.when(_length(name, form.within) != _length(first, form.within)).then(
            pl.format(
                "column '{}' has {} values and '{}' has {}; they must be as many",
                *(pl.lit(name), _length(name, form.within), pl.lit(first), _length(first, form.within)),
            )
        )
    for name in form.dense:
        number = pl.col(name).cast(pl.Float32, strict=False)
        found = found.when((pl.col(name) != "") & number.is_null()).then(
            pl.format("column '{}' '{}' is no number", pl.lit(name), pl.col(name))
        )
    return frame.select(found.otherwise(pl.lit(None, pl.String)).alias("why"))["why"]


def _split(name: str, within: str) -> pl.Expr:
    return pl.when(pl.col(name) == "").then(pl.lit([], pl.List(pl.String))).otherwise(pl.col(name).str.split(within))


def _samples(frame: pl.DataFrame, form: Form, split: int) -> pa.RecordBatch:
    columns = [
        pl.col(form.user).alias("user"),
        pl.concat_str([pl.col(name) for name in form.item], separator="^").alias("target"),
        pl.col(form.label).replace_strict(_LABELS, return_dtype=pl.Int8).alias("label"),
        pl.lit(split, pl.Int8).alias("split"),
        pl.col(form.user).alias(f"user.{USER}"),
        *(pl.col(name).replace("", None).alias(f"user.{name}") for name in form.user_fields),
        *(pl.col(name).cast(pl.Float32, strict=False).fill_null(np.nan).alias(f"dense.{name}") for name in form.dense),
        *(pl.col(target).replace("", None).alias(f"target.{name}") for name, (target, _) in form.item_fields.items()),
        *(_split(past, form.within).alias(f"history.{name}") for name, (_, past) in form.item_fields.items()),
        *(_split(past, form.within).alias(f"behaviour.{name}") for name, past in form.behaviour_fields.items()),
        _split(form.history[0], form.within).alias("history"),
    ]
    if form.sequence:
        columns.append(_split(form.sequence[1], form.within).alias("further"))
    table = frame.select(columns)
    if len(form.item) > 1:
        joined = frame.select(_split(name, form.within).alias(name) for name in form.history).with_row_index("row")
        flat = joined.explode(list(form.history)).drop_nulls()
        pairs = flat.select("row", pair=pl.concat_str(list(form.history), separator="^"))
        lists = pairs.group_by("row", maintain_order=True).agg("pair")
        table = table.with_columns(
            joined.select("row").join(lists, on="row", how="left", maintain_order="left")["pair"]
            .fill_null(pl.lit([], pl.List(pl.String))).alias("history")
        )  # fmt: skip
    arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
    return pa.record_batch([column.combine_chunks() for column in arrow.columns], schema=arrow.schema)
