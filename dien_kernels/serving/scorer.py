"""Scores for requests in raw values: a history and its candidates in, a probability for each candidate out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from dien_kernels.data import Prepared
from dien_kernels.serving._columns import (
    CANDIDATES,
    HISTORY,
    SCORES,
    Columns,
    behaviour_name,
    columns_of,
    names_of,
    newest,
)
from dien_kernels.serving._files import Output, check_out, open_requests, table_of


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
    """Scores requests with ``model.score``, which reads each history once for all of its candidates.

    Items and the values of fields are raw, as in the logs. The other item fields (category, ...) are looked up in the
    prepared data. An item that was not there at preparation has id 0, "unknown", and is counted in ``counts``; so has
    a value of another field that is null or not known. A number that is null or NaN is missing: 0, or left to the model
    where the prepared data has statistics of its numbers (``meta["dense"]``).

    A model whose scores depend on the rows beside them (``model.rows_depend_on_others``: the preset "authors") scores
    every request by itself, so that neither other requests nor ``chunk`` change its scores.

    Args:
        model: a trained model of ``dien_kernels.models``.
        prepared: the data it was trained on, for the vocabularies.
        max_length: the newest behaviours of a history that are read; as in training.
        read_history: False for a model that was trained on empty histories (``data.history``): all are
            taken for empty.
        calibration: what is done to the logits before they become probabilities, for instance
            ``dien_kernels.training.read_calibration(run)``; None: nothing.

    Raises ``ValueError`` for a ``max_length`` below 1 and for a model with features that no column of requests can
    hold.
    """

    def __init__(
        self,
        model: Any,
        prepared: Prepared,
        *,
        max_length: int = 100,
        read_history: bool = True,
        calibration: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.names = names_of(prepared.schema)
        self.model, self.prepared = model, prepared
        self.max_length = max_length if read_history else 0
        self.counts, self.calibration = Counts(), calibration

    def score(
        self,
        history: Sequence[object],
        candidates: Sequence[object],
        *,
        users: Mapping[str, object] | None = None,
        dense: Mapping[str, object] | None = None,
        behaviours: Mapping[str, Sequence[object]] | None = None,
        behaviour_dense: Mapping[str, Sequence[object]] | None = None,
    ) -> NDArray[np.float32]:
        """Probabilities of a click, one for each candidate of one request, float32 [candidates].

        Args:
            history: raw item ids, oldest first.
            candidates: raw item ids.
            users: user field to its raw value, or None for unknown.
            dense: name to a number, or to a list with one for each candidate; None for missing.
            behaviours: field of behaviours to a list of raw values as long as ``history``.
            behaviour_dense: name to a list of numbers as long as ``history``.

        Raises ``ValueError`` for features that are not those of the model, and as ``score_table``.
        """
        schema = self.prepared.schema
        row: dict[str, Any] = {HISTORY: list(history), CANDIDATES: list(candidates)}
        for kind, given, wanted in (
            ("users", users, schema.users),
            ("dense", dense, schema.dense),
            ("behaviours", behaviours, schema.behaviours),
            ("behaviour_dense", behaviour_dense, schema.behaviour_dense),
        ):
            given = {} if given is None else given
            if set(given) != set(wanted):
                raise ValueError(f"{kind} must have the fields {sorted(wanted)}, got {sorted(given)}")
            for name, value in given.items():
                of_behaviours = kind.startswith("behaviour")
                value = list(value) if isinstance(value, (tuple, np.ndarray)) else value
                row[behaviour_name(schema, name) if of_behaviours else name] = value
        table = table_of([row], list(self.names), "the request")
        scores: NDArray[np.float32] = self.score_table(table)[SCORES].combine_chunks().values.to_numpy()
        return scores

    def score_table(self, requests: pa.Table, *, chunk: int | None = None) -> pa.Table:
        """The requests with a column ``scores``, a list as long as that of the candidates.

        Args:
            requests: columns ``history`` and ``candidates``, lists of raw item ids, and one for each further feature of
                the model, named as it: one value for a user field; for a number one value, or a list as long as
                ``candidates``; for a field or number of behaviours a list as long as ``history`` (its column is named
                "behaviour.NAME" where a user field or a number has the same name). Further columns are kept.
            chunk: candidates that are scored at a time, of one request or several; None: as many as read 2^18
                behaviours together. It decides the memory that is needed, and changes scores by rounding at most.

        Raises ``ValueError`` for a missing column, one that holds something else, requests with ``scores`` already,
        and a ``chunk`` below 1.
        """
        if SCORES in requests.column_names:
            raise ValueError(f"the requests have a column {SCORES!r} already")
        _check_chunk(chunk)
        sizes, scores = self._scores(requests, chunk)
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())
        return requests.append_column(SCORES, pa.LargeListArray.from_arrays(offsets, pa.array(scores)))

    def score_file(self, requests: str | Path, out: str | Path, *, chunk: int | None = None) -> Counts:
        """Score a file of requests into another; returns the counts so far.

        Both are Parquet, or JSON lines where their names end in ".jsonl": an object with the columns' names and values
        in every line. An ``out`` whose name ends in neither ".jsonl" nor ".parquet" is of the kind of the requests.

        ``out`` appears when it is complete: until then the scores are in a file ".dien-score-*.part" in its folder,
        which the next run there removes if this one is killed. A FIFO or a character device (/dev/stdout, /dev/null) is
        written to as scores come.

        Args:
            requests: the file to read; see ``score_table`` for its columns.
            out: the file to write.
            chunk: candidates that are scored at a time, see ``score_table``.

        Raises as ``score_table`` does, ``FileNotFoundError``, and ``ValueError`` for a file that cannot be read or an
        ``out`` that is a folder, the requests themselves or another thing that is no file.
        """
        _check_chunk(chunk)
        requests, out = Path(requests), Path(out)
        if not requests.is_file():
            raise FileNotFoundError(f"there is no file {requests}")
        check_out(out, requests)
        source = open_requests(requests, self.names)
        with source, Output(out, source) as output:
            for batch in source.batches():
                sizes, scores = self._scores(batch.table, chunk)
                output.write(batch, sizes, scores)
        return self.counts

    def _scores(self, requests: pa.Table, chunk: int | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The number of candidates of each request, and the scores of all of them."""
        columns = newest(columns_of(requests, self.prepared.schema), self.max_length)
        sizes = columns.candidates.lengths
        if not sizes.sum():
            self._count(len(sizes), *(self._encode("item", c.values) for c in (columns.history, columns.candidates)))
            return sizes, np.zeros(0, np.float32)
        arguments = self._arguments(columns)
        if not getattr(self.model, "rows_depend_on_others", False):
            return sizes, self._numpy(self.model.score(**arguments, block=chunk))
        if len(sizes) == 1:
            return sizes, self._numpy(self.model.score(**arguments))
        return sizes, np.concatenate([self._one(arguments, row, sizes) for row in np.flatnonzero(sizes).tolist()])

    def _one(self, arguments: dict[str, Any], row: int, sizes: NDArray[np.int64]) -> NDArray[np.float32]:
        """The scores of one of several requests, by itself."""
        last = int(sizes[: row + 1].sum())
        low, high = arguments["offsets"][row : row + 2].tolist()
        steps, rows = slice(low, high), slice(last - int(sizes[row]), last)
        places = {"history": steps, "behaviours": steps, "behaviour_dense": steps, "targets": rows, "dense": rows}
        places["users"] = slice(row, row + 1)
        part: dict[str, Any] = {"offsets": torch.tensor([0, high - low])}
        part["history_of"] = torch.zeros(int(sizes[row]), dtype=torch.int64)
        for name, place in places.items():
            values = arguments.get(name)
            if values is not None:
                part[name] = {k: v[place] for k, v in values.items()} if isinstance(values, dict) else values[place]
        return self._numpy(self.model.score(**part))

    def _arguments(self, columns: Columns) -> dict[str, Any]:
        """The arguments of ``model.score`` for all requests together."""
        schema, lengths, sizes = self.prepared.schema, columns.history.lengths, columns.candidates.lengths
        item = next(iter(schema.items))
        history = self._encode(item, columns.history.values)
        targets = self._encode(item, columns.candidates.values)
        self._count(len(sizes), history, targets)
        arguments: dict[str, Any] = {
            "history": self._fields(history),
            "targets": self._fields(targets),
            "offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
            "history_of": torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
            "users": {name: torch.from_numpy(self._encode(name, raw)) for name, raw in columns.users.items()},
        }
        if schema.dense:
            arguments["dense"] = self._numbers([columns.dense[name] for name in schema.dense])
        if schema.behaviours:
            arguments["behaviours"] = {
                name: torch.from_numpy(self._encode(name, raw)) for name, raw in columns.behaviours.items()
            }
        if schema.behaviour_dense:
            arguments["behaviour_dense"] = self._numbers(
                [columns.behaviour_dense[name] for name in schema.behaviour_dense]
            )
        return arguments

    def _numpy(self, scores: Tensor) -> NDArray[np.float32]:
        """The scores, with ``calibration`` done to their logits log(s / (1 - s))."""
        if self.calibration is not None:
            s = scores.double().clamp(1e-38, 1 - 2**-25)  # a float32 sigmoid is 1 from 17 on
            scores = self.calibration(s.log() - (-s).log1p()).sigmoid()
        numbers: NDArray[np.float32] = scores.float().cpu().numpy()
        return numbers

    def _count(self, requests: int, history: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        counts = self.counts
        counts.requests += requests
        counts.behaviours += len(history)
        counts.candidates += len(targets)
        counts.unknown_behaviours += int((history == 0).sum())
        counts.unknown_candidates += int((targets == 0).sum())

    def _encode(self, name: str, raw: pa.Array) -> NDArray[np.int64]:
        try:
            return self.prepared.vocabulary(name).encode(raw)
        except ValueError as error:
            raise ValueError(f"values of {name!r}: {error}") from error

    def _numbers(self, columns: list[NDArray[np.float32]]) -> Tensor:
        numbers = np.stack(columns, 1)
        if not self.prepared.meta.get("dense"):
            numbers[np.isnan(numbers)] = 0
        return torch.from_numpy(numbers)

    def _fields(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        item, *others = self.prepared.schema.items
        fields = {item: torch.from_numpy(ids)}
        for name in others:
            fields[name] = torch.from_numpy(self.prepared.item_fields[name][ids])
        return fields


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
