"""Readers of the public logs: Amazon reviews, Taobao UserBehavior, MovieLens."""

from __future__ import annotations

import ast
import codecs
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from dien_kernels.data._csv import csv_batches
from dien_kernels.data._files import DAMAGED, Opened, size_of
from dien_kernels.data._kinds import as_number
from dien_kernels.data._times import Times
from dien_kernels.data.columns import Roles
from dien_kernels.data.log import BadLines, Log

_LINES = 20_000  # of a JSON file that are parsed at a time
_BEHAVIOURS = ("pv", "cart", "fav", "buy")
# What reviews call their user, item and time: until 2018 in seconds, in 2023 in milliseconds. The later name counts.
_USER, _ITEM, _TIME = ("reviewerID", "user_id"), ("asin", "parent_asin"), {"unixReviewTime": "s", "timestamp": "ms"}
_REVIEW = pa.schema([(name, pa.string()) for name in (*_USER, *_ITEM)] + [(name, pa.int64()) for name in _TIME])
_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
) + (
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)  # of u.item in MovieLens 100K


def _pick(paths: Sequence[Path], what: str, matching: Sequence[Path]) -> Sequence[Path]:
    if not matching:
        raise FileNotFoundError(f"there is no {what} among {sorted(path.name for path in paths)}")
    return matching


def amazon(paths: Sequence[Path], bad: BadLines) -> Log:
    """Amazon reviews of 2014, 2018 and 2023: files of reviews and ``meta_*`` files, one object a line.

    user = reviewerID or user_id, item = parent_asin or asin, timestamp = unixReviewTime or timestamp; ``category`` is
    the last name of the item's first category path, as in the authors' code, or its main category, and unknown for
    items without one. Item and category of the meta files are held in memory.
    """
    metas = _pick(paths, "meta_*.json[.gz]", [path for path in paths if path.name.startswith("meta")])
    reviews = _pick(paths, "reviews_*.json[.gz]", [path for path in paths if path not in metas])

    def read() -> Iterator[pa.RecordBatch]:
        category_of: dict[str, str] = {}
        for path in metas:
            for line, number in _lines(log, path):
                asin, category = _meta(line, path, number, bad)
                if asin is not None and category is not None:
                    category_of.setdefault(asin, category)
        values = pa.array(category_of.values(), pa.string())
        keys = pa.array(category_of.keys(), pa.string())
        for path in reviews:
            for table, numbers in _reviews(log, path):
                given = {name: table[name].combine_chunks() for name in table.column_names}
                items = pc.coalesce(given["parent_asin"], given["asin"])
                name = max(_TIME, key=lambda name: len(given[name]) - given[name].null_count)
                log.times.given = _TIME[name]
                columns = {
                    "user": pc.coalesce(given["user_id"], given["reviewerID"]),
                    "item": items,
                    "timestamp": given[name],
                    "category": values.take(pc.index_in(items, value_set=keys, skip_nulls=True)),
                }
                yield log.standardise(columns, path, numbers.__getitem__)

    log = Log.of(Roles(item_fields={"category": "category"}), read, size_of([*metas, *reviews]), bad, Times(unit="s"))
    return log


def _lines(log: Log, path: Path) -> Iterator[tuple[bytes, int]]:
    """The lines of a file that are not blank, with their numbers, which count blank lines, too.

    It unpacks gz, takes a byte order mark of UTF-8 away, and moves the progress bar.
    """
    with Opened(path) as file:
        try:
            for number, line in enumerate(file.stream, start=1):
                if number % _LINES == 0:
                    log.advance(file.progress())
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield line, number
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        log.advance(file.progress())


