"""Running one cell, in this process."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from pkgutil import resolve_name

from experiments import rundir
from experiments.studies.cells import Cell, arguments_of, code_hash


def execute(cell: Cell, out: Path, threads: int, show: bool) -> str | None:
    """Run a cell; its error, or None.

    Its folder appears when it has finished, whole; a failure leaves a record with the error in its stead.

    Args:
        cell: The cell.
        out: The study's folder.
        threads: Of torch.
        show: Whether to draw its pictures.
    """
    import torch

    torch.set_num_threads(threads)
    work = out / "work" / f"{cell.folder}-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.perf_counter()
    try:
        made = _bulk(cell, work) if cell.stage.function else _fit(cell, out, work, show)
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
                "seconds": round(time.perf_counter() - began, 3),
            },
        )
        (out / "cells").mkdir(exist_ok=True)
        made.replace(out / "cells" / cell.folder)
        (out / "failed" / f"{cell.folder}.json").unlink(missing_ok=True)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        fail(cell, out, text)
        return text
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return None


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


def _bulk(cell: Cell, work: Path) -> Path:
    made = work / "made"
    made.mkdir()
    function = resolve_name(str(cell.stage.function))
    named = {key.replace(".", "_"): value for key, value in cell.point.items()}
    rows = function(made, seed=cell.seed, **cell.stage.arguments, **named)
    rundir.write_json(made / "rows.json", {"rows": list(rows)})
    return made
