"""The lock of a run's folder: one process is at work in it, and whoever comes second is told so.

It is held on ``.lock`` in the folder, which names its holder and goes when the run ends. The kernel frees it when its
holder ends, however it ends: of a killed run the file stays, and holds nobody up. Of several processes of one run the
first holds it for all. On a network's file system it holds between machines as far as ``flock`` does there; where
there are no locks at all, a warning says so and the run goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from datamodules.errors import InputError, bad
from datamodules.files import unwritable

LOCK = ".lock"
"""The name of the file."""

_held: set[BinaryIO] = set()


def _forget() -> None:
    """A fork shares the lock, and would hold it when its parent is gone: it lets go, and the parent keeps it."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class RunLock:
    """The lock of one folder, free at first."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def take(self, folder: Path, field: str) -> None:
        """Hold a folder's lock, until `release` or the end of the process.

        Args:
            folder: The run's; it must be there.
            field: What the folder was given as, for the error.

        Raises:
            InputError: If another run holds it, of this process too; or the folder cannot be written.
        """
        path = folder / LOCK
        try:
            file = _locked(path)
        except BlockingIOError:
            raise _taken(folder, field) from None
        except OSError as error:
            raise unwritable(path, error) from error
        if file is None:
            warnings.warn(f"{folder}: this file system has no locks; let no second run work in it", stacklevel=2)
            return
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        file.flush()
        _held.add(file)
        self._path, self._file = path, file

    def release(self) -> None:
        """Let go, if it is held."""
        if self._file is None or self._path is None:
            return
        if not self._file.closed:
            with suppress(OSError):
                self._path.unlink()  # while it is held: who gets hold of the old file sees that it has no name any more
            self._file.close()
        _held.discard(self._file)
        self._path = self._file = None


def check_free(folder: Path, field: str) -> None:
    """See that nobody is at work in a folder, and write nothing.

    Raises:
        InputError: If somebody is.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder, field) from None
    except OSError:  # there is no lock, or there are none here
        pass


@contextmanager
def if_free(folder: Path) -> Iterator[bool]:
    """Whether nobody is at work in a folder; if so, nobody can begin while the context lasts.

    False, too, where that cannot be known: there are no locks, or the folder is not ours to write.
    """
    file = None
    try:
        with suppress(OSError):
            file = _locked(folder / LOCK)
        yield file is not None
    finally:
        if file is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()
            file.close()


def _locked(path: Path) -> BinaryIO | None:
    """The file, open, empty and locked; None where the file system has no locks.

    Raises:
        BlockingIOError: If another holds it.
    """
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    return file
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            file.close()
            return None
        file.close()  # its holder took its name away meanwhile: another one has it, or none


def _taken(folder: Path, field: str) -> InputError:
    who = _holder(folder / LOCK)
    return bad(field, str(folder), f"{who} is at work in this run; wait until it has ended, or end it")


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        content = json.loads(path.read_bytes())
        return f"process {int(content['process'])} on {content['host']!s:.60}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
