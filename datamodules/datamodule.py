"""ImageDataModule: what a source of images and a rewrite of it have in common.

The pure parts – sets, sampling, augmentation, measures – are in their own files; this is the Lightning shell round
them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from datamodules.augment import Augmentation
from datamodules.errors import InputError, bad
from datamodules.files import full_path
from datamodules.imageset import Batch, ImageSet
from datamodules.loading import Batches, EvaluationBatches, Loader, Passes, TrainBatches
from datamodules.measures import Evaluation, Measure, Numbered
from datamodules.random import generator

Facts = dict[str, float | int | str | list[int] | list[float]]


@dataclass(frozen=True)
class Changes:
    """What a rewrite changed of the training set; export and scoring read it, a defence never does.

    Attributes:
        kind: The rewrite's name.
        ids: int64 (M,): the ids of the changed or added samples.
        origins: int64 (M,): the id each was made from; the same as `ids` where it was changed in place.
        original_labels: int64 (M,): labels before.
        labels: int64 (M,): labels after; of soft ones the likeliest class.
    """

    kind: str
    ids: Tensor
    origins: Tensor
    original_labels: Tensor
    labels: Tensor


class ImageDataModule(LightningDataModule, ABC):
    """Images with labels in train, validation and test splits, and what is to be measured on them.

    Right after construction it knows `num_classes`, `image_shape`, `mean` and `std`; after `setup`, the three sets.
    """

    num_classes: int
    """K."""
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    """Of each channel of the training images, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Its standard deviation."""
    class_names: Sequence[str]
    """K names."""
    secret: bool = False
    """Whether ids and images must reach no manifest, export, picture, log or store."""

    # --- what sources and rewrites give -----------------------------------------------------------------------------
    @property
    @abstractmethod
    def train_set(self) -> ImageSet:
        """The training set, rewritten."""

    @property
    @abstractmethod
    def val_set(self) -> ImageSet:
        """The holdout, cut from the training data by the split seed before anything is rewritten."""

    @property
    @abstractmethod
    def test_set(self) -> ImageSet:
        """The test set as it came."""

    @property
    @abstractmethod
    def next_id(self) -> int:
        """The smallest id that no sample of any split has."""

    @property
    @abstractmethod
    def loading(self) -> Loading:
        """How batches are made."""

    @abstractmethod
    def evaluations(self, split: str) -> list[Evaluation]:
        """What to measure on ``"val"`` or ``"test"``."""

    @property
    def batch_size(self) -> int:
        """Training samples in a batch, where Lightning's batch-size finder looks for it and sets it."""
        return self.loading.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.resize_batches(size)

    def resize_batches(self, size: int) -> None:
        """Make training batches of another size from now on."""
        raise bad("batch_size", size, f"{type(self).__name__} has batches of one size; give it in the configuration")

    def changes(self) -> list[Changes]:
        """What the rewrites changed, innermost first."""
        return []

    def facts(self) -> Facts:
        """What is known without a model: sizes, fractions, norms. It reaches manifest.json and metrics.json."""
        return {}

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """A training batch, augmented; rewrites change it after that in `rewrite_batch`."""
        return batch

    def copied(self, ids: Tensor, origins: Tensor) -> None:
        """Take note that a rewrite outside added copies: training samples `ids` of `origins`, both int64 (M,)."""

    def rewrite_batch(self, batch: Batch) -> Batch:
        """A batch after augmentation, with the triggers that are stamped at this point."""
        return batch

    # --- what follows from it ----------------------------------------------------------------------------------------
    def materialise(self, rows: Tensor) -> Batch:
        """Training rows as the model will see them, without augmentation."""
        return self.rewrite_batch(self.train_set.__getitems__(rows))

    def train_dataloader(self) -> Loader:
        """Shuffled training batches; with the trainer's `overfit_batches` the same ones in every epoch."""
        batches = self.train_batches(*self._place())
        batches.repeat = self._overfits()
        loader = self._loader(self.train_set, batches, self._batches_done)
        self._one_at_least("train", [loader])
        return loader

    def train_batches(self, rank: int = 0, world_size: int = 1) -> Batches:
        """The rows of each training batch, on one of several processes."""
        loading = self.loading
        return TrainBatches(len(self.train_set), loading.batch_size, loading.training_seed(), rank, world_size)

    def val_dataloader(self) -> list[Loader]:
        """One loader for each evaluation on the holdout."""
        loaders = self._evaluation_loaders("val")
        self._one_at_least("val", loaders)
        return loaders

    def test_dataloader(self) -> list[Loader]:
        """One loader for each evaluation on the test set, and on the holdout for the acceptance gate."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[Passes]:
        """As for the test."""
        return [Passes(loader) for loader in self._evaluation_loaders("test")]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment and rewrite a training batch, on the device; leave any other alone."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return batch
        return self.rewrite_batch(self.augment(batch, 0 if self._overfits() else trainer.current_epoch))

    def _evaluation_loaders(self, split: str) -> list[Loader]:
        rank, world = self._place()
        return [
            self._loader(
                Numbered(evaluation.images),
                EvaluationBatches(len(evaluation.images), self.loading.eval_batch_size, rank, world),
            )
            for evaluation in self.evaluations(split)
        ]

    def _loader(self, images: ImageSet, batches: Batches | EvaluationBatches, done: Any = None) -> Loader:
        loading, trainer = self.loading, self.trainer
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        if loading.resident:
            return Loader(images.to(device), batches, done=done)
        return Loader(images, batches, loading.num_workers, done, pin_memory=device.type == "cuda")

    def _overfits(self) -> bool:
        """Whether the trainer wants the same few batches again and again."""
        return self.trainer is not None and getattr(self.trainer, "overfit_batches") > 0  # noqa: B009 – it has no type

    def _one_at_least(self, stage: str, loaders: Sequence[Loader]) -> None:
        """A share of the batches to overfit is one batch at least, of the smallest set too."""
        share = getattr(self.trainer, f"limit_{stage}_batches", 1)
        if self._overfits() and isinstance(share, float) and any(int(len(each) * share) == 0 for each in loaders):
            setattr(self.trainer, f"limit_{stage}_batches", 1)

    def _place(self) -> tuple[int, int]:
        """Rank and world size."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _batches_done(self) -> int:
        if self.trainer is None or not self.trainer.training:
            return 0
        done: int = getattr(self.trainer.fit_loop.epoch_loop.batch_progress.current, "processed")  # noqa: B009 – typed too narrowly
        return done


