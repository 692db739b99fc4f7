"""The small AlexNet for CIFAR-10, as in TensorFlow's first tutorial."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from classifiers.backbones.backbone import Backbone


class AlexNetCIFAR(Backbone):
    """The scaled-down AlexNet for CIFAR-10 on which Poison Frogs poisons end to end: 192 features.

    Shafahi et al., "Poison Frogs! Targeted Clean-Label Poisoning Attacks on Neural Networks", 2018, section 4, take a
    "scaled-down AlexNet"; such a network was the one of TensorFlow's tutorial "Advanced Convolutional Neural Networks"
    (after Krizhevsky's cuda-convnet). From that tutorial: convolution 5×5 to 64 channels, ReLU, max-pool 3/2, local
    response normalisation, convolution 5×5 to 64 channels, ReLU, normalisation, max-pool 3/2, 384 and 192 hidden units
    with ReLU, the classes; and the initialisation: normal, cut at 2 standard deviations, of 0.05 (convolutions), 0.04
    (hidden layers) and 1/192 (head), biases 0.1 but 0 in the first layer and the head.

    Deviations: whole images (the tutorial crops CIFAR-10 to 24×24), so the first hidden layer sees 64×8×8 and not
    64×6×6 numbers; the softmax is left to the loss; no moving average of the weights; weight decay (0.004 there, on the
    hidden layers only) is the optimiser's business; any number of channels and any size from 8×8.

    Args:
        image_shape: (C, H, W), H and W at least 8.
        num_classes: The number of logits.

    Raises:
        InputError: If the images are smaller than 8×8.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(image_shape, num_classes, smallest=8)
        channels, height, width = self.image_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),  # for even sizes what TensorFlow calls SAME: it pads below and right
            LocalResponseNorm(64),
            nn.Conv2d(64, 64, 5, padding=2),
            nn.ReLU(),
            LocalResponseNorm(64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 384),
            nn.ReLU(),
            nn.Linear(384, 192),
            nn.ReLU(),
        )
        self.head = nn.Linear(192, num_classes)
        for number, layer in enumerate(m for m in self.body if isinstance(m, nn.Conv2d | nn.Linear)):
            _initialise(layer, 0.05 if isinstance(layer, nn.Conv2d) else 0.04, bias=0.1 if number else 0.0)
        _initialise(self.head, 1 / 192, bias=0.0)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, after ReLU: (N, C, H, W) → (N, 192)."""
        features: Tensor = self.body(x)
        return features


class LocalResponseNorm(nn.Module):
    """x ÷ (1 + α Σ x²)^β over a window of neighbouring channels: (N, C, H, W) → (N, C, H, W).

    Krizhevsky et al. 2012, section 3.3, with the constants of TensorFlow's tutorial: 4 neighbours on each side,
    α = 0.001/9, β = 0.75. It equals ``nn.LocalResponseNorm(9, alpha=0.001)``, but sums by a 1×1 convolution with a band
    of ones, where torch averages by a 3-D pool whose gradient is not deterministic on CUDA.

    Args:
        channels: C.
    """

    band: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        at = torch.arange(channels)
        near = (at[:, None] - at[None, :]).abs() <= 4
        self.register_buffer("band", near.float()[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over channels."""
        return x * (1 + (0.001 / 9) * conv2d(x.square(), self.band)).pow(-0.75)


def _initialise(layer: nn.Conv2d | nn.Linear, std: float, bias: float) -> None:
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
