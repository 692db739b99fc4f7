"""MarginBased: triggers with a large margin, which a surrogate inherits more often than plain ones.

Paper: Kim, Park, Jun, Jung & Yoo, "Margin-based Neural Network Watermarking", ICML 2023.

Threat model: as for `watermark.trigger_set`, but the thief has no weights: he asks the marked model about images of its
task, and trains a surrogate on the answers. Far from all he asks about, the surrogate does as it likes; so triggers lie
among the task's images (key source ``images``), and the model gives their labels to all that surrounds them.

Deviations: the paper samples several views of a trigger by projected gradient ascent, each from its own start in an
L∞ ball; so do we, and all of them enter the loss beside the trigger. Its ball and its weights were chosen for CIFAR;
what we use is in the configs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from classifiers.classifier import BackboneFactory
from datamodules.errors import InputError, bad
from datamodules.imageset import Batch
from datamodules.random import uniform
from watermark.trigger_set import TriggerSet
from watermark.watermarked import Watermarked


def ascend(
    logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, start: Tensor, radius: float, steps: int
) -> Tensor:
    """The views of some triggers for which a model least likes their labels: projected gradient ascent in an L∞ ball.

    Args:
        logits: float (N, C, H, W) in [0, 1] → (N, K).
        images: float (N, C, H, W) in [0, 1]: the balls' centres.
        labels: int64 (N,).
        start: float (N, C, H, W) in [−1, 1]: where in its ball each begins.
        radius: Of the ball, in [0, 1].
        steps: Of the ascent, each of 2.5 · radius / steps.

    Returns:
        float (N, C, H, W) in [0, 1], without a gradient.
    """
    low, high = (images - radius).clamp_min(0), (images + radius).clamp_max(1)
    views = (images + radius * start).clamp(low, high)
    for _ in range(steps):
        views.requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(F.cross_entropy(logits(views), labels), views)
        views = (views.detach() + 2.5 * radius / steps * slope.sign()).clamp(low, high)
    return views.detach()


class MarginBased(Watermarked):
    """A watermark with margins (Kim et al. 2023); the data are a `TriggerSet`, best of the owner's own images.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        radius: Of the ball round each trigger, as a share of a pixel's range, in (0, 1].
        steps: Of the ascent, 1 or more.
        views: Of each trigger in a batch, 1 or more.
        margin_weight: Of the views' loss beside that of the batch.
        **kwargs: See `ImageClassifier`.

    Raises:
        InputError: If a value is out of its range.
    """

    version = 1

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        radius: float = 0.1,
        steps: int = 5,
        views: int = 4,
        margin_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, image_shape, mean, std, **kwargs)
        if not 0 < radius <= 1:
            raise bad("radius", radius, "the ball's radius is a share of a pixel's range, in (0, 1]")
        for field, value in (("steps", steps), ("views", views)):
            if value < 1:
                raise bad(field, value, "give their number, 1 or more")
        if margin_weight < 0:
            raise bad("margin_weight", margin_weight, "it must be 0 or more")
        self.radius, self.steps, self.views, self.margin_weight = radius, steps, views, margin_weight

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch, and that of the views of its triggers."""
        loss = super().training_step(batch, batch_idx)
        data = self._datamodule()
        if not isinstance(data, TriggerSet):
            raise InputError("data: the margins are those of a TriggerSet; name it as the outermost datamodule")
        rows = data.trigger_rows(batch.ids)
        if not len(rows):
            return loss
        images = batch.images[rows].repeat(self.views, 1, 1, 1).to(self.scale.dtype) / 255
        labels = batch.labels[rows].repeat(self.views)
        numbers = torch.arange(len(images), device=images.device)
        seed, size = data.loading.training_seed(), images[0].numel()
        start = uniform(seed, f"margin {self.global_rank}", self.global_step, numbers, size).view_as(images) * 2 - 1
        self.net.eval()  # BatchNorm would take the ascent for data
        views = ascend(self, images, labels, start.to(images.dtype), self.radius, self.steps)
        self.net.train()
        return loss + self.margin_weight * F.cross_entropy(self(views), labels)
