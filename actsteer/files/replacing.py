"""Replacing: a file that is written beside the one that it replaces, so that there is always a whole one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actsteer.errors import FileFormatError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.actsteer")
_KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
    stat.S_IFDIR: "folder",
}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new empty file beside `target` that takes its place on leaving without an error.

    A link stays a link, and the file keeps its mode. Temporary files that killed processes have left in the folder are
    removed: a writer holds a lock on its temporary file, and the lock ends with the process.

    Raises:
        FileFormatError: `target` is a FIFO, a device, or a folder.
        OSError: there is no folder for it, or it may not be written.
    """
    target = Path(os.path.realpath(target))
    mode = check_replaceable(target)
    _remove_abandoned(target.parent)
    temporary, descriptor = _created(target, mode)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode) if mode is None else mode
        yield temporary
        temporary.chmod(mode)
        if fcntl is None:  # where an open file cannot be renamed
            os.close(descriptor)
            descriptor = -1
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, whose files are moved into that one on leaving without an error.

    Where the process is killed, the next save removes it, as `replacing` has it.
    """
    folder = Path(os.path.realpath(folder))
    _remove_abandoned(folder.parent)
    temporary, descriptor = _created(folder, is_folder=True)
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for own in temporary.iterdir():
            own.replace(folder / own.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def check_replaceable(target: Path) -> int | None:
    """The mode of the file that is there, None where there is none; raises as `replacing` does."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}; make it first")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise FileFormatError(f"{target}: it is a {kind}, and only a file is written over; choose another name")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(mode)


def _created(target: Path, mode: int | None = None, *, is_folder: bool = False) -> tuple[Path, int]:
    """A new temporary file or folder, and its descriptor, which holds the lock."""
    while True:
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.actsteer")
        if is_folder:
            temporary.mkdir(mode=0o700)
            if fcntl is None:
                return temporary, -1
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666 if mode is None else mode)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, on which nothing is removed either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # else another process took it for abandoned before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders on which no process holds a lock."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            is_ours = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
            if is_ours and _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(temporary: Path) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()
    finally:
        os.close(descriptor)
