"""One run folder, one process at work in it; and what a killed one leaves holds nobody up."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from experiments import pictures
from experiments.aftermath import KILLED, settle_all
from experiments.rundir import write_json
from experiments.runlock import LOCK, RunLock, if_free
from tests.experiments.running import (
    ONE_EPOCH,
    QUIET,
    Fork,
    Outcome,
    complaint,
    first_checkpoint,
    fork,
    only_run,
    read_json,
    runs,
    weights_hash,
)
from tests.helpers import refused

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"
SLOW = "--trainer.callbacks+=tests.experiments.test_faults.Slow"
FEW = ("--data.base.batch_size=200", "--model.backbone.widths=[4,8]", "--trainer.max_epochs=3")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a short run, and are looked at elsewhere."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logged(run: Path) -> list[dict[str, str]]:
    """The rows of a run's tables, a table for each time that it was gone on with."""
    rows = (row for table in sorted(run.rglob("metrics.csv")) for row in csv.DictReader(table.open()))
    return [{name: value for name, value in row.items() if value} for row in rows]


# --- the lock ---------------------------------------------------------------------------------------------------------
def test_one_holds_it_and_the_next_is_told_who(tmp_path: Path) -> None:
    first, second = RunLock(), RunLock()
    first.take(tmp_path, "resume")
    with refused("resume", tmp_path, f"process {os.getpid()}", "wait until it has ended"):
        second.take(tmp_path, "resume")
    with if_free(tmp_path) as free:
        assert not free
    first.release()
    assert not (tmp_path / LOCK).exists()
    second.take(tmp_path, "resume")
    second.release()
    second.release()
    with if_free(tmp_path) as free:
        assert free
        with refused("at work"):
            first.take(tmp_path, "resume")
    assert not (tmp_path / LOCK).exists()


def test_a_child_does_not_keep_it(tmp_path: Path) -> None:
    """A worker may outlive a killed run by seconds."""
    lock = RunLock()
    lock.take(tmp_path, "resume")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        with refused("at work"):
            RunLock().take(tmp_path, "resume")
        lock.release()
        RunLock().take(tmp_path, "resume")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_child_that_ends_does_not_free_it(tmp_path: Path) -> None:
    lock = RunLock()
    lock.take(tmp_path, "resume")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with refused("at work"):
        RunLock().take(tmp_path, "resume")
    lock.release()


@pytest.mark.parametrize("content", [b"", b"no JSON", b'{"process": "\\n"}'])
def test_what_lies_there_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    lock = RunLock()
    lock.take(tmp_path, "resume")
    (tmp_path / LOCK).write_bytes(content)
    with refused("another process is at work"):
        RunLock().take(tmp_path, "resume")
    lock.release()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with refused(tmp_path / "gone", "cannot be written"):
        RunLock().take(tmp_path / "gone", "resume")


# --- the commands -----------------------------------------------------------------------------------------------------
def test_no_lock_is_left_by_a_run(lightning: Command) -> None:
    assert lightning("fit", LINE, *ONE_EPOCH, "--trainer.logger=false").code == 0
    assert not list(Path("runs").rglob(LOCK))
    complaint(lightning("fit", LINE, *ONE_EPOCH, "--data.poison_fraction=2"), "poison_fraction")
    assert len(runs()) == 1, "not the folder of one that never began either"


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
def test_nothing_goes_on_with_a_run_that_is_going_on(command: str, lightning: Command, shared_run: Path) -> None:
    before, lock = files(shared_run), RunLock()
    lock.take(shared_run, "resume")
    line = complaint(lightning(command, "--resume", str(shared_run), *QUIET), "resume", f"process {os.getpid()}")
    assert line.startswith(f"lightning {command}: ")
    lock.release()
    assert files(shared_run) == before


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """The folder of a short run, which nothing here changes."""
    from experiments.cli import run

    root = tmp_path_factory.mktemp("shared")
    overrides = [option.removeprefix("--") for option in (*ONE_EPOCH, "--trainer.logger=false")]
    return run("badnets_digits", overrides=[*overrides, f"trainer.default_root_dir={root}"], show=False).directory