def _meta(line: bytes, path: Path, number: int, bad: BadLines) -> tuple[str | None, str | None]:
    """Item and category of a line of a meta file, which is JSON or a Python literal."""
    try:
        text = line.decode()
        try:
            entry = json.loads(text)
        except json.JSONDecodeError:
            entry = ast.literal_eval(text.strip())
        asin = _text(entry.get("parent_asin", entry.get("asin")))
    except (ValueError, SyntaxError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        bad.add(path, number, f"no meta entry ({type(error).__name__}): {_start(line)}")
        return None, None
    return asin, _category(entry)


def _category(entry: Mapping[str, object]) -> str | None:
    """The last name of the first path: paths are ``categories`` in 2014, one path is ``category`` in 2018 and
    ``categories`` in 2023. Where there is none, the main category."""
    for name in ("categories", "category", "main_category", "main_cat"):
        found = entry.get(name)
        if isinstance(found, list) and found and isinstance(found[0], list):
            found = found[0]
        if isinstance(found, list):
            found = found[-1] if found else None
        try:
            if found:
                return _text(found)
        except (ValueError, TypeError):
            pass
    return None


def _start(line: bytes) -> str:
    """The beginning of a line, for messages."""
    return repr(line[:80].decode(errors="replace").strip())


def _text(value: object) -> str:
    """``value`` if it is text that UTF-8 can hold; ``ValueError`` or ``TypeError`` for half a surrogate pair and
    everything else."""
    if not isinstance(value, str):
        raise TypeError(value)
    value.encode()
    return value


def _reviews(log: Log, path: Path) -> Iterator[tuple[pa.Table, list[int]]]:
    """Tables of the three columns, with their rows' lines; a corrupt block is read line by line."""
    options = pa.json.ParseOptions(explicit_schema=_REVIEW, unexpected_field_behavior="ignore")
    lines = _lines(log, path)
    while block := list(islice(lines, _LINES)):
        numbers = [number for _, number in block]
        data = b"".join(line if line.endswith(b"\n") else line + b"\n" for line, _ in block)
        try:
            reading = pa.json.ReadOptions(use_threads=False, block_size=len(data))
            table = pa.json.read_json(io.BytesIO(data), reading, options)
            table.validate(full=True)  # Arrow takes any bytes for text
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            table = None
        if table is None or table.num_rows != len(block):
            table, numbers = _line_by_line(log, path, block)
        yield table, numbers


def _line_by_line(log: Log, path: Path, block: list[tuple[bytes, int]]) -> tuple[pa.Table, list[int]]:
    rows, numbers = [], []
    for line, number in block:
        try:
            entry = json.loads(line)
            row: dict[str, object] = {name: _text(entry[name]) for name in (*_USER, *_ITEM) if name in entry}
            for name in _TIME:
                if name in entry:
                    row[name] = int(np.int64(int(entry[name])))  # OverflowError beyond 64 bits
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.bad.add(path, number, f"no review ({type(error).__name__}): {_start(line)}")
            continue
        rows.append(row)
        numbers.append(number)
    return pa.Table.from_pylist(rows, _REVIEW), numbers


def taobao(paths: Sequence[Path], behaviours: Sequence[str], bad: BadLines) -> Log:
    """Taobao ``UserBehavior.csv``: user, item, category, kind of behaviour, timestamp, without a header.

    Only rows of the kinds ``behaviours`` count; others are left out silently, kinds that do not exist are bad
    lines.
    """
    if isinstance(behaviours, str) or not behaviours or not all(kind in _BEHAVIOURS for kind in behaviours):
        raise ValueError(f"behaviours must be a list of some of {_BEHAVIOURS}, got {behaviours!r}")
    names = ["user", "item", "category", "kind", "timestamp"]

    def read() -> Iterator[pa.RecordBatch]:
        for path in paths:
            for batch, line_of in csv_batches(log, path, names, names=names):
                kind = batch.column("kind")
                for row in np.flatnonzero(~np.asarray(pc.is_in(kind, value_set=pa.array(_BEHAVIOURS)))).tolist():
                    why = f"{kind[row].as_py()!r} is no kind of behaviour; kinds are {', '.join(_BEHAVIOURS)}"
                    bad.add(path, line_of(row), why)
                rows = np.flatnonzero(np.asarray(pc.is_in(kind, value_set=pa.array(list(behaviours)))))
                taken = batch.take(pa.array(rows))
                selected = {name: taken.column(name) for name in names if name != "kind"}
                yield log.standardise(selected, path, line_of.take(rows))

    log = Log.of(Roles(item_fields={"category": "category"}), read, size_of(paths), bad, Times(unit="s"))
    log.as_text = dict.fromkeys(("user", "item", "category"), False)
    return log


def movielens(paths: Sequence[Path], bad: BadLines) -> Log:
    """MovieLens: ``ratings.csv`` and ``movies.csv``, the same as ``.dat`` with ``::`` between, or ``u.data`` and
    ``u.item`` of MovieLens 100K.

    Every rating is a behaviour; ``category`` is the first genre of the movie, unknown where none is listed.
    """
    begin = "ratings.", "u.data"
    ratings = _pick(paths, "ratings.csv, ratings.dat or u.data", [p for p in paths if p.name.lower().startswith(begin)])
    begin = "movies.", "u.item"
    movies = _pick(paths, "movies.csv, movies.dat or u.item", [p for p in paths if p.name.lower().startswith(begin)])

    def read() -> Iterator[pa.RecordBatch]:
        genre_of: dict[int, str | None] = {}
        for path in movies:
            genre_of.update(_genres(log, path))
        keys, values = pa.array(genre_of.keys(), pa.int64()), pa.array(genre_of.values(), pa.string())
        for path in ratings:
            delimiter, names = _ratings(path)
            wanted = ["userId", "movieId", "timestamp"]
            for batch, line_of in csv_batches(log, path, wanted, delimiter, names):
                user, item, time = (batch.column(name) for name in wanted)
                numbers = as_number(item, pl.Int64())
                category = values.take(pc.index_in(numbers, value_set=keys, skip_nulls=True))
                columns = {"user": user, "item": item, "timestamp": time, "category": category}
                yield log.standardise(columns, path, line_of)

    log = Log.of(Roles(item_fields={"category": "category"}), read, size_of([*movies, *ratings]), bad, Times(unit="s"))
    log.as_text = {"user": False, "item": False, "category": True}
    return log


def _ratings(path: Path) -> tuple[str, list[str] | None]:
    """What stands between the columns of a file of ratings, and their names where it has no header."""
    name = path.name.lower()
    if name.startswith("u.data"):
        return "\t", ["userId", "movieId", "rating", "timestamp"]
    if ".dat" in name:  # read with ":" between, "::" is an empty column
        return ":", ["userId", "_1", "movieId", "_2", "rating", "_3", "timestamp"]
    return ",", None


def _genres(log: Log, path: Path) -> Iterator[tuple[int, str | None]]:
    name = path.name.lower()
    if ".dat" in name or name.startswith("u.item"):  # titles have colons of their own
        between, columns = ("|", 5 + len(_GENRES)) if name.startswith("u.item") else ("::", 3)
        for line, number in _lines(log, path):
            words = line.decode("latin-1").strip().split(between)
            if len(words) != columns or not words[0].isdecimal():
                log.bad.add(path, number, f"no movie: {_start(line)}")
            elif columns == 3:
                yield int(words[0]), _first_genre(words[2])
            else:
                genres = (genre for genre, flag in zip(_GENRES, words[5:], strict=True) if flag == "1")
                yield int(words[0]), next((genre for genre in genres if genre != "unknown"), None)
        return
    for batch, line_of in csv_batches(log, path, ["movieId", "genres"]):
        numbers = as_number(batch.column("movieId"), pl.Int64()).to_pylist()
        for row, (number, genres) in enumerate(zip(numbers, batch.column("genres").to_pylist(), strict=True)):
            if number is None:
                log.bad.add(path, line_of(row), "no movie")
            else:
                yield number, _first_genre(genres)


def _first_genre(genres: str | None) -> str | None:
    first = (genres or "").split("|")[0].strip()
    return None if first in ("", "(no genres listed)") else first
