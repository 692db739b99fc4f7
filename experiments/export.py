"""`lightning export`: the rewritten training set as PNG files with a table, for looking at and for other tools."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.files import under_way
from experiments.arguments import value_of
from experiments.cli import start

COLUMNS = ("file", "id", "label", "original_label", "poisoned", "origin", "rewrite")


def export(args: list[str]) -> int:
    """Write the training set of a config.

    Args:
        args: ``export --config NAME --out DIR [--limit N] [--changed] [--KEY=VALUE …]``; ``--changed`` leaves out what
            no rewrite touched.

    Raises:
        InputError: If the folder is not empty, or the data hold secrets.
    """
    passed, out, limit, changed = ["test"], "", 0, False
    rest = iter(args[1:])
    for arg in rest:
        key, equals, value = arg.partition("=")
        if key == "--out":
            out = value if equals else value_of(rest, key)
        elif key == "--limit":
            text = value if equals else value_of(rest, key)
            if not text.isdigit() or int(text) < 1:
                raise bad("limit", text, "the number of images must be 1 or more")
            limit = int(text)
        elif key == "--changed":
            changed = True
        else:
            passed.append(arg)
    if not out:
        raise InputError("out: name a folder: lightning export --config badnets_digits --out DIR")
    datamodule = start(passed, act=False, keep=False).datamodule
    assert isinstance(datamodule, ImageDataModule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    written = write_images(datamodule, Path(os.path.abspath(out)), limit or None, changed)
    print(f"{written} images and table.csv: {out}")
    return 0


def write_images(datamodule: ImageDataModule, out: Path, limit: int | None = None, changed: bool = False) -> int:
    """Write a training set as the model will see it, augmentation off.

    Args:
        datamodule: Set up.
        out: A folder that does not exist yet, or is empty; it appears when all is written.
        limit: How many images at the most.
        changed: Whether to leave out what no rewrite touched.

    Returns:
        How many were written.

    Raises:
        InputError: If the folder is not empty, the data hold secrets, or the images are neither grey nor RGB.
    """
    if datamodule.secret:
        raise InputError("export: this set holds secret triggers, and is not exported")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise bad("out", str(out), "there is something already; choose a new folder")
    channels = datamodule.image_shape[0]
    if channels not in (1, 3):
        raise InputError(f"export: images of {channels} channels are neither grey nor RGB")
    train = datamodule.train_set
    touched: dict[int, tuple[int, int, str]] = {}
    for each in datamodule.changes():
        for sample, origin, old in zip(
            each.ids.tolist(), each.origins.tolist(), each.original_labels.tolist(), strict=True
        ):
            first_origin, first_label, names = touched.get(sample, (origin, old, ""))
            touched[sample] = (first_origin, first_label, f"{names}+{each.kind}".removeprefix("+"))
    rows = torch.arange(len(train))
    if changed:
        rows = rows[torch.isin(train.ids, torch.tensor(sorted(touched), dtype=torch.int64))]
    rows = rows[:limit]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with under_way(out, folder=True) as partial:
            _write(datamodule, rows, touched, partial)
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
    except OSError as error:
        raise bad("out", str(out), f"cannot be written ({error.strerror}); choose another folder") from error
    return len(rows)


def _write(
    datamodule: ImageDataModule, rows: torch.Tensor, touched: Mapping[int, tuple[int, int, str]], folder: Path
) -> None:
    """Write the images of some rows into a folder, and a table of them."""
    from PIL import Image
    from rich.progress import track

    (folder / "images").mkdir()
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for part in track(rows.split(256), description="writing images", transient=True):
            batch = datamodule.materialise(part)
            labels = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)
            for image, label, sample in zip(batch.images, labels.tolist(), batch.ids.tolist(), strict=True):
                pixels = image.permute(1, 2, 0).numpy()
                name = f"images/{sample:07d}.png"
                Image.fromarray(pixels[..., 0] if datamodule.image_shape[0] == 1 else pixels).save(folder / name)
                origin, original, kinds = touched.get(sample, (sample, label, ""))
                table.writerow([name, sample, label, original, int(sample in touched), origin, kinds])
