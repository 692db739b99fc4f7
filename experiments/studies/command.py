"""`lightning study`: run a study's cells, here or on a cluster, and keep a table of how it stands."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import write_atomically
from experiments import rundir
from experiments.arguments import value_of
from experiments.studies.cells import Cell, command_of, plan
from experiments.studies.pool import call, run_in_pool, start_imports
from experiments.studies.results import rows_of, write_results
from experiments.studies.spec import Study, default_out, find_study, read_study
from experiments.studies.work import execute, fail

OPTIONS = (
    "--config", "--size", "--out", "--workers", "--only", "--dry-run", "--retry-failed", "--sweep", "--no-report",
    "--wandb",
)  # fmt: skip
"""Of the command."""


@dataclass
class Options:
    """What was typed after `lightning study`."""

    config: Path
    size: str | None = None
    out: Path | None = None
    workers: int | None = None
    only: list[str] = field(default_factory=list)
    dry_run: bool = False
    retry_failed: bool = False
    sweep: Path | None = None
    report: bool = True
    wandb: bool = False


def study(args: list[str]) -> int:
    """Run a study.

    Args:
        args: ``study --config NAME [--size quick|paper] [--out DIR] [--workers N] [--only KEY=VALUE|STAGE] [--dry-run]
            [--retry-failed] [--sweep FILE] [--no-report] [--wandb]``.

    Returns:
        0 if no cell failed – those whose data are not there are not run, and that is said –, 1 if some did.

    Raises:
        InputError: If the study is wrong, or another one is running in its folder.
    """
    options = _options(args)
    spec = read_study(options.config, options.size)
    if options.sweep is not None:
        _write_sweep(spec, options.sweep)
        return 0
    workers = options.workers or spec.workers
    threads = max(1, (os.cpu_count() or 1) // workers)
    out = options.out or default_out(spec)
    local = spec.executor["kind"] == "local"
    if local and workers > 1 and not options.dry_run and not (out / "results.csv").exists():
        start_imports()
        spec, cells = call(_planned, spec, threads)
    else:
        cells = plan(spec, threads)
    chosen = _chosen(cells, options.only)
    if options.dry_run:
        _show_plan(spec, chosen, out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out, local):
        _keep_spec(spec, cells, out)
        if options.retry_failed:
            for record in (out / "failed").glob("*.json"):
                record.unlink()
        try:
            _run(spec, [cell for cell in chosen if not cell.absent], out, workers, threads)
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
            there = sum((out / "cells" / cell.folder / "cell.json").is_file() for cell in chosen)
            print(f"interrupted: {there} of {len(chosen)} cells are finished; the same command goes on from there")
            raise
        finally:
            rows = rows_of(spec, cells, out)
            write_results(rows, out)
    failed = sum(row["status"] == "failed" for row in rows)
    finished = sum(row["status"] == "finished" for row in rows)
    codes = {row["code_hash"] for row in rows if row.get("code_hash")}
    _say_absent(chosen)
    print(f"{finished} rows finished, {failed} failed: {out / 'results.csv'}")
    if len(codes) > 1:
        print(f"note: they were made with {len(codes)} versions of the code; column code_hash tells which")
    if options.report:
        from experiments.report import report

        report(["report", str(out), *(["--wandb"] if options.wandb or spec.wandb else [])])
    return 1 if failed else 0


def _planned(spec: Study, threads: int) -> tuple[Study, list[Cell]]:
    """A study and its cells, whose stages are its own, in another process too."""
    return spec, plan(spec, threads)


def _say_absent(cells: Sequence[Cell]) -> None:
    """One line for each reason why cells cannot run here."""
    for reason, n in Counter(cell.absent for cell in cells if cell.absent).items():
        print(f"not run: {n} of {len(cells)} cells: {reason}")


def _options(args: list[str]) -> Options:
    found: dict[str, Any] = {"only": []}
    rest = iter(args[1:])
    for arg in rest:
        key, equals, value = arg.partition("=")

        def needed(key: str = key, equals: str = equals, value: str = value) -> str:
            return value if equals else value_of(rest, key)

        if key in ("--config", "-c"):
            found["config"] = find_study(needed())
        elif key == "--size":
            found["size"] = needed()
        elif key in ("--out", "--sweep"):
            found[key[2:]] = Path(needed())
        elif key == "--workers":
            text = needed()
            if not text.isdigit() or int(text) < 1:
                raise bad("workers", text, "give the number of processes, 1 or more")
            found["workers"] = int(text)
        elif key == "--only":
            found["only"].append(needed())
        elif key in ("--dry-run", "--retry-failed", "--wandb"):
            found[key[2:].replace("-", "_")] = True
        elif key == "--no-report":
            found["report"] = False
        else:
            raise InputError(f"{key}: there is no such option{did_you_mean(key, OPTIONS)}")
    if "config" not in found:
        raise InputError("config: name a study: lightning study --config badnets_fraction --size quick")
    options = Options(**found)
    if options.wandb and not options.report:
        raise InputError("--wandb: it is the report that goes to W&B; leave --no-report out")
    return options


def _chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that match, and those whose weights they need, in order."""
    wanted = {cell.identity for cell in cells if _matches(cell, only)}
    if not wanted:
        raise bad("only", " ".join(only), "no cell matches; lightning study … --dry-run shows them all")
    for cell in reversed(cells):
        if cell.identity in wanted:
            wanted.update(cell.needs.values())
    return [cell for cell in cells if cell.identity in wanted]


