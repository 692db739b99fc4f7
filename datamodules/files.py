"""Files that are whole or not there. The standard library alone: a command that only looks need not import torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from datamodules.errors import InputError


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
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
