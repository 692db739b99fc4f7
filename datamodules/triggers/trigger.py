"""A trigger changes pixels of a batch: a tensor operation with an explicit mask.

What a trigger covers is said by its mask and never by its colour: a black pixel is a pixel. Both backdoors and
watermark trigger sets stamp, so triggers live below both.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.errors import InputError, bad
from datamodules.imageset import fingerprint

_SHORT = 80
"""Characters of JSON that a value may take in a summary."""


class Trigger(ABC):
    """A change of images that is the same function for every image.

    Attributes:
        needs_boxes: Whether it is placed relative to each image's box.
    """

    needs_boxes = False

    @abstractmethod
    def __call__(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Stamp a batch.

        Args:
            images: uint8 (N, C, H, W), on any device; not changed.
            boxes: float32 (N, 4): x1, y1, x2, y2 in pixels, for triggers that need them.

        Returns:
            uint8 (N, C, H, W).
        """

    @abstractmethod
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Refuse images that the trigger does not fit.

        Raises:
            InputError: If it is larger than the image or has other channels.
        """

    @abstractmethod
    def describe(self) -> Mapping[str, object]:
        """What determines the trigger, every pixel: it enters hashes."""

    def summary(self) -> Mapping[str, object]:
        """What manifests and metrics say of it: its description without what is long, and a hash of all of it."""
        described = self.describe()
        short = {key: value for key, value in described.items() if len(json.dumps(value)) <= _SHORT}
        return {**short, "hash": fingerprint(json.dumps(described, sort_keys=True))}


def blend(images: Tensor, values: Tensor, opacity: Tensor) -> Tensor:
    """``round((1 − a)·image + a·value)`` in integers, so that the bytes are the same on every device.

    Args:
        images: uint8 (N, C, h, w).
        values: uint8, broadcastable to `images`.
        opacity: uint8, broadcastable; 0 leaves the pixel, 255 replaces it.

    Returns:
        uint8 (N, C, h, w).
    """
    a = opacity.to(torch.int32)
    mixed = images.to(torch.int32) * (255 - a) + values.to(torch.int32) * a
    return ((mixed + 127) // 255).to(torch.uint8)


class Stamp(Trigger):
    """A picture with an opacity for each pixel, at one place of every image.

    Args:
        values: uint8 (c, h, w), c = 1 for all channels alike or the images' number.
        opacity: uint8 (h, w): 0 leaves the image's pixel, 255 replaces it.
        row: Of the picture's upper edge in the image; negative: the row of its lower edge, counted from the image's
            (−1: it ends with the image).
        column: The same for its left (right) edge.
    """

    def __init__(self, values: Tensor, opacity: Tensor, row: int, column: int) -> None:
        if values.dtype != torch.uint8 or values.ndim != 3 or opacity.dtype != torch.uint8:
            raise InputError("trigger: values uint8 (c, h, w) and opacity uint8 (h, w) expected")
        if values.shape[1:] != opacity.shape:
            raise InputError(f"trigger: values {tuple(values.shape)} and opacity {tuple(opacity.shape)} do not match")
        if not bool(opacity.any()):
            raise InputError("trigger: its mask is empty, so it would change nothing")
        self.values, self.opacity = values, opacity
        self.row, self.column = row, column
        self._solid = bool((opacity == 255).all())

    def _place(self, height: int, width: int) -> tuple[int, int]:
        """The row and column of the upper left corner in an image of that size."""
        h, w = self.opacity.shape
        top = self.row if self.row >= 0 else height + self.row + 1 - h
        left = self.column if self.column >= 0 else width + self.column + 1 - w
        return top, left

    def __call__(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Stamp the picture where it belongs."""
        top, left = self._place(*images.shape[2:])
        h, w = self.opacity.shape
        stamped = images.clone()
        window = stamped[:, :, top : top + h, left : left + w]
        values = self.values.to(images.device)
        if self._solid:
            window.copy_(values.expand_as(window))
        else:
            window.copy_(blend(window, values, self.opacity.to(images.device)))
        return stamped

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Refuse images that are too small, or have other channels."""
        channels, height, width = image_shape
        c, h, w = self.values.shape
        top, left = self._place(height, width)
        if c not in (1, channels):
            raise bad("trigger", f"{c} channels", f"the images have {channels}; give it 1 or {channels}")
        if not (0 <= top <= height - h and 0 <= left <= width - w):
            raise bad(
                "trigger",
                f"{h}×{w} at row {self.row}, column {self.column}",
                f"it does not lie within the image of {height}×{width}; make it smaller or move it",
            )

    def describe(self) -> Mapping[str, object]:
        """Name, place, values and opacity."""
        return {
            "name": type(self).__name__,
            "row": self.row,
            "column": self.column,
            "values": self.values.tolist(),
            "opacity": self.opacity.tolist(),
        }

    def summary(self) -> Mapping[str, object]:
        """Name, place, height and width, the number of pixels that it covers, and a hash."""
        all_of_it = {**super().summary(), "size": list(self.opacity.shape), "pixels": int((self.opacity > 0).sum())}
        return {key: value for key, value in all_of_it.items() if key not in ("values", "opacity")}
