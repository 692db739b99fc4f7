"""Stronger augmentation of whole batches: affine distortion, contrast and cutout, each one tensor operation.

They are pure functions of images and numbers; the classes draw the numbers by sample id, as in `datamodules.augment`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.augment import Augmentation, flip
from datamodules.errors import bad
from datamodules.random import uniform


def affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Turn, stretch, shear and move each image about its centre; outside is zero, between pixels is bilinear.

    Args:
        images: (N, C, H, W), uint8 or real.
        angle: Real (N,), in radians: positive is clockwise as one looks at the image.
        scale: Real (N,): above 1 enlarges.
        shear: Real (N,): the tangent by which rows move to the right from the centre down.
        shift: Real (N, 2), in pixels: to the right, and down.

    Returns:
        As `images`; bytes are rounded.
    """
    if not len(images):
        return images
    _, _, height, width = images.shape
    cos, sin = angle.cos(), angle.sin()
    # out = scale · turn · shear · in + shift, in pixels from the centre; sampling needs the way back
    back = torch.stack([cos + shear * sin, sin - shear * cos, -sin, cos], 1).view(-1, 2, 2) / scale[:, None, None]
    moved = -(back * shift[:, None, :]).sum(2, keepdim=True)
    half = torch.tensor([width / 2, height / 2], device=images.device, dtype=back.dtype)
    theta = torch.cat([back * half[None, None, :] / half[None, :, None], moved / half[None, :, None]], 2)
    real = images.float()
    grid = F.affine_grid(theta.float(), list(images.shape), align_corners=False)
    return _as(F.grid_sample(real, grid, mode="bilinear", padding_mode="zeros", align_corners=False), images)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move each image's pixels away from (factor above 1) or towards its mean; bytes stay within 0 … 255.

    Args:
        images: (N, C, H, W): uint8, or real in [0, 1].
        factor: Real (N,).
    """
    real = images.float()
    mean = real.mean((1, 2, 3), keepdim=True)
    top = 255.0 if images.dtype == torch.uint8 else 1.0
    return _as((mean + factor[:, None, None, None] * (real - mean)).clamp(0, top), images)


def cutout(images: Tensor, centre: Tensor, size: int) -> Tensor:
    """Black out a square of each image, cut off at its border (DeVries & Taylor 2017).

    Args:
        images: (N, C, H, W).
        centre: int64 (N, 2): row and column of the square's middle pixel.
        size: Its side, in pixels.
    """
    _, _, height, width = images.shape
    low = centre - size // 2
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows = (row >= low[:, :1]) & (row < low[:, :1] + size)
    columns = (column >= low[:, 1:]) & (column < low[:, 1:] + size)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Affine(Augmentation):
    """Random rotation, scale, shear and shift, all at once.

    Args:
        degrees: The largest angle, to either side.
        scale: The largest change of size: factors are uniform in [1 − scale, 1 + scale].
        shear: The largest tangent of the shear, to either side.
        shift: The largest shift along each axis, as a share of the side.

    Raises:
        InputError: If a value is negative, or `scale` is 1 or more.
    """

    def __init__(self, degrees: float = 15.0, scale: float = 0.1, shear: float = 0.1, shift: float = 0.1) -> None:
        for name, value in (("degrees", degrees), ("shear", shear), ("shift", shift)):
            if value < 0:
                raise bad(name, value, "the largest change must be 0 or more")
        if not 0 <= scale < 1:
            raise bad("scale", scale, "the largest change of size must be in [0, 1)")
        self.degrees, self.scale, self.shear, self.shift = degrees, scale, shear, shift

    def __call__(self, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Distort."""
        numbers = 2 * uniform(seed, "affine", epoch, ids, columns=5) - 1
        sides = torch.tensor(images.shape[:1:-1], device=images.device)  # width, height
        return affine(
            images,
            math.radians(self.degrees) * numbers[:, 0],
            1 + self.scale * numbers[:, 1],
            self.shear * numbers[:, 2],
            self.shift * sides * numbers[:, 3:],
        )


class Strong(Augmentation):
    """Affine distortion, contrast and cutout: the strong side of FixMatch.

    Args:
        flip: Whether to mirror with probability one half. Leave it off for digits and traffic signs.
        degrees: See `Affine`.
        scale: See `Affine`.
        shear: See `Affine`.
        shift: See `Affine`.
        contrast: The largest change of contrast: factors are uniform in [1 − contrast, 1 + contrast].
        cutout: The side of the square that is blacked out, as a share of the image's.

    Raises:
        InputError: If a value is out of its range.
    """

    def __init__(
        self,
        flip: bool = False,
        degrees: float = 30.0,
        scale: float = 0.2,
        shear: float = 0.3,
        shift: float = 0.125,
        contrast: float = 0.5,
        cutout: float = 0.5,
    ) -> None:
        for name, value in (("contrast", contrast), ("cutout", cutout)):
            if not 0 <= value <= 1:
                raise bad(name, value, "it must be in [0, 1]")
        self.flip, self.contrast, self.cutout = flip, contrast, cutout
        self.affine = Affine(degrees, scale, shear, shift)

    def __call__(self, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Mirror, distort, change the contrast, black out."""
        numbers = uniform(seed, "strong", epoch, ids, columns=4)
        if self.flip:
            images = flip(images, numbers[:, 0] < 0.5)
        images = contrast(self.affine(images, ids, seed, epoch), 1 + self.contrast * (2 * numbers[:, 1] - 1))
        sides = torch.tensor(images.shape[2:], device=images.device)
        return cutout(images, (numbers[:, 2:] * sides).long(), round(self.cutout * min(images.shape[2:])))


def _as(real: Tensor, images: Tensor) -> Tensor:
    return real.round().to(torch.uint8) if images.dtype == torch.uint8 else real.to(images.dtype)