@dataclass(frozen=True)
class Loading:
    """How batches are made: see `Source` for the meaning of each field."""

    batch_size: int
    eval_batch_size: int
    num_workers: int
    resident: bool
    seed: int | None

    def training_seed(self) -> int:
        """The seed of shuffling and augmentation: one's own, or that of the run (`seed_everything`)."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))


@dataclass(frozen=True)
class Splits:
    """What a source reads: training and test images as uint8 (N, C, H, W), labels int64 (N,), and extras of each."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train_extras: dict[str, Tensor] | None = None
    test_extras: dict[str, Tensor] | None = None
    digest: str | None = None  # of all this, where it is known already


class Source(ImageDataModule):
    """Images from disk. A subclass names its classes and its shape, and reads; everything else is here.

    Args:
        data_dir: The data folder; by default the environment variable ``PHARMAKON_DATA``, else ``data/``.
        batch_size: Training samples in a batch, over all devices together.
        eval_batch_size: Samples in an evaluation batch, on each device.
        val_fraction: The share of the training images that is held out of training for validation: the user's holdout.
        augment: Changes training batches at random; None: nothing does.
        num_workers: Worker processes of the loaders; 0 is fastest for sets in memory.
        resident: Whether the whole set moves to the training device once; batches are then never copied to it.
        split_seed: Seed of the split into train and validation; it stays the same while others vary.
        seed: Seed of shuffling and augmentation; None: the run's `seed_everything`.

    Raises:
        InputError: If a number is out of its range.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_fraction: float = 0.05,
        augment: Augmentation | None = None,
        num_workers: int = 0,
        resident: bool = False,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for field, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise bad(field, size, "a batch holds 1 sample or more")
        if not 0 <= val_fraction < 1:
            raise bad("val_fraction", val_fraction, "the share held out must be in [0, 1)")
        if resident and num_workers:
            raise bad("num_workers", num_workers, "a resident set has no worker processes; set it to 0")
        self.data_dir = full_path(data_dir or os.environ.get("PHARMAKON_DATA") or "data")
        self.val_fraction = val_fraction
        self.augmentation = augment
        self.split_seed = split_seed
        self._loading = Loading(batch_size, eval_batch_size, num_workers, resident, seed)
        self._sets: dict[str, ImageSet] = {}

    # --- what a subclass gives ---------------------------------------------------------------------------------------
    @abstractmethod
    def read(self) -> Splits:
        """Read both splits from disk. Called on every rank; writes nothing but through the store.

        Raises:
            InputError: If something is missing or damaged; it names the file and the remedy.
        """

    # --- what follows from it ----------------------------------------------------------------------------------------
    @property
    def loading(self) -> Loading:
        """How batches are made."""
        return self._loading

    def resize_batches(self, size: int) -> None:
        """Make training batches of another size from now on."""
        self._loading = replace(self._loading, batch_size=size)

    def setup(self, stage: str = "fit") -> None:
        """Read the images and hold the validation set out of train, once."""
        if self._sets:
            return
        splits = self.read()
        n, m = len(splits.train_labels), len(splits.test_labels)
        for name, found, labels in (("training", len(splits.train_images), n), ("test", len(splits.test_images), m)):
            if found != labels:
                what = f"{found:,} {name} images and {labels:,} labels in {self.data_dir}"
                raise InputError(f"{type(self).__name__}: {what}: a label for each image is needed; get the files anew")
        known = splits.digest
        train = ImageSet(
            splits.train_images,
            splits.train_labels,
            torch.arange(n),
            splits.train_extras,
            known and f"{known}/train",
        )
        test = ImageSet(
            splits.test_images,
            splits.test_labels,
            torch.arange(n, n + m),
            splits.test_extras,
            known and f"{known}/test",
        )
        for name, images in (("training", train), ("test", test)):
            if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < self.num_classes:
                raise InputError(
                    f"{type(self).__name__}: a {name} label lies outside 0 … {self.num_classes - 1} in {self.data_dir}"
                )
            if images.image_shape != tuple(self.image_shape):
                raise InputError(
                    f"{type(self).__name__}: {name} images are {images.image_shape}, expected {self.image_shape}"
                )
        order = torch.randperm(n, generator=generator(self.split_seed, "split"))
        held = round(self.val_fraction * n)
        if n and held == n:
            raise bad("val_fraction", self.val_fraction, f"holds out all of the {n} images; leave some to train on")
        self._sets = {
            "val": train.select(order[:held].sort().values),
            "train": train.select(order[held:].sort().values) if held else train,
            "test": test,
        }

    @property
    def train_set(self) -> ImageSet:
        """The training images that are not held out."""
        return self._set("train")

    @property
    def val_set(self) -> ImageSet:
        """The holdout."""
        return self._set("val")

    @property
    def test_set(self) -> ImageSet:
        """The test images."""
        return self._set("test")

    @property
    def next_id(self) -> int:
        """The number of images in all splits."""
        return len(self._set("train")) + len(self._set("val")) + len(self._set("test"))

    def evaluations(self, split: str) -> list[Evaluation]:
        """Clean accuracy on the split; in the test also on the holdout, which the acceptance gate goes by."""
        measured = {"val": self.val_set, "test": self.test_set}[split]
        found = [Evaluation("clean", measured, (Measure("clean_accuracy", measured.labels),))]
        if split == "test" and len(self.val_set):
            held = self.val_set
            found.append(Evaluation("holdout", held, (Measure("holdout_accuracy", held.labels),)))
        return [evaluation for evaluation in found if len(evaluation.images)]

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """The augmentation of the configuration, keyed by sample id."""
        if self.augmentation is None:
            return batch
        images = self.augmentation(batch.images, batch.ids, self._loading.training_seed(), epoch)
        return batch._replace(images=images)

    def _set(self, name: str) -> ImageSet:
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__}: call setup() before asking for the {name} set")
        return self._sets[name]
