"""``append`` adds the events of new days to a prepared folder: old ids stay, and old files are not written again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dien_kernels._options import user_path
from dien_kernels.batch import Schema
from dien_kernels.checks import check_flag
from dien_kernels.data._deal import BUCKETS, Dealt, deal, read_shards
from dien_kernels.data._ids import Ids, give_ids
from dien_kernels.data._options import Options, check_integer
from dien_kernels.data._place import added, locked
from dien_kernels.data._report import warnings_of
from dien_kernels.data._samples import Rule
from dien_kernels.data._tails import Tails
from dien_kernels.data._write import ShardWriter, Written
from dien_kernels.data.folder import (
    ITEMS,
    SPLITS,
    behaviour_column,
    dense_column,
    shard_schema,
    user_column,
    vocabulary_file,
)
from dien_kernels.data.log import Columns, Log
from dien_kernels.data.prepare import file_entries, refuse_finished, schema_of, shards_for, tell, write_meta
from dien_kernels.data.prepared import Prepared
from dien_kernels.data.readers import Sources, open_log

_log = logging.getLogger(__name__)


def append(
    sources: Sources,
    out: str | Path,
    *,
    format: str | None = None,
    columns: Columns | Mapping[str, object] | None = None,
    delimiter: str | None = None,
    behaviours: Sequence[str] | None = None,
    time_format: str | None = None,
    time_unit: str | None = None,
    missing: Sequence[str] | None = None,
    max_bad_lines: int = 100,
    tail: int = 200,
    progress: bool = True,
    chunk_rows: int = 1 << 18,
    shard_rows: int = 1 << 19,
) -> Prepared:
    """Add the events of new days to a prepared folder.

    The new events become shards of their own, a new generation. A user's row in it has the latest ``tail`` behaviours
    that the folder had, and behind them the new ones; only these are targets. Vocabularies grow at their ends, so that
    every old id stays; what a model learnt of them can be kept. The options of the folder (labels, targets, split,
    min_count, seed, ...) hold for the new events. With ``split="user"`` a user stays in their split; with
    ``split="time"`` all new events are of the training split, as they are later than those of valid and test.

    Args:
        sources, format, columns, delimiter, behaviours, time_format, time_unit, missing, max_bad_lines: as in
            ``open_log``; the log has the fields of the folder.
        out: the prepared folder.
        tail: how many behaviours of the past stand before a user's new ones, at least those that a model reads.
        progress, chunk_rows, shard_rows: as in ``prepare``.

    Events before the last one that the folder knows of their user are left out, and counted as ``late_rows``. What
    stands for numbers (mean, deviation) stays as it was, as the model was trained with it.

    Raises ``FileNotFoundError`` or ``ValueError`` for no prepared folder, ``ValueError`` for another log than the
    folder's, ``FileExistsError`` where another process writes to the folder.
    """
    check_integer("tail", tail, 1)
    check_integer("chunk_rows", chunk_rows, 1)
    check_integer("shard_rows", shard_rows, 1)
    check_flag("progress", progress)
    out = user_path(out, "out")
    if not out.is_dir():
        raise FileNotFoundError(f"there is no prepared folder {out}")
    with locked(out) as finished:  # opened inside, so that no other append comes between
        if finished:
            refuse_finished(out)
        prepared = Prepared.open(out)
        meta = prepared.meta
        if "split" not in meta:
            raise ValueError(
                f"{out} was not written by prepare, so that its rule of splits is not known: it cannot grow"
            )
        if "grouped_by" in meta:
            raise ValueError(f"{out} was made of samples and not of a log of behaviours, so that it cannot grow")
        log = open_like(
            prepared,
            sources,
            format,
            columns,
            max_bad_lines=max_bad_lines,
            chunk_rows=chunk_rows,
            delimiter=delimiter,
            behaviours=behaviours,
            time_format=time_format,
            time_unit=time_unit,
            missing=missing,
        )
        with added(out) as folder:
            _write(log, folder, prepared, tail, chunk_rows, shard_rows, progress)
    grown = Prepared._open(out, digests=False)  # they were compared before, and the rest was written just now
    report = grown.meta["appended"][-1]
    tell(log, report["warnings"])
    if report["late_rows"]:
        _log.warning(
            "%d rows are from before the last behaviour that is known of their user, and were left out",
            report["late_rows"],
        )
    return grown


def open_like(
    prepared: Prepared,
    sources: Sources,
    format: str | None,
    columns: Columns | Mapping[str, object] | None,
    **reading: Any,
) -> Log:
    """A log whose rows are read with the ids of a folder; ``reading`` are the further arguments of ``open_log``.

    Raises ``ValueError`` for other fields than the folder has, or ids of another kind, and what ``open_log`` raises.
    """
    log = open_log(sources, format, columns, labelled=prepared.labels == "given", **reading)
    _check_fields(log, prepared.schema, prepared.path)
    _check_kinds(log, prepared)
    return log


def deal_like(prepared: Prepared, log: Log, work: Path, chunk_rows: int) -> tuple[Dealt, Ids]:
    """Deal the rows of a log to files in ``work``, and read the ids of the folder that they are to have.

    Raises ``ValueError`` where no row can be used, or times are of another unit than in the folder.
    """
    meta, schema = prepared.meta, prepared.schema
    dealt = deal(log, work, chunk_rows, meta["options"].get("buckets", {}))
    if not dealt.rows:
        raise ValueError("there is no usable row in the log" + (f": {log.bad.first[0]}" if log.bad.count else ""))
    if log.time_unit != meta["time_unit"]:
        raise ValueError(f"times must be of the unit {meta['time_unit']!r}, as in {prepared.path}, got {log.time_unit}")
    whole = prepared.unabridged()
    vocabularies = {name: whole.vocabulary(name) for name in (*schema.items, *schema.users, *schema.behaviours)}
    return dealt, Ids.read(prepared.path, vocabularies, schema.several, meta["raw_items"])


def _check_fields(log: Log, schema: Schema, out: Path) -> None:
    """The log has the fields of the folder."""
    for what, got, wanted in (
        ("item_fields", ("item", *log.item_fields), tuple(schema.items)),
        ("user_fields", log.user_fields, tuple(schema.users)),
        ("dense", log.dense, schema.dense),
        ("behaviour_fields", log.behaviour_fields, tuple(schema.behaviours)),
        ("behaviour_dense", log.behaviour_dense, schema.behaviour_dense),
        ("sequences", tuple(log.sequences[1:]), schema.sequences),
    ):
        if tuple(got) != tuple(wanted):
            raise ValueError(f"{what} must be {list(wanted)}, as in {out}, got {list(got)}")


def _write(
    log: Log, folder: Path, prepared: Prepared, tail: int, chunk_rows: int, shard_rows: int, progress: bool
) -> None:
    meta, options, schema = prepared.meta, prepared.meta["options"], prepared.schema
    buckets = options.get("buckets", {})
    work = folder / "rows"
    work.mkdir()
    quiet = None if progress else True
    with tqdm(total=log.total, unit="B", unit_scale=True, desc="read", disable=quiet) as bar:
        log.advance = bar.update
        dealt, old = deal_like(prepared, log, work, chunk_rows)
    ids = give_ids(dealt, log, options["min_count"], old, buckets)
    ids.write(folder)
    columns = columns_like(prepared, dealt)
    tails = Tails.read(
        prepared.path,
        meta,
        _users(dealt),
        _tail_columns(schema, prepared.labels),
        tail,
        latest=_latest_columns(schema, prepared.labels),
    )
    if meta["split"]["thresholds"] is None:
        rule = Rule(options["targets"] == "every", None, (float("inf"), float("inf")), options["seed"])
    else:
        first, second = meta["split"]["thresholds"]
        rule = Rule(options["targets"] == "every", (first, second), (float("inf"),) * 2, options["seed"])
    writer = ShardWriter(
        folder, columns, log, ids, rule,
        duplicates=options["duplicates"], tails=tails, first_shard=len(meta["shards"]),
    )  # fmt: skip
    shards = shards_for(dealt.rows, shard_rows)
    for rows in read_shards(dealt, shards):
        writer.write(rows)
    ids.take_out(folder, writer.written.dropped)
    dealt.buckets.remove(range(BUCKETS))
    work.rmdir()
    write_meta(folder, _grown(prepared, schema_of(log, ids), log, dealt, ids, writer.written, folder))


def _shard_columns(prepared: Prepared) -> pa.Schema:
    return pq.read_schema(prepared.path / prepared.meta["shards"][0]["file"])


def _check_kinds(log: Log, prepared: Prepared) -> None:
    """Ids of the new log are of the kinds of the folder: integers become their digits where that has text."""
    schema = prepared.schema
    users = not pa.types.is_integer(_shard_columns(prepared).field("user").type)
    if log.as_text.get("user") and not users:
        raise ValueError(f"'user' must hold integers, as in {prepared.path}, got text")
    log.as_text["user"] = users
    for name in (*schema.items, *schema.users, *schema.behaviours):
        vocabulary = prepared.vocabulary(name)
        text = vocabulary.text if vocabulary.buckets else not pa.types.is_integer(vocabulary.values.type)
        if vocabulary.size > 1 and log.as_text.get(name) and not text:
            raise ValueError(f"{name!r} must hold integers, as in {prepared.path}, got text")
        if vocabulary.size > 1:
            log.as_text[name] = text


def columns_like(prepared: Prepared, dealt: Dealt) -> pa.Schema:
    """The columns of a shard; users and times have the types of the folder."""
    first = _shard_columns(prepared)
    user, time = first.field("user").type, first.field("time").type.value_type
    dealt_as = cast(pa.Schema, dealt.schema)  # there are rows
    for name, wanted in (("user", user), ("timestamp", time)):
        got = dealt_as.field(name).type
        if got != wanted:
            remedy = "store the column so, or prepare all logs anew"
            raise ValueError(f"{name} must be {wanted}, as in {prepared.path}, got {got}: {remedy}")
    return shard_schema(prepared.schema, prepared.labels, user, time)


def _users(dealt: Dealt) -> pa.Array:
    """The distinct users of the new rows."""
    rows = cast(pa.Table, dealt.buckets.read(range(BUCKETS), ["user"]))  # there are some
    return rows["user"].unique()


def _tail_columns(schema: Schema, labels: str) -> list[str]:
    """The columns with a value for each behaviour. With given labels, those of rows are of the impressions."""
    names: list[str] = []
    for sequence in (None, *schema.sequences):
        before = "" if sequence is None else f"{sequence}."
        names += [f"{before}item", f"{before}time"]
        names += [behaviour_column(name, sequence) for name in (*schema.behaviours, *schema.behaviour_dense)]
    if labels == "next":
        names += [*map(user_column, schema.users), *map(dense_column, schema.dense)]
    return names


def _latest_columns(schema: Schema, labels: str) -> dict[str, list[str]]:
    """Of each list of times, the columns that say whether a row of the last one is known already."""
    found = {"time": ["item", "time"]} if labels == "next" else {"target_time": ["target", "target_time", "label"]}
    return found | {f"{name}.time": [f"{name}.item", f"{name}.time"] for name in schema.sequences}


def _grown(
    prepared: Prepared, schema: Schema, log: Log, dealt: Dealt, ids: Ids, written: Written, folder: Path
) -> dict[str, Any]:
    """The meta file of the folder with its new generation."""
    meta, counts = prepared.meta, prepared.meta["counts"]
    generation = 1 + max(shard.get("generation", 0) for shard in meta["shards"])
    shards = [shard | {"generation": generation} for shard in written.shards]
    report = {"late_rows": 0, "longest_user": written.longest, "rows": dealt.rows, **written.report, **ids.report}
    of_day = {"users": written.users, "behaviours": written.behaviours}
    options = Options(**(meta["options"] | {"fractions": tuple(meta["options"]["fractions"])}))
    appended = {
        "seen": log.seen,
        "users": written.users,
        "bad_lines": log.bad.count,
        "first_bad_lines": log.bad.first,
        "warnings": warnings_of(report, of_day, schema, options, log),
        "new_items": ids.vocabularies["item"].size - prepared.schema.items["item"],
        **{name: int(number) for name, number in sorted(report.items())},
    }
    replaced = {ITEMS, *map(vocabulary_file, ids.vocabularies)}
    files = {name: entry for name, entry in meta["files"].items() if name not in replaced}
    return {
        **{name: value for name, value in meta.items() if name not in ("fingerprint", "digest")},
        "schema": schema.to_dict(),
        "counts": {
            "users": counts["users"] + written.users,
            "behaviours": counts["behaviours"] + written.behaviours,
            "samples": {split: counts["samples"][split] + written.samples[split] for split in SPLITS},
        },
        "raw_items": ids.raw_items,
        "shards": [*meta["shards"], *shards],
        "appended": [*meta.get("appended", []), appended],
        "ancestors": [*meta.get("ancestors", []), prepared.fingerprint],
        "files": files | file_entries(folder),
    }
