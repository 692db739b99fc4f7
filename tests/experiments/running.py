"""Running the command: in this process, or – for signals and ranks – in a fork of it, which has all imports done."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from classifiers.weights import content_hash
from experiments.__main__ import main

TWO = ("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2")
"""Two batches of everything."""

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")

FAST = (
    "--config=victim_digits", "--model.backbone=classifiers.backbones.MLP", "--model.backbone.hidden=[8]",
    "--trainer.max_epochs=2", *TWO, *QUIET,
)  # fmt: skip
"""Two epochs of two batches of a small network, a third of a second."""

ONE_EPOCH = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", *QUIET)
"""Two batches of training, then a whole test."""


class Outcome(NamedTuple):
    """What a command came to."""

    code: int | str | None
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], args: tuple[str, ...]) -> Outcome:
    """Run a command in this process."""
    capsys.readouterr()
    try:
        code: Any = main(list(args))
    except SystemExit as stop:
        code = stop.code
    return Outcome(code, *capsys.readouterr())


def complaint(outcome: Outcome, *words: str) -> str:
    """The one line of a refused command, in which `words` occur; nothing was trained."""
    assert outcome.code == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("lightning "), lines[0]
    assert outcome.out == ""
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    return lines[0]


def runs(root: Path | str = "runs") -> list[Path]:
    """The folders of all runs, oldest first."""
    return sorted(Path(root).glob("*/*"), key=lambda path: path.stat().st_ctime_ns)


def only_run(root: Path | str = "runs") -> Path:
    """The folder of the one run."""
    (found,) = runs(root)
    return found


def read_json(path: Path) -> Any:
    """A JSON file; anything that is not standard JSON is an error."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}, which is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def weights_hash(run: Path) -> str:
    """Of the weights that a run ended with."""
    return content_hash(load_file(run / "weights.safetensors"))


def weights(run: Path) -> dict[str, Tensor]:
    """The weights that a run ended with."""
    return load_file(run / "weights.safetensors")


class Fork:
    """A fork of this process that runs a command, with output in a file.

    Args:
        args: Of the command.
        log: The file.
        environment: Variables to set.
        before: What to do first, in the fork.
    """

    def __init__(
        self,
        args: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code: Any = 1
            try:
                self._redirect()
                os.environ.update(environment or {})
                if before is not None:
                    before()
                code = main(args)
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else int(code is not None))

    def _redirect(self) -> None:
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
        for number in (signal.SIGTERM, signal.SIGHUP):  # whatever this process was begun by, such as nohup
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def running(self) -> bool:
        """Whether it has not ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float = 120) -> int:
        """Its exit status; it is killed, and the test fails, after some time."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {seconds} s:\n{self.text}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGKILL


def first_checkpoint(process: Fork, seconds: float = 60) -> Path:
    """The first checkpoint of the run in the working directory, as soon as it is there: training is under way."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in Path("runs").glob("*/*/checkpoints/*.ckpt"):
            return path
        assert process.running(), f"it ended:\n{process.text}"
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint within {seconds} s:\n{process.text}")


@contextlib.contextmanager
def fork(args: list[str], log: Path, **options: Any) -> Iterator[Fork]:
    """A `Fork` that does not outlive the test."""
    process = Fork(args, log, **options)
    try:
        yield process
    finally:
        process.kill()


@contextlib.contextmanager
def ranks(args: list[str], folder: Path, size: int = 2, **options: Any) -> Iterator[list[Fork]]:
    """The processes of one distributed run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    try:
        for rank in range(size):
            environment = {
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
            } | options.get("environment", {})
            strategy = ["--trainer.accelerator=cpu", f"--trainer.devices={size}", "--trainer.strategy=ddp"]
            before = _be(rank, options.get("before"))
            processes.append(Fork([*args, *strategy], folder / f"rank{rank}.log", environment, before))
        yield processes
    finally:
        for process in processes:
            process.kill()


def _be(rank: int, also: Callable[[int], None] | None) -> Callable[[], None]:
    def before() -> None:
        from lightning_utilities.core.rank_zero import rank_zero_only

        rank_zero_only.rank = rank
        if also is not None:
            also(rank)

    return before
