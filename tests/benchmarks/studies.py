"""Two claims about studies, each shown by running one: `kills` and `overhead`.

``python -m tests.benchmarks.studies kills``: a study that is killed (SIGKILL, its whole process group) ten times at
random moments, half of them while cells run, ends with the files of an undisturbed one, byte for byte apart from times.

``python -m tests.benchmarks.studies overhead``: 100 small cells through the local pool: wall time × workers against the
cells' own seconds, and which processes paid for imports.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
OUT = "study"
"""The study's folder, in a working directory of its own: commands in results.csv name it."""

TIMES = ("seconds", "finished")
"""Columns of results.csv, and keys of `TIMED`, that hold times."""

PLAIN = ("weights.safetensors", "config.yaml", "manifest.json")
"""Files of a cell that hold no times."""

TIMED = ("metrics.json", "cell.json")
"""Files of a cell that do."""

PATIENCE = 1800.0
"""Seconds after which something hangs."""

_COUNT_IMPORTS = """\
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "lightning.pytorch.trainer.trainer":
            with open(os.environ["IMPORTS_LOG"], "a") as log:
                log.write(f"{os.getpid()}\\n")

sys.meta_path.insert(0, Watch())
"""


def tiny() -> dict[str, Any]:
    """Eight clean victims and, for two of them, an attack that is compared with them."""
    return {
        "stages": {
            "victim": {
                "configs": ["victim_digits"],
                "overrides": {"trainer.max_epochs": 8},
                "seeds": [0, 1, 2, 3, 4, 5, 6, 7],
            },
            "attack": {
                "configs": ["badnets_digits"],
                "overrides": {"trainer.max_epochs": 8},
                "seeds": [0, 1],
                "seeded": ["seed_everything", "data.seed"],
                "inputs": {"model.honest": "victim"},
            },
        },
        "workers": 2,
    }


def many(cells: int, epochs: int) -> dict[str, Any]:
    """So many clean victims, two processes."""
    stage = {"configs": ["victim_digits"], "overrides": {"trainer.max_epochs": epochs}, "seeds": list(range(cells))}
    return {"stages": {"victim": stage}, "workers": 2}


