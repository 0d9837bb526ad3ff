"""``prepare`` turns behaviour logs into a prepared folder, in bounded memory."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from dien_kernels._options import user_path
from dien_kernels.data._scan import scan
from dien_kernels.data._tables import is_table
from dien_kernels.data._write import Options, Writer, check_integer
from dien_kernels.data.log import Columns
from dien_kernels.data.prepared import META, UNFINISHED, Prepared
from dien_kernels.data.readers import Sources, open_log

_WORK, _NEW = ".work", ".new"
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
    max_bad_lines: int = 100,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
    chunk_rows: int = 1 << 18,
    partition_rows: int = 1 << 23,
) -> Prepared:
    """Turn behaviour logs into a prepared folder; docs/data.md has the folder's format and all semantics.

    The log is read once and spilled as numbers, dealt to partitions by user, and sorted one partition at a
    time. Memory holds a chunk, a partition (at least the longest user), and tables of the distinct users,
    items and field values.

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
        negatives: for ``"next"``: negatives of each target of valid and test, which are fixed here.
        negative_sampling: ``"popularity"`` (drawn from the list of all behaviours) or ``"uniform"``; never an
            item of the user's log. Training draws the same way.
        min_count: values seen less often become "unknown"; a number, or a mapping of field name to number.
        seed: of split and negatives.
        progress: show bars (on terminals).
        overwrite: replace a folder that is prepared already.
        chunk_rows, partition_rows: rows handled at a time in the first pass, and sorted at a time. They bound
            memory and change nothing else.

    Raises:
        ValueError: a bad option, column or file, too many bad lines, too few users or too few times for a
        split.
        FileNotFoundError: a source is absent.
        FileExistsError: ``out`` holds something else.

    >>> import tempfile
    >>> from dien_kernels.data import prepare, synthetic
    >>> folder = tempfile.mkdtemp()
    >>> prepare(synthetic(users=50, items=40, categories=4, events=500), folder).split_size("valid")
    5
    """
    check_integer("chunk_rows", chunk_rows, 1)
    check_integer("partition_rows", partition_rows, 1)
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
    out = user_path(out)
    minimum = _minimum(min_count, ("item", *log.item_fields, *log.user_fields))
    try:
        first, second, third = map(float, fractions)
    except (TypeError, ValueError):
        raise ValueError(f"fractions must be three shares with the sum 1, got {fractions!r}") from None
    options = Options(labels, targets, split, (first, second, third), negatives, negative_sampling, minimum, seed)
    with _folder(out, overwrite) as (folder, work):
        with tqdm(total=log.total, unit="B", unit_scale=True, desc="read", disable=None if progress else True) as bar:
            log.advance = bar.update
            scanned = scan(log, work, chunk_rows)
        if not scanned.rows:
            where = "the table" if is_table(sources) else sources
            why = f"; bad lines: {log.bad.count}, the first: {log.bad.first[0]}" if log.bad.count else ""
            raise ValueError(f"there is no usable row in {where}{why}")
        Writer(folder, work, log, scanned, options, progress, partition_rows).write()
    prepared = Prepared.open(out)
    if log.bad.count:
        _log.warning("%d lines were skipped, the first: %s", log.bad.count, "; ".join(log.bad.first[:3]))
    return prepared


def _minimum(given: int | Mapping[str, int], fields: Sequence[str]) -> dict[str, int]:
    """The least count of every field."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(fields, given)
    for name in given:
        if name not in fields:
            raise ValueError(f"min_count must name fields of {list(fields)}, got {name!r}")
    return dict.fromkeys(fields, 1) | dict(given)


@contextmanager
def _folder(out: Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """The folder to fill, and one for temporary files.

    After a failure nothing is left behind; after a kill the file ``unfinished`` is left.

    An older prepared folder is replaced only at the end: until then, and after a failure, it stays complete.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; the prepared data need a folder")
    created = not out.exists()
    names = sorted(path.name for path in out.iterdir()) if not created else []
    if META in names:
        Prepared.read_meta(out)
        if not overwrite:
            raise FileExistsError(f"{out} is prepared already; overwrite=True (--overwrite) would replace it")
    elif names and UNFINISHED not in names:
        raise FileExistsError(f"{out} holds other files ({', '.join(names[:5])}); choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    fill = out / _NEW if META in names else out
    shutil.rmtree(out / _NEW, ignore_errors=True)
    fill.mkdir(exist_ok=True)
    (fill / UNFINISHED).write_text("prepare has not finished here\n")
    _clear(fill)
    work = fill / _WORK
    work.mkdir()
    try:
        yield fill, work
    except BaseException:
        _clear(fill)
        (fill / UNFINISHED).unlink(missing_ok=True)
        if created or fill is not out:
            fill.rmdir()
        raise
    shutil.rmtree(work)
    if fill is not out:
        os.replace(fill / UNFINISHED, out / UNFINISHED)
        _clear(out)
        for path in sorted(fill.iterdir(), key=lambda path: path.name == META):
            os.replace(path, out / path.name)
        fill.rmdir()
    (out / UNFINISHED).unlink()


def _clear(out: Path) -> None:
    """Remove the files of a prepare. The meta file goes first: without it, the others are not taken for complete."""
    (out / META).unlink(missing_ok=True)
    shutil.rmtree(out / _WORK, ignore_errors=True)
    for path in [*out.glob("*.arrow"), *out.glob("*.parquet"), *out.glob(META + ".*")]:
        path.unlink()
