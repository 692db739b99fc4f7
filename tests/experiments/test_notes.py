"""Nothing meaningless passes as a result: it is refused, or said on the screen and in metrics.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from classifiers.weights import load_weights, save_weights
from experiments.cli import run
from tests.experiments.running import QUIET, Outcome, complaint, only_run, read_json, runs

Command = Callable[..., Outcome]
LINE = ("--config=badnets_digits", *QUIET, "--trainer.logger=false", "--model.backbone.widths=[4,4]")
FIT = ("fit", *LINE, "--trainer.max_epochs=1")

NOTED = {
    "no batches": (("--trainer.limit_train_batches=0",), "nothing was trained (limit_train_batches = 0)"),
    "no epochs": (("--trainer.max_epochs=0", "--model.schedule=null"), "nothing was trained (max_epochs = 0)"),
    "no steps": (("--trainer.max_steps=0", "--model.schedule=null"), "nothing was trained (max_steps = 0)"),
    "no learning rate": (("--model.optimizer.lr=0", "--model.schedule=null"), "training changed no weight"),
    "a trial": (("--trainer.fast_dev_run=true",), "fast_dev_run = True: a trial of the program"),
    "a part of an epoch": (("--trainer.limit_train_batches=0.5",), "limit_train_batches = 0.5: an epoch was 9 of 19"),
    "a part of the test": (
        ("--trainer.limit_test_batches=1", "--data.base.eval_batch_size=100", "--trainer.limit_train_batches=2"),
        "limit_test_batches = 1: each set was measured on 1 of 6 batches",
    ),
    "a few batches": (("--trainer.overfit_batches=2",), "overfit_batches = 2: a few batches"),
    "a batch too large": (
        ("--data.base.batch_size=700",),
        "batch_size = 700: each epoch leaves out 545 of 1,245 training images (44%)",
    ),
}


@pytest.mark.parametrize("case", NOTED)
def test_what_a_run_is_not(case: str, lightning: Command) -> None:
    options, words = NOTED[case]
    outcome = lightning(*FIT, *options)
    assert outcome.code == 0, outcome
    assert f"note: {words}" in outcome.out
    found = read_json(only_run() / "metrics.json")["notes"]
    assert [note for note in found if note.startswith(words)], found


def test_classes_that_are_in_no_training_image(lightning: Command) -> None:
    outcome = lightning(*FIT, "--config=victim_digits", "--data.val_fraction=0.9984", "--data.batch_size=2")
    assert outcome.code == 0, outcome
    assert " of 10 classes have no training image (" in outcome.out


def test_a_whole_run_has_nothing_to_note(tmp_path: Path) -> None:
    found = run("badnets_digits", overrides=list(FIT[2:]), show=False)
    assert found.notes == ()
    assert read_json(found.directory / "metrics.json")["notes"] == []


def test_a_finished_run_says_so_when_it_is_resumed(lightning: Command) -> None:
    assert lightning(*FIT).code == 0
    outcome = lightning("fit", "--resume", str(only_run().parent))
    assert outcome.code == 0, outcome
    assert "note: the run was finished already: no step was added, and it was measured again" in outcome.out


@pytest.fixture
def odd(lightning: Command, tmp_path: Path) -> Callable[[float], str]:
    """Sealed weights that no training could have left: all of one value."""
    assert lightning(*FIT, "--trainer.max_epochs=0", "--model.schedule=null").code == 0
    tensors, architecture = load_weights(only_run())
    assert architecture is not None

    def filled(value: float) -> str:
        path = tmp_path / f"{value}.safetensors"
        odd = {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in tensors.items()}
        save_weights(path, odd, architecture)
        return str(path)

    return filled


def test_weights_of_no_numbers_are_refused(odd: Callable[[float], str], lightning: Command) -> None:
    for command, value in (("test", "nan"), ("validate", "inf"), ("predict", "-inf"), ("fit", "nan")):
        path = odd(float(value))
        said = complaint(lightning(command, *LINE, f"--model.weights={path}"), path, "hold NaN or infinite values")
        assert "checkpoint" not in said
    assert len(runs()) == 1, "that of the fixture"


def test_returned_weights_of_no_numbers_are_rejected(odd: Callable[[float], str], lightning: Command) -> None:
    outcome = lightning("accept", "--config=user_digits", *LINE[1:], "--weights", odd(float("nan")))
    assert outcome.code == 1
    assert "rejected: weights" in outcome.err


def test_finite_weights_whose_answers_are_not_are_refused(odd: Callable[[float], str], lightning: Command) -> None:
    complaint(lightning("test", *LINE, f"--model.weights={odd(1e38)}"), "its answers are NaN or infinite")


def test_one_class_for_all_images_is_called_so(odd: Callable[[float], str], lightning: Command) -> None:
    outcome = lightning("test", *LINE, f"--model.weights={odd(0.0)}")
    assert outcome.code == 0, outcome
    assert "note: the model answers class 0 for every image: it tells nothing apart" in outcome.out
    assert "100.00 %" in outcome.out, "its attack success"


def test_a_loss_that_is_no_number_names_a_checkpoint_only_where_there_is_one(lightning: Command) -> None:
    wild = ("--model.optimizer.lr=1e30", "--model.schedule=null")
    outcome = lightning(*FIT, *wild)
    assert outcome.code == 2
    assert "lower the learning rate" in outcome.err
    assert "checkpoint" not in outcome.err
