"""``prepare`` turns behaviour logs into a prepared folder, in bounded memory."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from tqdm import tqdm

from dien_kernels._options import user_path
from dien_kernels.batch import Schema
from dien_kernels.checks import check_flag
from dien_kernels.data._arrow import digest
from dien_kernels.data._deal import BUCKETS, Dealt, deal, read_shards
from dien_kernels.data._files import named, places_of
from dien_kernels.data._ids import Ids, give_ids
from dien_kernels.data._options import Options, check_integer
from dien_kernels.data._place import filled, locked, stays_inside
from dien_kernels.data._report import warnings_of
from dien_kernels.data._samples import Rule, make_rule
from dien_kernels.data._write import ShardWriter, Written
from dien_kernels.data._write_samples import SampleWriter, deal_samples
from dien_kernels.data.folder import FORMAT, META, SPLITS, VERSION, seal, shard_schema
from dien_kernels.data.log import BadLines, Columns, Log
from dien_kernels.data.prepared import Prepared
from dien_kernels.data.readers import Sources, open_log
from dien_kernels.data.samples import SAMPLE_FORMATS, USER, open_samples

_SHARD_ROWS = 1 << 19  # about so many rows are sorted at a time, where the log is not larger than 2^25 rows
_log = logging.getLogger(__name__)


def prepare(
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
    labels: str = "next",
    targets: str = "last",
    split: str = "user",
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    negatives: int = 1,
    negative_sampling: str = "popularity",
    min_count: int | Mapping[str, int] = 1,
    duplicates: str = "keep",
    buckets: Mapping[str, int] | None = None,
    max_bad_lines: int = 100,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
    chunk_rows: int = 1 << 18,
    shard_rows: int = _SHARD_ROWS,
) -> Prepared:
    """Turn behaviour logs into a prepared folder; docs/data.md has the folder's format and all semantics.

    The log is read once. Its rows are dealt to temporary files by the hash of their user, so that each file can be
    sorted by itself. Memory holds a chunk of the log, one shard, and a number or two for each distinct item and field
    value.

    Args:
        sources, format, columns, delimiter, behaviours, time_format, time_unit, missing, max_bad_lines: as in
            ``open_log``.
        out: the folder to write: absent, empty, or left behind by a prepare that was interrupted.
        labels: ``"next"``: predict a user's next behaviour against sampled negatives; ``"given"``: the rows
            are impressions with a label 0 or 1, histories are the clicks strictly before them.
        targets: for ``"next"``: ``"last"``, one target for each user, or ``"every"`` position with a history.
            Users of valid and test have one, their last, either way.
        split: ``"user"``: users at random; ``"time"``: by quantiles of the targets' timestamps.
        fractions: of train, valid and test; their sum is 1.
        negatives: for ``"next"``: negatives of each target of valid and test; the same ones at every evaluation.
        negative_sampling: ``"popularity"`` (an item as often as it is a behaviour) or ``"uniform"``. Training draws
            the same way.
        min_count: values seen less often become "unknown"; a number, or a mapping of field name to number.
        buckets: for fields with more values than a table may have rows: how many buckets the values fall into by their
            hash. Values of one bucket share an id, and new values have one, too. A mapping of field name to number.
        duplicates: ``"drop"`` leaves out rows with the user, item, time (and label) of an earlier row; ``"keep"``
            counts them in the report.
        seed: of split and negatives.
        progress: show bars (on terminals).
        overwrite: replace a folder that is prepared already.
        chunk_rows, shard_rows: about how many rows are held in the first pass, and sorted at a time. ``chunk_rows``
            changes nothing else; ``shard_rows`` changes how the users are dealt to files.

    Raises:
        ValueError: a bad option, column or file, too many bad lines, too few users or too few times for a
            split.
        FileNotFoundError: a source is absent.
        FileExistsError: ``out`` holds something else, or another process is writing there.

    >>> import tempfile
    >>> from dien_kernels.data import prepare, synthetic
    >>> folder = tempfile.mkdtemp()
    >>> prepare(synthetic(users=50, items=40, categories=4, events=500), folder).split_size("valid")
    5
    """
    check_integer("chunk_rows", chunk_rows, 1)
    check_integer("shard_rows", shard_rows, 1)
    check_flag("progress", progress)
    check_flag("overwrite", overwrite)
    if format in SAMPLE_FORMATS:
        given = (columns, delimiter, behaviours, time_format, time_unit, missing, buckets)
        chosen = (split, tuple(fractions), targets, duplicates)
        if chosen != ("user", (0.8, 0.1, 0.1), "last", "keep") or any(value is not None for value in given):
            raise ValueError(
                f"format {format!r} has its own splits, targets and columns; split, fractions, targets, duplicates, "
                "columns, delimiter, behaviours, time_format, time_unit, missing and buckets are for logs"
            )
        log = open_samples(sources, format, BadLines(max_bad_lines))
        fields = ("item", *log.item_fields, *log.user_fields, *log.behaviour_fields)
        minimum = _minimum(min_count, fields) | {USER: 1}  # metrics of each user group by this field
        options = Options(
            "given", targets, "user", (0.8, 0.1, 0.1), negatives, negative_sampling, minimum, duplicates, {}, seed
        )
        return _run(log, sources, out, options, chunk_rows, shard_rows, progress, overwrite, _write_samples)
    log = open_log(
        sources,
        format,
        columns,
        labelled=labels == "given",
        max_bad_lines=max_bad_lines,
        chunk_rows=chunk_rows,
        delimiter=delimiter,
        behaviours=behaviours,
        time_format=time_format,
        time_unit=time_unit,
        missing=missing,
    )
    fields = ("item", *log.item_fields, *log.user_fields, *log.behaviour_fields)
    try:
        first, second, third = map(float, fractions)
    except (TypeError, ValueError):
        raise ValueError(f"fractions must be three shares with the sum 1, got {fractions!r}") from None
    minimum = _minimum(min_count, fields)
    if buckets is not None and not isinstance(buckets, Mapping):
        raise ValueError(f"buckets must map names of fields to numbers, got {buckets!r}")
    hashed = dict(buckets or {})
    for name in hashed:
        if name not in fields or name in log.several:
            allowed = [field for field in fields if field not in log.several]
            raise ValueError(f"buckets must name fields of {allowed}, got {name!r}")
    options = Options(
        labels, targets, split, (first, second, third), negatives, negative_sampling, minimum, duplicates, hashed, seed
    )
    return _run(log, sources, out, options, chunk_rows, shard_rows, progress, overwrite)


def _run(
    log: Log,
    sources: Sources,
    out: str | Path,
    options: Options,
    chunk_rows: int,
    shard_rows: int,
    progress: bool,
    overwrite: bool,
    write: Callable[..., None] | None = None,
) -> Prepared:
    write = _write if write is None else write
    out = user_path(out, "out")
    with locked(out) as finished:
        if finished:
            refuse_finished(out)
        with filled(out, places_of(sources), lambda: _old_files(out), overwrite) as folder:
            where = ", ".join(map(str, named(sources))) or "the table"
            write(log, folder, options, where, chunk_rows, shard_rows, progress)
    prepared = Prepared.open(out)
    tell(log, prepared.meta["warnings"])
    return prepared


def tell(log: Log, warnings: Sequence[str]) -> None:
    """Log the rows that were skipped, and the warnings of a report."""
    if log.bad.count:
        _log.warning("%d lines were skipped, the first: %s", log.bad.count, "; ".join(log.bad.first[:3]))
    for warning in warnings:
        _log.warning("%s", warning)


def refuse_finished(out: Path) -> None:
    """Say that what had been killed was finished now, and that these sources were not read."""
    raise FileExistsError(
        f"the prepare or append that was interrupted in {out} is complete now, and nothing else was done: look at the "
        "folder (dien-kernels check), and run this again if these events are not in it"
    )


def _deal_all(log: Log, where: str, quiet: bool | None, read: Callable[[], Dealt]) -> Dealt:
    """What ``read`` makes of a log, with a bar; ``where`` is what errors call the log.

    Raises ``ValueError`` where no row can be used, saying why.
    """
    with tqdm(total=log.total, unit="B", unit_scale=True, desc="read", disable=quiet) as bar:
        log.advance = bar.update
        dealt = read()
    if not dealt.rows:
        why = f"; bad lines: {log.bad.count}, the first: {log.bad.first[0]}" if log.bad.count else ""
        why += f"; {log.left_out} rows are of none of the sequences {list(log.sequences)}" if log.left_out else ""
        raise ValueError(f"there is no usable row in {where}{why}")
    return dealt


def _write(
    log: Log, folder: Path, options: Options, where: str, chunk_rows: int, shard_rows: int, progress: bool
) -> None:
    work = folder / "rows"
    work.mkdir()
    quiet = None if progress else True
    dealt = _deal_all(log, where, quiet, lambda: deal(log, work, chunk_rows, options.buckets))
    given = options.labels == "given"
    if not dealt.behaviours:
        which = "has the label 1" if given else f"is of the sequence {next(iter(log.sequences), '')!r}"
        raise ValueError(f"no row {which}, so that there are no behaviours to learn from")
    ids = give_ids(dealt, log, options.min_count, buckets=options.buckets)
    ids.write(folder)
    shards = shards_for(dealt.rows, shard_rows)
    rule, eligible = make_rule(
        dealt,
        work,
        given=given,
        every=options.targets == "every",
        by_user=options.split == "user",
        fractions=options.fractions,
        seed=options.seed,
        shards=shards,
    )
    schema = schema_of(log, ids)
    dealt_as = cast(Any, dealt.schema)  # there are rows
    columns = shard_schema(schema, options.labels, dealt_as.field("user").type, dealt_as.field("timestamp").type)
    writer = ShardWriter(folder, columns, log, ids, rule, duplicates=options.duplicates)
    with tqdm(total=dealt.rows, unit=" rows", unit_scale=True, desc="sort", disable=quiet) as bar:
        for shard, rows in enumerate(read_shards(dealt, shards)):
            writer.write(rows)
            each = BUCKETS // shards
            dealt.buckets.remove(range(shard * each, (shard + 1) * each))
            bar.update(0 if rows is None else rows.num_rows)
    ids.take_out(folder, writer.written.dropped)
    _require_samples(writer.written, rule, options, eligible)
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    _describe(folder, schema, log, dealt, ids, rule, writer.written, options)


def _write_samples(
    log: Log, folder: Path, options: Options, where: str, chunk_rows: int, shard_rows: int, progress: bool
) -> None:
    work = folder / "rows"
    work.mkdir()
    quiet = None if progress else True
    dealt = _deal_all(log, where, quiet, lambda: deal_samples(log, work, chunk_rows))
    ids = give_ids(dealt, log, options.min_count)
    schema = schema_of(log, ids)
    writer = SampleWriter(folder, shard_schema(schema, "given", pa.string(), pa.int64()), log, ids)
    shards = shards_for(dealt.rows, shard_rows)
    with tqdm(total=dealt.rows, unit=" rows", unit_scale=True, desc="merge", disable=quiet) as bar:
        for rows in read_shards(dealt, shards):
            writer.write(rows)
            bar.update(0 if rows is None else rows.num_rows)
    if not writer.written.samples["train"]:
        raise ValueError(f"split 'train' got no sample from {where}")
    ids.items = ids.items.set_column(0, "count", pa.array(writer.count))
    ids.write(folder)
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    rule = Rule(False, None, (float("inf"), float("inf")), options.seed)
    _describe(folder, schema, log, dealt, ids, rule, writer.written, options, USER)


def shards_for(rows: int, shard_rows: int) -> int:
    """The number of shards for so many rows: a power of two, at most that of the buckets."""
    shards = 1
    while shards < BUCKETS and rows > shards * shard_rows:
        shards *= 2
    return shards


def _require_samples(written: Written, rule: Rule, options: Options, eligible: int) -> None:
    """Raise ``ValueError`` for a split that is to have samples and has none."""
    for split, share in zip(SPLITS, options.fractions, strict=True):
        if written.samples[split] or not share:
            continue
        owners = written.report["users_owning_every_item"]
        raise ValueError(
            f"split {split!r} got no sample: {eligible} of {written.users} users have "
            + ("an impression" if options.labels == "given" else "two behaviours or more")
            + (f" and {owners} users have had every item, so that there is no negative for them" if owners else "")
            + f"; fractions={options.fractions}, split={options.split!r}"
            + (f", valid begins at time {rule.cuts[0]} and test at {rule.cuts[1]}" if options.split == "time" else "")
        )


def schema_of(log: Log, ids: Ids) -> Schema:
    """The features of a folder."""
    sizes = {name: vocabulary.size for name, vocabulary in ids.vocabularies.items()}
    return Schema(
        {"item": sizes["item"], **{name: sizes[name] for name in log.item_fields}},
        {name: sizes[name] for name in log.user_fields},
        log.dense,
        ids.several,
        {name: sizes[name] for name in log.behaviour_fields},
        log.behaviour_dense,
        tuple(log.sequences[1:]),
    )


def _describe(
    folder: Path,
    schema: Schema,
    log: Log,
    dealt: Dealt,
    ids: Ids,
    rule: Rule,
    written: Written,
    options: Options,
    grouped_by: str | None = None,
) -> None:
    """Write the meta file, as the last one: a folder that has this file is complete."""
    report: Counter[str] = Counter(ids.report)
    report.update(written.report)
    report.update(rows=dealt.rows, bad_lines=log.bad.count, rare_items=ids.rare, longest_user=written.longest)
    counts = {
        "users": written.users,
        "behaviours": written.behaviours,
        "samples": {split: written.samples[split] for split in SPLITS},
    }
    plain_report = {name: int(number) for name, number in sorted(report.items())}
    meta: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "schema": schema.to_dict(),
        "options": asdict(options),
        "split": {"thresholds": rule.thresholds, "cuts": [cut if cut < float("inf") else None for cut in rule.cuts]},
        "counts": counts,
        "raw_items": ids.raw_items,
        "time_unit": log.time_unit,
        "dense": {name: numbers.to_dict() for name, numbers in written.numbers.items()},
        "report": plain_report,
        "seen": log.seen,
        "warnings": warnings_of(plain_report, counts, schema, options, log),
        "first_bad_lines": log.bad.first,
        "shards": written.shards,
        "files": file_entries(folder),
    }
    if grouped_by is not None:
        meta["grouped_by"] = grouped_by
    write_meta(folder, meta)


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every Parquet file below a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(folder.rglob("*.parquet"))
    }


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` with fingerprint and digest."""
    with (folder / META).open("w") as file:
        json.dump(seal(meta), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _minimum(given: int | Mapping[str, int], fields: Sequence[str]) -> dict[str, int]:
    """The least count of every field."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(fields, given)
    for name in given:
        if name not in fields:
            raise ValueError(f"min_count must name fields of {list(fields)}, got {name!r}")
    return dict.fromkeys(fields, 1) | dict(given)


def _old_files(out: Path) -> list[str]:
    """The files that the meta file of a prepared folder lists, whatever version wrote it."""
    file = out / META
    try:
        meta = json.loads(file.read_text())
    except ValueError as error:
        raise FileExistsError(f"{out} holds a {META} that cannot be read ({error}); choose another folder") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not isinstance(meta.get("files"), dict):
        raise FileExistsError(f"{out} holds a {META} of another program; choose another folder")
    return [name for name in meta["files"] if stays_inside(name)]