def _matches(cell: Cell, only: Sequence[str]) -> bool:
    """Whether a cell has every ``KEY=VALUE`` (``seed`` too), or is of a stage named."""
    for condition in only:
        key, equals, value = condition.partition("=")
        if not equals:
            if cell.stage.name != key:
                return False
        elif str({**cell.point, "seed": cell.seed}.get(key)) != str(yaml.safe_load(value)):
            return False
    return True


def _show_plan(spec: Study, cells: Sequence[Cell], out: Path) -> None:
    """Print the cells, which of them are finished, and how long the others may take."""
    from experiments.studies.results import seconds_of

    table = Table(title=f"{spec.name}, {spec.size}: {len(cells)} cells", title_justify="left")
    for heading in ("stage", "cell", "seed", "point", "state", "seconds"):
        table.add_column(heading)
    times: dict[str, list[float]] = {}
    for cell in cells:
        seconds = seconds_of(cell, out)
        if seconds is not None:
            times.setdefault(cell.stage.name, []).append(seconds)
        failed = (out / "failed" / f"{cell.folder}.json").is_file()
        state = "finished" if seconds is not None else "failed" if failed else "not run" if cell.absent else "to do"
        point = _short(cell.point)
        shown = "" if seconds is None else f"{seconds:.1f}"
        table.add_row(cell.stage.name, cell.folder, str(cell.seed), point, state, shown)
    console = Console()
    console.print(table)
    _say_absent(cells)
    open_cells = [cell for cell in cells if seconds_of(cell, out) is None and not cell.absent]
    known = [sum(times[c.stage.name]) / len(times[c.stage.name]) for c in open_cells if c.stage.name in times]
    if open_cells and len(known) == len(open_cells):
        console.print(f"to do: {len(open_cells)} cells, about {sum(known) / 60:.1f} minutes in one process")
    elif open_cells:
        console.print(f"to do: {len(open_cells)} cells; how long one takes is known once one has run")
    for cell in open_cells[:1]:
        console.print(f"the first is: {command_of(spec, cell, out)}", soft_wrap=True, highlight=False)


def _short(point: Mapping[str, Any]) -> str:
    """A cell's place in the grid, by the last part of each key."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())


@contextmanager
def _alone(out: Path, local: bool) -> Iterator[None]:
    """Hold the study's folder; the lock of a killed one is free. Jobs of a cluster may be at work still."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise bad(
                "out", str(out), "another study is running there; wait for it, or choose another folder"
            ) from error
        if local:
            shutil.rmtree(out / "work", ignore_errors=True)  # what a study left that was killed
        try:
            yield
        finally:
            if local:
                shutil.rmtree(out / "work", ignore_errors=True)


