"""MNIST and Fashion-MNIST, read from their IDX files."""

from __future__ import annotations

from typing import Any

import torch

from datamodules.datamodule import Source, Splits
from datamodules.errors import InputError
from datamodules.sources.fetch import fetch


class MNIST(Source):
    """MNIST: 60,000 + 10,000 handwritten digits, 28×28 (LeCun et al. 1998).

    Read from ``<data_dir>/MNIST/raw/*-ubyte``, else downloaded there. See `Source` for the arguments.
    """

    num_classes = 10
    image_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    class_names: tuple[str, ...] = tuple("0123456789")

    def _split(self, train: bool, download: bool = False) -> Any:
        from torchvision import datasets

        return getattr(datasets, type(self).__name__)(str(self.data_dir), train=train, download=download)

    def prepare_data(self) -> None:
        """Download what is not there."""
        fetch(self, f"{type(self).__name__}/raw/*-ubyte", lambda: self._split(True), lambda: self._split(True, True))

    def read(self) -> Splits:
        """Both splits, whole."""
        try:
            train, test = self._split(True), self._split(False)
        except (RuntimeError, AssertionError, ValueError, OSError) as error:
            where = self.data_dir / type(self).__name__ / "raw"
            raise InputError(f"{type(self).__name__}: {where} is missing or damaged: remove it, and it is fetched anew ({error})") from error
        return Splits(
            train.data.unsqueeze(1), train.targets.to(torch.int64), test.data.unsqueeze(1), test.targets.to(torch.int64)
        )


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28×28 (Xiao et al. 2017).

    Read from ``<data_dir>/FashionMNIST/raw/*-ubyte``, else downloaded there. See `Source` for the arguments.
    """

    mean = (0.2860,)
    std = (0.3530,)
    class_names = (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
