"""Cells: the points of a study's grids, each named by the hash of all that determines it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from datamodules.errors import InputError, bad
from experiments.studies.spec import Stage, Study, Value

if TYPE_CHECKING:
    from experiments.studies.resolve import Resolved

UNIMPORTANT = ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary")
"""Of the trainer's keys: those that change no result."""


@dataclass(frozen=True)
class Cell:
    """One point of a stage's grid.

    Attributes:
        stage: Its stage.
        point: Grid key → value; also those keys of its inputs' grids that are not in its own.
        seed: Its seed.
        needs: Key → the identity of the cell whose weights it gets.
        identity: 64 hex digits: the hash of all that determines it.
        absent: Why it cannot run here: its data are not there; empty if they are.
    """

    stage: Stage
    point: Mapping[str, Value]
    seed: int
    needs: Mapping[str, str]
    identity: str
    absent: str = ""

    @property
    def own(self) -> dict[str, Value]:
        """What of its point is in its stage's grid, and changes its config."""
        return {key: self.point[key] for key in self.stage.grid}

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
        InputError: If a stage's config or function is wrong, or an input has no cell, or several, for one of its own.
    """
    cells: list[Cell] = []
    for stage in study.stages:
        points = [dict(zip(stage.grid, values, strict=True)) for values in itertools.product(*stage.grid.values())]
        points = [point for point in points if not any(left.items() <= point.items() for left in stage.exclude)]
        if points:
            _check(stage, points[0])
        whole_points = [(own, point) for own in points for point in _inherited(cells, stage, own)]
        for (own, point), seed in itertools.product(whole_points, stage.seeds):
            sources = {key: _source(cells, source, point, seed) for key, source in stage.inputs.items()}
            needs = {key: source.identity for key, source in sources.items()}
            identity, absent = _identity(stage, own, seed, needs, threads)
            absent = next((reason for reason in (absent, *(s.absent for s in sources.values())) if reason), "")
            cells.append(Cell(stage, point, seed, needs, identity, absent))
    return cells


def _inherited(cells: Sequence[Cell], stage: Stage, own: Mapping[str, Value]) -> list[Mapping[str, Value]]:
    """A stage's point, once for each point of its inputs that agrees with it, and with what these add."""
    found: list[Mapping[str, Value]] = [own]
    for source in stage.inputs.values():
        points = [cell.point for cell in cells if cell.stage.name == source]
        joined = [{**add, **point} for point in found for add in points if _agree(add, point)]
        found = [point for number, point in enumerate(joined) if point not in joined[:number]] or found
    return found


