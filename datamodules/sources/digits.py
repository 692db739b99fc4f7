"""Digits: real handwritten digits that come with scikit-learn, so that everything can be tried without a network.

1,797 images of 8×8 pixels in 17 grey levels: the test part of the UCI set "Optical Recognition of Handwritten Digits"
(Alpaydin & Kaynak 1998). It has no official split.
"""

from __future__ import annotations

import torch

from datamodules.augment import Augmentation
from datamodules.datamodule import Source, Splits
from datamodules.errors import bad
from datamodules.random import generator


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8×8: embedded, no download.

    Args:
        batch_size: See `Source`.
        eval_batch_size: See `Source`.
        val_fraction: See `Source`.
        test_fraction: The share that is the test set; it is drawn by `split_seed`, since there is no official one.
        augment: See `Source`.
        resident: See `Source`.
        split_seed: See `Source`.
        seed: See `Source`.

    Raises:
        InputError: If a fraction is out of its range.
    """

    num_classes = 10
    image_shape = (1, 8, 8)
    mean = (0.3053,)
    std = (0.3760,)
    class_names = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        val_fraction: float = 0.1,
        test_fraction: float = 0.3,
        augment: Augmentation | None = None,
        resident: bool = False,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(None, batch_size, eval_batch_size, val_fraction, augment, 0, resident, split_seed, seed)
        if not 0 < test_fraction < 1:
            raise bad("test_fraction", test_fraction, "the share of the test set must be in (0, 1)")
        self.test_fraction = test_fraction

    def read(self) -> Splits:
        """Grey levels 0 … 16 as 0 … 255, shuffled once by the split seed and cut."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = (torch.from_numpy(digits.images).to(torch.float64) * 255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        order = torch.randperm(len(labels), generator=generator(self.split_seed, "digits"))
        cut = len(labels) - round(self.test_fraction * len(labels))
        train, test = order[:cut], order[cut:]
        return Splits(images[train], labels[train], images[test], labels[test])
