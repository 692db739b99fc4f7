"""GTSRB, the German Traffic Sign Recognition Benchmark (Stallkamp et al. 2012), with the signs' boxes."""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from datamodules.augment import Augmentation
from datamodules.datamodule import Source, Splits
from datamodules.errors import InputError, bad
from datamodules.sources.decode import ImageFile, decode, image_file, listing_hash
from datamodules.sources.fetch import absent, damaged, fetch, line, unpack
from datamodules.store import Store, entry_digest, load_tensors

_DECODING = 1  # a change of what is done to the pixels; it has older entries of the store left alone
_UNPACKED = 2 * 2**30  # bytes; the largest of the official archives unpacks to a quarter of it
_ADDRESS = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_ARCHIVES = (  # name, MD5 (both as torchvision has them), what to take out of it, relative to the folder gtsrb
    ("GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478", "GTSRB/Training"),
    ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185", "GTSRB/Final_Test/Images"),
    ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5", "GT-final_test.csv"),
)
_COLUMNS = ("Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2")


class GTSRB(Source):
    """GTSRB: 26,640 + 12,630 photographs of German traffic signs of 43 kinds, with boxes (Stallkamp et al. 2012).

    Read from ``<data_dir>/gtsrb/GTSRB/Training/<class>/*.ppm`` with ``GT-<class>.csv``, from
    ``gtsrb/GTSRB/Final_Test/Images/*.ppm`` and ``gtsrb/GT-final_test.csv`` – torchvision's layout –, else downloaded
    there. The images, of 15 to 250 pixels, are resized to squares once, into a memory map in the store. The extras
    ``boxes``, float32 (N, 4), hold x1, y1, x2, y2 of the sign in pixels of the resized image.

    Args:
        size: Height and width of the images.
        crop_to_box: Whether each sign is cut out before it is resized; its box is then the whole image.
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
        InputError: If a number is out of its range.
    """

    num_classes = 43
    mean = (0.3403, 0.3121, 0.3214)
    std = (0.2724, 0.2608, 0.2669)
    class_names = (
        "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
        "end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking", "no overtaking by lorries",
        "priority at next junction", "priority road", "give way", "stop", "no vehicles", "no lorries", "no entry",
        "danger", "bend to the left", "bend to the right", "double bend", "uneven road", "slippery road",
        "road narrows on the right", "road works", "traffic signals", "pedestrians", "children", "bicycles",
        "ice or snow", "wild animals", "end of all restrictions", "turn right ahead", "turn left ahead", "ahead only",
        "straight on or right", "straight on or left", "keep right", "keep left", "roundabout", "end of no overtaking",
        "end of no overtaking by lorries",
    )  # fmt: skip

    def __init__(
        self,
        size: int = 32,
        crop_to_box: bool = False,
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
        self.size, self.crop_to_box = size, crop_to_box
        self.image_shape = (3, size, size)

    @property
    def _folder(self) -> Path:
        return self.data_dir / "gtsrb"

    def _find(self) -> None:
        for _, _, part in _ARCHIVES:
            (self._folder / part).stat()

    def prepare_data(self) -> None:
        """Download what is not there, and decode what is not in the store yet."""
        fetch(
            self,
            "gtsrb/GTSRB/Training, gtsrb/GTSRB/Final_Test/Images and gtsrb/GT-final_test.csv",
            self._find,
            self._download,
        )
        self._entry()

    def _download(self) -> None:
        from torchvision.datasets.utils import download_url

        for archive, md5, part in _ARCHIVES:
            if not (self._folder / part).exists():
                download_url(f"{_ADDRESS}{archive}", self._folder, archive, md5)
                unpack(self._folder / archive, part, self._folder / part, _UNPACKED)

    def read(self) -> Splits:
        """Both splits, as memory maps. What the store does not hold is decoded here, by one process for all."""
        entry = self._entry()
        train, test = (load_tensors(entry / f"{split}.safetensors") for split in ("train", "test"))
        return Splits(
            train["images"],
            train["labels"],
            test["images"],
            test["labels"],
            {"boxes": train["boxes"]},
            {"boxes": test["boxes"]},
            entry_digest(entry),
        )

    def _entry(self) -> Path:
        def make(folder: Path) -> None:
            for split, signs in self._signs.items():
                self._decode(signs, folder / f"{split}.safetensors")

        files = {
            split: listing_hash([s.file for s in signs], [s.label for s in signs], [s.box for s in signs])
            for split, signs in self._signs.items()
        }
        key = {"files": files, "size": self.size, "crop_to_box": self.crop_to_box, "decoding": _DECODING}
        return Store().build("gtsrb", key, make)

    def _decode(self, signs: list[_Sign], path: Path) -> None:
        labels = torch.tensor([sign.label for sign in signs], dtype=torch.int64)
        boxes = torch.tensor([sign.box for sign in signs], dtype=torch.float32)

        def fit(image: Image.Image, row: int) -> Image.Image:
            width, height = image.size
            x1, y1, x2, y2 = box = signs[row].box
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                what = f"its box is {box}, the image has {width} by {height} pixels"
                name = signs[row].file.path
                raise InputError(f"{type(self).__name__}: {name}: {what}; mend or remove its line in the table")
            if self.crop_to_box:
                boxes[row] = torch.tensor([0.0, 0.0, self.size, self.size])
            else:
                boxes[row] *= self.size / torch.tensor([width, height, width, height])
            sign = image.crop(box) if self.crop_to_box else image
            return sign.resize((self.size, self.size), Image.Resampling.BILINEAR)

        decode([sign.file for sign in signs], self.size, fit, path, {"labels": labels, "boxes": boxes})

    @cached_property
    def _signs(self) -> dict[str, list[_Sign]]:
        """The rows of the tables, in torchvision's order: training images by class and name, test images as listed."""
        base = self._folder / "GTSRB"
        try:
            folders = sorted(folder for folder in (base / "Training").iterdir() if folder.name.isdigit())
        except OSError as error:
            raise absent(self, base / "Training") from error
        train = [
            sign
            for folder in folders
            for sign in sorted(self._table(folder / f"GT-{folder.name}.csv", folder), key=lambda sign: sign.file.name)
        ]
        return {"train": train, "test": self._table(self._folder / "GT-final_test.csv", base / "Final_Test" / "Images")}

    def _damaged(self, path: Path, what: object) -> InputError:
        return damaged(self, path, what, f"remove the folder {self._folder}, and it is fetched anew")

    def _table(self, path: Path, folder: Path) -> list[_Sign]:
        try:
            with path.open(newline="", encoding="utf-8") as table:
                rows = list(csv.DictReader(table, delimiter=";", skipinitialspace=True))
        except FileNotFoundError as error:
            raise self._damaged(path, f"{error.filename} is missing") from error
        except (OSError, ValueError, csv.Error) as error:
            raise self._damaged(path, error) from error
        signs = []
        for number, row in enumerate(rows, 2):  # the first line names the columns
            try:
                x1, y1, x2, y2 = (int(row[column]) for column in _COLUMNS)
                file = image_file(folder / row["Filename"], f"{folder.name}/{row['Filename']}")
                signs.append(_Sign(file, int(row["ClassId"]), (x1, y1, x2, y2)))
            except (OSError, KeyError, TypeError, ValueError) as error:
                what = f"no column {error}" if isinstance(error, KeyError) else error
                raise damaged(self, path, f"line {number}: {line(what)}", "mend or remove that line") from error
        if not signs:
            raise self._damaged(path, "no rows")
        return signs


class _Sign(NamedTuple):
    file: ImageFile
    label: int
    box: tuple[int, int, int, int]
