"""Augmentation of whole batches, on whatever device they are: flip and crop as two indexed copies.

Each sample's draw is keyed by (seed, epoch, id): batch size, rank and resuming do not change it. Where a sample is
flipped and cropped, the crop comes first, leaving a fresh tensor to flip in place; the two commute in distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from datamodules.errors import bad
from datamodules.imageset import put_rows
from datamodules.random import draw


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images (N, C, H, W) for which `flipped` (bool, N) holds, left to right; the input is not changed."""
    return flip_(images.clone(memory_format=torch.contiguous_format), flipped)


def flip_(images: Tensor, flipped: Tensor) -> Tensor:
    """As `flip`, in place: `images` must be contiguous, and is returned."""
    rows = flipped.nonzero().squeeze(1)
    return put_rows(images, rows, images.index_select(0, rows).flip(-1)) if len(rows) else images


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Cut a window of the images' own size out of each zero-padded image.

    Every window is one row of an overlapping strided view of the padded batch, so that all are copied by a single
    `index_select` – 40 times faster than gathering pixel by pixel.

    Args:
        images: (N, C, H, W), any dtype.
        top: int64 (N,) in [0, 2·padding]: the window's first row in the padded image.
        left: The same for its first column.
        padding: Zeros added on each side.

    Returns:
        (N, C, H, W), contiguous.
    """
    n, channels, height, width = images.shape
    if n == 0:
        return images
    padded = pad(images.contiguous(), (padding, padding, padding, padding))
    rows, columns = height + 2 * padding, width + 2 * padding
    span = (channels - 1) * rows * columns + (height - 1) * columns + width  # from a window's first pixel past its last
    windows = padded.as_strided((padded.numel() - span + 1, channels, height, width), (1, rows * columns, columns, 1))
    image = torch.arange(n, device=images.device) * (channels * rows * columns)
    return windows.index_select(0, image + top * columns + left)


class Augmentation(ABC):
    """Changes a training batch at random, by sample id."""

    @abstractmethod
    def __call__(self, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Images (N, C, H, W) of any dtype → images of the same shape and dtype."""


class FlipCrop(Augmentation):
    """Random crop of the zero-padded image, and left-right flip with probability one half.

    Args:
        padding: Zeros on each side before the crop; 0: no crop.
        flip: Whether to flip. Leave it off for digits and traffic signs, whose mirror images mean something else.

    Raises:
        InputError: If `padding` is negative.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise bad("padding", padding, "the number of zero pixels on each side must be 0 or more")
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Crop, then flip."""
        numbers = draw(seed, "flip-crop", epoch, ids, columns=3)
        flipped = numbers[:, 0] < 2**30
        if not self.padding:
            return flip(images, flipped) if self.flip else images
        offset = (numbers[:, 1:] * (2 * self.padding + 1)) >> 31
        images = crop(images, offset[:, 0], offset[:, 1], self.padding)
        return flip_(images, flipped) if self.flip else images
