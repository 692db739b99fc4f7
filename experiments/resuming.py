"""Going on from a checkpoint: whether it is one, whether it fits, and where inside an epoch it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from torch import Tensor

from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad

_COUNTS = {"ready": int, "started": int, "processed": int, "completed": int}
_PROGRESS = {"total": _COUNTS, "current": _COUNTS}

TRAINING: dict[str, Any] = {
    "epoch": int,
    "global_step": int,
    "optimizer_states": [{"state": {}, "param_groups": [{}]}],
    "lr_schedulers": [{}],
    "callbacks": {},
    "loops": {
        "fit_loop": {
            "state_dict": {},
            "epoch_progress": _PROGRESS,
            "epoch_loop.state_dict": {},
            "epoch_loop.batch_progress": {**_PROGRESS, "is_last_batch": bool},
        }
    },
}
"""What training goes on from, by its form: a type, a list of such as the one in it, a mapping with at least these."""

KEPT: dict[str, Any] = {
    "callbacks": {},
    "batch_size": int,
    "gradients": {},
    "losses": {"epoch": int, "sum": Tensor, "count": int},
}
"""What else is read where it is there."""


def check_content(path: str, content: Mapping[str, Any], command: str) -> None:
    """Refuse what can be read but is no checkpoint of Lightning's, or has not what a command goes on from.

    Args:
        path: Of the file, for the message.
        content: As read.
        command: ``fit`` wants the state of training; others want the weights alone.

    Raises:
        InputError: If it has not; it names the part and the remedy.
    """
    state = content.get("state_dict")
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not isinstance(content.get("pytorch-lightning_version"), str):
        remedy = (
            "it is no checkpoint of Lightning's: a state_dict with names, and a pytorch-lightning_version are needed"
        )
        raise bad("ckpt_path", path, f"{remedy}; to start from weights: --model.weights")
    if command == "fit" and not content.get("optimizer_states"):
        remedy = "it holds the weights alone, and training cannot go on from it; start from them"
        raise bad("ckpt_path", path, f"{remedy}: --model.weights={path}")
    needed = TRAINING if command == "fit" else {}
    wrong = _misfit(content, {**needed, **{key: part for key, part in KEPT.items() if key in content}}, "")
    if wrong or not _rows(content.get("callbacks", {}).get("Record", {}).get("history", [])):
        part = wrong or "callbacks.Record.history"
        raise bad("ckpt_path", path, f"{part} is missing, or of another form; take another checkpoint")


def _rows(history: Any) -> bool:
    """Whether they are rows of numbers, an epoch each."""
    return isinstance(history, list) and all(
        isinstance(row, dict) and "epoch" in row and all(type(value) in (int, float) for value in row.values())
        for row in history
    )


def _misfit(value: Any, form: Any, where: str) -> str:
    """The first part of `value` that is not of its form; empty: none."""
    if isinstance(form, type):
        negative = form is int and isinstance(value, int) and value < 0
        return "" if (type(value) is form or (form is Tensor and isinstance(value, Tensor))) and not negative else where
    if isinstance(form, list):
        if not isinstance(value, list):
            return where
        found = (_misfit(each, form[0], f"{where}[{number}]") for number, each in enumerate(value))
    elif not isinstance(value, dict):
        return where
    elif where == "callbacks":
        found = (_misfit(each, {}, f"{where}.{key}") for key, each in value.items())
    else:
        dot = f"{where}." if where else ""
        found = (_misfit(value.get(key), part, f"{dot}{key}") for key, part in form.items())
    return next((each for each in found if each), "")


def reopen_epoch(checkpoint: dict[str, Any], by_steps: bool = False) -> bool:
    """Let training go on in the epoch that a stop – at a number of steps, at a time – left unfinished.

    Lightning takes such an epoch for done: its progress is counted like that of a whole one, and the rest of its
    batches would never be trained on.

    Args:
        checkpoint: As read; its loops' progress is changed in place.
        by_steps: Whether training goes on to a number of steps. Lightning then goes on inside a whole epoch too, which
            would end a second time, with no batches in between; so the next one is begun here.

    Returns:
        Whether it stands inside an epoch.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loop.get("epoch_progress"), loop.get("epoch_loop.batch_progress")
    if not epochs or not batches or not batches["current"]["ready"]:
        return False
    whole = batches["is_last_batch"]
    if whole and by_steps and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for progress in (epochs["current"], epochs["total"]):
            progress["completed"] = progress["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    if not whole:
        for progress in (epochs["current"], epochs["total"]):
            progress["processed"] = min(progress["processed"], progress["ready"] - 1)
            progress["completed"] = min(progress["completed"], progress["processed"])
    return not whole


def check_begun(trainer: Trainer, restored: Mapping[str, Any]) -> list[str]:
    """See, before the first step, that what was restored is what the configuration goes on with.

    Args:
        trainer: With optimizers and progress restored.
        restored: The checkpoint's number of schedules, ``schedules``; empty where nothing was restored.

    Returns:
        Notes: what the configuration says of the optimizer, but the checkpoint otherwise.

    Raises:
        InputError: If the optimizer is another, or the epoch has fewer batches than were trained on.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    done, whole = progress.completed, trainer.num_training_batches
    if done > whole:
        remedy = f"the checkpoint stands after batch {done} of its epoch; give as many, or more"
        raise bad("trainer.limit_train_batches", trainer.limit_train_batches, remedy)
    if not restored:
        return []
    if len(trainer.lr_scheduler_configs) > restored["schedules"]:
        remedy = "the checkpoint is of training without; go on without: --model.schedule=null"
        raise InputError(f"model.schedule: {remedy}, or start from its weights: --model.weights")
    differs = {}
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        group = optimizer.param_groups[0]
        for key, value in optimizer.defaults.items():
            if key not in group:
                remedy = f"the checkpoint is of another one, without {key}; go on with that, or start from its weights"
                raise bad("model.optimizer", name, f"{remedy}: --model.weights")
            kept = group.get("initial_lr", group[key]) if key == "lr" else group[key]
            if type(value) in (int, float) and not isinstance(group[key], int | float | Tensor):
                raise bad(
                    "ckpt_path", str(getattr(trainer, "ckpt_path", "")), f"its {key} = {group[key]!r} is no number"
                )
            if _plain(kept) != _plain(value):
                differs[key] = f"{key} = {kept}, not {value}"
    return [f"the checkpoint's optimizer goes on: {', '.join(differs.values())}"] if differs else []


def _plain(value: Any) -> Any:
    """A value of an optimizer as it is after a checkpoint was written and read."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def catch_up(trainer: Trainer, model: LightningModule) -> None:
    """Let callbacks that go by the beginning of an epoch alone know of the one that training stands in.

    What a finetuning callback had unfrozen it froze again when it was set up.
    """
    for callback in getattr(trainer, "callbacks", []):  # typed too narrowly
        if isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer, model)
        if isinstance(callback, BaseFinetuning):
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    for value in group["params"]:
                        value.requires_grad_(True)


def check_batches(checkpoint: Mapping[str, Any], datamodule: ImageDataModule) -> None:
    """Refuse to go on inside an epoch with other batches than it was begun with.

    Raises:
        InputError: If their size is another.
    """
    size, now = checkpoint.get("batch_size"), datamodule.loading.batch_size
    if size is not None and size != now:
        remedy = f"the checkpoint stands inside an epoch of batches of {size}; go on with that size"
        raise bad("batch_size", now, f"{remedy}, or from a checkpoint of an epoch's end (--ckpt_path)")
