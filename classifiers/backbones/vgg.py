"""VGG for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classifiers.backbones.backbone import Backbone

CHANNELS = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Configuration A of the paper: the channels of each convolution, a max-pool after each group."""


class VGG11(Backbone):
    """VGG-11 in its form for 32×32 images: eight convolutions and one linear layer; 9,231,114 weights for 10 classes.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, configuration A.

    Deviations, those of kuangliu/pytorch-cifar: one linear layer for the paper's three, and BatchNorm after each
    convolution. What the five pools leave of a larger image is averaged. Convolutions start from N(0, 2/fan-out) and
    biases from 0, as in torchvision: without BatchNorm, PyTorch's default would let the signal die out.

    Args:
        image_shape: (C, H, W), H and W at least 32.
        num_classes: The number of logits.
        batch_norm: BatchNorm after each convolution.

    Raises:
        InputError: If the images are smaller than 32×32.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, batch_norm: bool = True) -> None:
        super().__init__(image_shape, num_classes, smallest=32)
        inputs = self.image_shape[0]
        layers: list[nn.Module] = []
        for group in CHANNELS:
            for outputs in group:
                conv = nn.Conv2d(inputs, outputs, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [conv, nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The mean of each channel, at 32×32 of one pixel: (N, C, H, W) → (N, 512)."""
        return torch.mean(self.body(x), dim=(2, 3))