def _agree(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    """Whether two points have the same values in the keys that both have."""
    return all(other.get(key, value) == value for key, value in one.items())


def _source(cells: Sequence[Cell], stage: str, point: Mapping[str, Value], seed: int) -> Cell:
    """The cell of an earlier stage that agrees with this point and seed."""
    agree = [cell for cell in cells if cell.stage.name == stage and _agree(cell.point, point)]
    same_seed = [cell for cell in agree if cell.seed == seed] or agree
    if len(same_seed) != 1:
        there = len(same_seed)
        raise InputError(f"inputs: stage {stage} has {there} cells for {dict(point)}, seed {seed}; one is needed")
    return same_seed[0]


def _identity(
    stage: Stage, point: Mapping[str, Value], seed: int, needs: Mapping[str, str], threads: int
) -> tuple[str, str]:
    """The hash of the resolved config, what differs in this cell, its data, its inputs, its methods and threads.

    And why there are no data, if there are none.
    """
    absent = ""
    content: dict[str, Any] = {
        "differs": {**stage.overrides, **point},
        "seed": seed,
        "seeded": list(stage.seeded),
        "needs": dict(needs),
        "threads": threads,
    }
    if stage.function is not None:
        version = getattr(_function(stage, point), "version", 1)
        content |= {"function": stage.function, "version": version, "arguments": dict(stage.arguments)}
        resolved = _resolved_arguments(stage)
    else:
        resolved = _resolved(stage, point)
    if resolved is not None:
        content |= {"config": resolved.text, "data": resolved.data, "versions": resolved.versions}
        absent = resolved.absent
    canonical = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest(), absent


def _resolved(stage: Stage, point: Mapping[str, Value]) -> Resolved:
    """A config with what chooses among classes and files; plain numbers of the grid need no resolving."""
    from experiments.studies.resolve import resolve

    differs = {**stage.overrides, **point, **dict.fromkeys(stage.inputs, "weights.safetensors")}
    return resolve(stage.configs, tuple(_options({key: value for key, value in differs.items() if _chooses(value)})))


def _check(stage: Stage, point: Mapping[str, Value]) -> None:
    """See that all of a stage's keys are known, and its function can be called, before anything runs."""
    from experiments.studies.resolve import check

    if stage.function is not None:
        _function(stage, point)
        return
    differs = {**stage.overrides, **point, **dict.fromkeys(stage.inputs, "weights.safetensors")}
    check(stage.configs, tuple(_options(differs | dict.fromkeys(stage.seeded, stage.seeds[0]))))


def _resolved_arguments(stage: Stage) -> Resolved | None:
    """The config that a function's arguments name; None if they name none."""
    from experiments.studies.resolve import resolve

    configs = stage.arguments.get("configs")
    if not configs:
        return None
    overrides = stage.arguments.get("overrides") or {}
    return resolve((configs,) if isinstance(configs, str) else tuple(configs), tuple(_options(overrides)))


def _function(stage: Stage, point: Mapping[str, Value]) -> Any:
    """A stage's function, if it can be called with what the stage gives it."""
    where = f"stages.{stage.name}.function"
    try:
        found = resolve_name(str(stage.function))
    except (ImportError, AttributeError, ValueError) as error:
        raise bad(where, stage.function, f"it cannot be imported ({' '.join(str(error).split())})") from error
    keys = [key.replace(".", "_") for key in (*stage.arguments, *point, *stage.inputs)]
    for key in keys:
        if keys.count(key) > 1 or key == "seed":
            raise bad(where, stage.function, f"{key} is given twice, of seed, arguments, grid and inputs")
    try:
        signature(found).bind(Path(), seed=0, **dict.fromkeys(keys))
    except TypeError as error:
        raise bad(where, stage.function, f"it cannot be called with what the stage gives ({error})") from error
    return found


def whole(value: Value) -> Value:
    """2.0 as 2: which of the two a parser makes of a number depends on what its process has imported."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _chooses(value: Value) -> bool:
    """Whether an override may choose a class or a file: the config has to be resolved with it."""
    if isinstance(value, list):
        return any(map(_chooses, value))
    return not (value is None or isinstance(value, bool | int | float))


def _options(overrides: Mapping[str, Value]) -> list[str]:
    return [f"--{key}={_text(value)}" for key, value in overrides.items()]


@cache
def code_hash() -> str:
    """SHA-256 of the project's Python that makes results: recorded with each row, so that mixtures are seen."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in code_files(root):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_files(root: Path) -> list[Path]:
    """The Python that makes results, in order; the report only shows them."""
    families = ("datamodules", "classifiers", "poisoning", "extraction", "watermark", "experiments")
    found = [path for family in families for path in sorted((root / family).rglob("*.py"))]
    return [path for path in found if not path.is_relative_to(root / "experiments" / "report")]


def weights_of(cell: Cell, out: Path) -> dict[str, Path]:
    """The files that a cell gets from those it needs, by key."""
    return {key: out / "cells" / needed[:16] / "weights.safetensors" for key, needed in cell.needs.items()}


def arguments_of(cell: Cell, out: Path) -> list[str]:
    """The options of the command that is this cell."""
    differs = {**cell.stage.overrides, **cell.own}
    differs |= dict.fromkeys(cell.stage.seeded, cell.seed)
    differs |= {key: str(path) for key, path in weights_of(cell, out).items()}
    configs = [part for config in cell.stage.configs for part in ("--config", config)]
    return ["fit", *configs, *_options(differs)]


def keywords_of(cell: Cell, out: Path) -> dict[str, Value]:
    """What a function gets beside its folder and seed: dots in keys become underscores."""
    found = {**cell.stage.arguments, **cell.own, **{k: str(path) for k, path in weights_of(cell, out).items()}}
    return {key.replace(".", "_"): value for key, value in found.items()}


def command_of(study: Study, cell: Cell, out: Path) -> str:
    """The command that reproduces a cell."""
    if cell.stage.function:
        only = [cell.stage.name, *(f"{key}={_text(value)}" for key, value in {**cell.point, "seed": cell.seed}.items())]
        options = [part for condition in only for part in ("--only", condition)]
        return "lightning " + shlex.join(["study", "--config", study.config, "--size", study.size, *options])
    return "lightning " + shlex.join(arguments_of(cell, out))


def _text(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
