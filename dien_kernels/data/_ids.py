"""From counts to ids: the vocabularies of a prepared folder, and what each item id stands for.

Room card. Lives here: ids by frequency, the fields of the items. May import: numpy, pyarrow, polars, ``_deal``,
``vocabulary``. Must not be here: rows of the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dien_kernels.data._arrow import Array
from dien_kernels.data._deal import Dealt
from dien_kernels.data.folder import ITEMS, PARQUET, vocabulary_file
from dien_kernels.data.log import Log
from dien_kernels.data.vocabulary import Vocabulary

MOST_VALUES = 16  # of an item field with several values; what an item has beyond them is left out, and counted


@dataclass
class Ids:
    """The vocabularies by field name, and the items by id.

    Attributes:
        vocabularies: of ``item``, item fields, user fields and behaviour fields.
        items: a table with a row for each item id: ``count``, and every item field.
        several: the largest number of values of an item, for each item field that has several.
        raw_items: the number of raw items.
        report: rows that disagree with the first value of an item's field (``conflicts:FIELD``), items without a value
            (``unknown_items:FIELD``), values beyond the most that are kept (``cut_values:FIELD``).
    """

    vocabularies: dict[str, Vocabulary]
    items: pa.Table
    several: dict[str, int]
    raw_items: int
    report: Counter[str]

    @property
    def rare(self) -> int:
        """The number of raw items that share id 0."""
        return self.raw_items - (self.vocabularies["item"].size - 1)

    def write(self, folder: Path) -> None:
        """Write ``vocabulary-FIELD.parquet`` and ``items.parquet``."""
        for name, vocabulary in self.vocabularies.items():
            vocabulary.write(folder / vocabulary_file(name))
        pq.write_table(self.items, folder / ITEMS, **PARQUET)

    def take_out(self, folder: Path, dropped: Array | None) -> None:
        """Write ``items.parquet`` again, without these behaviours of each item; None: there are none."""
        if dropped is None:
            return
        count = pa.array(self.items["count"].to_numpy() - dropped)
        self.items = self.items.set_column(self.items.column_names.index("count"), "count", count)
        pq.write_table(self.items, folder / ITEMS, **PARQUET)

    @classmethod
    def read(
        cls, folder: Path, vocabularies: Mapping[str, Vocabulary], several: Mapping[str, int], raw_items: int
    ) -> Ids:
        """Those of a prepared folder, with its ``vocabularies``."""
        return cls(dict(vocabularies), pq.read_table(folder / ITEMS), dict(several), raw_items, Counter())


def give_ids(
    dealt: Dealt, log: Log, minimum: Mapping[str, int], old: Ids | None = None, buckets: Mapping[str, int] | None = None
) -> Ids:
    """Number the values of every field by frequency, those of equal frequency by value; id 0 is "unknown".

    ``minimum`` is the least count of a value that gets an id of its own, by field. With ``old``, its ids stay, new
    values get the ids that follow, and an item keeps the fields that it has. Of the fields in ``buckets`` the rows
    hold buckets, and buckets get ids.
    """
    pairs, report = cast(pl.DataFrame, dealt.items.total()), Counter[str]()  # logs without rows have been refused
    totals = pairs.group_by("item").agg(pl.col("rows", "behaviours").sum())
    before = {} if old is None else old.vocabularies
    grown = {"item": _vocabulary(totals.select(value="item", rows="rows"), minimum["item"], 0, before.get("item"))}
    size, ids = grown["item"].size, _encode(grown["item"], totals["item"])
    totals = totals.with_columns(pl.Series("id", ids))
    count = np.bincount(ids, totals["behaviours"].to_numpy().astype(np.float64), minlength=size).astype(np.int64)
    if old is not None:
        count[: old.items.num_rows] += old.items["count"].to_numpy()
    columns: dict[str, pa.Array] = {"count": pa.array(count)}
    several: dict[str, int] = {}
    for name in log.item_fields:
        lists = name in log.several
        chosen = _lists_of_items(dealt, name, report) if lists else _values_of_items(pairs, name, report)
        weighed = totals.join(chosen, on="item", how="left")
        unknown = weighed.filter(pl.col(name).is_null())
        report[f"unknown_items:{name}"] = unknown.height
        counts = weighed.drop_nulls(name)
        counts = counts.explode(name) if lists else counts
        counts = counts.group_by(pl.col(name).alias("value")).agg(pl.col("rows").sum())
        grown[name] = _vocabulary(counts, minimum[name], int(unknown["rows"].sum()), before.get(name))
        known = weighed.filter(pl.col(name).is_not_null() & (pl.col("id") > 0)).select("id", name)
        before_field = None if old is None else old.items[name]
        if lists:
            columns[name], several[name] = _list_column(known, name, grown[name], size, before_field)
            several[name] = max(several[name], 0 if old is None else old.several[name])
        else:
            table = np.zeros(size, np.int32)
            table[known["id"].to_numpy()] = _encode(grown[name], known[name])
            if before_field is not None:
                kept = before_field.to_numpy()
                fresh = table[: kept.size].copy()
                table[: kept.size] = np.where(kept > 0, kept, fresh)
                differ = np.flatnonzero((kept > 0) & (fresh > 0) & (kept != fresh))
                rows_of = np.bincount(ids, totals["rows"].to_numpy().astype(np.float64), minlength=size)
                report[f"conflicts:{name}"] += int(rows_of[differ].sum())
            columns[name] = pa.array(table)
    for name, tally in dealt.fields.items():
        found = tally.total()
        counts = pl.DataFrame({"value": [], "rows": []}) if found is None else found.select(value=name, rows="rows")
        grown[name] = _vocabulary(counts, minimum[name], dealt.missing[name], before.get(name))
        report[f"missing:{name}"] = dealt.missing[name]
    for name, number in (buckets or {}).items():
        grown[name].buckets, grown[name].text = number, dealt.text[name]
    raw = totals.height
    if old is not None:
        raw = old.raw_items + size - old.items.num_rows  # what is too rare for an id may have been counted before
    return Ids(grown, pa.table(columns), several, raw, report)


def _values_of_items(pairs: pl.DataFrame, name: str, report: Counter[str]) -> pl.DataFrame:
    """item, and the first value that the log gives it; rows with another one are counted."""
    known = pairs.filter(pl.col(name).is_not_null())
    known = known.with_columns(chosen=pl.col(name).sort_by("first").first().over("item"))
    report[f"conflicts:{name}"] = int(known.filter(pl.col(name) != pl.col("chosen"))["rows"].sum())
    return known.select("item", pl.col("chosen").alias(name)).unique("item")


def _lists_of_items(dealt: Dealt, name: str, report: Counter[str]) -> pl.DataFrame:
    """item, and the first list of values that the log gives it, each value once."""
    first = pl.concat(dealt.lists[name]).unique("item", keep="first", maintain_order=True)
    chosen = first.select("item", pl.col(name).list.unique(maintain_order=True))
    report[f"cut_values:{name}"] = int((chosen[name].list.len().cast(pl.Int64) - MOST_VALUES).clip(0).sum())
    return chosen.with_columns(pl.col(name).list.head(MOST_VALUES))


def _vocabulary(counts: pl.DataFrame, minimum: int, unknown: int, old: Vocabulary | None) -> Vocabulary:
    """The vocabulary of values with ``rows`` each; ``unknown`` are rows without a value."""
    if old is None:
        old = Vocabulary(pa.array([], pa.null()), np.zeros(1, np.int64))
        ids = np.zeros(counts.height, np.int64)
    else:
        ids = _encode(old, counts["value"])
    rows = counts["rows"].to_numpy().astype(np.int64)
    known = np.bincount(ids, rows.astype(np.float64), minlength=old.size).astype(np.int64)
    known[0] = unknown
    fresh = counts.filter(pl.Series(ids == 0))
    kept = fresh.filter(pl.col("rows") >= minimum).sort("rows", "value", descending=[True, False])
    known[0] += int(fresh["rows"].sum()) - int(kept["rows"].sum())
    values = kept["value"].to_arrow(compat_level=pl.CompatLevel.oldest())
    values = values.cast(pa.int64() if pa.types.is_integer(values.type) else pa.string())
    if old.size > 1:
        values = pa.concat_arrays([old.values, values.cast(old.values.type)])
    return Vocabulary(values, np.concatenate([old.counts + known, kept["rows"].to_numpy()]).astype(np.int64))


def _encode(vocabulary: Vocabulary, values: pl.Series) -> Array:
    if not len(values):
        return np.zeros(0, np.int64)
    array = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    return vocabulary.encode_values(array.cast(vocabulary.values.type))


def _list_column(
    known: pl.DataFrame, name: str, vocabulary: Vocabulary, size: int, old: pa.ChunkedArray | None
) -> tuple[pa.Array, int]:
    """A list of ids for each item id, empty for those that ``known`` (id, list of raw values) has not; and the length
    of the longest. ``old`` are the lists of the first ids; those that are not empty stay."""
    flat = known.explode(name).drop_nulls()
    ids = flat.select("id", value=pl.Series(_encode(vocabulary, flat[name]).astype(np.int32)))
    ids = ids.filter(pl.col("value") > 0)  # values too rare for an id are left out
    if old is not None:
        before = pl.DataFrame({"id": np.arange(len(old)), "value": pl.Series(old)}).explode("value").drop_nulls()
        before = before.cast({"id": pl.Int64, "value": pl.Int32})
        ids = pl.concat([before, ids.join(before, on="id", how="anti", maintain_order="left")])
    ids = ids.sort("id", maintain_order=True)
    lengths = np.bincount(ids["id"].to_numpy(), minlength=size)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    array = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids["value"].to_numpy().astype(np.int32)))
    return array, max(1, int(lengths.max(initial=0)))
