"""The store: costly results on disk, each under the hash of everything that determines it.

An entry is a folder ``<root>/<kind>/<hash>`` of safetensors and JSON files – never pickle – with a table of their sizes
and hashes, ``entry.json``. It is written next to its place, flushed to the disk and then renamed, so that a builder
killed at any moment leaves an entry that is either absent or whole. Who builds holds a lock that the kernel frees when
its holder dies; the others wait. Hashes are checked when an entry is read: a damaged one is set aside and built anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.errors import InputError
from datamodules.files import full_path, under_way

FORMAT = 1
"""Of the entries; a change of it makes every older entry one that is not found."""

ENTRY = "entry.json"

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_checked: dict[str, tuple[object, ...]] = {}  # entry folder → the state of its files when their hashes were right

# --- entries ---------------------------------------------------------------------------------------------------------


class Store:
    """A folder of entries, shared by all processes and runs.

    Args:
        root: The folder; by default the environment variable ``PHARMAKON_CACHE``, else ``$XDG_CACHE_HOME/pharmakon``,
            else ``~/.cache/pharmakon``.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = full_path(_default_root() if root is None else root).absolute()

    def folder(self, kind: str, key: Mapping[str, object]) -> Path:
        """Where the entry is, or would be.

        Args:
            kind: A plain word for what the entries are, such as ``images``.
            key: All that determines the content, as it can be written in JSON.

        Raises:
            ValueError: If `kind` is no plain word, or `key` holds what JSON does not (or NaN).
        """
        if not re.fullmatch(r"[\w-]+", kind):
            raise ValueError(f"kind = {kind!r}: letters, digits, '-' and '_' only")
        name = hashlib.sha256(_canonical(_identity(kind, key)).encode()).hexdigest()
        return self.root / kind / name

    def find(self, kind: str, key: Mapping[str, object]) -> Path | None:
        """The entry's folder if it is there and whole. Writes nothing and waits for nobody."""
        folder = self.folder(kind, key)
        return folder if folder.is_dir() and _fault(folder, _identity(kind, key)) is None else None

    def build(self, kind: str, key: Mapping[str, object], make: Callable[[Path], object]) -> Path:
        """The entry's folder, built unless it is there and whole.

        Of several processes that want the same entry, one builds it; the others wait for it, as long as it takes. An
        entry whose files were damaged is renamed to ``<hash>.damaged-<n>``, with a warning, and built anew.

        Args:
            kind: See `folder`.
            key: See `folder`.
            make: Gets an empty folder and writes ``.safetensors`` and ``.json`` files into it. What it raises is raised
                here, and nothing stays behind.

        Raises:
            InputError: If the disk is full, or the store cannot be written.
            ValueError: See `folder`; also if `make` writes files of another type, or none.
        """
        folder, identity = self.folder(kind, key), _identity(kind, key)
        if folder.is_dir() and _fault(folder, identity) is None:  # without the lock: a read-only store will do
            return folder
        with self._locked(folder):
            if folder.is_dir():
                fault = _fault(folder, identity)
                if fault is None:  # another process built it meanwhile
                    return folder
                self._set_aside(folder, fault)
            self._write(folder, identity, make)
        return folder

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Hold the entry's lock; what builders that died left of it, or of any other entry, goes."""
        with ExitStack() as held:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(folder.with_name(f"{folder.name}.lock")))
            except OSError as error:
                raise self._unwritable(error) from error
            for rest in self.root.glob("*/*.tmp-*"):
                name = rest.name.partition(".tmp-")[0]
                if rest.with_name(name) == folder or _nobody_holds(rest.with_name(f"{name}.lock")):
                    shutil.rmtree(rest, ignore_errors=True)
            yield

    def _set_aside(self, folder: Path, fault: str) -> None:
        n = 1
        while (aside := folder.with_name(f"{folder.name}.damaged-{n}")).exists():
            n += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise self._unwritable(error) from error
        _log.warning("%s is damaged (%s): set aside as %s and built anew", folder, fault, aside.name)

    def _write(self, folder: Path, identity: Mapping[str, object], make: Callable[[Path], object]) -> None:
        part = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            part.mkdir()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            make(part)
            _seal(part, identity)
            part.rename(folder)
            _flush(folder.parent)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise InputError(
                f"{folder.parent}: no room to write an entry ({error.strerror}): free some space there, or set "
                "PHARMAKON_CACHE to a folder on another disk"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)  # after the rename there is none
        _checked[str(folder)] = _state(folder, _table(folder))

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.root}: the store cannot be written ({error.strerror}): set PHARMAKON_CACHE to a folder that can"
        )


