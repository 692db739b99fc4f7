"""The run's folder: a fresh one for each run, and what is written at its start and end."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from datamodules.errors import InputError
from datamodules.files import write_atomically
from experiments.environment import redact

TOKEN = "{run}"
"""What stands for the run's folder in the trainer's part of a config."""


def fresh(root: str | Path, name: str) -> Path:
    """Make a new folder ``<root>/<name>/<date_time>`` that no other run has.

    Raises:
        InputError: If nothing can be written there.
    """
    parent = Path(root) / name
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            folder = parent / (stamp if attempt == 0 else f"{stamp}_{attempt}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise InputError(
            f"trainer.default_root_dir = {str(root)!r}: no run can be kept there ({error.strerror}); choose another"
        ) from error
    raise InputError(f"trainer.default_root_dir = {str(root)!r}: a thousand runs started there within a second")


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that never began; one that holds anything stays."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def fill(value: Any, folder: Path) -> Any:
    """The value with `TOKEN` replaced in every string."""
    if isinstance(value, str):
        return value.replace(TOKEN, str(folder))
    if isinstance(value, dict):
        return {key: fill(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [fill(part, folder) for part in value]
    return value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable, standard JSON: what is not a number is null."""
    text = json.dumps(redact(plain(content)), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def set_status(folder: Path, status: str, **more: Any) -> None:
    """Say how the run stands: ``running``, ``finished``, ``interrupted`` or ``failed``."""
    write_json(folder / "status.json", {"status": status, "process": os.getpid(), "host": socket.gethostname(), **more})


def drop_interrupted(folder: Path) -> None:
    """Of a run that is through: the checkpoint at which it was interrupted goes, where there is a later one."""
    old = folder / "checkpoints" / "interrupted.ckpt"
    with suppress(OSError):
        then = old.stat().st_mtime_ns
        if any(path != old and path.stat().st_mtime_ns > then for path in old.parent.glob("*.ckpt")):
            old.unlink()


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("pharmakon", "torch", "torchvision", "lightning", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def plain(value: Any) -> Any:
    """The value as standard JSON has it: keys are text, tuples are lists, and what is not a number is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value
