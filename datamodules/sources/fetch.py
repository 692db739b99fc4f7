"""Finding data on disk, or fetching it – or saying in one line where it was looked for and what to put there."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from datamodules.datamodule import Source
from datamodules.errors import InputError
from datamodules.files import full_path
from datamodules.store import lock

PATIENCE = 30.0
"""Seconds without an answer after which a download is given up: a network that drops packets would hang for minutes."""

MISSING = (FileNotFoundError, NotADirectoryError)
"""What looking for a file raises where there is none."""


def fetch(source: Source, layout: str, find: Callable[[], object], download: Callable[[], object]) -> None:
    """Make sure that a source's files are there; of several processes, one downloads and the others wait.

    Args:
        source: For its name and its folder.
        layout: What should lie in the folder, for the error.
        find: Raises one of `MISSING` if files are missing, an InputError if they cannot be used.
        download: Brings what is missing into ``source.data_dir``.

    Raises:
        InputError: If the files are neither there nor to be had, or there but damaged: what a person put there is not
            replaced.
    """
    try:
        find()
    except PermissionError as error:
        raise InputError(f"{type(source).__name__}: {error.filename} may not be read by this user") from error
    except OSError as error:
        if not isinstance(error, MISSING):  # such as links that go in a circle
            raise unseen(error) from error
        where = source.data_dir.absolute()
        try:
            where.mkdir(parents=True, exist_ok=True)
            with lock(where / ".download.lock"), _impatient():
                _find_or(find, download)
        except InputError:
            raise
        except Exception as error:  # whatever a network, a server or an archive can bring
            raise InputError(
                f"{type(source).__name__}: no {layout} in {where}, and the download failed ({line(error)}): "
                "put the files there, or set data_dir or PHARMAKON_DATA to where they are"
            ) from error


def _find_or(find: Callable[[], object], download: Callable[[], object]) -> None:
    try:
        find()  # another process may have brought them while this one waited for the lock
    except MISSING:
        download()
        find()


@contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def locate(source: Source, field: str, path: str) -> Path:
    """What a path of the configuration means: relative to the working directory, else to the source's data folder.

    Raises:
        InputError: If there is nothing in either place.
    """
    given = full_path(path)
    places = [given.absolute(), (source.data_dir / given).absolute()]
    for place in places:
        if place.exists():
            return place
    looked = " nor ".join(dict.fromkeys(map(str, places)))
    raise InputError(f"{type(source).__name__}: {field} = {path!r}: there is no {looked}")


def absent(source: Source, path: Path) -> InputError:
    """The error for a file that was not looked for before it was to be read."""
    return InputError(f"{type(source).__name__}: there is no {path.absolute()}: prepare_data() fetches it")


def unseen(error: OSError) -> InputError:
    """The error for a file or folder that cannot be looked at: links in a circle, a disk that does not answer."""
    return InputError(f"{error.filename}: cannot be looked at ({line(error.strerror)}); mend or remove it")


def damaged(source: Source, path: Path, what: object, remedy: str = "remove it, and it is fetched anew") -> InputError:
    """The error for a file that is there and cannot be used."""
    return InputError(f"{type(source).__name__}: {path.absolute()} is damaged ({line(what)}): {remedy}")


def read_bytes(source: Source, path: Path) -> bytes:
    """A file's content.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except MISSING as error:
        raise absent(source, path) from error
    except OSError as error:
        raise InputError(
            f"{type(source).__name__}: {path.absolute()} cannot be read ({line(error.strerror)})"
        ) from error


def line(what: object) -> str:
    """A text or an error in one line of at most 200 characters."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def unpack(archive: Path, member: str, target: Path, limit: int) -> None:
    """Take one file or folder out of a .zip or .tar.gz archive; `target` appears whole or not at all.

    Args:
        archive: The archive. Every member of it is looked at, and one that is not a plain file or folder below the
            archive's root – a link, a device, an absolute path, a ``..`` – has the whole archive refused.
        member: The path in the archive of what to take.
        target: What it becomes on disk; there must be none yet.
        limit: Bytes that the archive may unpack to. More of them are never written, whatever its headers say.

    Raises:
        InputError: If the archive is refused, damaged, or does not hold `member`.
        OSError: If the target cannot be written.
    """
    part = target.with_name(f"{target.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed: callers hold the lock of the folder
    part.mkdir(parents=True)
    try:
        (_unzip if archive.suffix == ".zip" else _untar)(archive, part, limit)
        taken = part / member
        if not taken.exists():
            raise InputError(f"{archive}: refused: there is no {member} in it")
        taken.rename(target)
    except _UNREADABLE as error:
        raise InputError(f"{archive} is damaged ({line(error)}): remove it, and it is fetched anew") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _untar(archive: Path, into: Path, limit: int) -> None:
    # read as a stream, through a reader that counts: even headers cannot make it yield more than the limit
    with gzip.open(archive) as packed:
        counted = cast(IO[bytes], _Limited(packed.read, archive, limit))
        with tarfile.open(fileobj=counted, mode="r|") as tar:
            for member in tar:
                plain = (member.isreg() and not member.issparse()) or member.isdir()
                _check_member(archive, member.name, plain)
                _write_member(tar, member, into / member.name)
        while counted.read(2**20):  # to the end, where the checksum is compared
            pass


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write a member that was found harmless; owner and mode stay behind, as in tarfile itself only from 3.11.4 on."""
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # a plain file
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)


def _unzip(archive: Path, into: Path, limit: int) -> None:
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        if sum(member.file_size for member in members) > limit:  # zipfile reads no more of a member than this size
            raise InputError(f"{archive}: refused: it would unpack to more than {limit:,} bytes")
        for member in members:
            mode = member.external_attr >> 16
            _check_member(archive, member.filename, stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR))
        packed.extractall(into)


def _check_member(archive: Path, name: str, plain: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if not plain or path.is_absolute() or ".." in path.parts or os.path.splitdrive(name)[0]:
        raise InputError(f"{archive}: refused: its member {name!r} is a link or a device, or leads out of the folder")


_UNREADABLE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError)


class _Limited:
    """A stream that refuses to yield more than so many bytes."""

    def __init__(self, read: Callable[[int], bytes], archive: Path, limit: int) -> None:
        self._read, self._archive, self._limit, self._left = read, archive, limit, limit

    def read(self, size: int) -> bytes:
        data = self._read(size)
        self._left -= len(data)
        if self._left < 0:
            raise InputError(f"{self._archive}: refused: it would unpack to more than {self._limit:,} bytes")
        return data
