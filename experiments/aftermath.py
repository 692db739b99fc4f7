"""What a killed run leaves: a status that says "running", and files half written."""

from __future__ import annotations

import json
from pathlib import Path

from datamodules.files import sweep
from experiments.rundir import write_json
from experiments.runlock import if_free

KILLED = "its process ended without a word: it was killed, or the machine went down"


def tidy(run: Path) -> None:
    """Remove what processes that were killed left half written in a run's folder; the caller holds its lock."""
    sweep(run)
    sweep(run / "checkpoints")


def settle(run: Path) -> None:
    """Where a run is called running and nobody is at work in it, say that it was interrupted, and tidy up.

    A run of another machine is left alone unless this file system's locks tell of it; one that named no machine, too.
    """
    try:
        status = json.loads((run / "status.json").read_bytes())
        if status["status"] != "running" or "host" not in status:
            return
    except (OSError, ValueError, KeyError, TypeError):  # it has none, and is no run
        return
    with if_free(run) as free:
        if free:
            tidy(run)
            write_json(run / "status.json", {**status, "status": "interrupted", "error": KILLED})


def settle_all(parent: Path) -> None:
    """`settle` for each run of a config."""
    if parent.is_dir():
        for run in parent.iterdir():
            settle(run)