def entry_digest(folder: Path) -> str:
    """SHA-256 (hex) of an entry's content: of the names and hashes of its files, whatever its key.

    Raises:
        InputError: If the folder holds no readable ``entry.json``.
    """
    try:
        files = _table(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: not an entry of the store ({_line(error)})") from error
    return hashlib.sha256(_canonical({name: file["sha256"] for name, file in files.items()}).encode()).hexdigest()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it without a timeout.

    The kernel frees it when its holder ends, however it ends; so a lock file that lies about locks nobody out. It is
    never removed: two processes could then hold locks on two files of the same name.

    Raises:
        OSError: If the file cannot be written or its file system has no locks.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for the process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _nobody_holds(path: Path) -> bool:
    """Whether a lock is there, and free."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _default_root() -> Path:
    if given := os.environ.get("PHARMAKON_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pharmakon"


def _canonical(value: object) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"a key of the store must be writable in JSON: {error}") from error


def _identity(kind: str, key: Mapping[str, object]) -> dict[str, object]:
    # through JSON and back: tuples become lists and numbers that are keys become strings, as they are when read again
    identity: dict[str, object] = json.loads(_canonical({"kind": kind, "key": dict(key), "format": FORMAT}))
    return identity


def _table(folder: Path) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = json.loads((folder / ENTRY).read_bytes())["files"]
    return files


def _fault(folder: Path, identity: Mapping[str, object]) -> str | None:
    """What is wrong with the entry, or None. Hashes are computed once in a process, and again if a file changes."""
    try:
        entry = json.loads((folder / ENTRY).read_bytes())
        files = entry.pop("files")
        if entry != identity:
            return f"{ENTRY} belongs to another key"
        state = _state(folder, files)
        if _checked.get(str(folder)) != state:
            wrong = [name for name, file in files.items() if not _as_written(folder / name, file)]
            if wrong:
                return f"{', '.join(wrong)}: wrong size or hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except PermissionError as error:  # not damage: another user's entry must not be set aside
        raise InputError(f"{error.filename}: the store's entry may not be read by this user") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{ENTRY} cannot be read: {_line(error)}"
    _checked[str(folder)] = state
    return None


def _as_written(path: Path, file: Mapping[str, object]) -> bool:
    return path.stat().st_size == file["size"] and _sha256(path) == file["sha256"]


def _state(folder: Path, files: Mapping[str, object]) -> tuple[object, ...]:
    stats = [(name, (folder / name).stat()) for name in (ENTRY, *files)]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _seal(folder: Path, identity: Mapping[str, object]) -> None:
    """Write the table of the files, and have everything on the disk before the entry gets its name."""
    files: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json") or not path.is_file() or path.name == ENTRY:
            raise ValueError(f"{path.name}: an entry holds .safetensors and .json files; {ENTRY} is the store's own")
        _flush(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    if not files:
        raise ValueError("an entry holds one file or more, and none was written")
    with (folder / ENTRY).open("w", encoding="utf-8") as file:
        json.dump({**identity, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush(folder)


def _flush(path: Path) -> None:
    """Have a file, or the list of names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


# --- tensors ---------------------------------------------------------------------------------------------------------

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_Spec = tuple[str, torch.dtype, tuple[int, ...]]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: the same bytes for the same content, and never half a file.

    The library's own writer is not used: it reports a full disk as an error of its own kind, and does not flush.

    Args:
        path: The file; its folder must be there. It is replaced in one step.
        tensors: By name; of any device and layout, real numbers or bool.
        metadata: Strings to go with them.

    Raises:
        OSError: If the file cannot be written; what was there before is untouched.
        ValueError: If a tensor's type has no place in the format.
    """
    specs = _ordered([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
    header = _header(specs, metadata)
    with under_way(path) as part:
        with part.open("wb") as file:
            file.write(header)
            for name, _, _ in specs:
                file.write(_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    _flush(path.parent)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, as views of a private memory map of it: nothing is read until it is used.

    To write into such a tensor does not change the file.

    Raises:
        InputError: If the file is missing or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – it is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_line(error)})") from error


def load_metadata(path: Path) -> dict[str, str]:
    """The strings that `save_tensors` put beside the tensors.

    Raises:
        InputError: If the file is missing or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_line(error)})") from error