def test_killed_and_then_resumed_twice_at_once(lightning: Command, tmp_path: Path) -> None:
    """kill -9 in the midst of a fit; while it lives nobody gets in; then of two one goes on, to the same weights."""
    setting = ["fit", LINE, *QUIET, *FEW, SLOW]
    with fork(setting, tmp_path / "log", environment={"SLOW": "1"}) as process:
        broken = first_checkpoint(process).parent.parent
        complaint(lightning("fit", "--resume", str(broken)), f"process {process.pid}", "wait")
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert (broken / LOCK).is_file()
    assert not (broken / "metrics.json").exists()
    (broken / "checkpoints" / ".epoch=1.ckpt.123-01234567.part").write_bytes(b"half")
    with ExitStack() as stack:
        resumed = ["fit", "--resume", str(broken)]
        both: list[Fork] = [
            stack.enter_context(fork(resumed, tmp_path / f"log{number}", environment={"SLOW": "1"}))
            for number in range(2)
        ]
        assert sorted(process.wait() for process in both) == [0, 2], [process.text for process in both]
    (told,) = (process.text for process in both if process.code == 2)
    (line,) = told.splitlines()
    assert "is at work in this run" in line
    assert lightning(*setting).code == 0
    whole, broken = sorted(runs(), key=lambda run: run == broken)
    assert weights_hash(whole) == weights_hash(broken)
    assert read_json(broken / "status.json")["status"] == "finished"
    assert (broken / "checkpoints" / "epoch=2.ckpt").is_file()
    assert not list((broken / "checkpoints").glob("*-v1.ckpt"))
    assert not [path for path in broken.rglob("*") if path.name.startswith(".")]
    rows, expected = logged(broken), logged(whole)
    assert all(rows.count(row) == 1 for row in rows)
    assert [row for row in expected if row in rows] == rows, "no other, but that the kill may have cost one"
    assert len(rows) >= len(expected) - 1


def test_of_one_that_ended_while_this_began(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint to go on from is chosen when the folder is held, not when the command is typed."""
    from experiments import arguments

    setting = ("fit", LINE, *QUIET, *FEW, "--trainer.logger=false")
    assert lightning(*setting, "--trainer.callbacks.save_top_k=-1").code == 0
    run = only_run()
    old, *_ = sorted((run / "checkpoints").iterdir())
    monkeypatch.setattr(arguments, "last_checkpoint", lambda _: old)
    before = weights_hash(run)
    assert lightning("fit", "--resume", str(run)).code == 0
    assert (run / "metrics.json").stat().st_mtime_ns > 0
    assert weights_hash(run) == before


# --- what a killed run says -------------------------------------------------------------------------------------------
def test_the_next_run_of_a_config_says_what_became_of_the_killed(tmp_path: Path) -> None:
    told = {"status": "running", "process": os.getpid(), "host": "elsewhere"}
    stay = {"finished": {**told, "status": "finished"}, "older": {"status": "running", "process": 1}}
    for name, status in {"killed": told, "living": told, **stay}.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        write_json(tmp_path / name / "status.json", status)
        (tmp_path / name / "checkpoints" / ".x.ckpt.1-01234567.part").touch()
    (tmp_path / "no run").mkdir()
    lock = RunLock()
    lock.take(tmp_path / "living", "resume")
    settle_all(tmp_path)
    lock.release()
    assert read_json(tmp_path / "killed" / "status.json") == {**told, "status": "interrupted", "error": KILLED}
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())
    for name, status in {"living": told, **stay}.items():
        assert read_json(tmp_path / name / "status.json") == status
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 1
    settle_all(tmp_path / "absent")