def begin(folder: Path, content: dict[str, Any], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a study in `folder`, as the leader of a process group."""
    folder.mkdir(exist_ok=True)
    (folder / "claim.yaml").write_text(
        f"# A claim about studies\n{yaml.safe_dump(content, sort_keys=False)}", encoding="utf-8"
    )
    paths = os.pathsep.join(filter(None, [(environment or {}).get("PYTHONPATH"), str(ROOT)]))
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", "study", "--config", "claim.yaml", "--out", OUT, "--no-report"],
        cwd=folder,
        env={**os.environ, **(environment or {}), "PYTHONPATH": paths},
        stdout=(folder / "log.txt").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a study; whatever is wrong ends this program."""
    if process.wait(PATIENCE) != 0:
        sys.exit(f"the study failed:\n{(folder / 'log.txt').read_text(encoding='utf-8')}")


# --- kills -----------------------------------------------------------------------------------------------------------
def kills(times: int, seed: int) -> int:
    """Compare a study that is killed so often with one that is not; 1 if they differ."""
    console, chance = Console(), random.Random(seed)
    with TemporaryDirectory() as temporary:
        calm, killed = Path(temporary) / "calm", Path(temporary) / "killed"
        started = time.perf_counter()
        process = begin(calm, tiny())
        _wait(process, calm / OUT, started, PATIENCE, 0)
        until_cells = time.perf_counter() - started
        finish(process, calm)
        wall = time.perf_counter() - started
        records = [_json(path) for path in (calm / OUT / "cells").glob("*/cell.json")]
        each = sum(record["seconds"] for record in records) / len(records)
        console.print(f"undisturbed: {wall:.1f} s, {len(records)} cells of {each:.1f} s, the first begun after "
                      f"{until_cells:.1f} s")  # fmt: skip
        # half of them at any time before cells run; half once as many cells as are drawn are finished, and a bit later
        moments: list[tuple[float, int, float]] = [(chance.uniform(0, until_cells), 0, 0.0) for _ in range(times // 2)]
        moments += [(PATIENCE, chance.randint(0, 1), chance.uniform(0, 0.4)) for _ in range(times - times // 2)]
        chance.shuffle(moments)
        table = Table(title=f"{times} × SIGKILL, seed {seed}", title_justify="left")
        for heading in ("kill", "after (s)", "cells at work", "finished"):
            table.add_column(heading, justify="right")
        number = 0
        for at_latest, cells, later in moments:
            started = time.perf_counter()
            process = begin(killed, tiny())
            _wait(process, killed / OUT, started, at_latest, _finished(killed / OUT) + cells)
            time.sleep(later)
            at_work = _at_work(killed / OUT, started)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            number += process.wait() == -signal.SIGKILL
            after = time.perf_counter() - started
            table.add_row(str(number), f"{after:.1f}", str(at_work), str(_finished(killed / OUT)))
        console.print(table)
        finish(begin(killed, tiny()), killed)
        wrong = differences(calm / OUT, killed / OUT)
    if number < times:
        wrong.append(f"it was killed {number} times only: it had ended before")
    compared = f"results.csv, and weights, metrics, manifest and config of {len(records)} cells"
    console.print("\n".join(wrong) if wrong else f"no difference in {compared}, apart from times")
    return 1 if wrong else 0


def _wait(process: subprocess.Popen[bytes], out: Path, started: float, at_latest: float, finished: int) -> None:
    """Wait until so many seconds have passed, or so many cells are finished and one is at work."""
    while process.poll() is None and time.perf_counter() - started < at_latest:
        if _at_work(out, started) and _finished(out) >= finished:
            return
        time.sleep(0.005)


def _finished(out: Path) -> int:
    return len(list((out / "cells").glob("*/cell.json")))


def _at_work(out: Path, started: float) -> int:
    """How many cells are at work that were not when a study was killed before this one was started."""
    passed = time.perf_counter() - started
    count = 0
    for path in (out / "work").glob("*"):
        with suppress(FileNotFoundError):  # it has ended
            count += path.stat().st_mtime > time.time() - passed
    return count


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two studies' folders, apart from times."""
    found = []
    if _table(one) != _table(other):
        found.append("results.csv differs")
    names = [sorted(path.name for path in (out / "cells").iterdir()) for out in (one, other)]
    if names[0] != names[1]:
        return [*found, f"the cells differ: {names[0]} and {names[1]}"]
    for name in names[0]:
        mine, theirs = one / "cells" / name, other / "cells" / name
        files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (mine, theirs)]
        if files[0] != files[1]:
            found.append(f"{name}: the files differ: {files[0]} and {files[1]}")
        found += [
            f"{name}: {file} differs" for file in PLAIN if (mine / file).read_bytes() != (theirs / file).read_bytes()
        ]
        found += [f"{name}: {file} differs" for file in TIMED if _untimed(mine / file) != _untimed(theirs / file)]
    found += [f"{left.name} is left" for left in (other / "work", other / "failed") if left.exists()]
    return found


def _table(out: Path) -> str:
    """results.csv without the columns of times."""
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = [column for column, name in enumerate(rows[0]) if name not in TIMES]
    return "\n".join(",".join(json.dumps(row[column]) for column in kept) for row in rows)


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _untimed(path: Path) -> dict[str, Any]:
    return {key: value for key, value in _json(path).items() if key not in TIMES}


# --- overhead --------------------------------------------------------------------------------------------------------
def overhead(cells: int, epochs: int) -> int:
    """Run a study of small cells; 1 if the pool costs more than a tenth of the cells' own time."""
    content = many(cells, epochs)
    workers = int(content["workers"])
    with TemporaryDirectory() as temporary:
        folder, watch, log = (Path(temporary) / name for name in ("study", "watch", "imports.txt"))
        watch.mkdir()
        (watch / "sitecustomize.py").write_text(_COUNT_IMPORTS, encoding="utf-8")
        started, clock = time.perf_counter(), time.time()
        finish(begin(folder, content, {"PYTHONPATH": str(watch), "IMPORTS_LOG": str(log)}), folder)
        wall = time.perf_counter() - started
        paths = list((folder / OUT / "cells").glob("*/cell.json"))
        ends = sorted((path.stat().st_mtime - clock, _json(path)["seconds"]) for path in paths)
        importers = log.read_text(encoding="utf-8").split()
    own = sum(seconds for _, seconds in ends)
    share = wall * workers / own - 1
    table = Table(title=f"{len(ends)} cells of {own / len(ends):.2f} s, {workers} workers", title_justify="left")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    first = min(end - seconds for end, seconds in ends)
    for what, seconds in (
        ("wall time", wall),
        ("until the first cell was begun: imports and plan", first),
        ("from then until the last had ended", ends[-1][0] - first),
        ("after that: results", wall - ends[-1][0]),
        ("the cells' own, added up", own),
    ):
        table.add_row(what, f"{seconds:.1f}")
    console = Console()
    console.print(table)
    running = (ends[-1][0] - first) * workers / own - 1
    console.print(f"overhead: {100 * share:.1f} % of the cells' own time; {100 * running:.1f} % while cells ran")
    console.print(f"imports: {len(importers)} in {len(set(importers))} processes, for {workers} workers and the study")
    return 1 if share > 0.1 or len(importers) > len(set(importers)) else 0


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.studies", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("kills")
    part.add_argument("--times", type=int, default=10)
    part.add_argument("--seed", type=int, default=0)
    part = commands.add_parser("overhead")
    part.add_argument("--cells", type=int, default=100)
    part.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    if options.command == "kills":
        return kills(options.times, options.seed)
    return overhead(options.cells, options.epochs)


if __name__ == "__main__":
    sys.exit(main())
