"""Running one cell, in this process."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from datamodules.errors import InputError, bad
from experiments import rundir
from experiments.studies.cells import Cell, arguments_of, code_hash, keywords_of, weights_of

RESERVED = ("study", "size", "stage", "cell", "status", "error", "code_hash", "threads", "seconds", "command")
"""Columns of results.csv that a row of a function may not have."""


def execute(cell: Cell, out: Path, threads: int, show: bool, mark: str = "") -> str | None:
    """Run a cell; its error, or None.

    Its folder appears when it has finished, whole; a failure leaves a record with the error in its stead.

    Args:
        cell: The cell.
        out: The study's folder.
        threads: Of torch.
        show: Whether to draw its pictures.
        mark: Of this process, where others may be at work on the same cell.
    """
    import torch

    torch.set_num_threads(threads)
    work = out / "work" / f"{cell.folder}{mark}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.perf_counter()
    try:
        _check_inputs(cell, out)
        with _hushed():
            made = _bulk(cell, out, work) if cell.stage.function else _fit(cell, out, work, show)
        rundir.write_json(
            made / "cell.json",
            {
                "identity": cell.identity,
                "stage": cell.stage.name,
                "point": dict(cell.point),
                "seed": cell.seed,
                "needs": dict(cell.needs),
                "code_hash": code_hash(),
                "threads": threads,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - began, 3),
            },
        )
        _keep(made, out / "cells" / cell.folder)
        (out / "failed" / f"{cell.folder}.json").unlink(missing_ok=True)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        fail(cell, out, text)
        return text
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return None


def _keep(made: Path, place: Path) -> None:
    """Put a cell's folder in its place; another process may have finished it first: a job that was queued twice."""
    place.parent.mkdir(exist_ok=True)
    try:
        made.replace(place)
    except OSError:
        if not (place / "cell.json").is_file():
            raise


@contextmanager
def _hushed() -> Iterator[None]:
    """Have a run print nothing but warnings: it is one of many."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)


def fail(cell: Cell, out: Path, error: str) -> None:
    """Record why a cell has no result."""
    (out / "failed").mkdir(exist_ok=True)
    rundir.write_json(out / "failed" / f"{cell.folder}.json", {"identity": cell.identity, "error": error})


def _fit(cell: Cell, out: Path, work: Path, show: bool) -> Path:
    from experiments.cli import start

    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={work}"]
    line = start([*arguments_of(cell, out), *quiet], show=show)
    shutil.rmtree(line.record.folder / "checkpoints", ignore_errors=True)
    return line.record.folder


def _bulk(cell: Cell, out: Path, work: Path) -> Path:
    made = work / "made"
    made.mkdir()
    function = resolve_name(str(cell.stage.function))
    rows = _checked(function(made, seed=cell.seed, **keywords_of(cell, out)))
    rundir.write_json(made / "rows.json", {"rows": rows})
    return made


def _checked(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a function: name → value, or → value, n, low and high of a measure."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"rows: a function returns mappings, name → value, not {row!r:.80}")
        for name, value in row.items():
            if name in RESERVED:
                raise bad("rows", name, "the study has a column of that name; choose another")
            if isinstance(value, Mapping) and set(value) - {"value", "n", "low", "high", "unit"}:
                raise bad(f"rows.{name}", dict(value), "give a value, or value, n, low and high")
        found.append(dict(row))
    return found


def _check_inputs(cell: Cell, out: Path) -> None:
    for key, path in weights_of(cell, out).items():
        if not path.is_file():
            stage = cell.stage.inputs[key]
            raise InputError(f"inputs.{key} = {stage!r}: its cell {path.parent.name} left no {path.name}")
