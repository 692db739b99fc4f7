"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from any of the forms in which they are handed round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.datamodule import Source, Splits
from datamodules.sources.fetch import absent, damaged, fetch, line, read_bytes, unpack
from datamodules.sources.npz import Arrays

_PIXELS = 3 * 32 * 32
_UNPACKED = 400 * 2**20  # bytes; the official archives unpack to less than half of it


class CIFAR10(Source):
    """CIFAR-10: 50,000 + 10,000 colour photographs, 32×32, of ten kinds of things (Krizhevsky 2009).

    Read from what is found first in `data_dir`: ``cifar10.npz`` (x_train, y_train, x_test, y_test), the official binary
    version in ``cifar-10-batches-bin``, or the official Python version in ``cifar-10-batches-py``. Else the archive
    ``cifar-10-binary.tar.gz`` is unpacked there, after being downloaded if need be. See `Source` for the arguments.
    """

    num_classes = 10
    image_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    class_names: tuple[str, ...] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip

    npz = "cifar10.npz"
    binary = "cifar-10-batches-bin"
    pickled = "cifar-10-batches-py"
    archive = "cifar-10-binary.tar.gz"
    address = "https://www.cs.toronto.edu/~kriz/"
    md5 = "c32a1d4ab5d03f1284b67883e8d87530"
    """Of the archive, as its page gives it."""
    reader = "CIFAR10"
    """The torchvision class that knows the checksums of the Python version."""
    label_bytes = 1
    """Before the pixels of each record of the binary version; the last one is the label."""
    train_files: tuple[str, ...] = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    test_files: tuple[str, ...] = ("test_batch.bin",)

    def _find(self) -> Path:
        for name in (self.npz, self.binary, self.pickled):
            if (self.data_dir / name).exists():
                return self.data_dir / name
        raise FileNotFoundError(self.data_dir / self.binary)

    def prepare_data(self) -> None:
        """Unpack, and before that download, what is not there."""
        fetch(self, f"{self.npz}, {self.binary}/, {self.pickled}/ or {self.archive}", self._find, self._download)

    def _download(self) -> None:
        from torchvision.datasets.utils import download_url

        download_url(f"{self.address}{self.archive}", self.data_dir, self.archive, self.md5)  # not if it lies there
        unpack(self.data_dir / self.archive, self.binary, self.data_dir / self.binary, _UNPACKED)

    def read(self) -> Splits:
        """Both splits, whole."""
        try:
            found = self._find()
        except FileNotFoundError as error:
            raise absent(self, self.data_dir / self.binary) from error
        if found.name == self.npz:
            return self._read_npz(found)
        if found.name == self.binary:
            return Splits(*self._read_binary(found, self.train_files), *self._read_binary(found, self.test_files))
        return Splits(*self._read_pickled(found, True), *self._read_pickled(found, False))

    def _read_npz(self, path: Path) -> Splits:
        return Arrays(path).splits()

    def _read_binary(self, folder: Path, files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Records of labels (one byte each) and pixels (channel by channel, row by row)."""
        length = self.label_bytes + _PIXELS
        remedy = f"remove the folder {self.binary}, and it is fetched anew"
        parts = []
        for name in files:
            if not (folder / name).exists():
                raise damaged(self, folder, f"{name} is missing", remedy)
            data = read_bytes(self, folder / name)
            if not data or len(data) % length:
                what = f"{len(data)} bytes are no whole number of records of {length}"
                raise damaged(self, folder / name, what, remedy)
            parts.append(np.frombuffer(data, np.uint8).reshape(-1, length))
        images = np.empty((sum(map(len, parts)), _PIXELS), np.uint8)
        np.concatenate([part[:, self.label_bytes :] for part in parts], out=images)
        labels = np.concatenate([part[:, self.label_bytes - 1] for part in parts])
        return torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))

    def _read_pickled(self, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
        # Pickle runs what a file tells it to. torchvision compares the checksum of every file with the official one
        # before it opens any, so that only the official bytes are ever unpickled.
        from torchvision import datasets

        try:
            split: Any = getattr(datasets, self.reader)(str(self.data_dir), train=train)
        except (RuntimeError, OSError) as error:
            raise damaged(
                self,
                folder,
                f"it differs from the official version: {line(error)}",
                "remove the folder, and it is fetched anew",
            ) from error
        images = np.ascontiguousarray(split.data.transpose(0, 3, 1, 2))
        return torch.from_numpy(images), torch.tensor(split.targets, dtype=torch.int64)


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 + 10,000 colour photographs, 32×32, with the hundred fine labels (Krizhevsky 2009).

    Read from what is found first in `data_dir`: ``cifar100.npz`` (x_train, y_train, x_test, y_test), the official
    binary version in ``cifar-100-binary``, or the official Python version in ``cifar-100-python``. Else the archive
    ``cifar-100-binary.tar.gz`` is unpacked there, after being downloaded if need be. See `Source` for the arguments.
    """

    num_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    class_names = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
        "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
        "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
        "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
        "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip

    npz = "cifar100.npz"
    binary = "cifar-100-binary"
    pickled = "cifar-100-python"
    archive = "cifar-100-binary.tar.gz"
    md5 = "03b5dce01913d631647c71ecec9e9cb8"
    reader = "CIFAR100"
    label_bytes = 2
    train_files = ("train.bin",)
    test_files = ("test.bin",)
