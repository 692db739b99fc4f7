"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from classifiers.backbones.backbone import Backbone
from datamodules.errors import bad


class MLP(Backbone):
    """A fully connected network: hidden layers with ReLU; with none, softmax regression.

    Among the first victims of model extraction (Tramèr et al., "Stealing Machine Learning Models via Prediction APIs",
    2016), both kinds. PyTorch's default initialisation.

    Args:
        image_shape: (C, H, W).
        num_classes: The number of logits.
        hidden: The width of each hidden layer; an empty list makes the pixels the features.
        dropout: The probability that a hidden unit is dropped in training, in [0, 1).

    Raises:
        InputError: If a width is below 1 or `dropout` is outside [0, 1).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        hidden: Sequence[int] = (512, 512),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(image_shape, num_classes)
        if any(width < 1 for width in hidden):
            raise bad("hidden", list(hidden), "must be numbers of units, each at least 1")
        if not 0 <= dropout < 1:
            raise bad("dropout", dropout, "must be at least 0 and less than 1")
        inputs = prod(self.image_shape)
        layers: list[nn.Module] = [nn.Flatten()]
        for outputs in hidden:
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, after ReLU: (N, C, H, W) → (N, hidden[-1])."""
        features: Tensor = self.body(x)
        return features
