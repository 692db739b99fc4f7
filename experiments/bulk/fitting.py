"""Training what a config says from inside a bulk stage: a network among many, of which no run is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from classifiers.classifier import ImageClassifier, load_classifier
from classifiers.devices import accelerator
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError
from experiments.cli import CommandLine, start


def start_config(configs: Sequence[str], overrides: Mapping[str, Any] | None, seed: int) -> CommandLine:
    """Model, data and trainer of a config, made and not run.

    Args:
        configs: Names or paths; later ones win.
        overrides: Keys that differ from them.
        seed: ``seed_everything``.

    Raises:
        InputError: If a key or a type is wrong, in one line.
    """
    named = [part for config in configs for part in ("--config", config)]
    return start(["fit", *named, *options_of(overrides, seed)], act=False, keep=False, show=False)


def options_of(overrides: Mapping[str, Any] | None, seed: int) -> list[str]:
    """Overrides and the seed as options of the command."""
    differs = {"seed_everything": seed, **(overrides or {})}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in differs.items()]


def fit(line: CommandLine, data: ImageDataModule, epochs: int | None = None) -> ImageClassifier:
    """Train the config's model on `data` with nothing kept; it comes back ready to answer, where there is a GPU on it.

    Args:
        line: Model and trainer.
        data: What it is trained on.
        epochs: How long; None: as long as the config says.

    Raises:
        InputError: If the model is none of images.
    """
    trainer = Trainer(
        max_epochs=line.trainer.max_epochs if epochs is None else epochs,
        max_steps=line.trainer.max_steps,
        limit_train_batches=line.trainer.limit_train_batches,
        accumulate_grad_batches=line.trainer.accumulate_grad_batches,
        gradient_clip_val=line.trainer.gradient_clip_val,
        gradient_clip_algorithm=line.trainer.gradient_clip_algorithm,
        precision=line.trainer.precision,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=getattr(line.trainer, "reload_dataloaders_every_n_epochs"),  # noqa: B009
    )
    model = line.model
    if not isinstance(model, ImageClassifier):
        raise InputError("configs: the model must be an ImageClassifier")
    trainer.fit(model, data)
    return model.eval().to(accelerator())


def loaded(weights: str | Path) -> ImageClassifier:
    """A classifier from its weights file, ready to answer, where there is a GPU on it."""
    return load_classifier(weights).to(accelerator())
