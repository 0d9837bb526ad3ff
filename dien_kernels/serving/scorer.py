"""Scores for requests in raw item ids: a history and its candidates in, a probability for each candidate
out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from dien_kernels.data import Prepared

HISTORY, CANDIDATES, SCORES = "history", "candidates", "scores"


@dataclass
class Counts:
    """What has been scored: requests and items, and how many of the items the vocabulary does not know."""

    requests: int = 0
    behaviours: int = 0
    candidates: int = 0
    unknown_behaviours: int = 0
    unknown_candidates: int = 0

    def words(self) -> str:
        """One line for a reader."""
        return (
            f"{self.requests:,} requests, "
            f"{self.candidates:,} candidates ({self.unknown_candidates:,} unknown), "
            f"{self.behaviours:,} behaviours ({self.unknown_behaviours:,} unknown)"
        )


class Scorer:
    """Scores requests with ``model.score``: what depends on a history alone runs once, however many
    candidates it has.

    Items are raw ids, as in the logs. The other item fields (category, ...) are looked up in the prepared
    data. An item that was not there at preparation has id 0, "unknown", and is counted in ``counts``.

    Args:
        model: a trained model of ``dien_kernels.models``.
        prepared: the data it was trained on, for the vocabularies.
        max_length: the newest behaviours of a history that are read; as in training.
        read_history: False for a model that was trained on empty histories (``data.history``): all are
            taken for empty.

    Raises ``ValueError`` for a model with user fields or dense features: requests do not carry them.
    """

    def __init__(self, model: Any, prepared: Prepared, *, max_length: int = 100, read_history: bool = True) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        schema = prepared.schema
        if schema.users or schema.dense:
            names = ", ".join([*schema.users, *schema.dense])
            raise ValueError(f"the model reads features that requests do not carry: {names}")
        self.model, self.prepared = model, prepared
        self.max_length = max_length if read_history else 0
        self.counts = Counts()

    def score(self, history: Sequence[object], candidates: Sequence[object]) -> NDArray[np.float32]:
        """Probabilities of a click, one for each candidate of one history (oldest first)."""
        table = pa.table({HISTORY: [list(history)], CANDIDATES: [list(candidates)]})
        scores: NDArray[np.float32] = self.score_table(table)[SCORES].combine_chunks().values.to_numpy()
        return scores

    def score_table(self, requests: pa.Table) -> pa.Table:
        """The requests with a column ``scores``, a list as long as that of the candidates.

        Args:
            requests: columns ``history`` and ``candidates``, lists of raw item ids; further columns are kept.

        Raises ``ValueError`` for a missing column, one that holds no lists, or requests with ``scores``
        already.
        """
        if SCORES in requests.column_names:
            raise ValueError(f"the requests have a column {SCORES!r} already")
        behaviours, lengths = _lists(requests, HISTORY)
        targets, sizes = _lists(requests, CANDIDATES)
        behaviours, lengths = _newest(behaviours, lengths, self.max_length)
        history, target = self.prepared.encode_items(behaviours), self.prepared.encode_items(targets)
        counts = self.counts
        counts.requests += requests.num_rows
        counts.behaviours += len(history)
        counts.candidates += len(target)
        counts.unknown_behaviours += int((history == 0).sum())
        counts.unknown_candidates += int((target == 0).sum())
        scores = torch.zeros(0)
        if len(target):
            scores = self.model.score(
                self._fields(history),
                self._fields(target),
                offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
                history_of=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
            )
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())
        values = pa.array(scores.float().cpu().numpy())
        return requests.append_column(SCORES, pa.LargeListArray.from_arrays(offsets, values))

    def score_file(self, requests: str | Path, out: str | Path, *, chunk: int = 1024) -> Counts:
        """Score a Parquet file of requests into another, ``chunk`` requests at a time; returns the counts so
        far.

        ``out`` appears when it is complete. Raises as ``score_table`` does, ``FileNotFoundError``, and
        ``ValueError`` for a ``chunk`` below 1 or a folder as ``out``.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        requests, out = Path(requests), Path(out)
        if not requests.is_file():
            raise FileNotFoundError(f"there is no file {requests}")
        if out.is_dir():
            raise ValueError(f"out must be a file to write, got the folder {out}")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {out.parent} for {out.name}")
        part = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            source = pq.ParquetFile(requests)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{requests} cannot be read as Parquet: {error}") from error
        writer: pq.ParquetWriter | None = None
        try:
            with source:
                empty = self.score_table(source.schema_arrow.empty_table())
                writer = pq.ParquetWriter(part, empty.schema)
                for batch in source.iter_batches(chunk):
                    writer.write_table(self.score_table(pa.Table.from_batches([batch])))
            writer.close()
            os.replace(part, out)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return self.counts

    def _fields(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        item, *others = self.prepared.schema.items
        fields = {item: torch.tensor(ids)}
        for name in others:
            fields[name] = torch.from_numpy(self.prepared.item_fields[name][ids])
        return fields


def _lists(requests: pa.Table, name: str) -> tuple[pa.Array, NDArray[np.int64]]:
    """The values of a list column, one list after another, and the lengths of the lists; a null list is empty."""
    if name not in requests.column_names:
        raise ValueError(f"the requests have no column {name!r}, only {', '.join(requests.column_names)}")
    column = requests[name]
    list_type = column.type
    is_flat_list = (
        pa.types.is_list(list_type) or pa.types.is_large_list(list_type) or pa.types.is_fixed_size_list(list_type)
    ) and (not pa.types.is_nested(list_type.value_type))
    if not is_flat_list:
        raise ValueError(f"the column {name!r} must hold lists of item ids, got {list_type}")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    values = pc.list_flatten(column)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values, lengths


def _newest(values: pa.Array, lengths: NDArray[np.int64], most: int) -> tuple[pa.Array, NDArray[np.int64]]:
    """The last ``most`` values of each list."""
    kept = np.minimum(lengths, most)
    ends = np.cumsum(lengths)
    position = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
    return values.take(pa.array(np.repeat(ends - kept, kept) + position)), kept
