"""A run that was stopped inside an epoch, by whatever, ends as if it had not been: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer

from classifiers.weights import load_checkpoint
from experiments import pictures
from tests.experiments.running import (
    FAST,
    QUIET,
    Outcome,
    complaint,
    read_json,
    runs,
    weights_hash,
)
from tests.experiments.test_faults import AVERAGE, DROPOUT, interrupt

Command = Callable[..., Outcome]
HERE = "tests.experiments.test_going_on"
LINE = "--config=badnets_digits"
SETTING = (LINE, *QUIET, "--trainer.max_epochs=3", "--trainer.logger=false")
"""Six or seven batches to an epoch, with the options of `DROPOUT` or `AVERAGE`."""
PLAIN = (*DROPOUT, "--model.schedule=null")
NORMED = (*AVERAGE, "--model.schedule=null")
TWO_TO_A_STEP = (*NORMED, "--trainer.accumulate_grad_batches=2")

WHOLE: dict[tuple[str, ...], tuple[str, Any, Any]] = {}
"""Options → weights' hash, measures and curves of the run that nothing stopped."""


class Stop(Callback):
    """Stops training as a timer does, after the third batch of the second epoch, once in a folder.

    Args:
        after: The hook in which it does.
    """

    def __init__(self, after: str = "batch") -> None:
        self.after = after

    def _stop(self, after: str, trainer: Trainer) -> None:
        at = trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_idx == 2
        if self.after == after and at and not Path("stopped").exists():
            Path("stopped").touch()
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._stop("batch", trainer)

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._stop("validation", trainer)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a short run, and are looked at elsewhere."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)


def outcome_of(folder: Path) -> tuple[str, Any, Any]:
    """Weights, measures, and the curves in the last epoch's checkpoint."""
    newest = max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    drawn = load_checkpoint(newest)["callbacks"]["Record"]["history"]
    return weights_hash(folder), read_json(folder / "metrics.json")["measures"], drawn


def whole(options: tuple[str, ...], lightning: Command) -> tuple[str, Any, Any]:
    """What a run with some options comes to; run once."""
    if options not in WHOLE:
        outcome = lightning("fit", *SETTING, *options, "--trainer.default_root_dir=whole")
        assert outcome.code == 0, outcome.err
        WHOLE[options] = outcome_of(runs("whole")[-1])
    return WHOLE[options]


def added(name: str, **more: object) -> list[str]:
    """Options that add a callback."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in more.items())]


@pytest.mark.parametrize("options", [PLAIN, NORMED, TWO_TO_A_STEP], ids=["dropout", "moving average", "two to a step"])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_number_of_steps(steps: int, options: tuple[str, ...], lightning: Command) -> None:
    expected = whole(options, lightning)
    assert lightning("fit", *SETTING, *options, f"--trainer.max_steps={steps}").code == 0
    (broken,) = runs()
    assert lightning("fit", "--resume", str(broken), "--trainer.max_steps=-1").code == 0
    assert outcome_of(broken) == expected


def test_a_number_of_steps_after_another(lightning: Command) -> None:
    expected = whole((*PLAIN, "--trainer.max_steps=15"), lightning)
    assert lightning("fit", *SETTING, *PLAIN, "--trainer.max_steps=4").code == 0
    (broken,) = runs()
    for steps in (4, 8, 12, 15):  # 12: at an epoch's end
        assert lightning("fit", "--resume", str(broken), f"--trainer.max_steps={steps}").code == 0
    found = outcome_of(broken)
    assert found[:2] == expected[:2]
    assert [(row["epoch"], row["step"]) for row in found[2]] == [(0, 6), (1, 12), (2, 15)]


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        (PLAIN, added(f"{HERE}.Stop")),
        (NORMED, added(f"{HERE}.Stop")),
        (TWO_TO_A_STEP, added(f"{HERE}.Stop")),
        (TWO_TO_A_STEP, interrupt("train")),
        ((*NORMED, "--trainer.val_check_interval=3"), added(f"{HERE}.Stop", after="validation")),
        ((*TWO_TO_A_STEP, "--trainer.val_check_interval=3"), added(f"{HERE}.Stop", after="validation")),
        ((*PLAIN, "--trainer.limit_train_batches=5"), added(f"{HERE}.Stop")),
        ((*NORMED, *added("GradientAccumulationScheduler", scheduling="{1: 3}")), interrupt("train", epoch=1)),
    ],
    ids=["timer", "timer, average", "timer, two to a step", "SIGTERM, two to a step", "validation",
         "validation, two to a step", "fewer batches", "growing steps"],
)  # fmt: skip
def test_a_stop(options: tuple[str, ...], stop: list[str], lightning: Command) -> None:
    expected = whole(options, lightning)
    assert lightning("fit", *SETTING, *options, *stop).code in (0, 143)
    (broken,) = runs()
    assert lightning("fit", "--resume", str(broken)).code == 0
    assert outcome_of(broken) == expected


@pytest.mark.parametrize("options", [PLAIN, (*PLAIN, "--trainer.accumulate_grad_batches=2")], ids=["", "two to a step"])
@pytest.mark.parametrize(
    "kept",
    [
        added("ModelCheckpoint", every_n_train_steps=1, save_top_k=1, dirpath="{run}/checkpoints"),
        added("ModelCheckpoint", monitor="val/clean_accuracy", mode="max", save_on_train_epoch_end="false"),
        added("OnExceptionCheckpoint", dirpath="{run}/checkpoints"),
    ],
    ids=["of a step", "of a validation", "of the failure"],
)
def test_a_crash(kept: list[str], options: tuple[str, ...], lightning: Command) -> None:
    """From a checkpoint that a callback of the user's made inside an epoch."""
    between = (*options, "--trainer.val_check_interval=3")
    expected = whole(between, lightning)
    outcome = lightning("fit", *SETTING, *between, *kept, *interrupt("last", how="crash"))
    assert (outcome.code, "went away" in outcome.err) == (1, True)
    (broken,) = runs()
    newest = max(broken.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name != "epoch=0.ckpt", "there is one from inside the epoch"
    assert lightning("fit", "--resume", str(broken)).code == 0
    assert outcome_of(broken)[:2] == expected[:2]


def test_other_batches_inside_an_epoch(lightning: Command) -> None:
    assert lightning("fit", *FAST, "--trainer.limit_train_batches=1.0", "--trainer.max_steps=7").code == 0
    (broken,) = runs()
    resume = ("fit", "--resume", str(broken), "--trainer.max_steps=-1")
    complaint(lightning(*resume, "--data.batch_size=32"), "batch_size = 32", "inside an epoch", "64")
    outcome = lightning(*resume, "--trainer.limit_train_batches=5")
    complaint(outcome._replace(out=""), "limit_train_batches = 5", "after batch 7")
    assert lightning(*resume, "--trainer.limit_train_batches=9").code == 0
    assert lightning("fit", "--resume", str(broken), "--data.batch_size=32", "--trainer.max_epochs=3").code == 0, "end"
