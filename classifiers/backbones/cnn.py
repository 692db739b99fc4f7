"""Small convolutional networks: the one of the BadNets paper, and one for images of a few pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from classifiers.backbones.backbone import Backbone, check_positive, conv3x3
from datamodules.errors import bad


class BadNetsCNN(Backbone):
    """The MNIST network of the BadNets paper: two 5×5 convolutions, 281,034 weights.

    Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017,
    table 1. Convolution 5×5 to 16 channels, ReLU, average-pool 2, convolution 5×5 to 32 channels, ReLU, average-pool 2,
    512 hidden units with ReLU, and the classes. No padding: 28×28 ends as 32×4×4.

    Deviations: the softmax is left to the loss; any number of channels and any size from 16×16 (the hidden layer grows
    with it). PyTorch's default initialisation, as the paper names none.

    Args:
        image_shape: (C, H, W), H and W at least 16.
        num_classes: The number of logits.
        hidden: The hidden units, which are the features; 512 are the paper's.

    Raises:
        InputError: If the images are smaller than 16×16 or `hidden` is below 1.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, hidden: int = 512) -> None:
        super().__init__(image_shape, num_classes, smallest=16)
        check_positive(hidden=hidden)
        channels, height, width = self.image_shape
        area = _twice_pooled(height) * _twice_pooled(width)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * area, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The hidden units, after ReLU: (N, C, H, W) → (N, hidden)."""
        features: Tensor = self.body(x)
        return features


class SmallCNN(Backbone):
    """A fast network for images of a few pixels, such as 8×8 digits: three 3×3 convolutions.

    Our own. Each convolution has BatchNorm and ReLU; a 2×2 max-pool follows the first and every further one but the
    last, as long as the image is more than 4 pixels wide and high. The features are each channel's *maximum* over the
    image: unlike an average, it shows a trigger of 2 to 4 pixels in a corner as strongly as one of half the image, and
    its size does not depend on that of the image. Convolutions are padded, so that a corner pixel is seen by 4
    windows and not by one. PyTorch's default initialisation.

    Args:
        image_shape: (C, H, W), H and W at least 4.
        num_classes: The number of logits.
        widths: The channels of each convolution, at least one number; the last is the number of features.

    Raises:
        InputError: If the images are smaller than 4×4 or a width is below 1.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, widths: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__(image_shape, num_classes, smallest=4)
        if not widths or min(widths) < 1:
            raise bad("widths", list(widths), "must be one or more numbers of channels, each at least 1")
        inputs, height, width = self.image_shape
        layers: list[nn.Module] = []
        for number, outputs in enumerate(widths, start=1):
            layers += [conv3x3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            if number < len(widths) and min(height, width) > 4:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The maximum of each channel: (N, C, H, W) → (N, widths[-1])."""
        return torch.amax(self.body(x), dim=(2, 3))  # not AdaptiveMaxPool2d: its gradient is not deterministic on CUDA


def _twice_pooled(pixels: int) -> int:
    """What two rounds of a 5×5 convolution and a pool by 2 leave of a side."""
    return ((pixels - 4) // 2 - 4) // 2
