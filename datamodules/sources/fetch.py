"""Finding data on disk, or fetching it – or saying in one line where it was looked for and what to put there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datamodules.datamodule import Source
from datamodules.errors import InputError


def fetch(source: Source, layout: str, find: Callable[[], Any], download: Callable[[], Any]) -> None:
    """Make sure that a source's files are there.

    Args:
        source: For its name and its folder.
        layout: What should lie in the folder, for the error.
        find: Raises if the files are missing or damaged.
        download: Brings them.

    Raises:
        InputError: If they are neither there nor to be had.
    """
    try:
        find()
        return
    except (RuntimeError, OSError, ValueError, InputError) as error:
        missing = error
    try:
        source.data_dir.mkdir(parents=True, exist_ok=True)
        download()
        find()
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"{type(source).__name__}: {layout} not usable in {source.data_dir.absolute()} "
            f"({' '.join(str(missing).split())[:120]}), and the download failed ({reason}): "
            "put the files there, or set data_dir or PHARMAKON_DATA"
        ) from error
