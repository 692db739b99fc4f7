"""Triggered: clean data, measured with a trigger on it: what a backdoor that came from elsewhere does.

Paper: Gu, Dolan-Gavitt & Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
arXiv 1708.06733 (2017), the transfer attack: the user trains new last layers on clean data of his own over an extractor
that he found, and the attacker has no wish about his classes: a success is a lower accuracy on triggered images.

Threat model: nothing is poisoned here; whatever backdoor there is came with the model's weights.

Deviation: the paper measures one kind of sign after the other and averages; we count test images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.datamodule import Facts, ImageDataModule
from datamodules.errors import InputError
from datamodules.imageset import ImageSet, Overlay
from datamodules.measures import Evaluation, Measure
from datamodules.rewrite import Rewrite
from datamodules.triggers import Trigger
from poisoning.choosing import check_label


class Triggered(Rewrite):
    """Clean training data, measured with a trigger on the test images too: BadNets' transfer attack, the user's side.

    Measures, beside the base's: `triggered_accuracy` – all images, triggered, with their true labels; and, where a
    target is named, `attack_success_rate` – triggered images of all other classes, with its label.

    Args:
        base: The datamodule; its training set stays as it is.
        trigger: What is stamped on the images that are measured.
        name: Appended to the measures' names (`triggered_accuracy_<name>`), for two triggers.
        target_label: The class that a backdoor would call them; None: it is not looked for.

    Raises:
        InputError: If the trigger does not fit the images, or needs boxes and there are none; or if the target is no
            class.
    """

    def __init__(
        self, base: ImageDataModule, trigger: Trigger, name: str | None = None, target_label: int | None = None
    ) -> None:
        super().__init__(base)
        trigger.check(base.image_shape)
        if target_label is not None:
            check_label("target_label", target_label, base.num_classes)
        self.trigger, self.target_label = trigger, target_label
        self.suffix = f"_{name}" if name else ""
        self._evaluated: dict[str, list[Evaluation]] = {}

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training set as it is; a sticker without boxes is refused before anything is trained."""
        if self.trigger.needs_boxes and "boxes" not in train.extras_at(torch.empty(0, dtype=torch.int64)):
            raise InputError(f"trigger: {type(self.trigger).__name__} needs boxes; the data have none (GTSRB has)")
        return train

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and all images of the split, triggered."""
        if split not in self._evaluated:
            images = {"val": self.val_set, "test": self.test_set}[split]
            self._evaluated[split] = self._triggered(images) if len(images) else []
        return [*self.base.evaluations(split), *self._evaluated[split]]

    def facts(self) -> Facts:
        """What was stamped."""
        return {**self.base.facts(), f"measured_trigger{self.suffix}": json.dumps(self.trigger.summary())}

    def _triggered(self, images: ImageSet) -> list[Evaluation]:
        key = json.dumps(self.trigger.describe(), sort_keys=True)
        overlay = Overlay(images, torch.arange(len(images)), rewriter=self._stamp, key=key)
        accuracy = Measure(f"triggered_accuracy{self.suffix}", images.labels)
        found = [Evaluation(f"all_triggered{self.suffix}", overlay, (accuracy,))]
        if self.target_label is not None:
            rows = (images.labels != self.target_label).nonzero().squeeze(1)
            others = Overlay(images, rows, rewriter=self._stamp, key=key)
            success = Measure(f"attack_success_rate{self.suffix}", torch.full_like(others.labels, self.target_label))
            found += [Evaluation(f"triggered{self.suffix}", others, (success,))] if len(rows) else []
        return found

    def _stamp(self, images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        return self.trigger(images, extras.get("boxes"))
