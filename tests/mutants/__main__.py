"""Put faults of one line into copies of the sources, and demand that the tests named beside each fail.

    python -m tests.mutants [--only NAME …] [--jobs N]

Libraries from elsewhere are imported once; each mutant then gets a copy of the tree and a process forked from here,
which imports our packages from that copy. The working tree is never written. First the named tests are run as they are:
tests that fail anyway tell nothing. Ends with 1 if a mutant survives – or an equivalent one does not –, and with 2 if
a list is stale or the tests fail without any fault.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: who has no pool of threads can be forked

from tests.mutants import Mutant, apply, read

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("datamodules", "classifiers", "poisoning", "extraction", "watermark", "experiments", "configs", "tests")
HEAVY = (
    "torch", "torchvision", "torchmetrics", "lightning.pytorch.cli", "jsonargparse", "omegaconf", "safetensors.torch",
    "scipy.stats", "sklearn.datasets", "PIL.Image", "rich.progress", "wandb", "numpy", "pytest", "torch._dynamo",
)  # fmt: skip
LIMIT = 300.0
"""Seconds after which tests are ended: a fault that hangs is none of these lists."""

PASSED, FAILED = 0, 1
"""What pytest ends with; anything else, an import that fails for one, is not what a mutant is to do."""


@dataclass
class Job:
    """Tests that run in a process of their own, in a copy of the tree."""

    label: str
    tests: Sequence[str]
    mutant: Mutant | None = None
    folder: Path = Path()
    pid: int = 0
    begun: float = 0.0
    seconds: float = 0.0
    status: int = -1

    @property
    def output(self) -> str:
        """What the tests printed."""
        path = self.folder / "output.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def failed(self) -> list[str]:
        """The tests that failed."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return [line.split(" ", 1)[1].split(" - ")[0] for line in lines]


# --- one process -----------------------------------------------------------------------------------------------------
def copy_tree(source: Path, target: Path) -> None:
    """Copy what tests read, times of change and compiled files included, so that only what is changed is compiled."""
    target.mkdir(parents=True)
    for part in source.iterdir():
        if part.is_dir() and part.name in (*COPIED, "docs"):
            shutil.copytree(part, target / part.name)
        elif part.is_file() and not part.name.startswith("."):
            shutil.copy2(part, target / part.name)


