"""What a study's YAML says, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import at_home
from experiments.documents import check_yaml
from experiments.registry import configs_folder, find_config

Value = Any
"""What a YAML can hold."""

KINDS = ("local", "slurm", "submitit_local", "submitit_debug")
"""Of executors."""

_STAGE = ("configs", "overrides", "grid", "exclude", "seeds", "seeded", "inputs", "function", "arguments")
_STUDY = ("stages", "sizes", "figures", "tables", "workers", "executor", "wandb", "minutes")


@dataclass(frozen=True)
class Stage:
    """A config, or a function, with its grid.

    Attributes:
        name: Of the stage.
        configs: Names or paths of configs; later ones win.
        overrides: Keys that differ from them, for every cell.
        grid: Key → its values; the cells are their product.
        exclude: Points that are left out of the product, each by some of its keys.
        seeds: One cell for each seed at each point.
        seeded: The keys that get the seed.
        inputs: Key → the earlier stage whose weights it gets: the path of weights.safetensors in the folder of the cell
            with the same seed and grid values. Where the earlier grid has keys that this one has not, there is a cell
            for each of their values; results have them as columns, the config does not get them.
        function: The dotted path of a function for bulk trials, in the place of `configs`. It is called with its cell's
            folder and the keywords `seed`, `arguments`, grid values and inputs – a dot in a key becomes an underscore –
            and returns rows: name → value, or → a mapping of value, n, low and high. Of what it leaves in the folder,
            the report shows ``*.png``, and weights.safetensors can be the input of a later stage.
        arguments: Of that function. If they have `configs`, and perhaps `overrides`, what these come to and their data
            are part of its cells' identities.
    """

    name: str
    configs: tuple[str, ...] = ()
    overrides: Mapping[str, Value] = field(default_factory=dict)
    grid: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    exclude: tuple[Mapping[str, Value], ...] = ()
    seeds: tuple[int, ...] = (0,)
    seeded: tuple[str, ...] = ("seed_everything",)
    inputs: Mapping[str, str] = field(default_factory=dict)
    function: str | None = None
    arguments: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Stages, and what to make of their results.

    Attributes:
        name: That of its YAML.
        size: ``quick``, ``paper``, or another that the YAML has.
        description: The YAML's first comment.
        stages: In order.
        figures: See `experiments.report`.
        tables: See `experiments.report`.
        workers: Processes; each gets its share of the cores, or one device.
        executor: ``kind``: ``local``, ``slurm``, or submitit's own ``submitit_local`` and ``submitit_debug``; the rest
            goes to submitit (``slurm_partition``, ``timeout_min``, …).
        minutes: When so many have passed, no further cell is begun: those that run are finished, and the same command
            goes on with the rest. None: no such cap. A cluster has its own: submitit's ``timeout_min``.
        wandb: Whether the report goes to W&B when all is done: one run for the study, none for a cell.
        config: What ``--config`` takes: the name of a shipped one, or the path.
    """

    name: str
    size: str
    description: str
    stages: tuple[Stage, ...]
    figures: tuple[Mapping[str, Value], ...] = ()
    tables: tuple[Mapping[str, Value], ...] = ()
    workers: int = 1
    executor: Mapping[str, Value] = field(default_factory=lambda: {"kind": "local"})
    wandb: bool = False
    config: str = ""
    minutes: float | None = None


def read_study(path: Path, size: str | None = None) -> Study:
    """Read a study's YAML.

    Args:
        path: The file.
        size: Which of its ``sizes``; None: the first.

    Raises:
        InputError: If a key is misspelt or has another type; it names the key.
    """
    text = path.read_text(encoding="utf-8")
    try:
        check_yaml(text, str(path))
        spec = _at_home(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a YAML ({' '.join(str(error).split())})") from error
    _check_keys(spec, _STUDY, str(path))
    sizes = spec.pop("sizes", None) or {"paper": {}}
    size = next(iter(sizes)) if size is None else size
    if size not in sizes:
        raise bad("size", size, f"{path.stem} has {', '.join(sizes)}{did_you_mean(size, sizes)}")
    spec = _merged(spec, sizes[size] or {})
    _check_keys(spec, _STUDY, f"{path}, sizes.{size}")
    if not isinstance(spec.get("stages"), dict) or not spec["stages"]:
        raise bad("stages", spec.get("stages"), "give one stage or more, by name")
    stages: list[Stage] = []
    for name, part in spec["stages"].items():
        if part is not None:
            stages.append(_stage(name, part, {stage.name for stage in stages}))
    first = text.split("\n", 1)[0]
    workers = spec.get("workers", 1)
    if not isinstance(workers, int) or workers < 1:
        raise bad("workers", workers, "give the number of processes, 1 or more")
    executor = spec.get("executor") or {"kind": "local"}
    if executor.get("kind") not in KINDS:
        hint = did_you_mean(str(executor.get("kind")), KINDS)
        raise bad("executor.kind", executor.get("kind"), f"choose one of {', '.join(KINDS)}{hint}")
    wandb = spec.get("wandb", False)
    if not isinstance(wandb, bool):
        raise bad("wandb", wandb, "true or false is expected")
    minutes = spec.get("minutes")
    if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0):
        raise bad("minutes", minutes, "give the wall time after which no cell is begun, above 0")
    for key in ("figures", "tables"):
        spec[key] = _of_this_size(spec.get(key), [name for name, part in spec["stages"].items() if part is None])
    _check_report(path.stem, spec)
    return Study(
        name=path.stem,
        size=size,
        description=first.removeprefix("#").strip() if first.startswith("#") else "",
        stages=tuple(stages),
        figures=tuple(spec.get("figures") or ()),
        tables=tuple(spec.get("tables") or ()),
        workers=workers,
        executor=executor,
        wandb=wandb,
        minutes=minutes,
        config=path.stem if path.resolve().parent == configs_folder().resolve() / "studies" else str(path),
    )


