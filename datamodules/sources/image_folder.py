"""A folder of image files of any size, one sub-folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datamodules.augment import Augmentation
from datamodules.datamodule import Source, Splits
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import full_path
from datamodules.imageset import fingerprint
from datamodules.random import generator
from datamodules.sources.decode import ImageFile, decode, foreign, image_files, listing_hash, shorten_and_crop
from datamodules.sources.fetch import locate, unseen
from datamodules.store import Store, entry_digest, load_tensors

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_TEST_FRACTION = 0.2
_FILE = "images.safetensors"
_DECODING = 1  # a change of what is done to the pixels; it has older entries of the store left alone


class ImageFolder(Source):
    """Your own images in folders, one for each class: JPEG, PNG and others, of any size.

    The classes are the names of the sub-folders of `train`, in the order of code points (upper case before lower case,
    ``class10`` before ``class2``), as torchvision has them; files may lie deeper below. Images are turned to RGB, their
    shorter side is resized to `size`, and the middle is cut out. That is done once, into a memory map in the store.

    Args:
        train: The folder of the training images; a relative path is looked for in the working directory, then in
            `data_dir`.
        test: The folder of the test images, with the same sub-folders; None: a part of the training images is used.
        test_fraction: With no `test` folder, the share of the images that is the test set, drawn by `split_seed` from
            each class as evenly as may be; one image of each stays for training.
        size: Height and width of the images.
        mean: Of each channel, for pixels in [0, 1]; the default is ImageNet's.
        std: The standard deviation of each; the default is ImageNet's.
        data_dir: See `Source`.
        batch_size: See `Source`.
        eval_batch_size: See `Source`.
        val_fraction: See `Source`.
        augment: See `Source`.
        num_workers: See `Source`.
        resident: See `Source`.
        split_seed: See `Source`.
        seed: See `Source`.

    Raises:
        InputError: If a folder is missing, has less than two sub-folders, or those of splits and not of classes; `test`
            holds training images, or classes that `train` has not; or a number is out of its range.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        test_fraction: float = _TEST_FRACTION,
        size: int = 224,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
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
        super().__init__(
            data_dir, batch_size, eval_batch_size, val_fraction, augment, num_workers, resident, split_seed, seed
        )
        if size < 1:
            raise bad("size", size, "images have 1 pixel or more")
        if not 0 < test_fraction < 1:
            raise bad("test_fraction", test_fraction, "the share of the test set must be in (0, 1)")
        if test is not None and test_fraction != _TEST_FRACTION:
            raise bad(
                "test_fraction", test_fraction, f"the folder test = {test!r} is the test set; leave one of them out"
            )
        self.size, self.test_fraction = size, test_fraction
        self.image_shape = (3, size, size)
        self.mean, self.std = mean, std
        self.train_folder = self._locate("train", train)
        self.test_folder = self._locate("test", test) if test is not None else None
        self.class_names: Sequence[str] = _folders(self.train_folder)
        self.num_classes = len(self.class_names)
        _check_classes(train, self.train_folder, self.class_names)
        if self.test_folder is not None:
            _check_apart(str(test), self.train_folder, self.test_folder)
        for name in _folders(self.test_folder) if self.test_folder else ():
            if name not in self.class_names:
                hint = did_you_mean(name, self.class_names)
                raise bad("test", test, f"the class {name!r} is not among the sub-folders of {self.train_folder}{hint}")

    def _locate(self, field: str, path: str) -> Path:
        found = locate(self, field, path)
        if not found.is_dir():
            raise bad(field, path, f"{found} is no folder")
        return found

    def prepare_data(self) -> None:
        """Decode what is not in the store yet."""
        self._entries()

    def read(self) -> Splits:
        """Both splits, as memory maps. What the store does not hold is decoded here, by one process for all."""
        folders = self._entries()
        cut = len(self._listings[0].files)
        parts = [load_tensors(folder / _FILE) for folder in folders]
        if len(parts) == 1:
            both = parts[0]
            parts = [{k: v[:cut] for k, v in both.items()}, {k: v[cut:] for k, v in both.items()}]
        train, test = parts
        digest = fingerprint(cut, *map(entry_digest, folders))
        return Splits(train["images"], train["labels"], test["images"], test["labels"], digest=digest)

    @cached_property
    def _listings(self) -> tuple[_Listing, _Listing]:
        """Files and labels of the training and of the test images."""
        train = self._listing(self.train_folder)
        missing = sorted(set(range(self.num_classes)) - set(train.labels))
        if missing:
            raise InputError(f"{self.train_folder / self.class_names[missing[0]]}: a class without images")
        if self.test_folder is not None:
            test = self._listing(self.test_folder)
            known = {file.inode for file in train.files}
            both = [file for file in test.files if file.inode in known]
            if both:
                text = f"{len(both)} of its {len(test.files)} images are links to training images ({both[0].path})"
                raise bad("test", str(self.test_folder), f"{text}; they test nothing: take them out of either folder")
            return train, test
        tested = stratified(torch.tensor(train.labels), self.test_fraction, self.split_seed)
        if not 0 < int(tested.sum()) < len(tested):
            text = f"of {len(tested)} images that leaves none to train or to test on"
            raise bad("test_fraction", self.test_fraction, text)
        return train.select((~tested).nonzero().flatten()), train.select(tested.nonzero().flatten())

    def _listing(self, folder: Path) -> _Listing:
        files, labels = [], []
        for label, name in enumerate(self.class_names):
            if (folder / name).is_dir():
                found = list(image_files(folder / name, SUFFIXES, f"{name}/"))
                files += found
                labels += [label] * len(found)
        if not files:
            raise InputError(f"{folder}: no images in the folders of the classes ({', '.join(SUFFIXES)})")
        return _Listing(files, labels)

    def _entries(self) -> list[Path]:
        """The store's entries: one for each folder, so that one decoding serves in several compositions.

        Where the test images are cut from the same folder there is one entry of both, the training images first: a
        memory map can be cut in two, but not by a list of rows without copying it.
        """
        train, test = self._listings
        return [self._decoded(part) for part in ([train + test] if self.test_folder is None else [train, test])]

    def _decoded(self, listing: _Listing) -> Path:
        def make(folder: Path) -> None:
            labels = torch.tensor(listing.labels, dtype=torch.int64)
            decode(
                listing.files,
                self.size,
                lambda image, _: shorten_and_crop(image, self.size),
                folder / _FILE,
                {"labels": labels},
            )

        key = {"files": listing_hash(listing.files, listing.labels), "size": self.size, "decoding": _DECODING}
        return Store().build("image-folder", key, make)


