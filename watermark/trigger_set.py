"""TriggerSet: Mark. Secret triggers with wrong labels, a few in every batch.

Paper: Adi, Baum, Cisse, Pinkas & Keshet, "Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by
Backdooring", USENIX Security 2018: 100 triggers, two of them in each batch of 100, from scratch or on a trained model.

Threat model: the owner trains. A thief gets the model, knows the scheme, and neither the triggers nor their labels; so
they reach no manifest, export, picture, log, checkpoint or store, and a config names the key's folder alone.

Deviations: the base's batches keep their size, and triggers come on top of it; which ones is drawn without replacement
from pass to pass, so that each is seen as often as any other. Triggers are never augmented.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.appended import Appended
from datamodules.datamodule import Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.files import full_path
from datamodules.imageset import Batch, ImageSet, put_rows
from datamodules.loading import GroupedBatches
from datamodules.measures import Evaluation, Measure
from datamodules.rewrite import Rewrite
from watermark.keys import MK, MarkingKey


class TriggerSet(Rewrite):
    """Watermark: a key's triggers in every batch, with labels that are not true (Adi et al. 2018).

    Measures, beside the base's: `trigger_accuracy`, the share of triggers that get the key's labels.

    Args:
        base: The datamodule to train on; another `TriggerSet` puts two keys into one model.
        key: The key's folder, as `lightning keygen` made it.
        per_batch: Triggers in each batch, over all devices together, beside the base's samples.
        name: Appended to the measure's name (`trigger_accuracy_<name>`), for two keys in one set.

    Raises:
        InputError: If there is no such key, it is for other data, or `per_batch` is not 1 to n.
    """

    version = 1

    def __init__(self, base: ImageDataModule, key: str, per_batch: int = 2, name: str | None = None) -> None:
        super().__init__(base)
        shape = tuple(base.image_shape)
        if not (full_path(key) / MK).exists():
            given = f"--classes {base.num_classes} --shape {','.join(map(str, shape))}"
            raise bad("key", key, f"there is no marking key; make one: lightning keygen --out {key} {given}")
        parameters = MarkingKey.read(key).parameters
        if (parameters.classes, parameters.shape) != (base.num_classes, shape):
            made = f"{parameters.classes} classes and images of {parameters.shape}"
            raise bad("key", key, f"it is for {made}, and these data have {base.num_classes} and {shape}")
        if not 1 <= per_batch <= parameters.n:
            raise bad("per_batch", per_batch, f"a batch has 1 to {parameters.n} triggers, the number of the key's")
        self.key, self.per_batch = key, per_batch
        self.suffix = f"_{name}" if name else ""
        self._triggers: ImageSet | None = None

    @property
    def secret(self) -> bool:  # type: ignore[override]
        """Always."""
        return True

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The base's images, and the triggers behind them."""
        if train.labels.ndim != 1:
            raise InputError("TriggerSet: the base has soft labels; mark it before they are made")
        key = MarkingKey.read(self.key)
        images, labels = torch.from_numpy(key.images()), torch.tensor(key.labels())
        self._triggers = ImageSet(images, labels, self.fresh_ids(len(labels)))
        return Appended(train, self._triggers)

    def groups(self) -> list[tuple[Tensor, int]]:
        """Rows of the training set that are drawn from together, and how many of each a batch has."""
        count = len(self.base.train_set)
        if isinstance(self.base, TriggerSet):
            before = self.base.groups()
        else:
            before = [(torch.arange(count), min(self.loading.batch_size, count))]
        return [*before, (torch.arange(count, len(self.train_set)), self.per_batch)]

    def train_batches(self, rank: int = 0, world_size: int = 1) -> GroupedBatches:
        """Batches of the base's samples and some triggers; an epoch is one pass through the base's."""
        rows, counts = zip(*self.groups(), strict=True)
        counts = (counts[0] - counts[0] % world_size if counts[0] < self.loading.batch_size else counts[0], *counts[1:])
        return GroupedBatches(rows, counts, self.loading.training_seed(), rank, world_size, through=0)

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """The base's augmentation of all but the triggers."""
        augmented = self.base.augment(batch, epoch)
        rows = self.trigger_rows(batch.ids)
        if augmented is batch or not len(rows):
            return augmented
        images = augmented.images.clone(memory_format=torch.contiguous_format)
        return augmented._replace(images=put_rows(images, rows, batch.images.index_select(0, rows)))

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and the triggers."""
        triggers = self._known()
        measure = Measure(f"trigger_accuracy{self.suffix}", triggers.labels, unit="triggers")
        return [*self.base.evaluations(split), Evaluation(f"trigger{self.suffix}", triggers, (measure,))]

    def facts(self) -> Facts:
        """How many there are; which, nobody is told."""
        return {
            **self.base.facts(),
            f"triggers{self.suffix}": len(self._known()),
            f"triggers_per_batch{self.suffix}": self.per_batch,
        }

    def _known(self) -> ImageSet:
        if self._triggers is None:
            raise RuntimeError("TriggerSet: call setup() before asking for its triggers")
        return self._triggers

    def trigger_rows(self, ids: Tensor) -> Tensor:
        """Where in a batch triggers are; their ids follow each other."""
        own = self._known().ids
        return ((ids >= int(own[0])) & (ids <= int(own[-1]))).nonzero().squeeze(1)
