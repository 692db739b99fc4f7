"""Files that are whole or not there. The standard library alone: a command that only looks need not import torch."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datamodules.errors import InputError

_PARTIAL = re.compile(r"\..+\.(?:\d+(?:-[0-9a-f]{8})?|[0-9a-f]{16})\.part", re.DOTALL)
"""The names of what is under way: with a process and a number by chance, or one of the two."""


def full_path(path: str | Path) -> Path:
    """A path as a person gives it, made whole: ``~``, ``~name`` and a leading ``$HOME`` are folders, never names.

    Every path of a configuration or a command goes through here once, where it enters. A relative one stays relative
    to the working directory.
    """
    return Path(at_home(str(path)))


def at_home(text: str) -> str:
    """The text with its home folder looked up, if it is a path that begins with one; any other text as it is."""
    for variable in ("$HOME", "${HOME}"):
        if text == variable or text.startswith(f"{variable}/"):
            text = f"~{text.removeprefix(variable)}"
    return os.path.expanduser(text)


def write_atomically(path: Path, data: bytes) -> None:
    """Write next to the target, fsync, rename, fsync the folder: the file is the old one or the new one, never half."""
    try:
        with under_way(path) as partial:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                _sync(file.fileno())
            partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        _sync(folder)
    finally:
        os.close(folder)


def _sync(number: int) -> None:
    """Have the system write to the disk what it was given; some file systems have no such thing, and say so."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


@contextmanager
def under_way(target: Path, folder: bool = False, mode: int | None = None) -> Iterator[Path]:
    """An empty file, or folder, beside `target`, to be filled and then renamed; if it is not, it goes at the end.

    It is locked as long as its maker lives. What makers that were killed left in the same place is removed first.

    Args:
        target: Whose name it will take.
        folder: Whether it is a folder.
        mode: Its permissions; None: those that anything new has. The umask takes its part away of both.

    Raises:
        OSError: If it cannot be made.
    """
    sweep(target.parent)
    while True:
        path = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        if folder:
            path.mkdir(mode=0o777 if mode is None else mode)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(path, flags, 0o666 if mode is None else mode))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # swept before it was locked
            continue
        with suppress(OSError):  # there are no locks here: then nothing is swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            break
        os.close(descriptor)
    try:
        yield path
    finally:
        _remove(path)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what `under_way` made in a folder for processes that were killed; what a living one is at work on stays.

    A process may live on another machine, or have the same number in another container: a lock tells, not a number.
    """
    try:
        left = [Path(entry.path) for entry in os.scandir(folder) if _PARTIAL.fullmatch(entry.name)]
    except OSError:
        return
    for path in left:
        with suppress(OSError):  # it is gone, or somebody's, or there are no locks
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> InputError:
    """What to raise where a file cannot be written: one line, with the remedy."""
    remedies = {
        errno.ENOSPC: "free space, or choose another folder",
        errno.EDQUOT: "free space of your quota, or choose another folder",
        errno.EFBIG: "it is larger than a file may be (ulimit -f): raise that, free space, or choose another folder",
        errno.EIO: "the disk fails; choose another folder",
    }
    remedy = remedies.get(error.errno or 0, "choose a folder that you may write to")
    return InputError(f"{path}: cannot be written ({error.strerror or error}): {remedy}")
