"""Resized: the images of any data at another size, for networks that were made for larger ones.

A pretrained network sees little in 32×32 pixels, and an attacker who may change an image at 128×128 needs to change
each value less. The images are published at that size: what is crafted from them is crafted there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from datamodules.datamodule import Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import KEPT, Batch, ImageSet, fingerprint
from datamodules.measures import Evaluation
from datamodules.rewrite import Rewrite

_PART = 256  # images worked on at a time: real values take four times their room


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic, rounded to whole grey levels; smoothed first where images become smaller. Each image by itself.

    Args:
        images: uint8 (N, C, H, W).
        size: Height and width of the result.

    Returns:
        uint8 (N, C, size, size).
    """
    if not len(images):
        return images.new_zeros(0, images.shape[1], size, size)
    smooth = size < max(images.shape[2:])
    parts = []
    for part in images.split(_PART):
        real = interpolate(part.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=smooth)
        parts.append(real.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


class ResizedImages(ImageSet):
    """Another set's images at another size, made when they are fetched; kept where all of them fit in `KEPT` bytes.

    Labels and ids are the other set's. Of the extras, ``boxes`` are in pixels and grow with the images.

    Args:
        base: The set that holds the pixels.
        size: Height and width.
    """

    def __init__(self, base: ImageSet, size: int) -> None:
        self.base, self.size = base, size
        self.labels, self.ids = base.labels, base.ids
        self._digest = None
        self._all: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, size, size)."""
        return self.base.image_shape[0], self.size, self.size

    def images_at(self, rows: Tensor) -> Tensor:
        """The images of some rows."""
        if len(self) * math.prod(self.image_shape) > KEPT:
            return torch.cat([resize(self.base.images_at(part), self.size) for part in rows.split(_PART)])
        if self._all is None:
            parts = torch.arange(len(self), device=self.ids.device).split(_PART)
            self._all = torch.cat([resize(self.base.images_at(part), self.size) for part in parts])
        return self._all.index_select(0, rows)

    def extras_at(self, rows: Tensor) -> dict[str, Tensor]:
        """The extras of some rows."""
        _, height, width = self.base.image_shape
        found = self.base.extras_at(rows)
        if "boxes" in found:
            boxes = found["boxes"]
            found["boxes"] = boxes * boxes.new_tensor([self.size / width, self.size / height] * 2)
        return found

    def to(self, device: torch.device | str) -> ResizedImages:
        """The same on `device`."""
        return ResizedImages(self.base.to(device), self.size)

    def _fingerprint(self) -> str:
        return fingerprint("resized", self.base.digest(), self.size)


class Resized(Rewrite):
    """All images of its base – training, holdout, test and whatever else is measured – at another size.

    It goes inside attacks, which then craft and stamp at that size; round one, it shows what the attack made of smaller
    images. Only one that stamps its batches after augmentation cannot be inside, for it stamps at its own size.

    Args:
        base: The datamodule whose images they are.
        size: Height and width. Images that are not square come out square.
        mean: Of each channel, for pixels in [0, 1], where a pretrained network wants its own; None: the base's.
        std: Its standard deviation, likewise.

    Raises:
        InputError: If the size is not positive, or `mean` and `std` are not a number in (0, 1] for each channel.
    """

    def __init__(
        self,
        base: ImageDataModule,
        size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(base)
        if size < 1:
            raise bad("size", size, "height and width are 1 or more")
        for name, numbers in (("mean", mean), ("std", std)):
            if numbers is None:
                continue
            if len(numbers) != base.image_shape[0] or not all(0 <= number <= 1 for number in numbers):
                raise bad(name, list(numbers), f"give {base.image_shape[0]} numbers in [0, 1], or null for the base's")
        if std is not None and min(std) <= 0:
            raise bad("std", list(std), "each must be above 0")
        self.size = size
        self._mean, self._std = mean, std
        self._held: dict[str, ImageSet] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """(C, size, size)."""
        return self.base.image_shape[0], self.size, self.size

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        """The base's, or what was given."""
        return self.base.mean if self._mean is None else tuple(self._mean)

    @property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        """The base's, or what was given."""
        return self.base.std if self._std is None else tuple(self._std)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training images at the new size."""
        return ResizedImages(train, self.size)

    @property
    def val_set(self) -> ImageSet:
        """The holdout at the new size."""
        return self._at_size("val", self.base.val_set)

    @property
    def test_set(self) -> ImageSet:
        """The test images at the new size."""
        return self._at_size("test", self.base.test_set)

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, at the new size."""
        return [
            Evaluation(each.name, self._at_size(f"{split} {each.name}", each.images), each.measures)
            for each in self.base.evaluations(split)
        ]

    def facts(self) -> Facts:
        """The base's, and the size."""
        return {**self.base.facts(), "image_size": self.size}

    def rewrite_batch(self, batch: Batch) -> Batch:
        """The batch as it is.

        Raises:
            InputError: If the base changes batches: it would do so at the wrong size.
        """
        if self.base.rewrite_batch(batch).images is not batch.images:
            kind = type(self.base).__name__
            raise InputError(f"base = {kind}: it stamps batches, and at its own size; put Resized inside {kind}")
        return batch

    def _at_size(self, name: str, images: ImageSet) -> ImageSet:
        held = self._held.get(name)
        if not isinstance(held, ResizedImages) or held.base is not images:
            held = self._held[name] = ResizedImages(images, self.size)
        return held
