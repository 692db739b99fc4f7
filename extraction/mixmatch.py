"""MixMatch: guessed labels of unlabelled images, sharpened, and everything mixed with everything.

Paper: Berthelot, Carlini, Goodfellow, Papernot, Oliver & Raffel, "MixMatch: A Holistic Approach to Semi-Supervised
Learning", NeurIPS 2019, arXiv 1905.02249; for extraction Jagielski et al. 2020, arXiv 1909.01838. K, T, α and λ_U are
theirs.

Threat model: see `extraction.semi_supervised`.

Deviations: all images pass through the network in one batch, whose statistics BatchNorm takes – theirs interleaves
several, to have the same statistics in each. λ_U rises over a share of the training, not over a number of images that
fits 2^26 of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from classifiers.classifier import BackboneFactory, OptimizerFactory, ScheduleFactory
from datamodules.augment import Augmentation
from datamodules.errors import bad
from datamodules.random import draw, uniform
from extraction.semi_supervised import Parts, SemiSupervisedSurrogate

_TRIES = 16
"""Of Jöhnk's method; each succeeds with probability ½ or more for α ≤ 1."""


def sharpen(scores: Tensor, temperature: float) -> Tensor:
    """Scores (N, K) to the power 1/T, renormalised."""
    powered = scores.pow(1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def beta(alpha: float, seed: int, purpose: str, epoch: int, ids: Tensor) -> Tensor:
    """A draw from Beta(α, α) for each id, by Jöhnk's method.

    Args:
        alpha: In (0, 1].
        seed: See `datamodules.random.draw`.
        purpose: See `datamodules.random.draw`.
        epoch: See `datamodules.random.draw`.
        ids: int64 (N,).

    Returns:
        float32 (N,) in [0, 1].
    """
    pairs = uniform(seed, purpose, epoch, ids, columns=2 * _TRIES).double().clamp_min(2.0**-25).pow(1 / alpha)
    one, other = pairs[:, :_TRIES], pairs[:, _TRIES:]
    first = (one + other <= 1).float().argmax(1, keepdim=True)  # 0 where none fits: less than once in 65,000
    one, other = one.gather(1, first)[:, 0], other.gather(1, first)[:, 0]
    return (one / (one + other)).float()


def mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share·one + (1 − share)·other, with one share (N,) for each row of real (N, …)."""
    share = share.view(-1, *[1] * (one.ndim - 1))
    return share * one + (1 - share) * other


def mixmatch_loss(logits: Tensor, targets: Tensor, labelled: int, weight: float) -> Tensor:
    """Cross-entropy of the labelled rows, which come first, and weighted squared error of the others' scores.

    Args:
        logits: Real (N, K).
        targets: Real (N, K).
        labelled: Rows that count as labelled.
        weight: Of the squared error, a mean over rows and classes.
    """
    known = -(targets[:labelled] * logits[:labelled].log_softmax(1)).sum(1).mean()
    guessed = (logits[labelled:].softmax(1) - targets[labelled:]).square().mean()
    return known + weight * guessed


class MixMatchSurrogate(SemiSupervisedSurrogate):
    """A surrogate that trains by MixMatch (Berthelot et al. 2019) on answered and unanswered images.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        weak: See `SemiSupervisedSurrogate`.
        copies: Augmented copies whose mean score is the guess, K.
        sharpening: The temperature T of the guess.
        alpha: Of the mixing shares, drawn from Beta(α, α), in (0, 1].
        unlabelled_weight: λ_U, once it has risen.
        ramp: The share of the training in which it rises from 0.
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
        copies: int = 2,
        sharpening: float = 0.5,
        alpha: float = 0.75,
        unlabelled_weight: float = 75.0,
        ramp: float = 0.5,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
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
        if copies < 1:
            raise bad("copies", copies, "guess from 1 augmented copy or more")
        if not sharpening > 0:
            raise bad("sharpening", sharpening, "the temperature must be above 0")
        if not 0 < alpha <= 1:
            raise bad("alpha", alpha, "it must be in (0, 1]")
        if not 0 <= ramp <= 1:
            raise bad("ramp", ramp, "the share of the training in which the weight rises must be in [0, 1]")
        self.copies, self.sharpening, self.alpha, self.ramp = copies, sharpening, alpha, ramp

    def joint_loss(self, parts: Parts) -> Tensor:
        """Guess, sharpen, mix, and compare."""
        seed, step = self.training_seed, self.global_step
        copies = [self.augmented(parts.others, parts.other_ids, copy) for copy in range(1, self.copies + 1)]
        with torch.no_grad():
            scores = self(torch.cat(copies)).softmax(1).view(self.copies, -1, self.num_classes).mean(0)
            guess = sharpen(scores, self.sharpening)
        top = 255 if parts.images.dtype == torch.uint8 else 1
        images = torch.cat([self.augmented(parts.images, parts.ids), *copies]).to(self.scale.dtype) / top
        targets = torch.cat([parts.targets, *[guess] * self.copies])
        # a number of its own for each copy of each image
        ids = torch.cat([parts.ids, *[parts.other_ids] * self.copies]) * (self.copies + 1)
        ids += torch.arange(self.copies + 1, device=ids.device).repeat_interleave(
            torch.tensor([len(parts.ids), *[len(parts.other_ids)] * self.copies], device=ids.device)
        )
        partner = draw(seed, "mixmatch partners", step, ids)[:, 0].argsort(stable=True)
        share = beta(self.alpha, seed, "mixmatch shares", step, ids)
        share = torch.maximum(share, 1 - share).to(images.dtype)
        logits = self(mix(images, images[partner], share))
        mixed = mix(targets, targets[partner], share)
        return mixmatch_loss(logits, mixed, len(parts.ids), self._weight())

    def _weight(self) -> float:
        rising = self.ramp * self.trainer.estimated_stepping_batches
        return self.unlabelled_weight * (min(1.0, self.global_step / rising) if rising else 1.0)
