"""Tables in memory as streams of record batches: Arrow's, those with the Arrow C stream interface, LazyFrames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa


class Opened(NamedTuple):
    """A table that can be read: ``rows`` is 0 where nobody knows how many there are."""

    schema: pa.Schema
    rows: int
    batches: Callable[[], Iterator[pa.RecordBatch]]


def is_table(sources: object) -> bool:
    """Whether sources are a table in memory rather than files."""
    return isinstance(sources, (pa.Table, pl.LazyFrame)) or hasattr(sources, "__arrow_c_stream__")


def opened(table: Any, chunk_rows: int) -> Opened:
    """The stream of a table. A LazyFrame is collected batch by batch.

    Raises ``ValueError`` for what has the interface but no columns, such as a single Series.
    """
    if isinstance(table, pa.Table):
        return Opened(table.schema, table.num_rows, lambda: iter(table.to_batches(max_chunksize=chunk_rows)))
    if isinstance(table, pl.LazyFrame):
        return Opened(_schema(table), 0, lambda: _collected(table, chunk_rows))
    try:
        reader = pa.RecordBatchReader.from_stream(table)
    except (pa.ArrowInvalid, TypeError) as error:
        raise ValueError(f"a table must have named columns, got {type(table).__name__} ({error})") from None
    rows = len(table) if hasattr(table, "__len__") else 0

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in reader:
            for start in range(0, batch.num_rows, chunk_rows):
                yield batch.slice(start, chunk_rows)

    return Opened(reader.schema, rows, batches)


def _schema(frame: pl.LazyFrame) -> pa.Schema:
    empty: pa.Table = pl.DataFrame(schema=frame.collect_schema()).to_arrow()
    return empty.schema


def _collected(frame: pl.LazyFrame, chunk_rows: int) -> Iterator[pa.RecordBatch]:
    for part in frame.collect_batches(chunk_size=chunk_rows, maintain_order=True):
        yield from part.to_arrow().to_batches(max_chunksize=chunk_rows)
