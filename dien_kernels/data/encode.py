"""``encode`` prepares logs with the vocabularies of another prepared folder: what that does not know is id 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dien_kernels._options import user_path
from dien_kernels.data._deal import BUCKETS, Dealt, read_shards
from dien_kernels.data._files import places_of
from dien_kernels.data._ids import Ids, give_ids
from dien_kernels.data._options import check_integer
from dien_kernels.data._place import filled, locked
from dien_kernels.data._samples import Rule
from dien_kernels.data._write import ShardWriter, Written
from dien_kernels.data.append import columns_like, deal_like, open_like
from dien_kernels.data.folder import SPLITS
from dien_kernels.data.log import Columns, Log
from dien_kernels.data.prepare import file_entries, schema_of, shards_for, write_meta
from dien_kernels.data.prepared import Prepared
from dien_kernels.data.readers import Sources

_NEVER = 1 << 62  # no value is seen so often that it would get an id


def encode(
    sources: Sources,
    out: str | Path,
    prepared: Prepared,
    *,
    format: str | None = None,
    columns: Columns | Mapping[str, object] | None = None,
    delimiter: str | None = None,
    behaviours: Sequence[str] | None = None,
    time_format: str | None = None,
    time_unit: str | None = None,
    missing: Sequence[str] | None = None,
    max_bad_lines: int = 100,
    chunk_rows: int = 1 << 18,
    shard_rows: int = 1 << 19,
) -> Prepared:
    """Prepare logs with the ids of a folder, for a model that was trained on it. No vocabulary grows.

    All samples are of the split ``"train"``, as there is none to hold back from: with labels ``"next"`` every
    behaviour with one before it is a target, with labels ``"given"`` every impression. Histories are those of these
    logs alone; ``append`` is for new days that go on with old histories.

    Args:
        sources, format, columns, delimiter, behaviours, time_format, time_unit, missing, max_bad_lines: as in
            ``open_log``; the log has the fields of the folder.
        out: the folder to write, absent or empty.
        prepared: the folder whose ids, labels, negatives, seed and statistics of numbers hold.
        chunk_rows, shard_rows: as in ``prepare``.

    ``meta["report"]`` has ``unknown:FIELD``, the rows whose value of a field the folder does not know, for every field
    (with ``append``'s rules for item fields). Raises ``ValueError`` for logs with other fields, times of another unit
    or no sample, and what ``open_log`` raises.
    """
    check_integer("chunk_rows", chunk_rows, 1)
    check_integer("shard_rows", shard_rows, 1)
    out = user_path(out, "out")
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
    with locked(out), filled(out, places_of(sources), lambda: [], False) as folder:
        _write(log, folder, prepared, chunk_rows, shard_rows)
    return Prepared.open(out)


def _write(log: Log, folder: Path, prepared: Prepared, chunk_rows: int, shard_rows: int) -> None:
    options = prepared.meta["options"]
    work = folder / "rows"
    work.mkdir()
    dealt, old = deal_like(prepared, log, work, chunk_rows)
    ids = give_ids(dealt, log, dict.fromkeys(old.vocabularies, _NEVER), old, options.get("buckets", {}))
    count = ids.items["count"].to_numpy() - old.items["count"].to_numpy()  # popularity is that of these logs
    ids.items = ids.items.set_column(0, "count", pa.array(count))
    ids.write(folder)
    rule = Rule(True, None, (float("inf"), float("inf")), options["seed"])
    writer = ShardWriter(
        folder, columns_like(prepared, dealt), log, ids, rule, duplicates=options.get("duplicates", "keep")
    )
    for rows in read_shards(dealt, shards_for(dealt.rows, shard_rows)):
        writer.write(rows)
    ids.take_out(folder, writer.written.dropped)
    dealt.buckets.remove(range(BUCKETS))
    work.rmdir()
    if not writer.written.samples["train"]:
        what = "an impression" if log.labelled else "two behaviours or more"
        raise ValueError(f"there is nothing to evaluate: none of the {writer.written.users} users has {what}")
    write_meta(folder, _meta(prepared, log, dealt, ids, old, writer.written, folder))


def _meta(
    prepared: Prepared, log: Log, dealt: Dealt, ids: Ids, old: Ids, written: Written, folder: Path
) -> dict[str, Any]:
    report = dict(written.report)
    for name, vocabulary in ids.vocabularies.items():
        report[f"unknown:{name}"] = int(vocabulary.counts[0] - old.vocabularies[name].counts[0])
    report |= {"rows": dealt.rows, "bad_lines": log.bad.count}
    left_out = ("fingerprint", "digest", "appended", "split", "seen")
    return {
        **{name: value for name, value in prepared.meta.items() if name not in left_out},
        "schema": schema_of(log, ids).to_dict(),
        "options": {**prepared.meta["options"], "targets": "every"},
        "counts": {
            "users": written.users,
            "behaviours": written.behaviours,
            "samples": {split: written.samples[split] for split in SPLITS},
        },
        "raw_items": ids.raw_items,
        "report": {name: int(number) for name, number in sorted(report.items())},
        "warnings": [],
        "first_bad_lines": log.bad.first,
        "shards": written.shards,
        "ancestors": [*prepared.meta.get("ancestors", []), prepared.fingerprint],
        "files": file_entries(folder),
    }