def put_in(mutant: Mutant, tree: Path) -> None:
    """Put a fault into a copy, and take the compiled file of what was there before away."""
    changed, path = apply(mutant, tree), tree / mutant.file
    path.write_text(changed, encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def start(job: Job, source: Path) -> None:
    """Fork a process that runs the tests: in a copy of `source` with the fault in it, or without one in `source`."""
    job.folder.mkdir(parents=True)
    tree = source
    if job.mutant is not None:
        tree = job.folder / "tree"
        copy_tree(source, tree)
        put_in(job.mutant, tree)
    job.begun = time.monotonic()
    job.pid = forked(partial(_run_tests, job.folder, job.tests), tree, job.folder / "output.txt")


def forked(work: Callable[[], int], tree: Path, output: Path) -> int:
    """The process id of a fork that ends with what `work` returns; there our packages come from `tree`."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        _enter(tree, output)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter(tree: Path, output: Path) -> None:
    os.setsid()  # what it starts ends with it
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in [name for name in sys.modules if name.split(".")[0] in COPIED]:
        del sys.modules[name]
    sys.modules["__main__"] = ModuleType("__main__")  # a process that a test spawns would import this one
    sys.path[:] = [str(tree), *(path for path in sys.path if not (Path(path or ".") / "datamodules").is_dir())]
    importlib.invalidate_caches()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # of what the tests start


def _write_data(folder: Path) -> int:
    importlib.import_module("tests.fixtures_data").write_all(folder)
    return 0


def _run_tests(folder: Path, tests: Sequence[str]) -> int:
    import pytest

    # no pruning of other processes' temporary folders, no plugin that starts processes
    quiet = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder / 'tmp'}"]
    return int(pytest.main([*quiet, *tests]))


def finished(jobs: list[Job]) -> Iterator[Job]:
    """Those that have ended since the last look, or were ended."""
    for job in list(jobs):
        pid, status = os.waitpid(job.pid, os.WNOHANG)
        job.seconds = time.monotonic() - job.begun
        if not pid and job.seconds > LIMIT:
            os.killpg(job.pid, signal.SIGKILL)
            pid, status = os.waitpid(job.pid, 0)
        if pid:
            job.status = os.waitstatus_to_exitcode(status)
            jobs.remove(job)
            yield job


def run_all(jobs: Sequence[Job], source: Path, work: Path, at_once: int) -> Iterator[Job]:
    """Run jobs, some at a time, each in a folder of its own below `work`; yields them as they end."""
    waiting, running = list(jobs), list[Job]()
    for number, job in enumerate(waiting):
        job.folder = work / f"{number:03d}"
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                start(running[-1], source)
            for job in finished(running):
                yield job
                shutil.rmtree(job.folder, ignore_errors=True)
            time.sleep(0.02)
    finally:
        for job in running:
            os.killpg(job.pid, signal.SIGKILL)


# --- all of them -----------------------------------------------------------------------------------------------------
def check_unmutated(mutants: Sequence[Mutant], base: Path, work: Path, at_once: int) -> list[str]:
    """The named tests that fail as things are; what is compiled for them stays in `base`, which mutants are made of."""
    named = {test: None for mutant in mutants for test in mutant.tests}
    files: dict[str, list[str]] = {}
    for test in named:
        files.setdefault(test.split("::")[0], []).append(test)
    jobs = [Job(file, tests) for file, tests in files.items()]
    wrong: list[str] = []
    for job in run_all(jobs, base, work, at_once):
        if job.status != PASSED:
            wrong += job.failed or [f"{job.label}: pytest ended with {job.status}\n{job.output[-2000:]}"]
    return wrong


def verdict(job: Job) -> tuple[bool, str]:
    """Whether a mutant did what it is to do, and what that was in words."""
    assert job.mutant is not None
    if job.status == PASSED:
        return job.mutant.equivalent, "passes" if job.mutant.equivalent else "SURVIVES"
    if job.status == FAILED and job.failed:
        words = "NOT EQUIVALENT: caught by" if job.mutant.equivalent else "caught by"
        return not job.mutant.equivalent, f"{words} {job.failed[0]}"
    return False, f"BROKEN: pytest ended with {job.status}: {' '.join(job.output.split())[-300:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--only", action="extend", nargs="+", metavar="NAME", help="these mutants, or those of a file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (%(default)s)")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without faults first")
    parser.add_argument("--lists", type=Path, default=ROOT / "tests" / "mutants", help="their folder (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="of what they change (%(default)s)")
    parser.add_argument("--imports", nargs="*", default=HEAVY, metavar="MODULE", help="what is imported once")
    given = parser.parse_args(arguments)
    try:
        mutants = read(given.lists)
        if given.only:
            unknown = set(given.only) - {m.name for m in mutants} - {m.file for m in mutants}
            if unknown:
                raise ValueError(f"there is no mutant {', '.join(sorted(unknown))}, nor a file of one")
            mutants = [m for m in mutants if m.name in given.only or m.file in given.only]
        for mutant in mutants:
            apply(mutant, given.root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name in given.imports:
        importlib.import_module(name)
    begun, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        work = Path(temporary)
        copy_tree(given.root, base := work / "base")
        if (base / "tests" / "fixtures_data.py").is_file():  # written once for all
            os.environ["PHARMAKON_TEST_DATA"] = str(work / "data")
            os.waitpid(forked(partial(_write_data, work / "data"), base, work / "data.txt"), 0)
        if not given.unchecked and (wrong := check_unmutated(mutants, base, work / "unmutated", given.jobs)):
            print("these tests fail without any fault:", *wrong, sep="\n  ", file=sys.stderr)
            return 2
        jobs = [Job(mutant.name, mutant.tests, mutant) for mutant in mutants]
        for number, job in enumerate(run_all(jobs, base, work / "mutated", given.jobs), start=1):
            right, text = verdict(job)
            bad += not right
            print(f"{number:4d} {job.label:44s} {job.seconds:5.1f} s  {text}", flush=True)
    counted = sum(not mutant.equivalent for mutant in mutants)
    print(f"{counted} mutants and {len(mutants) - counted} equivalents, {bad} not as they should be, "
          f"in {time.monotonic() - begun:.0f} s")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
