"""Classes: some classes of a source, numbered anew – the two of a binary task, or the others an extractor learns from.

Both halves of a transfer attack are made with it: the extractor is trained on eight classes of a set, the victim's last
layer on the other two. Ids stay those of the source, so that no sample of one half can be mistaken for the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.datamodule import ImageDataModule, Source
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet, Overlay
from datamodules.measures import Evaluation
from datamodules.random import generator
from datamodules.resized import Resized
from datamodules.rewrite import Rewrite


class Classes(Rewrite):
    """Some classes of a source, renumbered 0, 1, … in the order given; perhaps a fixed number of images of each.

    Args:
        base: The source, perhaps `Resized`, or another `Classes`: attacks go round this, not inside.
        classes: Which of its labels, two or more.
        per_class: Training images of each class, drawn by `seed` without replacement; None: all.
        seed: Of that draw.

    Raises:
        InputError: If a class does not exist or is named twice, the base is a rewrite of another kind, or there are
            fewer images of a class than asked for.
    """

    def __init__(
        self, base: ImageDataModule, classes: Sequence[int], per_class: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(base)
        if not isinstance(_inside(base), Source | Classes):
            raise bad("base", type(base).__name__, "Classes goes inside attacks, round a source; put it there")
        for label in classes:
            if not isinstance(label, int) or not 0 <= label < base.num_classes:
                raise bad("classes", label, f"there are {base.num_classes} classes, 0 to {base.num_classes - 1}")
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise bad("classes", list(classes), "name two classes or more, each once")
        if per_class is not None and per_class < 1:
            raise bad("per_class", per_class, "it must be 1 or more, or null for all images")
        self.classes = list(classes)
        self.per_class = per_class
        self.seed = seed
        self._held: dict[str, ImageSet] = {}

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Of those kept."""
        return len(self.classes)

    @property
    def class_names(self) -> Sequence[str]:  # type: ignore[override]
        """Of those kept."""
        names = self.base.class_names
        return [names[label] for label in self.classes]

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training images of these classes, in the order of the source."""
        kept = self._kept(train)
        if self.per_class is None:
            return kept
        chosen: list[Tensor] = []
        for label, name in enumerate(self.class_names):
            rows = (kept.labels == label).nonzero().squeeze(1)
            if len(rows) < self.per_class:
                raise bad("per_class", self.per_class, f"there are {len(rows)} training images of class {name}")
            order = torch.randperm(len(rows), generator=generator(self.seed, f"classes {self.classes[label]}"))
            chosen.append(rows[order[: self.per_class]])
        return kept.select(torch.cat(chosen).sort().values)

    @property
    def val_set(self) -> ImageSet:
        """The holdout's images of these classes."""
        return self._of("val", self.base.val_set)

    @property
    def test_set(self) -> ImageSet:
        """The test images of these classes."""
        return self._of("test", self.base.test_set)

    def evaluations(self, split: str) -> list[Evaluation]:
        """Clean accuracy on these classes, and on the holdout as a source has it."""
        return Source.evaluations(self, split)  # type: ignore[arg-type] # it asks for the sets alone

    def _of(self, name: str, images: ImageSet) -> ImageSet:
        if name not in self._held:
            self._held[name] = self._kept(images)
        return self._held[name]

    def _kept(self, images: ImageSet) -> ImageSet:
        if images.labels.ndim != 1:
            raise InputError("Classes: the base has soft labels")
        number = torch.full((self.base.num_classes,), -1)
        number[self.classes] = torch.arange(len(self.classes))
        labels = torch.where(images.labels >= 0, number[images.labels.clamp_min(0)], -1)
        rows = (labels >= 0).nonzero().squeeze(1)
        return Overlay(images, rows, labels=labels[rows])


def _inside(data: ImageDataModule) -> ImageDataModule:
    """What is resized, if it is; else itself."""
    while isinstance(data, Resized):
        data = data.base
    return data