def _keep_spec(spec: Study, cells: Sequence[Cell], out: Path) -> None:
    """Write study.yaml: what the report goes by. Its grids have the keys that stages got from their inputs too."""
    from dataclasses import asdict

    content = rundir.plain(asdict(spec))
    for stage in content["stages"]:
        points = [rundir.plain(cell.point) for cell in cells if cell.stage.name == stage["name"]]
        for key in dict.fromkeys(key for point in points for key in point if key not in stage["grid"]):
            values = [point[key] for point in points if key in point]
            stage["grid"][key] = [value for number, value in enumerate(values) if value not in values[:number]]
    write_atomically(out / "study.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


# --- running ---------------------------------------------------------------------------------------------------------
def _run(spec: Study, cells: Sequence[Cell], out: Path, workers: int, threads: int) -> None:
    """Run what is not finished, stage by stage; a failure is recorded, and the others go on."""
    board = Board(spec, cells, out)
    if "waiting" not in board.state.values():
        failed = list(board.state.values()).count("failed")
        again = f"; {failed} failed, which --retry-failed runs again" if failed else ""
        if cells:
            print(f"nothing to run: {len(board.state) - failed} cells are finished{again}")
        return
    shown = set({cell.stage.name: cell.identity for cell in reversed(cells)}.values())  # the first of each stage
    until = math.inf if spec.minutes is None else time.monotonic() + 60 * spec.minutes
    console = Console(file=sys.stdout)  # of now: what cells print is swallowed
    with Live(get_renderable=board.table, console=console, refresh_per_second=2):
        for stage in spec.stages:
            if time.monotonic() >= until:
                break
            todo = [cell for cell in cells if cell.stage is stage and board.state[cell.folder] == "waiting"]
            todo = list({cell.folder: cell for cell in todo}.values())
            ready = [cell for cell in todo if _inputs_are_there(cell, out, board)]
            if spec.executor["kind"] != "local":
                _on_cluster(spec, ready, shown, out, threads, board)
            elif workers == 1:
                for cell in ready:
                    if time.monotonic() >= until:
                        break
                    board.begin(cell)
                    board.end(cell, execute(cell, out, threads, cell.identity in shown))
            elif ready:
                run_in_pool(ready, shown, out, workers, threads, board.begin, board.end, until)
    if not console.is_terminal:
        console.print()  # which does not end the table's last line
    left = Counter(cell.stage.name for cell in cells if board.state[cell.folder] == "waiting")
    if left:
        which = ", ".join(f"{count} of {name}" for name, count in left.items())
        print(f"the {spec.minutes:g} minutes are over; left out: {which}; the same command goes on with them")


def _inputs_are_there(cell: Cell, out: Path, board: Board) -> bool:
    missing = [needed for needed in cell.needs.values() if not (out / "cells" / needed[:16] / "cell.json").is_file()]
    if missing:
        error = f"its input, cell {missing[0][:16]}, is missing or failed"
        fail(cell, out, error)
        board.end(cell, error)
    return not missing


def _on_cluster(spec: Study, cells: Sequence[Cell], shown: set[str], out: Path, threads: int, board: Board) -> None:
    """One job array through submitit; a job that is preempted is queued again."""
    from experiments.studies.cluster import submit

    jobs = submit(spec.executor, cells, shown, out, threads)
    for cell in cells:
        board.begin(cell)
    waiting = dict(zip(jobs, cells, strict=True))
    while waiting:
        for job in [job for job in waiting if job.done()]:
            cell = waiting.pop(job)
            died = job.exception()
            error = job.result() if died is None else f"{type(died).__name__}: {' '.join(str(died).split())}"
            if died is not None:
                fail(cell, out, str(error))
            board.end(cell, error)
        time.sleep(0.2 if spec.executor["kind"] == "submitit_debug" else 1.0)


class Board:
    """How a study stands, as a table.

    Args:
        spec: The study.
        cells: Those that are to run.
        out: Its folder.
    """

    def __init__(self, spec: Study, cells: Sequence[Cell], out: Path) -> None:
        self.spec = spec
        self.cells = cells
        self.began = time.perf_counter()
        self.seconds: list[float] = []
        self.state: dict[str, str] = {}
        self.last_error = ""
        self._since: dict[str, float] = {}
        for cell in cells:
            finished = (out / "cells" / cell.folder / "cell.json").is_file()
            failed = (out / "failed" / f"{cell.folder}.json").is_file()
            self.state[cell.folder] = "finished" if finished else "failed" if failed else "waiting"

    def begin(self, cell: Cell) -> None:
        """A cell runs."""
        self.state[cell.folder] = "running"
        self._since[cell.folder] = time.perf_counter()

    def end(self, cell: Cell, error: str | None) -> None:
        """A cell has ended."""
        self.state[cell.folder] = "finished" if error is None else "failed"
        if cell.folder in self._since:
            self.seconds.append(time.perf_counter() - self._since[cell.folder])
        if error is not None:
            self.last_error = f"{cell.folder}: {error}"

    def table(self) -> Table:
        """One line a stage."""
        passed = time.perf_counter() - self.began
        table = Table(title=f"{self.spec.name}, {self.spec.size} – {passed:.0f} s", title_justify="left")
        for heading in ("stage", "finished", "running", "failed", "waiting", "now"):
            table.add_column(heading, justify="left" if heading in ("stage", "now") else "right")
        for stage in self.spec.stages:
            mine = [cell for cell in self.cells if cell.stage is stage]
            counts = [
                sum(self.state[c.folder] == s for c in mine) for s in ("finished", "running", "failed", "waiting")
            ]
            now = [cell for cell in mine if self.state[cell.folder] == "running"][:2]
            point = "; ".join(
                ", ".join(part for part in (_short(cell.point), f"seed={cell.seed}") if part) for cell in now
            )
            table.add_row(stage.name, *(str(count) for count in counts), point)
        if self.last_error:
            table.caption = f"last failure: {self.last_error[:200]}"
        return table


# --- W&B sweeps ------------------------------------------------------------------------------------------------------
def _write_sweep(spec: Study, path: Path) -> None:
    """Write a W&B sweep of the last stage: its grid and seeds, run by W&B's agents as `lightning fit`."""
    stage = spec.stages[-1]
    if stage.function or stage.inputs:
        raise InputError(f"sweep: stage {stage.name} needs more than a config; run it with lightning study")
    if len(stage.seeded) > 1:
        raise InputError(
            f"sweep: stage {stage.name} gives its seed to {len(stage.seeded)} keys; W&B varies one at a time"
        )
    configs = [part for config in stage.configs for part in ("--config", config)]
    fixed = [f"--{key}={value}" for key, value in stage.overrides.items()]
    content = {
        "project": "pharmakon",
        "name": f"{spec.name}-{spec.size}",
        "method": "grid",
        "metric": {"name": "val/clean_accuracy", "goal": "maximize"},
        "parameters": {
            **{key: {"values": list(values)} for key, values in stage.grid.items()},
            **{key: {"values": list(stage.seeds)} for key in stage.seeded},
        },
        "command": ["lightning", "fit", *configs, *fixed, "${args}"],
    }
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
    print(f"wandb sweep {path}")
