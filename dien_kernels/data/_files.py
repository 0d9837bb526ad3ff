"""Files: finds those of a source (folders, partitions, patterns), and opens them, compressed or not."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import pyarrow as pa

from dien_kernels._options import user_path

DAMAGED = (OSError, EOFError, zlib.error)  # what reading a file raises that is cut or corrupt
_PARTITION = re.compile(r"([A-Za-z_][\w\-]*)=(.*)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def packed(*endings: str) -> tuple[str, ...]:
    """The endings, and the same of compressed files."""
    return tuple(ending + more for more in ("", ".gz", ".zst") for ending in endings)


def find(sources: str | Path | Sequence[str | Path], endings: tuple[str, ...], remedy: str) -> list[Path]:
    """The files that sources stand for; each exists, and those named one by one are not empty.

    A folder stands for all files below it with one of the endings, by path; names that begin with "." or "_" are left
    out, and so are empty files, as Spark writes them for parts without rows. A source with ``*``, ``?`` or ``[`` that
    is no file is a pattern, in which ``**`` stands for any folders. ``~`` is the home folder. Capitals in a name do not
    matter to its ending. ``remedy`` ends the error for a folder that has no such file.
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not given:
        raise ValueError("sources must name at least one file, got none")
    paths: list[Path] = []
    for source in map(user_path, given):
        if source.is_dir():
            paths += _inside(source, endings, remedy)
        elif source.exists():  # a pipe is a file, too
            paths.append(source)
        elif glob.has_magic(str(source)):
            found = sorted(map(Path, glob.glob(str(source), recursive=True)))
            for path in found:
                paths += _inside(path, endings, remedy) if path.is_dir() else [path]
            if not found:
                raise FileNotFoundError(f"no file matches the pattern {source}; {source.parent} has {_names(source)}")
        else:
            raise FileNotFoundError(f"{source} does not exist; {source.parent} has {_names(source)}")
    for path in paths:
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
    return paths


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
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
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
