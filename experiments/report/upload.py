"""Figures and tables in one run of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from experiments.report.results import Results, number
from experiments.report.spec import StudySpec
from experiments.report.tables import Table

MOST_ROWS = 10_000
"""Of a table that W&B shows."""


def upload(study: StudySpec, results: Results, tables: Sequence[Table], figures: Sequence[str], out: Path) -> str:
    """Log what a report holds as one W&B run, offline where there is no key; ``WANDB_MODE`` wins.

    Args:
        study: The study.
        results: All rows; numbers as numbers, for W&B's own charts.
        tables: Of the report.
        figures: Names of those that were drawn.
        out: The report's folder; W&B's files go there too.

    Returns:
        What became of it, in one line.
    """
    import wandb

    from experiments.wandb_logger import _mode, _staging_in

    mode = _mode()
    os.environ.setdefault("WANDB_SILENT", "true")
    content: dict[str, object] = {
        f"figures/{name}": wandb.Image(str(out / "figures" / f"{name}.png")) for name in figures
    }
    for table in tables:
        rows = [[*keys, *(entry.plain for entry in entries)] for keys, entries in table.rows]
        content[f"tables/{table.spec.name}"] = wandb.Table(columns=_unlike([*table.keys, *table.headings]), data=rows)
    cells = [[row[name] if (value := number(row[name])) is None else value for name in results.columns]
             for row in results.rows[:MOST_ROWS]]  # fmt: skip
    content["results"] = wandb.Table(columns=list(results.columns), data=cells, allow_mixed_types=True)
    run = wandb.init(
        project="pharmakon",
        name=study.name,
        group=study.name,
        job_type="report",
        dir=out,
        mode=mode,
        config={"study": study.name, "size": study.size, "description": study.description},
        reinit="create_new",
    )
    try:
        content["report"] = wandb.Html((out / "report.html").read_text(encoding="utf-8"), inject=False)
        with _staging_in(out / "wandb"):
            run.log(content)
    finally:
        run.finish()
    if mode == "disabled":
        return "W&B: disabled by WANDB_MODE"
    return (
        f"W&B: {run.url}" if mode == "online" else f"W&B: kept offline; send it with: wandb sync {out}/wandb/offline-*"
    )


def _unlike(names: Sequence[str]) -> list[str]:
    """W&B needs a name of its own for each column."""
    found: list[str] = []
    for name in names:
        found.append(name if name not in found else f"{name} ({sum(each == name for each in names)})")
    return found
