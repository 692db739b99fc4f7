"""Semi-supervised extraction: the pool's images that the victim was not asked about train the surrogate too.

Paper: Jagielski, Carlini, Berthelot, Kurakin & Papernot, "High Accuracy and High Fidelity Extraction of Neural
Networks", USENIX Security 2020, arXiv 1909.01838, section 4.

Threat model: as in Knockoff Nets, with many more images of the task than queries.

The data are the same for every semi-supervised method – answered and unanswered rows, so many of each in a batch; what
is done with the latter is the model's: `MixMatchSurrogate`, `FixMatchSurrogate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from classifiers.classifier import BackboneFactory, ImageClassifier, OptimizerFactory, ScheduleFactory
from datamodules.augment import Augmentation
from datamodules.datamodule import Changes, ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import UNLABELLED, Batch, ImageSet, Overlay, labelled
from datamodules.loading import GroupedBatches
from datamodules.random import derive
from extraction.answers import labels
from extraction.knockoff_nets import KnockoffNets
from extraction.oracle import Oracle


class SemiSupervised(KnockoffNets):
    """A pool, labelled by the victim's answers as far as the budget goes; the rest of it unlabelled (Jagielski 2020).

    The images asked about are those of Knockoff Nets with the same seed. The base's own augmentation and batch size
    are better left alone: the model augments, and a batch has so many rows of each kind.

    Args:
        base: See `KnockoffNets`.
        oracle: See `Extraction`.
        budget: Queries; fewer than the pool has images.
        labelled_batch: Answered rows in a batch, over all devices together.
        unlabelled_batch: Unanswered rows in a batch.
        pool: See `KnockoffNets`.
        temperature: See `Extraction`.
        similarity: See `Extraction`.
        fidelity_on: See `Extraction`.
        seed: Of the choice from the pool.
        samples_budget: See `KnockoffNets`.

    Raises:
        InputError: If a value is out of its range, or pool, victim and task do not fit together.
    """

    version = 1

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int = 250,
        labelled_batch: int = 64,
        unlabelled_batch: int = 64,
        pool: ImageDataModule | None = None,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, pool, temperature, similarity, fidelity_on, seed, samples_budget)
        for field, size in (("labelled_batch", labelled_batch), ("unlabelled_batch", unlabelled_batch)):
            if size < 1:
                raise bad(field, size, "a batch has 1 row or more of each kind")
        self.labelled_batch, self.unlabelled_batch = labelled_batch, unlabelled_batch

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The pool: first what was asked about, with the victim's answers for labels, then the rest without any."""
        asked = self._chosen()
        whole = train if self.pool is None else self.pool.train_set
        if len(asked) >= len(whole):
            raise bad("budget", self.budget, f"of the pool's {len(whole)} images some must be left without an answer")
        answers = self.ask(asked, self._name(asked), "pool")
        rest = (~torch.isin(whole.ids, asked.ids)).nonzero().squeeze(1)
        place = torch.argsort(whole.ids)
        rows = torch.cat([place[torch.searchsorted(whole.ids[place], asked.ids)], rest])
        given = self.targets(answers)
        none = given.new_full((len(rest), *given.shape[1:]), UNLABELLED if given.ndim == 1 else 0)
        own = self.pool is None
        ids = whole.ids[rows] if own else self.fresh_ids(len(rows))
        before = torch.full_like(ids, UNLABELLED)
        if own and whole.labels.ndim == 1:
            before = whole.labels[rows]
        after = torch.cat([labels(answers), torch.full_like(rest, UNLABELLED)])
        self.record(Changes("SemiSupervised", ids, ids if own else torch.full_like(ids, -1), before, after))
        return Overlay(whole, rows, labels=torch.cat([given, none]), ids=ids)

    def train_batches(self, rank: int = 0, world_size: int = 1) -> GroupedBatches:
        """Batches of answered rows, then unanswered ones."""
        has = labelled(self.train_set.labels)
        groups = [has.nonzero().squeeze(1), (~has).nonzero().squeeze(1)]
        counts = [self.labelled_batch, self.unlabelled_batch]
        return GroupedBatches(groups, counts, self.loading.training_seed(), rank, world_size)


class Parts(NamedTuple):
    """A batch, divided.

    Attributes:
        images: uint8 (B, C, H, W): labelled.
        targets: float32 (B, K): their labels, soft or one-hot.
        ids: int64 (B,).
        others: uint8 (U, C, H, W): unlabelled.
        other_ids: int64 (U,).
    """

    images: Tensor
    targets: Tensor
    ids: Tensor
    others: Tensor
    other_ids: Tensor


class SemiSupervisedSurrogate(ImageClassifier, ABC):
    """A classifier that trains on labelled and unlabelled images together; a subclass says how, in `joint_loss`.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        weak: The augmentation of every training image; drawn anew in each step, since a labelled image comes up many
            times in an epoch. None: none.
        unlabelled_weight: Of the unlabelled images' loss, λ_U.
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

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        weak: Augmentation | None = None,
        unlabelled_weight: float = 1.0,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        schedule: ScheduleFactory | None = None,
        ema: float | None = None,
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
        new_head: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, optimizer, schedule, 0.0, ema, weights, channels_last,
            compile, new_head, frozen,
        )  # fmt: skip
        if unlabelled_weight < 0:
            raise bad("unlabelled_weight", unlabelled_weight, "it must be 0 or more")
        self.weak, self.unlabelled_weight = weak, unlabelled_weight

    @abstractmethod
    def joint_loss(self, parts: Parts) -> Tensor:
        """The loss of a batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch with labelled and unlabelled rows."""
        if self._draws:
            self._reseed(batch_idx)
        loss = self.joint_loss(self._divide(batch))
        self._losses.add(loss.detach())
        return loss

    @property
    def training_seed(self) -> int:
        """The run's."""
        return self._datamodule().loading.training_seed()

    def augmented(self, images: Tensor, ids: Tensor, copy: int = 0) -> Tensor:
        """A weakly augmented copy, by seed, step and id."""
        if self.weak is None:
            return images
        return self.weak(images, ids, derive(self.training_seed, f"copy {copy}"), self.global_step)

    def _divide(self, batch: Batch) -> Parts:
        has = labelled(batch.labels)
        rows, rest = has.nonzero().squeeze(1), (~has).nonzero().squeeze(1)
        given = batch.labels[rows]
        targets = F.one_hot(given, self.num_classes).float() if given.ndim == 1 else given
        return Parts(batch.images[rows], targets, batch.ids[rows], batch.images[rest], batch.ids[rest])
