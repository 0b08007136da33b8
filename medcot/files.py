"""Files as a run needs them: whole or not there, on a disk that has room, with one process writing."""

import contextlib
import hashlib
import shutil
from pathlib import Path

from .settings import MedcotError


def write_beside(path: Path, text: str):
    """Writes a text file beside its name and renames it, so that it is never half there; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.saving")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def swap_folder(fresh: Path, folder: Path):
    """Puts a finished folder in another's place; killed at any moment, `finish_swap` ends it."""
    if folder.exists():
        folder.rename(_old(folder))
    fresh.rename(folder)
    finish_swap(fresh, folder)


def finish_swap(fresh: Path, folder: Path):
    """Ends what `swap_folder` may have been killed in: while the old folder is set aside, `fresh` is a finished one."""
    if (old := _old(folder)).exists():
        if not folder.exists():
            fresh.rename(folder)
        shutil.rmtree(old)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_existing(path: Path) -> Path:
    """The path itself or the nearest of its parents that is there."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_disk(path: Path, needed: int):
    """Raises MedcotError if fewer than `needed` bytes are free where `path` is or will be."""
    there = first_existing(path)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MedcotError(
            f"{there} has {free / 2**20:.0f} MiB free and the next save needs {needed / 2**20:.0f}, so it was not begun: "
            "delete what is not needed there or set MEDCOT_OUT to another disk, then run this cell again"
        )


@contextlib.contextmanager
def only_process(folder: Path):
    """Holds a lock on a folder that is written to; it ends with the process, however that ends.

    Raises MedcotError at once if another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MedcotError(
            f"another process is writing to {folder}: wait until it is done, or set MEDCOT_OUT to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
