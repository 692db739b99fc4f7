"""Checkpoints that are whole or absent, and that run no code when read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from classifiers.weights import load_checkpoint
from datamodules.errors import bad
from datamodules.files import write_atomically


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


def check_checkpoint(path: str) -> None:
    """Refuse, before any work, a checkpoint that cannot be loaded. Lightning's words – last, best – are left to it.

    Raises:
        InputError: If it comes from elsewhere, is not there, is damaged, or might run code.
    """
    if "://" in path:
        raise bad("ckpt_path", path, "one from elsewhere is not loaded; download it, and check who made it")
    if Path(path).is_file():
        load_checkpoint(Path(path))
    elif path not in ("best", "last", "hpc") and not Path(path).is_dir():
        raise bad("ckpt_path", path, "there is no such file")
