"""Notes: what a reader of a run's figures must know, in a line each – on the screen, in metrics.json, in results.csv.

A figure is only as good as what it was measured on: a run that trained nothing, or that saw a part of its images, ends
like any other, with a table. Each note is a fact of the run, not a guess at what was meant.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer

from datamodules.datamodule import ImageDataModule
from datamodules.loading import TrainBatches

_LARGE = 0.1
"""Of the training images: a share left out of every epoch that is worth a note."""


def before_fit(trainer: Trainer, datamodule: ImageDataModule) -> list[str]:
    """What is known before training: limits, and images that no epoch has room for."""
    found = _trial(trainer)
    batches, overfit = datamodule.train_batches(), _of(trainer, "overfit_batches")
    if overfit:
        found.append(f"overfit_batches = {overfit}: a few batches were trained on, again and again")
    elif not found:
        found += _limited("limit_train_batches", trainer.limit_train_batches, len(batches), "an epoch was")
    labels = datamodule.train_set.labels
    if labels.ndim == 1:
        counts = labels[labels >= 0].bincount(minlength=datamodule.num_classes).tolist()
        without = [str(name) for name, count in zip(datamodule.class_names, counts, strict=False) if not count]
        if without and sum(counts):
            some = ", ".join(without[:5]) + (" …" if len(without) > 5 else "")
            found.append(f"{len(without)} of {len(counts)} classes have no training image ({some})")
    if isinstance(batches, TrainBatches):
        left = batches.n - len(batches) * batches.size
        if left >= _LARGE * batches.n:
            nearest = -(-batches.n // (len(batches) + 1))
            found.append(
                f"batch_size = {batches.size}: each epoch leaves out {left:,} of {batches.n:,} training images "
                f"({left / batches.n:.0%}), others each time; with {nearest} it leaves out {batches.n % nearest}"
            )
    return found


def measured_on(trainer: Trainer, datamodule: ImageDataModule, split: str) -> list[str]:
    """Limits of a test, or of a validation by itself."""
    if trial := _trial(trainer):
        return trial
    name = f"limit_{split}_batches"
    totals = [len(loader) for loader in datamodule._evaluation_loaders(split)]
    return _limited(name, getattr(trainer, name), max(totals, default=0), "each set was measured on")


def _trial(trainer: Trainer) -> list[str]:
    trial = _of(trainer, "fast_dev_run")
    return [f"fast_dev_run = {trial}: a trial of the program; its figures mean nothing"] if trial else []


def _of(trainer: Trainer, name: str) -> Any:
    """An argument that the trainer sets on itself where no type checker sees it."""
    return getattr(trainer, name, None)


def _limited(name: str, limit: float | None, total: int, what: str) -> list[str]:
    """A note where a limit left batches out; Lightning takes 1 for one batch, and 1.0 for all."""
    if limit is None:
        return []
    used = min(limit, total) if isinstance(limit, int) else int(total * limit)
    return [f"{name} = {limit}: {what} {used:,} of {total:,} batches"] if used < total else []


def sums(model: LightningModule) -> list[float]:
    """A sum of each tensor that is trained: if none of them changed, nothing was learnt."""
    with torch.no_grad():
        return [float(value.double().sum()) for value in model.parameters() if value.requires_grad]


def after_fit(trainer: Trainer, trained: bool, learnt: bool) -> list[str]:
    """What became of training.

    Args:
        trainer: As it is when training has ended.
        trained: Whether it took place at all.
        learnt: Whether it changed a weight.
    """
    if trainer.global_step == 0:
        limits: dict[str, Any] = {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "limit_train_batches": trainer.limit_train_batches,
        }
        why = ", ".join(f"{name} = {value}" for name, value in limits.items() if value == 0)
        return [f"nothing was trained{f' ({why})' if why else ''}: the figures are of the weights as they began"]
    if not trained:
        return ["the run was finished already: no step was added, and it was measured again"]
    if not learnt:
        return ["training changed no weight: is the learning rate 0?"]
    return []
