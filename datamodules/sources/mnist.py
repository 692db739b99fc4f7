"""MNIST, Fashion-MNIST, KMNIST and the letters of EMNIST, read from their IDX files."""

from __future__ import annotations

import gzip
import shutil
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from datamodules.datamodule import Source, Splits
from datamodules.sources.fetch import damaged, fetch, read_bytes, unpack

_UNPACKED = 2**31
"""Bytes that EMNIST's archive may unpack to; it holds about 0.6 · 10⁹."""


class MNIST(Source):
    """MNIST: 60,000 + 10,000 handwritten digits, 28×28 (LeCun et al. 1998).

    Read from ``<data_dir>/MNIST/raw/*-ubyte``, else downloaded there. See `Source` for the arguments.
    """

    num_classes = 10
    image_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    class_names: tuple[str, ...] = tuple("0123456789")

    dataset = "MNIST"
    """The name of its folder, and of the torchvision class that knows its addresses and checksums."""

    parts: tuple[str, str] = ("train", "t10k")
    """What the names of its training and test files begin with."""

    @property
    def _folder(self) -> Path:
        return self.data_dir / self.dataset / "raw"

    @property
    def _pattern(self) -> str:
        return "*-ubyte"

    def _find(self) -> None:
        for part in self.parts:
            for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
                (self._folder / name).stat()

    def prepare_data(self) -> None:
        """Download what is not there."""
        fetch(self, f"{self.dataset}/raw/{self._pattern}", self._find, self._download)

    def _download(self) -> None:
        from torchvision import datasets

        known = getattr(datasets, self.dataset)
        for packed, md5 in known.resources:
            path = self._folder / packed
            if not path.with_suffix("").exists():
                _download_from(known.mirrors, path, md5)
                _unzip(path, path.with_suffix(""))

    def read(self) -> Splits:
        """Both splits, whole."""
        train, test = (
            (self._read(f"{part}-images-idx3-ubyte", 3), self._read(f"{part}-labels-idx1-ubyte", 1))
            for part in self.parts
        )
        for part, (images, labels) in zip(self.parts, (train, test), strict=True):
            if len(images) != len(labels):
                path = self._folder / f"{part}-labels-idx1-ubyte"
                raise damaged(self, path, f"{len(labels):,} labels for {len(images):,} images")
        return Splits(train[0].unsqueeze(1), train[1].to(torch.int64), test[0].unsqueeze(1), test[1].to(torch.int64))

    def _read(self, name: str, axes: int) -> Tensor:
        """One IDX file of unsigned bytes: 0, 0, 8, number of axes, each one's length (big-endian), the values."""
        path = self._folder / name
        data = bytearray(read_bytes(self, path))
        head = 4 + 4 * axes
        shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, head, 4)]
        size = prod(shape)
        if data[:4] != bytes((0, 0, 8, axes)) or len(data) != head + size or size == 0:
            raise damaged(self, path, f"{len(data)} bytes that are no whole IDX file of {axes} axes")
        return torch.frombuffer(data, dtype=torch.uint8, offset=head).view(shape)


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28×28 (Xiao et al. 2017).

    Read from ``<data_dir>/FashionMNIST/raw/*-ubyte``, else downloaded there. See `Source` for the arguments.
    """

    mean = (0.2860,)
    std = (0.3530,)
    class_names = (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    dataset = "FashionMNIST"


class KMNIST(MNIST):
    """KMNIST: 60,000 + 10,000 cursive Japanese characters of ten kinds, 28×28 (Clanuwat et al. 2018).

    Read from ``<data_dir>/KMNIST/raw/*-ubyte``, else downloaded there. See `Source` for the arguments.
    """

    mean = (0.1918,)
    std = (0.3483,)
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    dataset = "KMNIST"


class EMNISTLetters(MNIST):
    """EMNIST's letters: 124,800 + 20,800 handwritten letters, either case in one class, 28×28 (Cohen et al. 2017).

    Read from ``<data_dir>/EMNIST/raw/emnist-letters-*-ubyte``, else downloaded there: 0.5 GB, for the archive holds all
    of EMNIST. See `Source` for the arguments.
    """

    num_classes = 26
    mean = (0.1722,)
    std = (0.3309,)
    class_names = tuple("abcdefghijklmnopqrstuvwxyz")
    dataset = "EMNIST"
    parts = ("emnist-letters-train", "emnist-letters-test")

    @property
    def _pattern(self) -> str:
        return "emnist-letters-*-ubyte"

    def _download(self) -> None:
        from torchvision.datasets import EMNIST as known
        from torchvision.datasets.utils import download_url

        archive, folder = self._folder / "emnist.zip", self._folder / "gzip"
        download_url(known.url, self._folder, archive.name, known.md5)
        if not folder.exists():
            unpack(archive, "gzip", folder, _UNPACKED)
        for path in folder.glob("emnist-letters-*-ubyte.gz"):
            _unzip(path, self._folder / path.stem)
        shutil.rmtree(folder)
        archive.unlink()

    def read(self) -> Splits:
        """Both splits, whole; on disk the images lie on their side, and the first letter is 1."""
        found = super().read()
        upright = [images.transpose(2, 3).contiguous() for images in (found.train_images, found.test_images)]
        return Splits(upright[0], found.train_labels - 1, upright[1], found.test_labels - 1)


def _unzip(packed: Path, path: Path) -> None:
    part = packed.with_suffix(".partial")  # so that the file itself is whole as soon as it is there
    with gzip.open(packed) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target)
    part.replace(path)


def _download_from(mirrors: list[str], path: Path, md5: str) -> None:
    from torchvision.datasets.utils import download_url

    for left, mirror in enumerate(mirrors, 1 - len(mirrors)):
        try:
            download_url(f"{mirror}{path.name}", path.parent, path.name, md5)
            return
        except (OSError, RuntimeError):  # no answer, or other bytes than expected
            if left == 0:
                raise
