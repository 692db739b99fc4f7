"""BadNets: a backdoor planted by poisoning the training data with triggered images.

Paper: Gu, Dolan-Gavitt & Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
arXiv 1708.06733 (2017).

Threat model: the user outsources training. The attacker sees and controls the whole training set and the training;
the user accepts the returned model only if its accuracy on a held-out validation set reaches a*. The attacker wants
triggered images classified as he says and everything else as before.

Deviations: the paper *adds* backdoored copies (mode ``add``, the default); most later code *replaces* images, which
is the mode ``replace``. The paper's detector of traffic signs is not rebuilt: signs are classified from their images,
with the sticker placed relative to the annotated box.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import Batch, ImageSet, Overlay, put_rows
from datamodules.measures import Evaluation, Measure
from datamodules.rewrite import Rewrite
from datamodules.triggers import Trigger
from poisoning.choosing import check_fraction, check_label, choose


def attacked(labels: Tensor, num_classes: int, target: int | str, source: int | None) -> tuple[Tensor, Tensor]:
    """Which images an attack is about, and what it wants of them.

    Args:
        labels: int64 (N,): true labels.
        num_classes: K.
        target: The class wanted, or ``"next"`` for (label + 1) mod K: all-to-all.
        source: The one class attacked, or None for all.

    Returns:
        bool (N,): eligible images – never one that has the wanted label already; and int64 (N,): the wanted labels.
    """
    wanted = (labels + 1) % num_classes if target == "next" else torch.full_like(labels, int(target))
    eligible = (wanted != labels) & (labels >= 0)
    if source is not None:
        eligible &= labels == source
    return eligible, wanted


class BadNets(Rewrite):
    """BadNets: triggered images with the attacker's labels in the training set, a backdoor (Gu et al. 2017).

    Measures, beside the base's: `attack_success_rate` – triggered images that get the attacker's label, images of the
    target class left out (one source class: its images alone; all-to-all: every image) – and `robust_accuracy`: the
    same images, true labels.

    Args:
        base: The clean datamodule, or any other rewrite.
        trigger: What is stamped.
        target_label: The class wanted; ``next`` for the all-to-all attack i → (i + 1) mod K.
        source_label: The one class attacked (one-to-one); None: all others (all-to-one).
        poison_fraction: p in [0, 1]: round(p · |D_train|) images are drawn from the eligible ones without replacement.
        mode: ``add`` puts triggered copies beside the originals (the paper's), ``replace`` in their stead.
        placement: ``before`` augmentation – the trigger is cropped and flipped with the image – or ``after`` it: the
            trigger is always where it is in the test.
        seed: Of the draw of the poisoned images; nothing else determines it.
        name: Appended to the measures' names (`attack_success_rate_<name>`), for two backdoors in one set.

    Raises:
        InputError: If a label is not a class, source and target are the same, the fraction is outside [0, 1] or
            rounds to nothing, the trigger does not fit the images, or a sticker is to be placed after augmentation.
    """

    def __init__(
        self,
        base: ImageDataModule,
        trigger: Trigger,
        target_label: int | Literal["next"] = 0,
        source_label: int | None = None,
        poison_fraction: float = 0.1,
        mode: Literal["add", "replace"] = "add",
        placement: Literal["before", "after"] = "before",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(base)
        check_fraction("poison_fraction", poison_fraction)
        if target_label != "next":
            check_label("target_label", target_label, base.num_classes)
        if source_label is not None:
            check_label("source_label", source_label, base.num_classes)
            if source_label == target_label:
                raise bad("source_label", source_label, "it is the target_label; choose another class, or null for all")
        if mode not in ("add", "replace"):
            raise bad("mode", mode, "choose add (triggered copies) or replace")
        if placement not in ("before", "after"):
            raise bad("placement", placement, "choose before (augmentation) or after it")
        trigger.check(base.image_shape)
        if trigger.needs_boxes and placement == "after":
            raise bad("placement", placement, "augmentation moves the box that the sticker belongs to; choose before")
        self.trigger = trigger
        self.target_label = target_label
        self.source_label = source_label
        self.poison_fraction = poison_fraction
        self.mode = mode
        self.placement = placement
        self.seed = seed
        self.suffix = f"_{name}" if name else ""
        self._poisoned = 0
        self._stamped_ids = torch.empty(0, dtype=torch.int64)
        self._evaluated: dict[str, list[Evaluation]] = {}

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training set with triggered images in it."""
        labels = train.labels
        if labels.ndim != 1:
            raise InputError("BadNets: the base has soft labels; poison it before they are made")
        if self.trigger.needs_boxes and "boxes" not in train.extras_at(torch.empty(0, dtype=torch.int64)):
            raise InputError(f"trigger: {type(self.trigger).__name__} needs boxes; the data have none (GTSRB has)")
        eligible, wanted = attacked(labels, self.num_classes, self.target_label, self.source_label)
        chosen = choose(eligible, len(train), self.poison_fraction, "poison_fraction", self.seed)
        n, m = len(train), len(chosen)
        rows, new_labels, ids = torch.arange(n), labels.clone(), train.ids.clone()
        changed = torch.zeros(n, dtype=torch.bool)
        if self.mode == "add":
            rows = torch.cat([rows, chosen])
            new_labels = torch.cat([labels, wanted[chosen]])
            added = self.fresh_ids(m)
            self.base.copied(added, train.ids[chosen])
            ids = torch.cat([ids, added])
            changed = torch.cat([changed, torch.ones(m, dtype=torch.bool)])
        else:
            new_labels[chosen] = wanted[chosen]
            changed[chosen] = True
        self._poisoned = m
        self._stamped_ids = ids[changed].sort().values
        self.record(Changes("BadNets", ids[changed], train.ids[chosen], labels[chosen], wanted[chosen]))
        if not m:
            return train
        key = json.dumps({**self.trigger.describe(), "placement": self.placement}, sort_keys=True)
        stamp = self._stamp if self.placement == "before" else _as_it_is
        return Overlay(train, rows, labels=new_labels, ids=ids, changed=changed, rewriter=stamp, key=key)

    def copied(self, ids: Tensor, origins: Tensor) -> None:
        """A copy of a triggered image carries the trigger, whichever side of augmentation it is stamped on."""
        super().copied(ids, origins)
        copies = ids[torch.isin(origins, self._stamped_ids)]
        self._stamped_ids = torch.cat([self._stamped_ids, copies]).sort().values

    def rewrite_batch(self, batch: Batch) -> Batch:
        """Stamp the poisoned samples of an augmented batch, if that is where the trigger goes."""
        batch = self.base.rewrite_batch(batch)
        if self.placement == "before" or not len(self._stamped_ids):
            return batch
        known = self._stamped_ids = self._stamped_ids.to(batch.ids.device)
        at = torch.searchsorted(known, batch.ids).clamp_max(len(known) - 1)
        rows = (known[at] == batch.ids).nonzero().squeeze(1)
        if not len(rows):
            return batch
        stamped = self.trigger(batch.images.index_select(0, rows))
        return batch._replace(images=put_rows(batch.images.clone(memory_format=torch.contiguous_format), rows, stamped))

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and the triggered images of the split."""
        if split not in self._evaluated:
            images = {"val": self.val_set, "test": self.test_set}[split]
            self._evaluated[split] = self._triggered(images) if len(images) else []
        return [*self.base.evaluations(split), *self._evaluated[split]]

    def triggered(self, images: ImageSet) -> tuple[Overlay, Tensor]:
        """The images of `images` that the attack is about, triggered, with the true labels; and the labels wanted."""
        eligible, wanted = attacked(images.labels, self.num_classes, self.target_label, self.source_label)
        rows = eligible.nonzero().squeeze(1)
        key = json.dumps(self.trigger.describe(), sort_keys=True)
        return Overlay(images, rows, rewriter=self._stamp, key=key), wanted[rows]

    def facts(self) -> Facts:
        """How much was poisoned, and with what."""
        found: Facts = {
            "poisoned": self._poisoned,
            "poisoned_share_of_set": self._poisoned / max(1, len(self.train_set)),
            "poison_fraction": self.poison_fraction,
            "poison_seed": self.seed,
            "trigger": json.dumps(self.trigger.summary()),
            "trigger_placement": self.placement,
        }
        return {**self.base.facts(), **{key + self.suffix: value for key, value in found.items()}}

    def _triggered(self, images: ImageSet) -> list[Evaluation]:
        overlay, wanted = self.triggered(images)
        if not len(overlay):
            return []
        success = Measure("attack_success_rate" + self.suffix, wanted)
        robust = Measure("robust_accuracy" + self.suffix, overlay.labels)
        return [Evaluation("triggered" + self.suffix, overlay, (success, robust))]

    def _stamp(self, images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        return self.trigger(images, extras.get("boxes"))


def _as_it_is(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    return images
