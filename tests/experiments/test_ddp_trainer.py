"""What a user may set about the trainer, with two processes: many runs in one pair, which costs its start once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from classifiers.classifier import ImageClassifier
from classifiers.weights import load_checkpoint
from experiments import pictures
from experiments.__main__ import main
from tests.experiments.running import FAST, Outcome, ranks, read_json, weights_hash

Command = Callable[..., Outcome]
HERE = "tests.experiments.test_going_on"
TWO_RANKS = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false")
LONG = ("--trainer.limit_train_batches=6", "--trainer.max_epochs=3", "--model.schedule=null", "--data.batch_size=128")
"""Epochs of six batches."""
STOP = (
    "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/clean_accuracy",
    "--trainer.callbacks.mode=max", "--trainer.callbacks.min_delta=1", "--trainer.callbacks.patience=1",
)  # fmt: skip
BEST = ("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/clean_accuracy",
        "--trainer.callbacks.mode=max", "--trainer.callbacks.filename=best")  # fmt: skip

RUNS: dict[str, tuple[str, ...]] = {
    "overfit": ("--trainer.overfit_batches=2", "--trainer.max_epochs=3"),
    "overfit a share": ("--trainer.overfit_batches=0.1", "--trainer.max_epochs=3"),
    "a share": ("--trainer.limit_train_batches=0.1",),
    "early stopping": (*STOP, "--trainer.max_epochs=9"),
    "the best": BEST,
    "no callbacks": ("--trainer.callbacks=null",),
    "reloaded": ("--trainer.reload_dataloaders_every_n_epochs=1",),
    "plain": (),
    "validated in between": ("--trainer.val_check_interval=1",),
    "barebones": ("--trainer.barebones=true",),
    "whole": LONG,
    "stopped": (*LONG, "--trainer.max_steps=8"),
    "whole, two to a step": (*LONG, "--trainer.accumulate_grad_batches=2"),
    "stopped, two to a step": (*LONG, "--trainer.accumulate_grad_batches=2", f"--trainer.callbacks+={HERE}.Stop"),
    "one chance for both": ("--seed_everything=true",),
    "batch-size finder": ("--trainer.callbacks+=BatchSizeFinder",),
    "learning-rate finder": ("--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=15"),
    "averaged": ("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01",
                 "--trainer.callbacks.swa_epoch_start=1"),
    "timer": ("--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:00:00"),
    "cut off": ("--trainer.limit_train_batches=0.001",),
}  # fmt: skip
RESUMED = {"stopped": ("--trainer.max_steps=-1",), "stopped, two to a step": ()}
"""Runs that are gone on with, by what is given then."""


def _all(rank: int) -> None:
    """Carry out all runs in this process, and write what became of each."""
    seen: dict[int, list[Any]] = {}
    step = ImageClassifier.training_step

    def spy(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        seen.setdefault(self.current_epoch, []).append(batch.ids.tolist())
        return step(self, batch, batch_idx)

    ImageClassifier.training_step = spy  # type: ignore[method-assign] # of this process, which ends after it
    found = {}
    for name, options in RUNS.items():
        seen.clear()
        root = f"--trainer.default_root_dir={name.replace(' ', '_').replace(',', '')}"
        codes = [_code(["fit", *FAST, *TWO_RANKS, *options, root])]
        batches = list(seen.values())
        if name in RESUMED:
            (folder,) = Path(root.partition("=")[2]).glob("*/*")
            codes.append(_code(["fit", "--resume", str(folder), *RESUMED[name]]))
        found[name] = {"codes": codes, "batches": batches}
    Path(f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _code(args: list[str]) -> Any:
    try:
        return main(args)
    except SystemExit as stop:
        return stop.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of all runs, what each rank found, and what was printed."""
    folder = tmp_path_factory.mktemp("pair")
    before = os.getcwd()
    kept = pictures.write_grid, pictures.write_curves
    os.chdir(folder)
    try:
        pictures.write_grid = lambda *_: False  # type: ignore[assignment]
        pictures.write_curves = lambda *_: False  # type: ignore[assignment]
        with ranks(["test", *FAST, "--trainer.logger=false"], folder, before=_all) as processes:
            for process in processes:
                assert process.wait(400) == 0, process.text
    finally:
        pictures.write_grid, pictures.write_curves = kept
        os.chdir(before)
    return folder, [read_json(folder / f"found{rank}.json") for rank in (0, 1)], [each.text for each in processes]


def _folder(pair: Any, name: str) -> Path:
    (found,) = (pair[0] / name.replace(" ", "_").replace(",", "")).glob("*/*")
    return Path(found)


REFUSED = {"one chance for both": 2, "batch-size finder": 2, "cut off": 2}


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_end_alike(name: str, pair: Any) -> None:
    expected = [REFUSED.get(name, 0)] * (2 if name in RESUMED else 1)
    assert [found[name]["codes"] for found in pair[1]] == [expected, expected]


def test_what_is_refused_is_said_in_one_line(pair: Any) -> None:
    for text in pair[2]:
        lines = [line for line in text.splitlines() if line.startswith("lightning fit: ")]
        assert len(lines) == len(REFUSED), lines
        assert "Traceback" not in text


@pytest.mark.parametrize("name", ["overfit", "overfit a share"])
def test_overfitting_sees_the_same_batches(name: str, pair: Any) -> None:
    for found in pair[1]:
        first, *others = found[name]["batches"]
        assert len(first) == (2 if name == "overfit" else 1)
        assert others == [first, first]
    assert pair[1][0][name]["batches"] != pair[1][1][name]["batches"], "each rank has its part"


@pytest.mark.parametrize("name", ["reloaded", "validated in between", "barebones", "no callbacks"])
def test_training_is_the_same(name: str, pair: Any) -> None:
    assert weights_hash(_folder(pair, name)) == weights_hash(_folder(pair, "plain"))


def test_a_run_that_was_stopped_inside_an_epoch_ends_as_if_it_had_not_been(pair: Any) -> None:
    assert weights_hash(_folder(pair, "stopped")) == weights_hash(_folder(pair, "whole"))
    a, b = (
        read_json(_folder(pair, name) / "metrics.json") for name in ("stopped, two to a step", "whole, two to a step")
    )
    assert a["epochs"] == b["epochs"] == 3
    assert a["measures"] == b["measures"]


def test_early_stopping_stops_both(pair: Any) -> None:
    assert read_json(_folder(pair, "early stopping") / "metrics.json")["epochs"] == 2


def test_checkpoints(pair: Any) -> None:
    assert sorted(os.listdir(_folder(pair, "the best") / "checkpoints")) == ["best.ckpt", "epoch=1.ckpt"]
    assert os.listdir(_folder(pair, "no callbacks") / "checkpoints") == ["epoch=1.ckpt"]
    content = load_checkpoint(_folder(pair, "no callbacks") / "checkpoints" / "epoch=1.ckpt")
    assert len(content["callbacks"]["Record"]["history"]) == 2
    assert not list(_folder(pair, "barebones").rglob("*.ckpt"))
