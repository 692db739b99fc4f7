"""What a Trainer is made of beside what the configuration says: the run's checkpoint, whatever else is listed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
)
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from datamodules.errors import bad
from experiments.checkpoints import AtomicCheckpointIO
from experiments.registry import configs_folder

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run's."""

_NAME = "epoch={epoch}"
"""How the run's checkpoint is called, there and in ``configs/defaults.yaml``."""


class RunCheckpoint(ModelCheckpoint):
    """Keeps the last epoch's checkpoint of a run: nothing is chosen, and ``--resume`` finds it.

    A list of callbacks in a configuration replaces the default one; this is there all the same.

    Args:
        folder: Where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(dirpath=folder, filename=_NAME, auto_insert_metric_name=False, save_top_k=1)

    @property
    def state_key(self) -> str:
        """One of its own: a `ModelCheckpoint` of the user's may have the same settings."""
        return type(self).__name__


def callbacks_of(
    given: Sequence[Callback], folder: Path, checkpointing: bool, command: str = "fit", going_on: bool = False
) -> list[Callback]:
    """The callbacks of a run.

    Args:
        given: Those of the configuration. A `ModelCheckpoint` that names no folder gets the run's.
        folder: The run's.
        checkpointing: Whether the run keeps checkpoints.
        command: That is run.
        going_on: Whether training goes on from a checkpoint. What Lightning's finders found is in it, and they would
            lose its progress and begin anew.

    Raises:
        InputError: If Lightning would go on from a checkpoint that another run left when it failed, or a callback is
            for another command.
    """
    place = folder / CHECKPOINTS
    found = [each for each in given if not _is_default(each, place)]
    for each in found:
        if isinstance(each, OnExceptionCheckpoint) and _is_left_over(Path(each.ckpt_path), folder):
            remedy = "another run left it, and Lightning would go on from it; write dirpath: '{run}/checkpoints'"
            raise bad("trainer.callbacks.dirpath", str(each.ckpt_path), remedy)
        if isinstance(each, ModelCheckpoint) and each.dirpath is None:
            each.dirpath = str(place)
        if isinstance(each, ModelPruning) and not each._make_pruning_permanent:
            remedy = "weights are kept pruned, not beside their masks; leave it true"
            raise bad("trainer.callbacks.make_pruning_permanent", False, remedy)
        if isinstance(each, BatchSizeFinder) and command != "fit":
            remedy = "it finds the size of training batches, for fit; here, set data.eval_batch_size"
            raise bad("trainer.callbacks", type(each).__name__, remedy)
    if going_on:
        found = [each for each in found if not isinstance(each, BatchSizeFinder | LearningRateFinder)]
    if checkpointing and not any(_keeps_last(each, folder) for each in found):
        found.append(RunCheckpoint(place))
    return found


def _is_left_over(path: Path, folder: Path) -> bool:
    return path.is_file() and not path.resolve().is_relative_to(folder.resolve())


def _is_default(callback: Callback, place: Path) -> bool:
    """Whether it is the one of ``configs/defaults.yaml`` as it stands there."""
    if type(callback) is not ModelCheckpoint or callback.dirpath is None:
        return False
    plain = RunCheckpoint(place)
    own = {**vars(plain), "dirpath": Path(str(plain.dirpath)).resolve()}
    return {**vars(callback), "dirpath": Path(callback.dirpath).resolve()} == own


def _keeps_last(callback: Callback, folder: Path) -> bool:
    """Whether a checkpoint that a run can go on from is kept by it, in the run's folder, as training proceeds."""
    return (
        isinstance(callback, ModelCheckpoint)
        and not callback.save_weights_only
        and (bool(callback.save_last) or (callback.monitor is None and callback.save_top_k != 0))
        and Path(str(callback.dirpath)).resolve().is_relative_to(folder.resolve())
    )


def plugins_of(config: Namespace) -> list[Any]:
    """The plugins of a trainer's configuration, and files that are written atomically.

    Args:
        config: The trainer's.
    """
    plugins = config.plugins or []
    plugins = list(plugins) if isinstance(plugins, list) else [plugins]
    for plugin in plugins:
        if isinstance(plugin, _WrappingCheckpointIO) and plugin.checkpoint_io is None:
            plugin.checkpoint_io = AtomicCheckpointIO()
    sharded = any(word in str(config.strategy).lower() for word in ("fsdp", "deepspeed", "modelparallel"))
    if not sharded and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    return plugins


def make_plain(value: Any) -> Any:
    """Make defaults of foreign classes what a YAML can hold: an enumeration's member its value, a device its name."""
    if isinstance(value, Namespace):
        for key, part in vars(value).items():
            value[key] = make_plain(part)
    elif isinstance(value, list):
        value[:] = [make_plain(part) for part in value]
    elif isinstance(value, dict):
        value.update({key: make_plain(part) for key, part in value.items()})
    elif isinstance(value, Enum):
        return value.value
    elif isinstance(value, torch.device):
        return str(value)
    return value


def is_default_logger(given: Any) -> bool:
    """Whether the loggers are those of every run, which nobody asked for."""
    defaults = yaml.safe_load((configs_folder() / "defaults.yaml").read_text(encoding="utf-8"))["trainer"]["logger"]
    return isinstance(given, list) and [each.get("class_path") for each in given] == [
        each["class_path"] for each in defaults
    ]


def callbacks_in(trainer: Trainer) -> list[Callback]:
    """The list of a trainer's callbacks, which Lightning gives no type."""
    found: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009
    return found
