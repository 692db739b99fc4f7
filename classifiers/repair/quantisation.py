"""Quantisation: weights are rounded to so many bits, one scale for each output channel, symmetric round zero.

What is stored are the rounded weights as real numbers, so that a weights file rebuilds alone; they take no values but
the 2ᵇ − 1 of their channel's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.classifier import BackboneFactory, ImageClassifier
from datamodules.errors import bad


def rounded(weight: Tensor, bits: int = 8) -> Tensor:
    """A weight on its grid: the first dimension is that of the channels, each with its own scale.

    Args:
        weight: (C, …).
        bits: 2 to 16.

    Returns:
        The same shape; each value is off by half a step of its channel at the most, the largest not at all.
    """
    levels = 2 ** (bits - 1) - 1
    scale = weight.abs().flatten(1).amax(1) / levels
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-levels, levels) * scale


class Quantised(ImageClassifier):
    """A classifier with quantised weights, as for small devices; with ``max_epochs: 0`` nothing is trained.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        bits: Of each weight.
        **kwargs: See `ImageClassifier`; ``weights`` are of the model to quantise.

    Checkpoints hold what is being trained; the weights file and the model at the end are on the grid.

    Raises:
        InputError: If the bits are out of their range, or there are no weights.
    """

    version = 1

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        bits: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, image_shape, mean, std, **kwargs)
        if not 2 <= bits <= 16:
            raise bad("bits", bits, "weights have 2 to 16 bits; 8 is usual")
        if kwargs.get("weights") is None:
            raise bad("weights", None, "there is nothing to quantise; give those of a trained model")
        self.bits = bits
        self._round()

    def on_train_end(self) -> None:
        """Round what training left, before it is written."""
        self._round()

    def save(self, path: str | Path) -> str:
        """Write a weights file, rounded even where a run that was complete is resumed and does not train."""
        self._round()
        return super().save(path)

    @torch.no_grad()
    def _round(self) -> None:
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.copy_(rounded(layer.weight, self.bits))
