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

from dien_kernels.data.folder import LOCK, META, UNFINISHED, WORK

_OURS = (LOCK, WORK, UNFINISHED)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process; it is made if it is not there.

    Raises ``FileExistsError`` where another process holds it. The lock goes with the process, however that ends.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; the prepared data need a folder")
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            if created and not any(out.iterdir()):
                out.rmdir()


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
        replaced = _listed(out / UNFINISHED)
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
    fresh = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    _mark(out, sorted({*replaced, *fresh}))
    (out / META).unlink(missing_ok=True)
    for name in replaced:
        (out / name).unlink(missing_ok=True)
    for name in sorted(fresh, key=lambda name: name == META):
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(work / name, out / name)
    shutil.rmtree(work)
    (out / UNFINISHED).unlink()


def _mark(out: Path, names: Sequence[str]) -> None:
    """Write the mark of an unfinished prepare, which lists the files that may be deleted by the next one."""
    temporary = out / WORK / UNFINISHED
    with temporary.open("w") as file:
        json.dump({"what": "prepare has not finished here", "files": list(names)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out / UNFINISHED)


def _listed(mark: Path) -> list[str]:
    """The files that a mark lists; none where it cannot be read. Names that lead out of the folder are left out."""
    try:
        names = json.loads(mark.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and stays_inside(name)]


def stays_inside(name: str) -> bool:
    """Whether a name from a file, relative to the folder, does not lead out of it."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