def _of_this_size(shown: Any, left_out: Sequence[str]) -> Any:
    """Figures or tables of several stages, less those that this size leaves out, and less what then shows none."""
    if not isinstance(shown, list):
        return shown
    found = []
    for part in shown:
        stages = part.get("stage") if isinstance(part, dict) else None
        if not isinstance(stages, list) or not stages:
            found.append(part)
        elif there := [stage for stage in stages if stage not in left_out]:
            found.append({**part, "stage": there})
    return found


def _check_report(name: str, spec: Mapping[str, Any]) -> None:
    """See that the report will know what it is to show, before anything runs."""
    from experiments.report.spec import parse

    stages = {stage: part for stage, part in spec["stages"].items() if part is not None}
    parse({"name": name, "stages": stages, "figures": spec.get("figures"), "tables": spec.get("tables")})


def _stage(name: str, part: Any, earlier: set[str]) -> Stage:
    _check_keys(part, _STAGE, f"stages.{name}")
    configs, function = part.get("configs") or [], part.get("function")
    if bool(configs) == bool(function):
        raise bad(f"stages.{name}", None, "give configs (a fit) or function (bulk trials), one of the two")
    configs = [configs] if isinstance(configs, str) else configs
    for config in configs:
        find_config(config)
    grid = part.get("grid") or {}
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise bad(f"stages.{name}.grid.{key}", values, "give a list of values")
    exclude = part.get("exclude") or []
    for point in exclude:
        for key in point:
            if key not in grid:
                raise bad(f"stages.{name}.exclude", key, f"the grid has no such key{did_you_mean(str(key), grid)}")
    seeds = part.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise bad(f"stages.{name}.seeds", seeds, "give a list of whole numbers")
    inputs = part.get("inputs") or {}
    for key, source in inputs.items():
        if source not in earlier:
            hint = did_you_mean(str(source), earlier)
            raise bad(f"stages.{name}.inputs.{key}", source, f"no earlier stage has that name{hint}")
    return Stage(
        name=name,
        configs=tuple(configs),
        overrides=part.get("overrides") or {},
        grid={key: tuple(values) for key, values in grid.items()},
        exclude=tuple(exclude),
        seeds=tuple(seeds),
        seeded=tuple(part.get("seeded", ["seed_everything"])),
        inputs=inputs,
        function=function,
        arguments=part.get("arguments") or {},
    )


def _check_keys(part: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(part, dict):
        raise InputError(f"{where}: keys are expected, not {part!r}")
    for key in part:
        if key not in known:
            raise InputError(f"{where}: {key}: there is no such key{did_you_mean(str(key), known)}")


def _merged(base: Any, over: Any) -> Any:
    """Mappings key by key, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}
    return over


def _at_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return at_home(value) if isinstance(value, str) else value


def default_out(study: Study) -> Path:
    """Where a study is kept unless one says otherwise."""
    return Path("studies") / f"{study.name}-{study.size}"


def find_study(name: str) -> Path:
    """The YAML of a study given by path or by name.

    Raises:
        InputError: If there is none; it suggests the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    short = name.removeprefix("configs/").removeprefix("studies/").removesuffix(".yaml")
    path = configs_folder() / "studies" / f"{short}.yaml"
    if path.is_file():
        return path
    known = [found.stem for found in path.parent.glob("*.yaml")]
    raise bad("config", name, f"there is no such study{did_you_mean(short, known)}")
