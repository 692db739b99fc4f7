"""The table of a study's results: one row a cell, each traceable to its config, data, poison and code."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from datamodules.files import write_atomically
from experiments.studies.cells import UNIMPORTANT, Cell, command_of, whole
from experiments.studies.spec import Study, Value

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster: a study has hundreds of configs

_LAST = (
    "accepted",
    "notes",
    "config_hash",
    "data_hash",
    "poison_hash",
    "weights_hash",
    "code_hash",
    "threads",
    "seconds",
)


def rows_of(study: Study, cells: Sequence[Cell], out: Path) -> list[dict[str, Value]]:
    """One row a cell – or as many as its function returned – finished or not, in the order of the plan."""
    found: list[dict[str, Value]] = []
    for cell in cells:
        folder = out / "cells" / cell.folder
        row: dict[str, Value] = {
            "study": study.name,
            "size": study.size,
            "stage": cell.stage.name,
            "cell": cell.folder,
            "status": "not run" if cell.absent else "missing",
            "error": cell.absent,
            "seed": cell.seed,
            **cell.point,
        }
        about = {"command": command_of(study, cell, out)}
        if (folder / "cell.json").is_file():
            row["status"] = "finished"
            record = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
            about |= {key: record[key] for key in ("code_hash", "threads", "seconds")}
            if cell.stage.function:
                bulk = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["rows"]
                found += [{**row, **_spread(each), **about} for each in bulk]
                continue
            row |= _measured(folder)
        elif (record_of := out / "failed" / f"{cell.folder}.json").is_file():
            row |= {"status": "failed", "error": json.loads(record_of.read_text(encoding="utf-8"))["error"]}
        found.append({**row, **about})
    return found


def _spread(row: Mapping[str, Value]) -> dict[str, Value]:
    """A row with a column for each part of a measure: ``.low``, ``.high``, ``.n``; ``.unit`` if no test images."""
    found: dict[str, Value] = {}
    for name, each in row.items():
        if isinstance(each, dict):
            found |= {name: each.get("value"), **{f"{name}.{part}": each.get(part) for part in ("low", "high", "n")}}
            if (unit := each.get("unit", "test images")) != "test images":
                found[f"{name}.unit"] = unit
        else:
            found[name] = each
    return found


def _measured(folder: Path) -> dict[str, Value]:
    """What a fit's folder says."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    row = _spread(metrics["measures"])
    row["accepted"] = metrics["accepted"]
    if metrics.get("notes"):
        row["notes"] = "; ".join(metrics["notes"])
    row |= {f"fact.{name}": value for name, value in metrics["facts"].items() if isinstance(value, int | float | str)}
    return row | {
        "config_hash": _config_hash(folder / "config.yaml"),
        "data_hash": manifest["source_train_set"],
        "poison_hash": manifest["train_set"],
        "weights_hash": hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
    }


def _config_hash(path: Path) -> str:
    """Of what determines a run: where it is kept and how it is logged do not."""
    config = _LOADER(path.read_text(encoding="utf-8")).get_single_data()
    config["trainer"] = {k: v for k, v in config["trainer"].items() if k not in UNIMPORTANT}
    return hashlib.sha256(json.dumps(whole(config), sort_keys=True).encode()).hexdigest()


def seconds_of(cell: Cell, out: Path) -> float | None:
    """How long a finished cell took; None if it is not finished."""
    record = out / "cells" / cell.folder / "cell.json"
    return float(json.loads(record.read_text(encoding="utf-8"))["seconds"]) if record.is_file() else None


def write_results(rows: Sequence[Mapping[str, Value]], out: Path) -> None:
    """Write results.csv and results.parquet: the same table."""
    import pyarrow
    from pyarrow import parquet

    last = (*_LAST, "command")
    names = list(dict.fromkeys(name for row in rows for name in row if name not in last))
    names = [name for name in names if not name.startswith("fact.")] + [n for n in names if n.startswith("fact.")]
    names += [name for name in last if any(name in row for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell_text(value) for key, value in row.items()})
    write_atomically(out / "results.csv", text.getvalue().encode())
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    write_atomically(out / "results.parquet", buffer.getvalue())


def _cell_text(value: Value) -> Value:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, dict | list) else value


def _column(values: list[Value]) -> list[Value]:
    """Values of one type, as a column has to be: text where they differ."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) <= 1 and not kinds & {dict, list}):
        return [float(value) if kinds == {int, float} and value is not None else value for value in values]
    return [None if value is None else str(_cell_text(value)) for value in values]
