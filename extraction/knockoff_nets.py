"""Knockoff Nets: a pool of images labelled by the victim's answers, drawn at random without replacement.

Paper: Orekondy, Schiele & Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019, arXiv
1812.02766; code: github.com/tribhuvanesh/knockoffnets. This is its random strategy.

Threat model: the attacker may ask a classifier for answers, up to a budget, and has images of any kind: another data
set of the same size, or training images of the task. He knows the classes and neither the victim's network nor its
data.

Deviation: the attacker's holdout is none of the victim's answers; nothing is chosen on it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from datamodules.datamodule import Changes, ImageDataModule
from datamodules.imageset import UNLABELLED, ImageSet, fingerprint
from datamodules.random import draw
from extraction.answers import labels
from extraction.oracle import Oracle
from extraction.strategy import Extraction, chosen


class KnockoffNets(Extraction):
    """A surrogate's training set: a pool, labelled by the victim's answers (Orekondy et al. 2019, random).

    Args:
        base: The victim's task: its holdout and test set measure the surrogate; its training set is the pool if no
            other is given.
        oracle: See `Extraction`.
        budget: Queries, at most; the pool may be smaller.
        pool: Data of images of the same shape, whose labels are not looked at; None: the base's training images.
        temperature: See `Extraction`.
        similarity: See `Extraction`.
        fidelity_on: See `Extraction`.
        seed: Of the choice from the pool.
        samples_budget: See `Extraction`.

    Raises:
        InputError: If a value is out of its range, or pool, victim and task do not fit together.
    """

    version = 2

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int = 60_000,
        pool: ImageDataModule | None = None,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, temperature, similarity, fidelity_on, seed, samples_budget)
        if pool is not None:
            self.check_pool(pool)
        self.pool = pool

    def prepare_data(self) -> None:
        """Ask the victim, unless its answers are in the store."""
        super().prepare_data()
        if self.pool is not None:
            self.pool.prepare_data()
            self.pool.setup("fit")
        self.base.setup("fit")
        images = self._chosen()
        self.ask(images, self._name(images), "pool")

    def setup(self, stage: str = "fit") -> None:
        """Set base and pool up, and relabel."""
        if self.pool is not None:
            self.pool.setup("fit")
        super().setup(stage)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """What was asked about, with the victim's answers for labels; nothing of the pool's own."""
        images = self._chosen()
        answers = self.ask(images, self._name(images), "pool")
        own = self.pool is None
        ids = images.ids if own else self.fresh_ids(len(images))
        origins = ids if own else torch.full_like(ids, -1)
        before = images.labels if own and images.labels.ndim == 1 else torch.full_like(ids, UNLABELLED)
        self.record(Changes("KnockoffNets", ids, origins, before, labels(answers)))
        return ImageSet(images.images, self.targets(answers), ids)

    def _chosen(self) -> ImageSet:
        """The pool's images that are asked about, in order of their draw."""
        whole = self.base.train_set if self.pool is None else self.pool.train_set
        order = draw(self.seed, "knockoff pool", 0, whole.ids)[:, 0].argsort(stable=True)
        return chosen(whole, order[: self.affordable])

    def _name(self, images: ImageSet) -> str:
        return fingerprint("knockoff", self.version, self.oracle.identity(), images.digest())
