"""Checkpoints that are whole or absent, and that run no code when read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from classifiers.weights import load_checkpoint, write_atomically
from datamodules.errors import InputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, syncs and renames; reads with ``weights_only``.

    Lightning's own goes through the temporary folder, and where that is another file system the last step is a copy, which
    a kill leaves half done.
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
        if "://" in str(path):
            raise InputError(f"{path}: a checkpoint from elsewhere is not loaded; download it, and check who made it")
        return load_checkpoint(Path(path))


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run's folder.

    Raises:
        InputError: If there is none.
    """
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise InputError(f"resume = {str(run)!r}: no checkpoint in {run / 'checkpoints'}; give the folder of a run")
    return found[-1]
