"""A network that sees its images smoothed: by a median of neighbours, or a Gaussian blur.

Paper: Xu, Evans & Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", NDSS 2018, section
III: local smoothing by a sliding median takes out what is high in frequency, and leaves what people see. A backbone
sees normalised images, which makes no difference: normalisation is affine and rising in each channel, so that it
commutes with a median and with a weighted mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.backbones.backbone import Backbone, features_of, last_layer, named_backbone
from datamodules.errors import bad


def median_blur(images: Tensor, size: int = 3) -> Tensor:
    """Each pixel becomes the median of the window round it, channel by channel; edges are mirrored.

    Args:
        images: Real (N, C, H, W), H and W above size // 2.
        size: Of the window, odd.
    """
    windows = _padded(images, size).unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(4).median(dim=4).values


def gaussian_blur(images: Tensor, size: int = 3) -> Tensor:
    """Each pixel becomes the Gaussian mean of the window round it, channel by channel; edges are mirrored.

    Args:
        images: Real (N, C, H, W), H and W above size // 2.
        size: Of the window, odd; the standard deviation is size / 6, or three deviations to each side.
    """
    at = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    line = (-0.5 * (at / (size / 6)) ** 2).exp()
    line = (line / line.sum()).repeat(images.shape[1], 1, 1, 1)
    down = F.conv2d(_padded(images, size), line.transpose(2, 3), groups=images.shape[1])
    return F.conv2d(down, line, groups=images.shape[1])


def _padded(images: Tensor, size: int) -> Tensor:
    return F.pad(images, (size // 2,) * 4, mode="reflect")


SMOOTH = {"median": median_blur, "gaussian": gaussian_blur}


class Smoothing(Backbone):
    """Another backbone of this project behind smoothed images; its weights are called `inner.…`.

    Args:
        image_shape: (C, H, W).
        num_classes: The number of logits.
        inner: The other backbone's class path, such as ``classifiers.backbones.cnn.SmallCNN``.
        inner_args: Its own arguments.
        blur: ``median`` or ``gaussian``.
        size: Of the window, odd and at least 3.

    Raises:
        InputError: If the blur is neither, the size does not fit, or there is no such backbone.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        inner: str = "classifiers.backbones.cnn.SmallCNN",
        inner_args: dict[str, Any] | None = None,
        blur: Literal["median", "gaussian"] = "median",
        size: int = 3,
    ) -> None:
        if blur not in SMOOTH:
            raise bad("blur", blur, "choose median or gaussian")
        if size < 3 or size % 2 == 0 or size // 2 >= min(image_shape[1:]):
            raise bad("size", size, f"an odd window of 3 or more is expected that fits images of {image_shape[1:]}")
        super().__init__(image_shape, num_classes)
        given = {key: value for key, value in (inner_args or {}).items() if key != "pretrained"}
        self.inner = named_backbone(inner)(image_shape, num_classes, **given)
        self.blur, self.size = blur, size

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """The other backbone's."""
        return last_layer(self.inner)

    def features(self, x: Tensor) -> Tensor:
        """The other backbone's, of smoothed images: (N, C, H, W) → (N, F)."""
        return features_of(self.inner, SMOOTH[self.blur](x, self.size))

    def forward(self, x: Tensor) -> Tensor:
        """The other backbone's logits of smoothed images: (N, C, H, W) → (N, K)."""
        logits: Tensor = self.inner(SMOOTH[self.blur](x, self.size))
        return logits
