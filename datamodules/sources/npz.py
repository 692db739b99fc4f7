"""Arrays in an .npz file: one's own data with no code at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.augment import Augmentation
from datamodules.datamodule import Source, Splits
from datamodules.errors import InputError, bad
from datamodules.sources.fetch import line, locate

_CHUNK = 2**20  # bytes read at once: what is turned to channels-first is still in the processor's cache


class Arrays:
    """Image and label arrays in an .npz file, compressed or not. Object arrays are refused: reading one runs code.

    Args:
        path: The file.

    Raises:
        InputError: From every method, if an array is missing, damaged, or not as expected.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def image_shape(self, name: str) -> tuple[int, int, int]:
        """(C, H, W) of an image array, from its header alone."""
        with self._open(name) as (file, size):
            return self._layout(name, file, size)[1]

    def count(self, name: str) -> int:
        """N of an image array."""
        with self._open(name) as (file, size):
            return self._layout(name, file, size)[0]

    def images(self, name: str) -> Tensor:
        """Images (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W) of type uint8, as uint8 (N, C, H, W), contiguous."""
        with self._open(name) as (file, size):
            n, shape, _ = self._layout(name, file, size)
        self._check_room(name, n * prod(shape))
        images = np.empty((n, *shape), np.uint8)
        at = 0
        for part in self.parts(name):
            images[at : at + len(part)] = part
            at += len(part)
        return torch.from_numpy(images)

    def parts(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """The same, about a megabyte at a time: uint8 (M, C, H, W), perhaps not contiguous.

        NumPy's, not torch's: a copy of a megabyte shared out over threads waits for them longer than it takes.
        """
        with self._open(name) as (file, size):
            n, (channels, height, width), last = self._layout(name, file, size)
            one = channels * height * width
            each = max(1, _CHUNK // one)
            for at in range(0, n, each):
                m = min(each, n - at)
                data = file.read(m * one)
                if len(data) != m * one:
                    raise EOFError(f"{name} ends early")
                flat = np.frombuffer(data, np.uint8)
                if last:
                    yield flat.reshape(m, height, width, channels).transpose(0, 3, 1, 2)
                else:
                    yield flat.reshape(m, channels, height, width)
            file.read(1)  # at the end, the checksum is compared

    def labels(self, name: str, n: int) -> Tensor:
        """Labels (N,) or (N, 1) of any integer type, as int64 (N,); of another number than N, none is read."""
        with self._open(name) as (file, size):
            shape, _, dtype = self._header(name, file)
            if dtype.kind not in "iu" or len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
                raise self._error(f"{name} is {dtype} {shape}: integer labels (N,) expected")
            self._check_size(name, size - file.tell(), prod(shape) * dtype.itemsize)
            if shape[0] != n:
                images = name.replace("y_", "x_", 1)
                raise self._error(f"{n} images in {images}, {shape[0]} labels in {name}: as many are needed")
            labels = np.frombuffer(file.read(), dtype)
        if labels.size and int(labels.max()) > 2**31:  # also keeps unsigned 64-bit values in the range of int64
            raise self._error(f"{name} holds the label {labels.max()}")
        return torch.from_numpy(labels.astype(np.int64))

    def splits(self) -> Splits:
        """x_train, y_train, x_test and y_test, into memory."""
        train, test = self.images("x_train"), self.images("x_test")
        return Splits(train, self.labels("y_train", len(train)), test, self.labels("y_test", len(test)))

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                if f"{name}.npy" not in archive.namelist():
                    raise self._error(f"there is no array {name} in it; it holds {_held(archive.namelist())}")
                with archive.open(f"{name}.npy") as file:
                    yield file, archive.getinfo(f"{name}.npy").file_size
        except InputError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # zipfile, zlib and numpy have errors of many types for a damaged file
            raise self._error(f"it is no readable .npz file ({line(error)})") from error

    def _header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # 3.0 is for field names in Unicode
            raise self._error(f"{name} is of .npy version {version}: a plain array expected")
        if dtype.hasobject:
            raise self._error(f"{name} is an array of Python objects, which can run code when it is read: refused")
        return shape, fortran, dtype

    def _layout(self, name: str, file: IO[bytes], size: int) -> tuple[int, tuple[int, int, int], bool]:
        """N, (C, H, W), and whether the channels come last; `size` is that of header and values, in bytes."""
        shape, fortran, dtype = self._header(name, file)
        self._check_size(name, size - file.tell(), prod(shape) * dtype.itemsize)
        if dtype == np.uint8 and not fortran and min(shape, default=0) > 0:
            if len(shape) == 3:
                return shape[0], (1, shape[1], shape[2]), False
            if len(shape) == 4 and shape[3] in (1, 3):
                return shape[0], (shape[3], shape[1], shape[2]), True
            if len(shape) == 4 and shape[1] in (1, 3):
                return shape[0], (shape[1], shape[2], shape[3]), False
        order = " in Fortran order" if fortran else ""
        wanted = "uint8 (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)"
        raise self._error(f"{name} is {dtype} {shape}{order}: {wanted} expected, N > 0")

    def _check_room(self, name: str, size: int) -> None:
        """Refuse, before any memory is asked for, what this machine cannot hold: a short file may unpack to much."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise self._error(f"{name} unpacks to {size:,} bytes, and this machine has {memory:,} of memory")

    def _check_size(self, name: str, size: int, expected: int) -> None:
        if size != expected:
            raise self._error(f"{name} has {size:,} bytes instead of {expected:,}: the file is damaged")

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")


def _held(members: Sequence[str]) -> str:
    """What is in an archive; where it has the names of others, with those that are expected."""
    held = sorted(name.removesuffix(".npy") for name in members)
    ours = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}
    ours |= {"X_train": "x_train", "Y_train": "y_train", "X_test": "x_test", "Y_test": "y_test"}
    known = [name for name in held if name in ours]
    text = ", ".join(held[:12] + ["…"] * (len(held) > 12)) or "nothing"
    return f"{text}; rename {', '.join(f'{name} to {ours[name]}' for name in known)}" if known else text


class Npz(Source):
    """Your own images in one .npz file: x_train, y_train, x_test, y_test.

    Images are uint8 (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W); labels are integers from 0.

    Args:
        path: The file; a relative path is looked for in the working directory, then in `data_dir`.
        num_classes: How many classes there are; None: one more than the largest label in ``y_train``.
        class_names: Their names; None: their numbers.
        mean: Of each channel of the training images, for pixels in [0, 1]; None: computed when it is asked for.
        std: The standard deviation; None: computed when it is asked for.
        data_dir: See `Source`.
        batch_size: See `Source`.
        eval_batch_size: See `Source`.
        val_fraction: See `Source`.
        augment: See `Source`.
        num_workers: See `Source`.
        resident: See `Source`.
        split_seed: See `Source`.
        seed: See `Source`.

    Raises:
        InputError: If the file is missing or damaged, an array is missing or of the wrong type or shape, or a label
            lies outside the classes.
    """

    def __init__(
        self,
        path: str,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_fraction: float = 0.05,
        augment: Augmentation | None = None,
        num_workers: int = 0,
        resident: bool = False,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            data_dir, batch_size, eval_batch_size, val_fraction, augment, num_workers, resident, split_seed, seed
        )
        self.arrays = Arrays(locate(self, "path", path))
        self.image_shape = self.arrays.image_shape("x_train")
        tested = self.arrays.image_shape("x_test")
        if tested != self.image_shape:
            raise InputError(f"{path}: x_test holds images {tested}, x_train {self.image_shape}: they must be alike")
        labels = self.arrays.labels("y_train", self.arrays.count("x_train"))
        if num_classes is None:
            if not len(labels) or int(labels.min()) != 0:
                lowest = int(labels.min()) if len(labels) else "none"
                raise InputError(f"{path}: the lowest label in y_train is {lowest}: labels must start at 0")
            num_classes = int(labels.max()) + 1
        self.num_classes = num_classes
        self._check_labels("train", labels)
        self._check_labels("test", self.arrays.labels("y_test", self.arrays.count("x_test")))
        self.class_names: Sequence[str] = class_names or [str(label) for label in range(num_classes)]
        if len(self.class_names) != num_classes:
            raise bad("class_names", class_names, f"there are {num_classes} classes")
        for field, given in (("mean", mean), ("std", std)):
            if given is not None and len(given) != self.image_shape[0]:
                raise bad(field, given, f"one number for each of {self.image_shape[0]} channels")
        self._mean, self._std = mean, std

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        """As given, else of the training images."""
        return self._mean or self._statistics[0]

    @property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        """As given, else of the training images.

        Raises:
            InputError: If all of their pixels are the same in a channel: they cannot be normalised.
        """
        if self._std is None and min(self._statistics[1]) == 0:
            channel = self._statistics[1].index(0)
            raise InputError(
                f"{self.arrays.path}: channel {channel} of x_train has one value in all pixels of all images, and "
                "tells nothing; leave it out, or give mean and std"
            )
        return self._std or self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return channel_statistics(self.arrays.parts("x_train"), self.image_shape[0])

    def _check_labels(self, part: str, labels: Tensor) -> None:
        path = self.arrays.path
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < self.num_classes:
            wrong = low if low < 0 else high
            raise InputError(f"{path}: y_{part} holds the label {wrong}, outside 0 … {self.num_classes - 1}")

    def read(self) -> Splits:
        """Both splits, into memory."""
        return self.arrays.splits()


def channel_statistics(
    parts: Iterable[NDArray[np.uint8]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel for pixels in [0, 1], exact: from counts of the 256 values.

    Args:
        parts: uint8 (M, C, H, W) each.
        channels: C.
    """
    counts = np.zeros((channels, 256), np.int64)
    for part in parts:
        for channel in range(channels):
            counts[channel] += np.bincount(part[:, channel].reshape(-1), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(1, keepdims=True)
    mean = (shares * levels).sum(1)
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
    return tuple(mean.tolist()), tuple(std.tolist())
