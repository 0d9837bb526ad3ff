"""The folder that ``prepare`` fills: one writer at a time, whole or marked as unfinished, and nothing else deleted.

Room card. Lives here: the lock, the temporary folder, and the moment at which the new files take the place of the old
ones. May import: ``folder``. Must not be here: what the files hold.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dien_kernels.data.folder import LOCK, META, UNFINISHED, WORK

_OURS = (LOCK, WORK, UNFINISHED)


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold the folder for this process; it is made if it is not there.

    Yields whether an earlier prepare or append was finished first, which had been killed after it had written
    everything. Raises ``FileExistsError`` where another process holds the folder. The lock goes with the process,
    however that ends.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; the prepared data need a folder")
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, out / LOCK):  # its holder has removed it since it was opened
                raise BlockingIOError
        except OSError:
            file.seek(0)
            holder = file.read().strip()
            who = f" (process {holder})" if holder else ""
            raise FileExistsError(
                f"another prepare is writing into {out}{who}; wait for it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield finish(out)
        finally:
            (out / LOCK).unlink(missing_ok=True)
            if created and not any(out.iterdir()):
                out.rmdir()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino)


@contextmanager
def filled(out: Path, sources: Sequence[Path], old: Callable[[], Sequence[str]], overwrite: bool) -> Iterator[Path]:
    """A folder to write to, whose files become those of ``out`` when the block ends without an error.

    Args:
        out: locked by this process.
        sources: what is read: ``prepare`` never writes to a folder that it reads from.
        old: the names of the files of the data that are in ``out`` now; raises what a folder of another kind asks for.
        overwrite: whether such data may be replaced.

    Until the end everything is written to a folder of its own inside ``out``, so that an older prepared folder stays
    whole. Only files are deleted whose names a meta file or the mark of an unfinished prepare lists. Raises
    ``FileExistsError`` where ``out`` has other files, or data that may not be replaced.
    """
    for source in sources:
        inside = out.resolve() in (source.resolve(), *source.resolve().parents)
        if inside:
            raise FileExistsError(f"{out} holds {source}, which is to be read; choose another folder to write to")
    names = sorted(path.name for path in out.iterdir() if path.name not in _OURS)
    replaced: list[str] = []
    if META in names:
        replaced = [*old(), META]
        if not overwrite:
            raise FileExistsError(f"{out} is prepared already; overwrite=True (--overwrite) would replace it")
    elif (out / UNFINISHED).exists():
        replaced = _said(out / UNFINISHED).get("files", [])
    strangers = [name for name in names if not any(name == Path(known).parts[0] for known in replaced)]
    if strangers and META not in names:
        raise FileExistsError(f"{out} holds other files ({', '.join(strangers[:5])}); choose an empty folder")
    work = out / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if META not in names:
        _mark(out, replaced)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if META not in names and not replaced:
            (out / UNFINISHED).unlink(missing_ok=True)
        raise
    _take_over(out, replaced)


@contextmanager
def added(out: Path) -> Iterator[Path]:
    """A folder to write to, whose files join those of ``out``, or take the place of those of the same name, when the
    block ends without an error. ``out`` is locked by this process and prepared."""
    work = out / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _take_over(out, [])


def _take_over(out: Path, replaced: Sequence[str]) -> None:
    """Move the files of the temporary folder to their places. ``replaced`` are old files; those that no new file takes
    the place of are deleted.

    All new files are complete before the first one is moved. From then on the mark of an unfinished prepare says so,
    and ``finish`` can do the rest after a kill.
    """
    work = out / WORK
    fresh = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    _mark(out, sorted({*replaced, *fresh}), ready=True, replaced=[name for name in replaced if name not in fresh])
    finish(out)


def finish(out: Path) -> bool:
    """Do what is left of a prepare whose files were all written; returns whether there was one.

    The folder is locked by this process.
    """
    mark, work = out / UNFINISHED, out / WORK
    said = _said(mark)
    if not said.get("ready"):
        return False
    if (work / META).exists():
        (out / META).unlink(missing_ok=True)
    for name in said["replaced"]:
        (out / name).unlink(missing_ok=True)
    fresh = [path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()]
    for name in sorted(fresh, key=lambda name: name == META):
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(work / name, out / name)
    shutil.rmtree(work, ignore_errors=True)
    mark.unlink()
    return True


def _mark(out: Path, names: Sequence[str], *, ready: bool = False, replaced: Sequence[str] = ()) -> None:
    """Write the mark of an unfinished prepare.

    ``names`` are the files that the next one may delete; ``ready`` says that all new files are written, ``replaced``
    are then the old ones to delete.
    """
    temporary = out / WORK / UNFINISHED
    said = {"what": "prepare has not finished here", "files": list(names), "ready": ready, "replaced": list(replaced)}
    with temporary.open("w") as file:
        json.dump(said, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out / UNFINISHED)


def _said(mark: Path) -> dict[str, Any]:
    """What a mark says: nothing where it cannot be read. Names that lead out of the folder are left out."""
    try:
        said = json.loads(mark.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict):
        return {}
    for key in ("files", "replaced"):
        names = said.get(key)
        names = names if isinstance(names, list) else []
        said[key] = [name for name in names if isinstance(name, str) and stays_inside(name)]
    return said


def stays_inside(name: str) -> bool:
    """Whether a name from a file, relative to the folder, does not lead out of it."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
