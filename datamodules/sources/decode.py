"""Image files, decoded once into a memory map in the store: there is no decoder in the training path."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.errors import InputError
from datamodules.sources.fetch import line, unseen
from datamodules.store import ImageWriter

Fit = Callable[[Image.Image, int], Image.Image]
"""RGB image, row → the image in the common size."""

_log = logging.getLogger(__name__)
_LONG = 2000  # files; from here on a progress bar is worth its lines
_LISTED = 10  # files that are named where many cannot be read
_CHUNK = 64 * 2**20  # bytes of decoded pixels in memory at once


@dataclass(frozen=True)
class ImageFile:
    """A file, and what a change of it shows by.

    Attributes:
        path: Where it is.
        name: Its path below the data set's folder, with ``/``.
        size: In bytes.
        mtime: Of its last change, in nanoseconds.
        inode: Device and number of what it is in the end, the same for every link to it.
    """

    path: Path
    name: str
    size: int
    mtime: int
    inode: tuple[int, int] = (0, 0)


def image_file(path: Path, name: str) -> ImageFile:
    """One file as it is now.

    Raises:
        OSError: If it is not there.
    """
    stat = path.stat()
    return ImageFile(path, name, stat.st_size, stat.st_mtime_ns, (stat.st_dev, stat.st_ino))


LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")
"""Folders that archivers, file servers and other programs make beside one's own."""


def foreign(name: str) -> bool:
    """Whether a name is that of something that other programs leave behind."""
    return name.startswith(".") or name in LEFT_BEHIND


def image_files(
    folder: Path, suffixes: Sequence[str], prefix: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[ImageFile]:
    """The files below a folder whose names end in one of the suffixes, whatever their case; links are followed.

    Args:
        folder: Where to look. What other programs leave behind is passed over, such as names that begin with a dot.
        suffixes: In lower case, with the dot.
        prefix: Of the names.
        above: The folders that it is in, as device and number.

    Yields:
        Files by name, then sub-folders by name, in the order of code points.

    Raises:
        InputError: If one cannot be looked at, or a link leads back to a folder that it is in.
    """
    try:
        stat = folder.stat()
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            raise InputError(f"{folder}: a link to a folder that it is in itself; remove the link")
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not foreign(entry.name)), key=lambda entry: entry.name)
        files = [
            image_file(Path(entry.path), f"{prefix}{entry.name}")
            for entry in found
            if entry.name.lower().endswith(tuple(suffixes)) and entry.is_file()
        ]
        folders = [entry for entry in found if entry.is_dir()]
    except OSError as error:
        raise unseen(error) from error
    yield from files
    for entry in folders:
        yield from image_files(Path(entry.path), suffixes, f"{prefix}{entry.name}/", (*above, here))


def listing_hash(files: Sequence[ImageFile], *others: Sequence[Any]) -> str:
    """SHA-256 (hex) of names, sizes, times, and of what else belongs to each file (labels, boxes)."""
    digest = hashlib.sha256()
    for file, *rest in zip(files, *others, strict=True):
        digest.update(f"{file.name}\0{file.size}\0{file.mtime}\0{rest}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def decode(files: Sequence[ImageFile], size: int, fit: Fit, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Decode image files to RGB, bring them to one size, and write them into a safetensors file.

    Args:
        files: What to decode, in this order.
        size: Height and width of the result.
        fit: Makes each image (size, size).
        path: The file to write: ``images`` uint8 (N, 3, size, size) and `tensors`.
        tensors: Of N rows each; `fit` may fill them while it goes.

    Raises:
        InputError: If files cannot be decoded: it names them all, or the first of many.
        OSError: If there is no room.
    """
    each = max(1, min(1024, _CHUNK // (3 * size * size)))
    chunk = np.empty((each, 3, size, size), np.uint8)

    wrong: list[InputError] = []

    def one(row: int) -> None:
        try:
            image = fit(_open(files[row].path), row)
        except InputError as error:
            wrong.append(error)
            return
        chunk[row % each] = np.asarray(image).transpose(2, 0, 1)

    # torch counts the cores that this process may use; decoding and resizing run outside the interpreter's lock
    threads = ThreadPoolExecutor(torch.get_num_threads())
    with ImageWriter(path, len(files), (3, size, size), tensors) as writer, threads:
        for start in _progress(range(0, len(files), each), len(files)):
            stop = min(start + each, len(files))
            for _ in threads.map(one, range(start, stop)):  # raises what a thread raised
                pass
            writer.write(torch.from_numpy(chunk[: stop - start]))
        if wrong:
            more = f" (and {len(wrong) - _LISTED:,} more)" if len(wrong) > _LISTED else ""
            raise InputError("; ".join(sorted(map(str, wrong))[:_LISTED]) + more)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: pixels of more than 8 bits (mode {image.mode}): convert it to 8 bits")
            return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # a decoder has errors of many types for a damaged file
        raise InputError(f"{path}: not a readable image ({line(error)}): mend or remove it") from error


def _progress(starts: range, n: int) -> Iterator[int]:
    """The same numbers; for long work, with a progress bar on a terminal, or a line in a log."""
    if n < _LONG:
        yield from starts
        return
    if not sys.stderr.isatty():
        _log.info("decoding %s images, once", f"{n:,}")
        yield from starts
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(starts, f"decoding {n:,} images, once", console=Console(stderr=True), transient=True)


def shorten_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The image resized so that its shorter side is `size`, and the middle of it cut out.

    The same pixels as torchvision's ``Resize(size)`` and ``CenterCrop(size)`` give for a PIL image.
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2), round((height - size) / 2)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))
