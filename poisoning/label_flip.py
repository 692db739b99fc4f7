"""Label flipping: availability poisoning by wrong labels alone.

Sources: Biggio, Nelson & Laskov, "Support Vector Machines Under Adversarial Label Noise" (2011) for the attack; the
pairwise flip i → i + 1 is the "pair" noise of Han et al., "Co-teaching" (2018).

Threat model: the attacker relabels a share of the training set and touches no image; he wants the model to be bad.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet, Overlay
from datamodules.random import generator
from datamodules.rewrite import Rewrite
from poisoning.choosing import check_fraction, check_label, choose


def flipped(labels: Tensor, num_classes: int, kind: str, target: int | None, seed: int) -> Tensor:
    """The wrong labels: int64 (N,), each different from `labels` except where a label is the target already.

    Args:
        labels: int64 (N,).
        num_classes: K.
        kind: ``random`` – uniform over the K − 1 wrong classes; ``pairwise`` – (label + 1) mod K; ``to_class``.
        target: The class for ``to_class``.
        seed: Of the random labels.
    """
    if kind == "pairwise":
        return (labels + 1) % num_classes
    if kind == "to_class":
        assert target is not None
        return torch.full_like(labels, target)
    steps = torch.randint(1, num_classes, labels.shape, generator=generator(seed, "label-flip"))
    return (labels + steps) % num_classes


class LabelFlip(Rewrite):
    """Label flipping: a share of the training labels made wrong, to make the model bad (availability).

    Args:
        base: The clean datamodule, or any other rewrite.
        flip_fraction: The share of the training set that is relabelled, in [0, 1].
        kind: ``random``: any wrong class; ``pairwise``: (label + 1) mod K; ``to_class``: `target_label`, and the images
            of that class are not eligible.
        target_label: The class for ``to_class``.
        seed: Of the draw of images and of the random labels.
        name: Appended to the facts' names (`flipped_<name>`), for two of them in one set.

    Raises:
        InputError: If a value is out of its range, or more images are asked for than are eligible.
    """

    def __init__(
        self,
        base: ImageDataModule,
        flip_fraction: float = 0.1,
        kind: Literal["random", "pairwise", "to_class"] = "random",
        target_label: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(base)
        check_fraction("flip_fraction", flip_fraction)
        if kind not in ("random", "pairwise", "to_class"):
            raise bad("kind", kind, "choose random, pairwise or to_class")
        if (kind == "to_class") != (target_label is not None):
            raise bad("target_label", target_label, "give it with kind: to_class, and only there")
        if target_label is not None:
            check_label("target_label", target_label, base.num_classes)
        if base.num_classes < 2:
            raise InputError("LabelFlip: with one class there is no wrong label")
        self.flip_fraction, self.kind, self.target_label, self.seed = flip_fraction, kind, target_label, seed
        self.suffix = f"_{name}" if name else ""

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training set with wrong labels in it."""
        labels = train.labels
        if labels.ndim != 1:
            raise InputError("LabelFlip: the base has soft labels; flip before they are made")
        wrong = flipped(labels, self.num_classes, self.kind, self.target_label, self.seed)
        eligible = (wrong != labels) & (labels >= 0)
        chosen = choose(eligible, len(train), self.flip_fraction, "flip_fraction", self.seed)
        new = labels.clone()
        new[chosen] = wrong[chosen]
        ids = train.ids[chosen]
        self.record(Changes("LabelFlip", ids, ids, labels[chosen], wrong[chosen]))
        return Overlay(train, torch.arange(len(train)), labels=new) if len(chosen) else train

    def facts(self) -> Facts:
        """How many labels were flipped."""
        own = self._changes[-1] if self._changes else None
        found: Facts = {
            "flipped": 0 if own is None else len(own.ids),
            "flip_fraction": self.flip_fraction,
            "flip_seed": self.seed,
        }
        return {**self.base.facts(), **{key + self.suffix: value for key, value in found.items()}}
