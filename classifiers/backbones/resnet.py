"""Residual networks for small images: ResNet-9 for speed, ResNet-18 and its pre-activation form for comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from classifiers.backbones.backbone import Backbone, check_positive, conv3x3
from datamodules.errors import bad


class ResNet9(Backbone):
    """The DAWNBench ResNet-9, made to learn CIFAR-10 in little time: eight convolutions, for a CPU at width 8 or 16.

    David Page, "How to Train Your ResNet", 2018 (the winner of DAWNBench's CIFAR-10 task): a convolution of w channels;
    2w, max-pool 2, a residual of two convolutions; 4w, max-pool 2; 8w, max-pool 2, another such residual; a max-pool
    over what is left; a linear layer. Each convolution has BatchNorm and ReLU. PyTorch's default initialisation.

    Deviations: Page scales the logits by 0.125 and his linear layer has no bias. We scale the features, which is the
    same for the weights, and the head has a bias that starts from 0, so that a head is the same thing in all backbones.
    The last pool takes the maximum of the whole image, which at 32×32 is his 4×4 pool.

    Args:
        image_shape: (C, H, W), H and W at least 8.
        num_classes: The number of logits.
        width: w, the channels of the first convolution; there are 8w · grid² features. 64 is Page's.
        grid: The last pool keeps grid × grid maxima of each channel, 1 as Page's. More features than training images
            make a last layer that can heed a single image: what Poison Frogs' one-shot kill lives on.
        logit_scale: The factor on the features, more than 0. Smaller starts with less certain answers and so trains
            with the high learning rates that the network is made for.

    Raises:
        InputError: If the images are smaller than 8×8 or an argument is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 64,
        grid: int = 1,
        logit_scale: float = 0.125,
    ) -> None:
        super().__init__(image_shape, num_classes, smallest=8)
        check_positive(width=width, grid=grid)
        self.grid = grid
        if any(size // 8 % grid for size in self.image_shape[1:]):
            raise bad("grid", grid, "must divide height and width of the last feature map, an eighth of the image's")
        if not logit_scale > 0:
            raise bad("logit_scale", logit_scale, "must be more than 0")
        self.logit_scale = logit_scale
        self.body = nn.Sequential(
            _conv_bn_relu(self.image_shape[0], width),
            _conv_bn_relu(width, 2 * width),
            nn.MaxPool2d(2),
            _Residual(2 * width),
            _conv_bn_relu(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _conv_bn_relu(4 * width, 8 * width),
            nn.MaxPool2d(2),
            _Residual(8 * width),
        )
        self.head = nn.Linear(8 * width * grid**2, num_classes)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """The maxima of each channel, scaled: (N, C, H, W) → (N, 8w · grid²)."""
        parts = self.body(x).unflatten(3, (self.grid, -1)).unflatten(2, (self.grid, -1))
        # not AdaptiveMaxPool2d: its gradient is not deterministic on CUDA
        return torch.amax(parts, dim=(3, 5)).flatten(1) * self.logit_scale


class ResNet18(Backbone):
    """ResNet-18 in its form for 32×32 images: 3×3 stem, four stages of two blocks; 11,173,962 weights for 10 classes.

    He et al., "Deep Residual Learning for Image Recognition", 2016, with the blocks of their ImageNet ResNet-18 and
    without its 7×7 stem and max-pool: the network that papers on CIFAR-10 mean (kuangliu/pytorch-cifar), and not the
    thinner ResNet-20 of He's own CIFAR section. Shortcuts are 1×1 convolutions where the shape changes. PyTorch's
    default initialisation, as in that repository; He et al. draw from N(0, 2/fan-out).

    Args:
        image_shape: (C, H, W), H and W at least 8.
        num_classes: The number of logits.
        width: The channels of the first stage; there are 8 times as many features. 64 is He's.

    Raises:
        InputError: If the images are smaller than 8×8 or `width` is below 1.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 64) -> None:
        super().__init__(image_shape, num_classes, smallest=8)
        check_positive(width=width)
        self.stem = nn.Sequential(conv3x3(self.image_shape[0], width), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = _stages(_Block, width)
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The mean of each channel: (N, C, H, W) → (N, 8 · width)."""
        return torch.mean(self.stages(self.stem(x)), dim=(2, 3))


class PreActResNet18(Backbone):
    """ResNet-18 with BatchNorm and ReLU before each convolution: 11,171,146 weights for 10 classes.

    He et al., "Identity Mappings in Deep Residual Networks", 2016, in the form of kuangliu/pytorch-cifar, which
    backdoor benchmarks use: without the BatchNorm and ReLU that He et al. put after the last block. `final_norm` adds
    them (11,172,170 weights); without them features may be negative. PyTorch's default initialisation.

    Args:
        image_shape: (C, H, W), H and W at least 8.
        num_classes: The number of logits.
        width: The channels of the first stage; there are 8 times as many features.
        final_norm: BatchNorm and ReLU after the last block, as in the paper.

    Raises:
        InputError: If the images are smaller than 8×8 or `width` is below 1.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, width: int = 64, final_norm: bool = False
    ) -> None:
        super().__init__(image_shape, num_classes, smallest=8)
        check_positive(width=width)
        self.stem = conv3x3(self.image_shape[0], width)
        self.stages = _stages(_PreActBlock, width)
        self.norm = nn.Sequential(nn.BatchNorm2d(8 * width), nn.ReLU()) if final_norm else nn.Identity()
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The mean of each channel: (N, C, H, W) → (N, 8 · width)."""
        return torch.mean(self.norm(self.stages(self.stem(x))), dim=(2, 3))


class _Residual(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv_bn_relu(channels, channels), _conv_bn_relu(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class _Block(nn.Module):
    """He's basic block: two convolutions, ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class _PreActBlock(nn.Module):
    """He's basic block with BatchNorm and ReLU first; nothing after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(first)
        out: Tensor = self.conv2(relu(self.norm2(self.conv1(first)))) + kept
        return out


def _stages(block: Callable[[int, int, int], nn.Module], width: int) -> nn.Sequential:
    """Four stages of two blocks; each but the first doubles the channels and halves the image."""
    blocks: list[nn.Module] = []
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        blocks += [block(inputs, outputs, 1 if stage == 0 else 2), block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*blocks)


def _conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU())
