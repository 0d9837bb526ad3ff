"""Checkpoints on disk: written completely or not at all, checked when they are read; the last two are kept."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

KEEP = 2
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message names the file."""


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes ``path`` at the end of the block, complete and on disk, or leaves ``path`` as
    it was.

    The bytes go to a temporary file of the same folder, are flushed to the disk and renamed onto ``path``;
    then the folder is flushed, so that the new name survives a power cut.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what ``atomic`` had begun to write in a folder when its process was killed.

    No other process may be at work in the folder.
    """
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, text, lists and dicts of them) atomically.

    Raises ``CheckpointError`` where the disk refuses; ``path`` and every other checkpoint are then as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch's writer, closing after a failed write, may hide the OSError behind a RuntimeError of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"cannot write the checkpoint {path}: {cause}") from error


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    torch reads archives without looking at their checksums, so the CRC-32 of every record is verified first;
    then only tensors and plain data are accepted. Raises ``CheckpointError`` naming the file and what is
    wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except Exception as error:  # whatever a damaged archive or pickle makes of itself
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds {type(content).__name__}, not a checkpoint")
    return content


def steps(folder: Path) -> list[Path]:
    """The step checkpoints of a folder, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def save_step(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the checkpoint of a step; keep it and the ``KEEP`` - 1 before it. Raises as ``save`` does.

    Later ones go too: they are damaged, or this run would not have started before them.
    """
    path = folder / f"step-{step:09d}.pt"
    save(path, content)
    names = steps(folder)
    here = names.index(path)
    for other in names[:here] + names[here + KEEP :]:
        other.unlink(missing_ok=True)
    return path


def load_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest step checkpoint that can be read, and its path; None where there is none.

    A damaged one is named in a warning and the one before is tried. Raises ``CheckpointError`` if all are
    damaged.
    """
    paths = steps(folder)
    for path in paths:
        try:
            return load(path), path
        except CheckpointError as error:
            warnings.warn(f"{error}; using the one before", stacklevel=2)
    if paths:
        raise CheckpointError(f"every checkpoint in {folder} is damaged")
    return None
