"""Cells as jobs of a cluster, through submitit: SLURM job arrays, and its local and debug executors for trying."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import InputError
from experiments.studies.cells import Cell
from experiments.studies.spec import Value
from experiments.studies.work import execute


class Job:
    """One cell as a job; a preempted one is queued again and starts anew."""

    def __call__(self, cell: Cell, out: Path, threads: int, show: bool) -> str | None:
        """Run the cell; its error, or None."""
        import submitit

        return execute(cell, out, threads, show, f"-{submitit.JobEnvironment().job_id}")

    def checkpoint(self, cell: Cell, out: Path, threads: int, show: bool) -> Any:
        """What submitit is to queue when the job is about to be stopped."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, cell, out, threads, show)


def submit(
    executor: Mapping[str, Value], cells: Sequence[Cell], shown: Collection[str], out: Path, threads: int
) -> list[Any]:
    """Queue cells as one job array.

    Args:
        executor: ``kind``, and what else submitit's `update_parameters` takes.
        cells: To run.
        shown: The identities of those that draw their pictures.
        out: The study's folder, on a file system that the nodes share.
        threads: Of torch.

    Returns:
        submitit's jobs, in the order of the cells.

    Raises:
        InputError: If submitit is missing, or does not know a parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("executor: submitit is not installed: pip install pharmakon[cluster]") from error
    kind = {"slurm": "slurm", "submitit_local": "local", "submitit_debug": "debug"}[executor["kind"]]
    try:
        queue = submitit.AutoExecutor(folder=out / "jobs", cluster=kind)
        queue.update_parameters(**{key: value for key, value in executor.items() if key != "kind"})
    except (NameError, TypeError, RuntimeError) as error:
        raise InputError(f"executor: {' '.join(str(error).split())}") from error
    with queue.batch():
        jobs = [queue.submit(Job(), cell, out.absolute(), threads, cell.identity in shown) for cell in cells]
    return jobs
