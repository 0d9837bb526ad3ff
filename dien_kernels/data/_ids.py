"""From counts to ids: the vocabularies of a prepared folder, and what each item id stands for.

Room card. Lives here: ids by frequency, the fields of the items. May import: numpy, pyarrow, polars, ``_deal``,
``vocabulary``. Must not be here: rows of the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        rare: the number of raw items that share id 0.
        raw_items: the number of raw items.
        report: rows that disagree with the first value of an item's field (``conflicts:FIELD``), items without a value
            (``unknown_items:FIELD``), values beyond the most that are kept (``cut_values:FIELD``).
    """

    vocabularies: dict[str, Vocabulary]
    items: pa.Table
    several: dict[str, int]
    rare: int
    raw_items: int
    report: Counter[str]

    def write(self, folder: Path) -> None:
        """Write ``vocabulary-FIELD.parquet`` and ``items.parquet``."""
        for name, vocabulary in self.vocabularies.items():
            vocabulary.write(folder / vocabulary_file(name))
        pq.write_table(self.items, folder / ITEMS, **PARQUET)


def give_ids(dealt: Dealt, log: Log, minimum: Mapping[str, int]) -> Ids:
    """Number the values of every field by frequency, those of equal frequency by value; id 0 is "unknown".

    ``minimum`` is the least count of a value that gets an id of its own, by field.
    """
    pairs, report = dealt.items.total(), Counter[str]()
    assert pairs is not None  # prepare has refused a log without rows
    totals = pairs.group_by("item").agg(pl.col("rows", "behaviours").sum())
    item, kept = _vocabulary(totals.select(value="item", rows="rows", behaviours="behaviours"), minimum["item"])
    vocabularies = {"item": item}
    lost = int(totals["behaviours"].sum()) - int(kept["behaviours"].sum())
    columns: dict[str, pa.Array] = {"count": pa.array(np.concatenate([[lost], kept["behaviours"].to_numpy()]))}
    several: dict[str, int] = {}
    for name in log.item_fields:
        if name in log.several:
            first = pl.concat(dealt.lists[name]).unique("item", keep="first", maintain_order=True)
            chosen = first.select("item", pl.col(name).list.unique(maintain_order=True))
            report[f"cut_values:{name}"] = int((chosen[name].list.len() - MOST_VALUES).clip(0).sum())
            chosen = chosen.with_columns(pl.col(name).list.head(MOST_VALUES))
        else:
            known = pairs.filter(pl.col(name).is_not_null())
            known = known.with_columns(chosen=pl.col(name).sort_by("first").first().over("item"))
            report[f"conflicts:{name}"] = int(known.filter(pl.col(name) != pl.col("chosen"))["rows"].sum())
            chosen = known.select("item", pl.col("chosen").alias(name)).unique("item")
        weighed = totals.join(chosen, on="item", how="left")
        unknown = weighed.filter(pl.col(name).is_null())
        report[f"unknown_items:{name}"] = unknown.height
        counts = weighed.drop_nulls(name)
        counts = counts.explode(name) if name in log.several else counts
        counts = counts.group_by(pl.col(name).alias("value")).agg(pl.col("rows").sum())
        vocabularies[name], _ = _vocabulary(counts, minimum[name], int(unknown["rows"].sum()))
        of_ids = kept.select(item="value").join(chosen, on="item", how="left", maintain_order="left")[name]
        if name in log.several:
            columns[name], several[name] = _lists(of_ids, vocabularies[name])
        else:
            ids = np.zeros(kept.height + 1, np.int32)
            ids[1:] = vocabularies[name].encode(of_ids.to_arrow(compat_level=pl.CompatLevel.oldest()))
            columns[name] = pa.array(ids)
    for name, tally in dealt.fields.items():
        found = tally.total()
        counts = pl.DataFrame({"value": [], "rows": []}) if found is None else found.select(value=name, rows="rows")
        vocabularies[name], _ = _vocabulary(counts, minimum[name], dealt.missing[name])
        report[f"missing:{name}"] = dealt.missing[name]
    raw = totals.height
    return Ids(vocabularies, pa.table(columns), several, raw - kept.height, raw, report)


def _vocabulary(counts: pl.DataFrame, minimum: int, unknown: int = 0) -> tuple[Vocabulary, pl.DataFrame]:
    """The vocabulary of values with ``rows`` each, and their table in the order of ids 1, 2, ..."""
    kept = counts.filter(pl.col("rows") >= minimum).sort("rows", "value", descending=[True, False])
    left_out = int(counts["rows"].sum()) - int(kept["rows"].sum()) + unknown
    values = kept["value"].to_arrow(compat_level=pl.CompatLevel.oldest())
    values = values.cast(pa.int64() if pa.types.is_integer(values.type) else pa.string())
    return Vocabulary(values, np.concatenate([[left_out], kept["rows"].to_numpy()]).astype(np.int64)), kept


def _lists(values: pl.Series, vocabulary: Vocabulary) -> tuple[pa.Array, int]:
    """Lists of raw values as lists of ids, with an empty list in front for id 0; and the length of the longest."""
    lists = values.fill_null([])
    lengths = lists.list.len().to_numpy().astype(np.int64)
    flat = lists.explode(empty_as_null=False).to_arrow(compat_level=pl.CompatLevel.oldest())
    ids: Array = vocabulary.encode(flat) if len(flat) else np.zeros(0, np.int64)
    seen = np.concatenate([[0], np.cumsum(ids > 0)])  # values too rare for an id are left out
    ends = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.concatenate([[0], seen[ends]]).astype(np.int32)
    array = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids[ids > 0].astype(np.int32)))
    return array, max(1, int(np.diff(offsets).max(initial=0)))
