"""InceptionV3 as a fixed feature extractor with a trainable last layer: the victim of Poison Frogs' transfer attack."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn.functional import interpolate

from classifiers.backbones.backbone import Backbone, as_rgb, check_rgb, last_layer
from classifiers.backbones.named import load_torchvision, take_out, torchvision_model

SIZE = 299
"""The height and width that InceptionV3 was made for."""


class InceptionV3(Backbone):
    """InceptionV3 on images resized to 299×299, frozen but for its last layer: 2048 features, for transfer learning.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, in torchvision's form; used by
    Shafahi et al., "Poison Frogs!", 2018, section 3, who train only a last layer on its 2048 pooled features. The
    pretrained weights were made for images normalised with ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229,
    0.224, 0.225); the network itself turns those into the [-1, 1] of the original.

    Deviations: torchvision's weights, ported from TensorFlow, not TensorFlow's graph; no auxiliary logits; images are
    resized here, so that a poison is crafted at its own size with gradients through the resizing. Grey images are shown
    as three equal channels. Where nothing is loaded, convolutions start from N(0, 2/fan-in), which keeps the features
    of a frozen network near 1: with torchvision's own start they are near 10⁷, as its BatchNorm never sees a batch.
    PyTorch's default for the head.

    Args:
        image_shape: (C, H, W), C of 1 or 3, any size.
        num_classes: The number of logits.
        pretrained: True for torchvision's ImageNet weights, looked for in $TORCH_HOME/hub/checkpoints and fetched if
            missing; or the path of a state_dict in a local file (safetensors, or what ``torch.load`` reads with
            weights_only). Its last layer is used if it has the same shape; auxiliary ones are left out.
        freeze: Only `head` learns: the rest has no gradients of its own and stays in evaluation mode, BatchNorm's
            statistics and the dropout before the head included. Gradients still reach the images.
        antialias: Smooth before making an image smaller. Off by default, as in TensorFlow's resizing of 2018.

    Raises:
        InputError: If the images have neither 1 nor 3 channels, or the weights are not found or do not fit.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        pretrained: bool | str = False,
        freeze: bool = True,
        antialias: bool = False,
    ) -> None:
        super().__init__(image_shape, num_classes)
        check_rgb(self.image_shape, "InceptionV3")
        self.freeze = freeze
        self.antialias = antialias
        body = torchvision_model("inception_v3", num_classes, SIZE, initialise=False)
        layer = last_layer(body)
        if not pretrained:
            for module in body.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        load_torchvision(body, layer, "inception_v3", pretrained)
        self.body, self.head = take_out(body, layer)
        if freeze:
            self.body.requires_grad_(False)
            self.body.eval()

    def features(self, x: Tensor) -> Tensor:
        """The pooled features: (N, C, H, W) → (N, 2048)."""
        x = as_rgb(x)
        if x.shape[2:] != (SIZE, SIZE):
            x = interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=self.antialias)
        features: Tensor = self.body(x)
        return features

    def train(self, mode: bool = True) -> Self:
        """Switches modes, but leaves a frozen extractor in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.body.eval()
        return self