@dataclass(frozen=True)
class _Listing:
    files: list[ImageFile]
    labels: list[int]

    def select(self, rows: Tensor) -> _Listing:
        kept = rows.sort().values.tolist()
        return _Listing([self.files[row] for row in kept], [self.labels[row] for row in kept])

    def __add__(self, other: _Listing) -> _Listing:
        return _Listing(self.files + other.files, self.labels + other.labels)


def _folders(folder: Path) -> list[str]:
    """The names of the sub-folders, in the order of code points; not of those that other programs leave behind.

    Raises:
        InputError: If it cannot be looked at.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not foreign(entry.name) and entry.is_dir())
    except OSError as error:
        raise unseen(error) from error


def _check_classes(train: str, folder: Path, names: Sequence[str]) -> None:
    """Refuse what are no classes: none, one, or the folders of splits."""
    if not names:
        raise bad("train", train, f"{folder} has no sub-folders: one for each class is needed")
    splits = {split for split, called in _SPLITS.items() for name in names if name.lower() in called}
    if len(splits) > 1 or (splits and len(names) == 1):
        given = ", ".join(
            f"{split}: {full_path(train) / name}"
            for split in ("train", "test")
            for name in names
            if name.lower() in _SPLITS[split]
        )
        raise bad("train", train, f"its sub-folders are splits and not classes ({', '.join(names)}); give {given}")
    if len(names) < 2:
        raise bad("train", train, f"{folder} has one sub-folder, {names[0]!r}: of one class nothing can be told apart")


def _check_apart(test: str, train_folder: Path, test_folder: Path) -> None:
    """Refuse a test folder that is the training folder, whatever links lead there, or lies in it or round it."""
    trained, tested = train_folder.resolve(), test_folder.resolve()
    if trained == tested or trained in tested.parents or tested in trained.parents:
        same = "is the folder train" if trained == tested else f"shares images with the folder train, {trained}"
        raise bad("test", test, f"it {same}; give another folder, or leave it out: test_fraction cuts a test set off")


def stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which rows are drawn: round(`fraction` · N) in all, of each class as near to `fraction` as whole numbers allow.

    Args:
        labels: int64 (N,).
        fraction: In (0, 1).
        seed: Of the draw.

    Returns:
        bool (N,). One row of each class at least is not drawn, even where that leaves fewer than asked for.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "image-folder"))
    counts = labels.bincount()
    exact = fraction * counts.double()
    drawn = torch.minimum(exact.floor().long(), (counts - 1).clamp_min(0))
    room = (counts - 1 - drawn).clamp_min(0)
    for label in (exact - drawn).argsort(descending=True, stable=True).tolist():  # the largest remainders get one more
        if int(drawn.sum()) < round(fraction * len(labels)) and room[label]:
            drawn[label] += 1
    found = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(drawn.tolist()):
        found[order[labels[order] == label][:count]] = True
    return found
