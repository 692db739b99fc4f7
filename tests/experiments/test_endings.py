"""Every way to end: the exit status, what status.json says, and that the run goes on from there, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import pictures
from experiments.aftermath import KILLED
from experiments.ranks import PATIENCE
from tests.experiments.running import (
    ONE_EPOCH,
    QUIET,
    Fork,
    Outcome,
    first_checkpoint,
    fork,
    only_run,
    ranks,
    read_json,
    runs,
    weights_hash,
)

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"
FEW = (
    "--data.base.batch_size=200", "--model.backbone.widths=[4,8]", "--trainer.max_epochs=3", "--trainer.logger=false",
)  # fmt: skip
SETTING = ["fit", LINE, *QUIET, *FEW, "--trainer.callbacks+=tests.experiments.test_faults.Slow"]
SLOW = {"SLOW": "1"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a short run, and are looked at elsewhere."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> str:
    """The weights' hash of a run that nothing disturbs."""
    from experiments.cli import run

    root = tmp_path_factory.mktemp("undisturbed")
    options = [option.removeprefix("--") for option in SETTING[2:]]
    return weights_hash(run("badnets_digits", overrides=[*options, f"trainer.default_root_dir={root}"]).directory)


def goes_on(lightning: Command, run: Path, expected: str) -> None:
    assert lightning("fit", "--resume", str(run)).code == 0
    assert weights_hash(run) == expected
    assert read_json(run / "status.json")["status"] == "finished"
    assert not (run / "checkpoints" / "interrupted.ckpt").exists()


# --- signals ----------------------------------------------------------------------------------------------------------
def ended_by(process: Fork, *numbers: int) -> Path:
    """The folder of the run that signals ended, as soon as it had a checkpoint."""
    run = first_checkpoint(process, 120).parent.parent
    for number in numbers:
        process.send(number)
        time.sleep(0.02)
    process.wait()
    assert "Traceback" not in process.text, process.text
    return run


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGHUP,), 143), ((signal.SIGTERM, signal.SIGTERM), 143)],
    ids=["Ctrl-C twice", "hang-up", "SIGTERM twice"],
)
def test_signals(numbers: tuple[int, ...], code: int, undisturbed: str, lightning: Command, tmp_path: Path) -> None:
    with fork(SETTING, tmp_path / "log", environment=SLOW) as process:
        run = ended_by(process, *numbers)
        assert process.code == code, process.text
    assert read_json(run / "status.json")["status"] == "interrupted"
    assert f"lightning fit --resume {run}" in process.text
    goes_on(lightning, run, undisturbed)


def ignore() -> None:
    """As of a job of nohup, or one begun in the background of a script."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def test_where_interrupts_are_ignored_sigterm_still_ends(undisturbed: str, lightning: Command, tmp_path: Path) -> None:
    with fork(SETTING, tmp_path / "log", environment=SLOW, before=ignore) as process:
        first_checkpoint(process, 120)
        for number in (signal.SIGINT, signal.SIGHUP):
            process.send(number)
        time.sleep(0.1)
        assert process.running()
        run = ended_by(process, signal.SIGTERM)
        assert process.code == 143, process.text
    assert (run / "checkpoints" / "interrupted.ckpt").is_file()
    goes_on(lightning, run, undisturbed)


# --- streams ----------------------------------------------------------------------------------------------------------
def nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.parametrize("bar", ["true", "false"], ids=["progress bar", "quiet"])
def test_a_training_does_not_die_of_what_nobody_reads(bar: str, tmp_path: Path) -> None:
    args = ["fit", LINE, *ONE_EPOCH, "--trainer.logger=false", f"--trainer.enable_progress_bar={bar}"]
    with fork(args, tmp_path / "log", before=nobody_reads) as process:
        assert process.wait() == 0, process.text
    assert "Traceback" not in process.text
    assert read_json(only_run() / "status.json")["status"] == "finished"


# --- several processes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dead", [0, 1])
def test_one_of_two_processes_is_killed(dead: int, tmp_path: Path) -> None:
    """The other says so in one line and ends; the status is true whichever it was; the run goes on."""
    with ranks(SETTING, tmp_path, environment=SLOW) as processes:
        run = first_checkpoint(processes[0], 120).parent.parent
        processes[dead].send(signal.SIGKILL)
        assert processes[dead].wait() == -signal.SIGKILL, "gone before anybody looks"
        other = processes[1 - dead]
        assert other.wait() == 1, other.text
    (line,) = (line for line in other.text.splitlines() if line.startswith("lightning fit: "))
    assert "another process of this run is gone" in line
    assert "Traceback" not in other.text
    status = read_json(run / "status.json")
    assert (status["status"], status["error"]) == ("interrupted", KILLED) if dead == 0 else status["status"] == "failed"
    with ranks(["fit", "--resume", str(run)], tmp_path) as processes:
        for process in processes:
            assert process.wait() == 0, process.text
    assert read_json(run / "status.json")["status"] == "finished"
    assert runs() == [run]


def test_one_of_two_processes_never_begins(tmp_path: Path) -> None:
    with ranks(SETTING, tmp_path, environment={PATIENCE: "2"}) as processes:
        processes[1].kill()
        assert processes[0].wait(60) == 1, processes[0].text
    (line,) = (line for line in processes[0].text.splitlines() if line.startswith("lightning fit: "))
    assert "not all processes of this run began within 2 s" in line
    assert PATIENCE in line
    assert "Traceback" not in processes[0].text
