"""Pictures of a run: what was done to the images, and how training went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.datamodule import ImageDataModule
from datamodules.resized import resize
from datamodules.rewrite import Rewrite


@dataclass(frozen=True)
class Pair:
    """A sample before and after rewriting: uint8 (C, H, W) each, its ids and the names of its labels."""

    id: int
    clean: Tensor
    poisoned: Tensor
    original_label: str
    label: str

    @property
    def difference(self) -> Tensor:
        """Grey where nothing changed, brighter and darker where it did: uint8 (C, H, W)."""
        change = self.poisoned.to(torch.int16) - self.clean.to(torch.int16)
        return (128 + change.div(2, rounding_mode="floor")).clamp(0, 255).to(torch.uint8)


def source_of(datamodule: ImageDataModule) -> ImageDataModule:
    """What the rewrites are wrapped round."""
    while isinstance(datamodule, Rewrite):
        datamodule = datamodule.base
    return datamodule


def changed_pairs(datamodule: ImageDataModule, most: int = 8) -> list[Pair]:
    """The first few samples that rewrites changed or added, with what each was made from.

    Args:
        datamodule: Set up.
        most: How many at the most.
    """
    before, after = source_of(datamodule).train_set, datamodule.train_set
    pairs: list[Pair] = []
    for changes in datamodule.changes():
        for sample, origin, old, new in zip(
            changes.ids.tolist(), changes.origins.tolist(), changes.original_labels.tolist(), changes.labels.tolist(),
            strict=True,
        ):  # fmt: skip
            if len(pairs) == most:
                return pairs
            row = (after.ids == sample).nonzero().flatten()
            origin_row = (before.ids == origin).nonzero().flatten()
            if len(row) and len(origin_row):
                names = datamodule.class_names
                clean, poisoned = before.images_at(origin_row), datamodule.materialise(row).images[0]
                if clean.shape[1:] != poisoned.shape and poisoned.shape[1] == poisoned.shape[2]:
                    clean = resize(clean, poisoned.shape[1])
                pairs.append(Pair(sample, clean[0], poisoned, str(names[old]), str(names[new])))
    return pairs


def write_grid(datamodule: ImageDataModule, path: Path, most: int = 8) -> bool:
    """Draw clean | poisoned | difference, a column for each sample; False if nothing was changed."""
    pairs = changed_pairs(datamodule, most)
    if not pairs:
        return False
    figure = _figure(1.3 * len(pairs) + 0.9, 4.4)
    rows = ("clean", "poisoned", "difference")
    axes = figure.subplots(3, len(pairs), squeeze=False)
    for column, pair in enumerate(pairs):
        for line, image in enumerate((pair.clean, pair.poisoned, pair.difference)):
            axis = axes[line][column]
            shown = image.permute(1, 2, 0).numpy()
            axis.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(rows[line])
            if line == 0:
                axis.set_title(pair.original_label if pair.original_label == pair.label
                               else f"{pair.original_label} → {pair.label}", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=120)
    return True


def write_curves(history: list[dict[str, float]], path: Path) -> bool:
    """Draw the holdout's measures, and the training loss, over the epochs; False if there is nothing to draw."""
    shares = sorted({name for row in history for name in row if name.startswith("val/")})
    losses = sorted({name for row in history for name in row if name.startswith("train/")})
    if not shares and not losses:
        return False
    figure = _figure(9, 3.6)
    for axis, names, scale, label in zip(
        figure.subplots(1, 2), (shares, losses), (100, 1), ("holdout (%)", "training loss"), strict=True
    ):
        for name in names:
            points = [(row["epoch"] + 1, scale * row[name]) for row in history if name in row]
            points = [point for point in points if math.isfinite(point[1])]
            line = name.split("/", 1)[1].replace("_", " ")
            axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=line)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if names:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def _figure(width: float, height: float) -> Any:
    """A figure that touches no global state of matplotlib's, and needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
