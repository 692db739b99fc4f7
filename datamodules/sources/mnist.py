"""MNIST and Fashion-MNIST, read from their IDX files."""

from __future__ import annotations

import gzip
import shutil
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from datamodules.datamodule import Source, Splits
from datamodules.sources.fetch import damaged, fetch, read_bytes

_PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


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

    @property
    def _folder(self) -> Path:
        return self.data_dir / self.dataset / "raw"

    def _find(self) -> None:
        for name in _PARTS:
            (self._folder / name).stat()

    def prepare_data(self) -> None:
        """Download what is not there."""
        fetch(self, f"{self.dataset}/raw/*-ubyte", self._find, self._download)

    def _download(self) -> None:
        from torchvision import datasets

        known = getattr(datasets, self.dataset)
        for packed, md5 in known.resources:
            path = self._folder / packed
            if not path.with_suffix("").exists():
                _download_from(known.mirrors, path, md5)
                part = path.with_suffix(".partial")  # so that the file itself is whole as soon as it is there
                with gzip.open(path) as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
                part.replace(path.with_suffix(""))

    def read(self) -> Splits:
        """Both splits, whole."""
        train, test = (
            (self._read(f"{part}-images-idx3-ubyte", 3), self._read(f"{part}-labels-idx1-ubyte", 1))
            for part in ("train", "t10k")
        )
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


def _download_from(mirrors: list[str], path: Path, md5: str) -> None:
    from torchvision.datasets.utils import download_url

    for left, mirror in enumerate(mirrors, 1 - len(mirrors)):
        try:
            download_url(f"{mirror}{path.name}", path.parent, path.name, md5)
            return
        except (OSError, RuntimeError):  # no answer, or other bytes than expected
            if left == 0:
                raise
