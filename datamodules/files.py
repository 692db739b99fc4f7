"""Files that are whole or not there. The standard library alone: a command that only looks need not import torch."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.errors import InputError


def write_atomically(path: Path, data: bytes) -> None:
    """Write next to the target, fsync, rename, fsync the folder: the file is the old one or the new one, never half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def unwritable(path: Path, error: OSError) -> InputError:
    """What to raise where a file cannot be written: one line, with the remedy."""
    return InputError(f"{path}: cannot be written ({error.strerror or error}): free space, or choose another folder")
