"""FixMatch: what the surrogate is sure of in a weakly augmented image is the label of the strongly augmented one.

Paper: Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang & Raffel, "FixMatch: Simplifying Semi-Supervised
Learning with Consistency and Confidence", NeurIPS 2020, arXiv 2001.07685. The threshold is theirs.

Threat model: see `extraction.semi_supervised`.

Deviation: the strong augmentation is `datamodules.distort.Strong` in place of RandAugment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from classifiers.classifier import BackboneFactory, OptimizerFactory, ScheduleFactory
from datamodules.augment import Augmentation
from datamodules.distort import Strong
from datamodules.errors import bad
from datamodules.random import derive
from extraction.semi_supervised import Parts, SemiSupervisedSurrogate


def fixmatch_loss(
    known: Tensor, targets: Tensor, weak: Tensor, strong: Tensor, threshold: float, weight: float
) -> Tensor:
    """Cross-entropy of the labelled, and of the strong copies of what is sure.

    Args:
        known: Logits of labelled images, real (B, K).
        targets: Their labels, real (B, K).
        weak: Logits of weakly augmented unlabelled images, real (U, K); no gradient goes through them.
        strong: Logits of the same images, strongly augmented.
        threshold: The score from which the weak copy's class is taken as label; the others count as loss 0.
        weight: Of the unlabelled images' mean loss.
    """
    sure, guess = weak.detach().softmax(1).max(1)
    unknown = F.cross_entropy(strong, guess, reduction="none") * (sure >= threshold)
    return F.cross_entropy(known, targets) + weight * unknown.mean()


class FixMatchSurrogate(SemiSupervisedSurrogate):
    """A surrogate that trains by FixMatch (Sohn et al. 2020) on answered and unanswered images.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        weak: See `SemiSupervisedSurrogate`.
        strong: The strong augmentation; None: `Strong` with its defaults.
        threshold: The score from which a guess counts, in [0, 1].
        unlabelled_weight: λ_U.
        optimizer: See `ImageClassifier`.
        schedule: See `ImageClassifier`.
        ema: See `ImageClassifier`.
        weights: See `ImageClassifier`.
        channels_last: See `ImageClassifier`.
        compile: See `ImageClassifier`.
        new_head: See `ImageClassifier`.
        frozen: See `ImageClassifier`.

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
        weak: Augmentation | None = None,
        strong: Augmentation | None = None,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.SGD(
            parameters, lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        schedule: ScheduleFactory | None = None,
        ema: float | None = 0.999,
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
        new_head: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, weak, unlabelled_weight, optimizer, schedule, ema, weights,
            channels_last, compile, new_head, frozen,
        )  # fmt: skip
        if not 0 <= threshold <= 1:
            raise bad("threshold", threshold, "the score from which a guess counts must be in [0, 1]")
        self.strong, self.threshold = strong or Strong(), threshold

    def joint_loss(self, parts: Parts) -> Tensor:
        """One pass for labelled, weak and strong images together."""
        known = self.augmented(parts.images, parts.ids)
        weak = self.augmented(parts.others, parts.other_ids, 1)
        strong = self.strong(parts.others, parts.other_ids, derive(self.training_seed, "strong copy"), self.global_step)
        count = len(parts.others)
        logits = self(torch.cat([known, weak, strong])).split([len(known), count, count])
        return fixmatch_loss(logits[0], parts.targets, logits[1], logits[2], self.threshold, self.unlabelled_weight)