class ImageWriter:
    """Writes one large uint8 tensor, ``images``, into a safetensors file part by part, without holding it in memory.

    Use it in a ``with`` statement. Space for the whole file is taken at the start, so that a full disk shows at once;
    the header is written at the end, so that an unfinished file is no safetensors file.

    Args:
        path: The file.
        n: How many images there will be.
        shape: (C, H, W) of each.
        tensors: Small tensors to go with them. They are written at the end: their values may still change until then,
            their shapes may not.
        metadata: Strings to go with them.

    Raises:
        OSError: If there is no room.
        ValueError: If there is a small tensor named ``images``, or fewer or more images come than were announced.
    """

    def __init__(
        self,
        path: Path,
        n: int,
        shape: tuple[int, int, int],
        tensors: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = dict(tensors or {})
        if "images" in self._tensors:
            raise ValueError("tensors: 'images' are what is written part by part")
        specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]
        self._specs = [*_ordered(specs), ("images", torch.uint8, (n, *shape))]
        self._head = _header(self._specs, metadata)
        self._n, self._shape, self._written = n, shape, 0
        start = len(self._head) + sum(tensor.nbytes for tensor in self._tensors.values())
        self._file = path.open("wb")
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, start + n * prod(shape))
            self._file.seek(start)
        except BaseException:
            self._file.close()
            raise

    def write(self, images: Tensor) -> None:
        """Append images: uint8 (M, C, H, W)."""
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self._shape:
            raise ValueError(f"uint8 (M, {self._shape}) expected, got {images.dtype} {tuple(images.shape)}")
        if self._written + len(images) > self._n:
            raise ValueError(f"{self._n} images were announced, more came")
        self._file.write(_bytes(images))
        self._written += len(images)

    def close(self) -> None:
        """Write the small tensors and the header, and flush everything to the disk."""
        try:
            if self._written != self._n:
                raise ValueError(f"{self._n} images were announced, {self._written} came")
            for name, dtype, shape in self._specs[:-1]:
                tensor = self._tensors[name]
                if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                    raise ValueError(f"{name}: {dtype} {shape} was announced, not {tensor.dtype} {tuple(tensor.shape)}")
            self._file.seek(len(self._head))
            for name, _, _ in self._specs[:-1]:
                self._file.write(_bytes(self._tensors[name]))
            self._file.seek(0)
            self._file.write(self._head)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _ordered(specs: Sequence[_Spec]) -> list[_Spec]:
    """Widest types first, so that each tensor starts at a multiple of its item size."""
    return sorted(specs, key=lambda spec: (-spec[1].itemsize, spec[0]))


def _header(specs: Sequence[_Spec], metadata: Mapping[str, str] | None) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, filled up with blanks to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, dtype, shape in specs:
        if dtype not in _TYPES:
            raise ValueError(f"{name}: {dtype} has no place in a safetensors file")
        begin, end = end, end + dtype.itemsize * prod(shape)
        table[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
