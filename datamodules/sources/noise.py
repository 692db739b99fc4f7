"""Noise: images without any content, as a pool to ask a victim about."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from datamodules.augment import Augmentation
from datamodules.datamodule import Source, Splits
from datamodules.errors import bad
from datamodules.random import generator


class Noise(Source):
    """Images whose pixels are uniform noise, and classes at random: a pool that needs no data.

    Args:
        image_shape: (C, H, W).
        num_classes: K, of labels that mean nothing.
        images: How many there are to train on, the holdout among them; a tenth as many again are the test set.
        noise_seed: Of pixels and labels.
        batch_size: See `Source`.
        eval_batch_size: See `Source`.
        val_fraction: See `Source`.
        augment: See `Source`.
        resident: See `Source`.
        split_seed: See `Source`.
        seed: See `Source`.

    Raises:
        InputError: If a number is out of its range.
    """

    version = 1

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        images: int = 60_000,
        noise_seed: int = 0,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_fraction: float = 0.05,
        augment: Augmentation | None = None,
        resident: bool = False,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(None, batch_size, eval_batch_size, val_fraction, augment, 0, resident, split_seed, seed)
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise bad("image_shape", image_shape, "give channels, height and width, each 1 or more")
        if num_classes < 2:
            raise bad("num_classes", num_classes, "there must be 2 or more")
        if images < 1:
            raise bad("images", images, "there must be 1 or more")
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.num_classes, self.images, self.noise_seed = num_classes, images, noise_seed
        # of the uniform distribution on [0, 1]
        self.mean = (0.5,) * channels
        self.std = (12**-0.5,) * channels
        self.class_names = tuple(str(number) for number in range(num_classes))

    def read(self) -> Splits:
        """Draw all pixels and labels."""
        source = generator(self.noise_seed, "noise")
        test = -(-self.images // 10)
        n = self.images + test
        images = torch.randint(0, 256, (n, *self.image_shape), generator=source, dtype=torch.uint8)
        labels = torch.randint(0, self.num_classes, (n,), generator=source)
        return Splits(images[: self.images], labels[: self.images], images[self.images :], labels[self.images :])
