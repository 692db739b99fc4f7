"""Rewrite: a datamodule that wraps another one and changes its training data, its measures, or its batches.

Every attack and every defence is one. A subclass overrides what it changes:

* `rewrite(train)` – the training set, from its base's; cheap, on every rank, by its seed alone;
* `evaluations(split)` – more measures, beside its base's;
* `rewrite_batch(batch)` – what happens after augmentation;
* `prepare_data()` – costly work (crafting, asking an oracle), into the store, read back in `rewrite`.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer

from datamodules.datamodule import Changes, Facts, ImageDataModule, Loading
from datamodules.imageset import Batch, ImageSet
from datamodules.measures import Evaluation


class Rewrite(ImageDataModule):
    """Wraps `base`; as it stands, it changes nothing.

    Args:
        base: The datamodule to rewrite; it may be a rewrite itself.
    """

    def __init__(self, base: ImageDataModule) -> None:
        self.base = base
        super().__init__()
        self._train_set: ImageSet | None = None
        self._changes: list[Changes] = []
        self._added = 0

    # --- what a subclass overrides -----------------------------------------------------------------------------------
    def rewrite(self, train: ImageSet) -> ImageSet:
        """The new training set. Report changes by `record` and copies to the base by `copied`; ids: `fresh_ids`."""
        return train

    # --- for the subclass --------------------------------------------------------------------------------------------
    def record(self, changes: Changes) -> None:
        """Remember what `rewrite` changed, for exports, manifests and scoring."""
        self._changes.append(changes)

    def fresh_ids(self, n: int) -> torch.Tensor:
        """`n` ids that no sample has: int64 (n,)."""
        first = self.next_id
        self._added += n
        return torch.arange(first, first + n)

    # --- delegation --------------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        """Prepare the base."""
        self.base.prepare_data()

    def setup(self, stage: str = "fit") -> None:
        """Set the base up, then rewrite its training set, once."""
        self.base.setup(stage)
        if self._train_set is None:
            self._train_set = self.rewrite(self.base.train_set)

    def teardown(self, stage: str) -> None:
        """Tear the base down."""
        self.base.teardown(stage)

    @property
    def train_set(self) -> ImageSet:
        """The rewritten training set."""
        if self._train_set is None:
            raise RuntimeError(f"{type(self).__name__}: call setup() before asking for the training set")
        return self._train_set

    @property
    def val_set(self) -> ImageSet:
        """The base's holdout."""
        return self.base.val_set

    @property
    def test_set(self) -> ImageSet:
        """The base's test set."""
        return self.base.test_set

    @property
    def next_id(self) -> int:
        """The base's, and past what was added here."""
        return self.base.next_id + self._added

    @property
    def loading(self) -> Loading:
        """The base's."""
        return self.base.loading

    def resize_batches(self, size: int) -> None:
        """Resize the base's."""
        self.base.resize_batches(size)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The base's."""
        return self.base.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """The base's."""
        return self.base.image_shape

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        """The base's."""
        return self.base.mean

    @property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        """The base's."""
        return self.base.std

    @property
    def class_names(self) -> Any:  # type: ignore[override]
        """The base's."""
        return self.base.class_names

    @property
    def secret(self) -> bool:  # type: ignore[override]
        """Whether the base holds secrets; a rewrite that does overrides this."""
        return self.base.secret

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's."""
        return self.base.evaluations(split)

    def changes(self) -> list[Changes]:
        """The base's, then this rewrite's."""
        return [*self.base.changes(), *self._changes]

    def facts(self) -> Facts:
        """The base's."""
        return self.base.facts()

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """The base's."""
        return self.base.augment(batch, epoch)

    def copied(self, ids: torch.Tensor, origins: torch.Tensor) -> None:
        """Tell the base; a rewrite that goes by ids in `rewrite_batch` adds those of copies to them."""
        self.base.copied(ids, origins)

    def rewrite_batch(self, batch: Batch) -> Batch:
        """The base's."""
        return self.base.rewrite_batch(batch)

    @property
    def trainer(self) -> Trainer | None:
        """The trainer, which the base gets too."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        self.base.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The base's."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base's."""
        self.base.load_state_dict(state_dict)
