"""Self-supervised pretraining on the pool: features from images alone, before the victim is asked anything.

Paper: Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020, arXiv 2002.05709 (SimCLR). For extraction, SwiftThief pretrains on unqueried images, by SimSiam.

Threat model: as in Knockoff Nets, with more images than queries; no label is looked at. A run of `SimCLR` on the pool
leaves weights; a surrogate starts from them with ``model.weights: runs/<config>`` and ``model.new_head: true``.

Deviations: `datamodules.distort.Strong` in place of crops and colours. With several processes, each contrasts the
images of its own share of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.backbones.backbone import last_layer
from classifiers.classifier import BackboneFactory, ImageClassifier, OptimizerFactory, ScheduleFactory
from datamodules.augment import Augmentation
from datamodules.distort import Strong
from datamodules.errors import bad
from datamodules.imageset import Batch
from datamodules.random import derive


def contrastive_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent: of all other views in the batch, each view is to find the second view of its own image.

    Args:
        one: Projections of the first views, real (N, D).
        other: Of the second ones, in the same order.
        temperature: Of the softmax over cosine similarities.
    """
    views = F.normalize(torch.cat([one, other]), dim=1)
    similar = (views @ views.T / temperature).float()
    similar.fill_diagonal_(float("-inf"))
    count = len(one)
    partner = torch.arange(2 * count, device=one.device).roll(count)
    return F.cross_entropy(similar, partner)


class SimCLR(ImageClassifier):
    """A network whose features are learned without labels (Chen et al. 2020); its last layer is not trained.

    Accuracy measured of it is that of an untrained last layer: its weights are what it is for.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        views: Makes the two views of an image; None: `Strong` with its defaults.
        temperature: Of the contrast.
        projection: Width of the projection that is contrasted.
        optimizer: See `ImageClassifier`.
        schedule: See `ImageClassifier`.
        channels_last: See `ImageClassifier`.
        compile: See `ImageClassifier`.

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
        views: Augmentation | None = None,
        temperature: float = 0.5,
        projection: int = 64,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        schedule: ScheduleFactory | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, optimizer, schedule, channels_last=channels_last,
            compile=compile,
        )  # fmt: skip
        if not temperature > 0:
            raise bad("temperature", temperature, "it must be above 0")
        if projection < 1:
            raise bad("projection", projection, "its width must be 1 or more")
        head = last_layer(self.net)
        head.requires_grad_(False)
        width = head.in_features
        self.views, self.temperature = views or Strong(), temperature
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))

    def parts(self) -> list[nn.Module]:
        """Backbone and projector."""
        return [self.net, self.projector]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The contrast of two views of a batch; its labels are not looked at."""
        if self._draws:
            self._reseed(batch_idx)
        seed = self._datamodule().loading.training_seed()
        views = [
            self.views(batch.images, batch.ids, derive(seed, f"view {number}"), self.global_step) for number in (0, 1)
        ]
        one, other = self.projector(self.features(torch.cat(views))).chunk(2)
        loss = contrastive_loss(one, other, self.temperature)
        self._losses.add(loss.detach())
        return loss
