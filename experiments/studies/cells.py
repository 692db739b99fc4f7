"""Cells: the points of a study's grids, each named by the hash of all that determines it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from datamodules.errors import InputError
from experiments.studies.spec import Stage, Study, Value

UNIMPORTANT = ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary")
"""Of the trainer's keys: those that change no result."""


@dataclass(frozen=True)
class Cell:
    """One point of a stage's grid.

    Attributes:
        stage: Its stage.
        point: Grid key → value.
        seed: Its seed.
        needs: Key → the identity of the cell whose weights it gets.
        identity: 64 hex digits: the hash of all that determines it.
    """

    stage: Stage
    point: Mapping[str, Value]
    seed: int
    needs: Mapping[str, str]
    identity: str

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.identity[:16]


def plan(study: Study, threads: int) -> list[Cell]:
    """All cells, in the order of stages, grid and seeds.

    Args:
        study: The study.
        threads: Of torch in each process: results depend on them.

    Raises:
        InputError: If a stage's config is wrong, or its input is ambiguous.
    """
    cells: list[Cell] = []
    for stage in study.stages:
        points = [dict(zip(stage.grid, values, strict=True)) for values in itertools.product(*stage.grid.values())]
        points = [point for point in points if not any(left.items() <= point.items() for left in stage.exclude)]
        for point, seed in itertools.product(points, stage.seeds):
            needs = {key: _source(cells, source, point, seed).identity for key, source in stage.inputs.items()}
            cells.append(Cell(stage, point, seed, needs, _identity(stage, point, seed, needs, threads)))
    return cells


def _source(cells: Sequence[Cell], stage: str, point: Mapping[str, Value], seed: int) -> Cell:
    """The cell of an earlier stage that agrees with this point and seed."""
    of_stage = [cell for cell in cells if cell.stage.name == stage]
    agree = [c for c in of_stage if all(point.get(key, value) == value for key, value in c.point.items())]
    same_seed = [cell for cell in agree if cell.seed == seed] or agree
    if len(same_seed) != 1:
        there = len(same_seed)
        raise InputError(f"inputs: stage {stage} has {there} cells for {dict(point)}, seed {seed}; one is needed")
    return same_seed[0]


def _identity(stage: Stage, point: Mapping[str, Value], seed: int, needs: Mapping[str, str], threads: int) -> str:
    """The hash of the resolved config, what differs in this cell, its data, its inputs, its methods and threads."""
    differs = {**stage.overrides, **point}
    content: dict[str, Any] = {
        "differs": differs,
        "seed": seed,
        "seeded": list(stage.seeded),
        "needs": dict(needs),
        "threads": threads,
    }
    if stage.function is not None:
        found = resolve_name(stage.function)
        version = getattr(found, "version", 1)
        content |= {"function": stage.function, "version": version, "arguments": dict(stage.arguments)}
    else:
        text, data, versions = _resolved(tuple(stage.configs), json.dumps(_data_keys(differs), sort_keys=True))
        content |= {"config": text, "data": data, "versions": versions}
    canonical = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _data_keys(differs: Mapping[str, Value]) -> dict[str, Value]:
    """The overrides that choose the source of the data."""
    return {key: value for key, value in differs.items() if key in ("data", "data.data_dir") or ".base" in key}


@cache
def _resolved(configs: tuple[str, ...], data_keys: str) -> tuple[str, str, dict[str, int]]:
    """The config with all defaults, the digest of its source's training set, and the versions of its classes."""
    from experiments.cli import start
    from experiments.pictures import source_of

    args = ["fit", *(part for config in configs for part in ("--config", config))]
    line = start([*args, *_options(json.loads(data_keys))], act=False, keep=False)
    source = source_of(line.datamodule)
    source.prepare_data()
    source.setup("fit")
    parsed = yaml.safe_load(line.text)
    parsed["trainer"] = {k: v for k, v in parsed["trainer"].items() if k not in UNIMPORTANT}
    versions = {path: int(getattr(resolve_name(path), "version", 1)) for path in _class_paths(parsed)}
    return yaml.safe_dump(whole(parsed)), source.train_set.digest(), versions


def whole(value: Value) -> Value:
    """2.0 as 2: which of the two a parser makes of a number depends on what its process has imported."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _class_paths(part)


def _options(overrides: Mapping[str, Value]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


@cache
def code_hash() -> str:
    """SHA-256 of all of the project's Python: recorded with each row, so that mixtures are seen."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for family in ("datamodules", "classifiers", "poisoning", "extraction", "watermark", "experiments"):
        for path in sorted((root / family).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def arguments_of(cell: Cell, out: Path) -> list[str]:
    """The options of the command that is this cell."""
    differs = {**cell.stage.overrides, **cell.point}
    differs |= dict.fromkeys(cell.stage.seeded, cell.seed)
    differs |= {key: str(out / "cells" / needed[:16] / "weights.safetensors") for key, needed in cell.needs.items()}
    configs = [part for config in cell.stage.configs for part in ("--config", config)]
    return ["fit", *configs, *_options(differs)]


def command_of(cell: Cell, out: Path) -> str:
    """The command that reproduces a cell."""
    if cell.stage.function:
        return f"python -c 'call {cell.stage.function} with seed {cell.seed}'"
    return "lightning " + shlex.join(arguments_of(cell, out))
