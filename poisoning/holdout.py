"""PoisonedHoldout: the acceptance gate of a user who has no trusted images and cuts his holdout from the pool.

Threat model: the user trains on data that may be poisoned and has no others. He holds a share of them out and accepts
the model if its accuracy on that share reaches a*. What was done to the pool was done to his holdout too: poison that a
model learns raises its accuracy there, wrong labels lower that of a good model. What a trusted holdout is worth is the
difference.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from datamodules.datamodule import Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet
from datamodules.measures import Evaluation, Measure
from datamodules.random import generator
from datamodules.rewrite import Rewrite


class PoisonedHoldout(Rewrite):
    """A holdout cut from the poisoned pool, labels as they are there, for the acceptance gate to judge by.

    It takes the place of the base's holdout, in training and in the test; what a model reaches on the base's, which is
    clean, is measured beside it as `trusted_holdout_accuracy`.

    Args:
        base: The attack; this goes outermost. What it does to batches after augmentation is not in the holdout.
        fraction: The share of the poisoned training set that is held out, in (0, 1).
        seed: Of that draw.

    Raises:
        InputError: If the fraction is out of its range or holds out no image or all, or the base has soft labels.
    """

    def __init__(self, base: ImageDataModule, fraction: float = 0.05, seed: int = 0) -> None:
        super().__init__(base)
        if not 0 < fraction < 1:
            raise bad("fraction", fraction, "the share of the pool that is held out must be in (0, 1)")
        self.fraction, self.seed = fraction, seed
        self._held: ImageSet | None = None

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The pool less the holdout."""
        if train.labels.ndim != 1:
            raise InputError("PoisonedHoldout: the base has soft labels; cut the holdout before they are made")
        held = round(self.fraction * len(train))
        if not 0 < held < len(train):
            raise bad("fraction", self.fraction, f"holds out {held} of {len(train)} images; some must be on both sides")
        order = torch.randperm(len(train), generator=generator(self.seed, "poisoned holdout"))
        self._held = train.select(order[:held].sort().values)
        return train.select(order[held:].sort().values)

    @property
    def val_set(self) -> ImageSet:
        """What was cut from the pool."""
        if self._held is None:
            raise RuntimeError("PoisonedHoldout: call setup() before asking for the holdout")
        return self._held

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, with this holdout in the place of the base's, which is called trusted."""
        name = {"val": "clean", "test": "holdout"}[split]
        held, base = self.val_set, self.base.evaluations(split)
        own = Evaluation(name, held, (Measure(f"{name}_accuracy", held.labels),))
        others = [_trusted(evaluation) if evaluation.name == name else evaluation for evaluation in base]
        return [own, *others] if split == "val" else [*others, own]

    def facts(self) -> Facts:
        """How much was held out, and how much of that is poisoned."""
        held = self.val_set.ids
        changed = [torch.isin(held, changes.ids) for changes in self.base.changes()]
        poisoned = torch.stack(changed).any(0) if changed else torch.zeros(len(held), dtype=torch.bool)
        return {
            **self.base.facts(),
            "holdout_images": len(held),
            "holdout_poisoned": int(poisoned.sum()),
            "holdout_seed": self.seed,
        }


def _trusted(evaluation: Evaluation) -> Evaluation:
    """The base's holdout under its other name."""
    (measure,) = evaluation.measures
    return replace(evaluation, name="trusted_holdout", measures=(replace(measure, name="trusted_holdout_accuracy"),))
