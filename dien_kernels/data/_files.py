"""Files: finds those of a source (folders, partitions, patterns), and opens them, compressed or not."""

from __future__ import annotations

import glob
import gzip
import io
import mmap
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import pyarrow as pa

from dien_kernels._options import user_path
from dien_kernels.data._tables import is_table
from dien_kernels.data.folder import FORMAT, META, UNFINISHED, WORK

DAMAGED = (OSError, EOFError, zlib.error)  # what reading a file raises that is cut or corrupt
_PARTITION = re.compile(r"([A-Za-z_][\w\-]*)=(.*)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def packed(*endings: str) -> tuple[str, ...]:
    """The endings, and the same of compressed files."""
    return tuple(ending + more for more in ("", ".gz", ".zst") for ending in endings)


def named(sources: object) -> list[Path]:
    """The paths that sources name; none for a table in memory. ``TypeError`` for anything else."""
    if is_table(sources):
        return []
    if isinstance(sources, (str, Path)):
        return [user_path(sources, "sources")]
    if isinstance(sources, bytes) or not isinstance(sources, Sequence):
        raise TypeError(f"sources must be a path, a list of paths or a table, got {type(sources).__name__}")
    return [user_path(source, "sources") for source in sources]


def find(sources: str | Path | Sequence[str | Path], endings: tuple[str, ...], remedy: str) -> list[Path]:
    """The files that sources stand for; each exists, and those named one by one are not empty.

    A folder stands for all files below it with one of the endings, by path; names that begin with "." or "_" are left
    out, and so are prepared folders, and empty files, as Spark writes them for parts without rows. A source with ``*``,
    ``?`` or ``[`` that is no file is a pattern, in which ``**`` stands for any folders. ``~`` is the home folder.
    Capitals in a name do not matter to its ending. ``remedy`` ends the error for a folder that has no such file.
    """
    given = named(sources)
    if not given:
        raise ValueError("sources must name at least one file, got none")
    paths: list[Path] = []
    for source in given:
        if source.is_dir():
            if is_prepared(source):
                raise ValueError(f"sources must name logs, got {source}, which is a prepared folder")
            paths += _inside(source, endings, remedy)
        elif source.exists():  # a pipe is a file, too
            paths.append(source)
        elif glob.has_magic(str(source)):
            fixed = before_wildcard(source)
            matches = sorted(map(Path, glob.glob(str(source), recursive=True)))
            found = [path for path in matches if not _within_prepared(path, fixed)]
            inside: list[Path] = []
            for path in found:
                inside += _inside(path, endings, remedy) if path.is_dir() else [path]
            paths += dict.fromkeys(inside)  # "**" stands for folders and for the files in them
            if not found:
                what = "no file outside of prepared folders" if matches else "no file"
                raise FileNotFoundError(f"{what} matches the pattern {source}; {source.parent} has {_names(source)}")
        else:
            raise FileNotFoundError(f"{source} does not exist; {source.parent} has {_names(source)}")
    for path in paths:
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
    return paths


def before_wildcard(source: Path) -> Path:
    """The folder of a pattern above its first part with a wildcard; a source without one, or that is there, itself."""
    if source.exists():
        return source
    parts = source.parts
    fixed = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:fixed])


def places_of(sources: object) -> list[Path]:
    """The files and folders that sources name; of a pattern, the folder that all of its files are in."""
    return [before_wildcard(source) for source in named(sources)]


def is_prepared(folder: Path) -> bool:
    """Whether a folder was prepared, by whichever version, or is being prepared: its Parquet files are no log."""
    meta, mark = folder / META, folder / UNFINISHED
    if mark.is_file() and ((folder / WORK).is_dir() or b"prepare has not finished" in mark.read_bytes()):
        return True
    if not meta.is_file() or not meta.stat().st_size:
        return False
    with meta.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(f'"{FORMAT}"'.encode()) >= 0


def _within_prepared(path: Path, top: Path) -> bool:
    """Whether a path, or a folder between it and ``top``, is a prepared folder; ``top`` counts, too."""
    above = [path, *path.parents]
    above = above[: above.index(top) + 1] if top in above else above
    return any(is_prepared(folder) for folder in above if folder.is_dir())


def _names(source: Path) -> list[str]:
    return sorted(path.name for path in source.parent.iterdir())[:10] if source.parent.is_dir() else []


def _inside(folder: Path, endings: tuple[str, ...], remedy: str) -> list[Path]:
    every = sorted(_walk(folder))
    inside = [path for path in every if path.name.lower().endswith(endings)]
    if not inside:
        names = sorted(path.name for path in folder.iterdir())[:10]
        raise FileNotFoundError(f"{folder} has no file ending in {' or '.join(endings)}; it has {names}; {remedy}")
    filled = [path for path in inside if path.stat().st_size]
    if not filled:
        raise ValueError(f"{folder} has only empty files: {inside[0]} is empty")
    return filled


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith((".", "_")) and not is_prepared(Path(root, name))]
        yield from (Path(root, name) for name in names if not name.startswith((".", "_")))


def partition(path: Path) -> dict[str, str | None]:
    """The columns that the folders of a path name, as in ``day=2024-01-01/part-0.parquet``, all of them text."""
    found = (_PARTITION.fullmatch(part) for part in path.parts[:-1])
    pairs = {match[1]: unquote(match[2]) for match in found if match}
    return {name: None if value == _NO_VALUE else value for name, value in pairs.items()}


def size_of(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


class Opened:
    """A file opened for reading, packed or not. It counts the bytes read since ``progress`` was last asked."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb")
        self._seen = 0
        name = path.name.lower()
        self.stream: IO[bytes] = self._raw
        if name.endswith(".gz"):
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=self._raw))
        elif name.endswith(".zst"):
            self.stream = io.BufferedReader(_Zst(self._raw))

    def progress(self) -> int:
        if not self._raw.seekable():
            return 0
        position = self._raw.tell()
        step, self._seen = position - self._seen, position
        return step

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._raw.close()


class _Zst(io.RawIOBase):
    """What a zst file holds. Arrow unpacks it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._unpacked = pa.CompressedInputStream(raw, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._unpacked.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
