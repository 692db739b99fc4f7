"""Input smoothing: a median over each pixel's neighbours takes small triggers away.

Paper: Xu, Evans & Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", NDSS 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from classifiers.backbones.smoothing import median_blur
from datamodules.errors import bad


def median(images: Tensor, size: int = 3) -> Tensor:
    """The median of size × size neighbours, of each channel by itself; borders are mirrored.

    Args:
        images: uint8 (N, C, H, W).
        size: Odd, 3 or more, at most the image's smaller side.

    Returns:
        uint8 (N, C, H, W).
    """
    if size < 3 or size % 2 == 0 or size > min(images.shape[2:]):
        raise bad("size", size, "an odd number from 3 to the image's smaller side is expected")
    return median_blur(images.float(), size).to(torch.uint8)
