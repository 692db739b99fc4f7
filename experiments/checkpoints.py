"""Checkpoints that are whole or absent, and that run no code when read."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from classifiers.weights import load_checkpoint
from datamodules.errors import bad
from datamodules.files import write_atomically
from experiments.resuming import check_content

WORDS = ("best", "last", "hpc")
"""What Lightning takes for ``ckpt_path`` beside a path."""

_SHARDED = ("meta.pt", ".metadata", "checkpoint")
"""What is in a folder that is a checkpoint itself, of FSDP, of several devices, of DeepSpeed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, syncs and renames; reads with ``weights_only``.

    Lightning's own goes through the temporary folder, and where that is another file system the last step is a copy,
    which a kill leaves half done.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, atomically."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(target, buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; a damaged one, or one with code in it, is refused in one line."""
        check_checkpoint(str(path))
        return load_checkpoint(Path(path))


def check_checkpoint(path: str, command: str | None = None) -> None:
    """Refuse, before any work, a checkpoint that cannot be loaded. Lightning's words – last, best – are left to it.

    Args:
        path: As given.
        command: What it is for: ``fit`` wants the state of training too; None: nothing is asked of its content.

    Raises:
        InputError: If it comes from elsewhere, is not there, is damaged, might run code, or is no checkpoint.
    """
    if "://" in path:
        raise bad("ckpt_path", path, "one from elsewhere is not loaded; download it, and check who made it")
    place = Path(path)
    if place.is_file():
        content = load_checkpoint(place)
        if command is not None:
            check_content(path, content, command)
    elif path in WORDS or any((place / name).exists() for name in _SHARDED):
        return
    elif (place / "config.yaml").is_file():
        raise bad("ckpt_path", path, f"it is a run's folder; go on in it: --resume {path}, or name a file in {path}")
    else:
        remedy = "it is a folder; name a file in it" if place.is_dir() else "there is no such file"
        raise bad("ckpt_path", path, remedy)


def check_word(word: str, callbacks: Sequence[Callback]) -> None:
    """Refuse Lightning's words for checkpoints where there is none: it would go on without, or know of no best.

    Args:
        word: What was given as ``ckpt_path``.
        callbacks: The trainer's.

    Raises:
        InputError: If no callback has kept what is asked for.
    """
    folders = [each.dirpath for each in callbacks if isinstance(each, ModelCheckpoint) and each.dirpath]
    kept = any(any(Path(folder).glob(f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*.ckpt")) for folder in folders)
    if word in WORDS and not (word == "last" and kept):
        remedy = "this run has none yet; name a file, or go on in another run's folder: --resume RUN"
        raise bad("ckpt_path", word, remedy)
