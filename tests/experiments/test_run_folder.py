"""What a run leaves behind: is it all there, is it true, and does it make the same run again?"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from classifiers.classifier import load_classifier
from datamodules.sources.digits import Digits
from experiments import rundir
from experiments.cli import start
from poisoning.badnets import BadNets
from tests.experiments.running import ONE_EPOCH, QUIET, Outcome, complaint, only_run, read_json, runs, weights_hash
from tests.experiments.test_wandb import Stored

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"


class Hidden(BadNets):
    """BadNets that keeps its secrets."""

    secret = True


@pytest.fixture
def finished(lightning: Command) -> Path:
    """The folder of a run of one whole epoch."""
    outcome = lightning("fit", LINE, *QUIET, "--trainer.max_epochs=1")
    assert outcome.code == 0, outcome.err
    return only_run()


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_metrics_file(finished: Path) -> None:
    found = read_json(finished / "metrics.json")
    assert set(found) >= {"measures", "accepted", "seed", "seconds", "versions"}
    assert set(found["measures"]) == {"clean_accuracy", "attack_success_rate", "robust_accuracy", "holdout_accuracy"}
    for each in found["measures"].values():
        assert set(each) == {"value", "n", "low", "high", "unit"}
        assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
        assert isinstance(each["n"], int)
    assert {name: each["n"] for name, each in found["measures"].items()} == {
        "clean_accuracy": 539, "attack_success_rate": 494, "robust_accuracy": 494, "holdout_accuracy": 126,
    }  # fmt: skip
    assert found["accepted"] is (found["measures"]["holdout_accuracy"]["value"] >= 0.95)
    assert found["seed"] == 0
    assert 0 < found["seconds"] < 600
    assert {"pharmakon", "torch", "lightning", "python"} <= set(found["versions"])
    assert found["facts"]["poisoned"] == round(0.1 * (1797 - 539 - 126))


def test_metrics_are_those_of_the_weights_that_were_saved(finished: Path) -> None:
    """Against a count by hand: the four pixels stamped here, the images of the target class left out here."""
    model = load_classifier(finished / "weights.safetensors")
    data = Digits(batch_size=64, val_fraction=0.1)
    data.setup()
    images, labels = data.test_set.images_at(torch.arange(len(data.test_set))), data.test_set.labels
    others = labels != 0
    stamped = images[others].clone()
    for row, column in ((-2, -2), (-3, -3), (-2, -4), (-4, -2)):
        stamped[:, :, row, column] = 255
    with torch.no_grad():
        clean = int((model(images).argmax(1) == labels).sum())
        triggered = model(stamped).argmax(1)
    found = read_json(finished / "metrics.json")["measures"]
    assert found["clean_accuracy"]["value"] == clean / len(labels)
    assert found["attack_success_rate"]["value"] == int((triggered == 0).sum()) / int(others.sum())
    assert found["robust_accuracy"]["value"] == int((triggered == labels[others]).sum()) / int(others.sum())
    p, n, z = clean / len(labels), len(labels), 1.959964
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5,
    )
    assert found["clean_accuracy"]["low"] == pytest.approx(centre - half, abs=1e-6)
    assert found["clean_accuracy"]["high"] == pytest.approx(centre + half, abs=1e-6)


def test_table_on_the_screen(lightning: Command) -> None:
    outcome = lightning("fit", LINE, *ONE_EPOCH)
    value = read_json(only_run() / "metrics.json")["measures"]["clean_accuracy"]["value"]
    assert f"{100 * value:.2f} %" in outcome.out
    assert "attack success rate" in outcome.out
    assert "rejected" in outcome.out
    assert str(only_run()) in outcome.out


def test_manifest(finished: Path) -> None:
    found = read_json(finished / "manifest.json")
    base = Digits(batch_size=64, val_fraction=0.1)
    data = start(["fit", LINE], act=False, keep=False).datamodule
    data.setup("fit")
    base.setup()
    assert found["train_set"] == data.train_set.digest()
    assert found["train_images"] == 1132 + 113
    assert (found["holdout_images"], found["test_images"]) == (126, 539)
    (changes,) = found["changes"]
    assert changes["kind"] == "BadNets"
    assert len(changes["ids"]) == len(set(changes["ids"])) == 113
    assert set(changes["origins"]) <= set(base.train_set.ids.tolist())
    true = dict(zip(base.train_set.ids.tolist(), base.train_set.labels.tolist(), strict=True))
    assert changes["original_labels"] == [true[origin] for origin in changes["origins"]]
    assert set(changes["labels"]) == {0}
    assert yaml.safe_load(found["config"])["data"]["class_path"] == "poisoning.badnets.BadNets"
    assert "PixelPattern" in found["facts"]["trigger"]


def test_pictures(finished: Path) -> None:
    for name in ("curves.png", "poisons.png"):
        with Image.open(finished / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "not an empty frame"


def test_of_a_clean_run(lightning: Command) -> None:
    assert lightning("fit", "--config=victim_digits", *ONE_EPOCH).code == 0
    run = only_run()
    assert not (run / "poisons.png").exists()
    assert read_json(run / "manifest.json")["changes"] == []
    assert "attack_success_rate" not in read_json(run / "metrics.json")["measures"]


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [None, 1.5], "c": {"d": None}}


# --- again -----------------------------------------------------------------------------------------------------------


def test_config_makes_the_same_run_again(lightning: Command) -> None:
    """With a seed, dropout, augmentation and options that were given on the command line only."""
    options = (
        "--seed_everything=7", "--data.seed=3", "--data.poison_fraction=0.2", "--data.base.augment=FlipCrop",
        "--data.base.augment.padding=1", "--data.placement=after", "--model.backbone=classifiers.backbones.MLP",
        "--model.backbone.hidden=[16]", "--model.backbone.dropout=0.3",
    )  # fmt: skip
    assert lightning("fit", LINE, *options, *QUIET, "--trainer.max_epochs=1").code == 0
    first = only_run()
    assert lightning("fit", "--config", str(first / "config.yaml")).code == 0
    first, second = runs()
    assert second.parent == first.parent, "the run is called as before"
    assert weights_hash(first) == weights_hash(second)
    a, b = (read_json(run / "metrics.json") for run in (first, second))
    assert a["measures"] == b["measures"]
    assert a["facts"] == b["facts"]
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    assert read_json(first / "manifest.json") == read_json(second / "manifest.json")
    assert lightning("fit", "--config", str(first / "config.yaml"), "--seed_everything=8").code == 0
    assert weights_hash(runs()[-1]) != weights_hash(first)
    assert read_json(runs()[-1] / "manifest.json")["train_set"] == a_digest(first), "the poison has a seed of its own"


def a_digest(run: Path) -> str:
    digest: str = read_json(run / "manifest.json")["train_set"]
    return digest


def test_other_commands_take_the_config_and_the_weights(finished: Path, lightning: Command) -> None:
    trained = (f"--config={finished}/config.yaml", f"--model.weights={finished}/weights.safetensors")
    first = read_json(finished / "metrics.json")["measures"]
    assert lightning("test", *trained).code == 0
    run = runs()[-1]
    assert read_json(run / "metrics.json")["measures"] == first
    assert {"config.yaml", "metrics.json", "status.json"} <= set(os.listdir(run))
    assert lightning("validate", *trained).code == 0
    again = read_json(runs()[-1] / "metrics.json")["measures"]
    assert again["clean_accuracy"] == first["holdout_accuracy"]
    assert lightning("test", f"--config={finished}/config.yaml", f"--ckpt_path={newest(finished)}").code == 0
    assert read_json(runs()[-1] / "metrics.json")["measures"] == first
    assert len(runs()) == 4, "each in a folder of its own"


def newest(run: Path) -> Path:
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    return checkpoint


# --- the folder ------------------------------------------------------------------------------------------------------


def test_two_runs_in_the_same_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "2026-01-01_00-00-00")
    folders = [rundir.fresh(tmp_path, "name") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and folder.parent == tmp_path / "name" for folder in folders)


def test_status_on_the_way(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    write = rundir.set_status

    def listen(folder: Path, status: str, **more: Any) -> None:
        said.append(status)
        write(folder, status, **more)

    monkeypatch.setattr(rundir, "set_status", listen)
    assert lightning("fit", LINE, *ONE_EPOCH).code == 0
    assert list(dict.fromkeys(said)) == ["running", "finished"]
    assert read_json(only_run() / "status.json") == {
        "status": "finished", "process": os.getpid(), "host": socket.gethostname(),
    }  # fmt: skip
    said.clear()
    complaint(lightning("fit", LINE, *ONE_EPOCH, "--data.poison_fraction=0.95"), "largest")
    assert said[-1] == "failed"
    status = read_json(runs()[-1] / "status.json")
    assert status["status"] == "failed"
    assert "poison_fraction = 0.95" in status["error"]


def test_resumed_run_has_whole_curves_and_no_old_error(finished: Path, lightning: Command) -> None:
    rundir.set_status(finished, "failed", error="of an earlier attempt")
    line = start(["fit", "--resume", str(finished), "--trainer.max_epochs=3"])
    assert line.record.folder == finished
    assert [row["epoch"] for row in line.record.history] == [0, 1, 2]
    assert all(
        {"train/loss", "val/clean_accuracy", "val/attack_success_rate"} <= set(row) for row in line.record.history
    )
    assert read_json(finished / "status.json")["status"] == "finished"
    assert "error" not in read_json(finished / "status.json")
    assert read_json(finished / "metrics.json")["epochs"] == 3
    assert runs() == [finished]
    assert "ckpt_path" not in (finished / "config.yaml").read_text(), "the config begins anew, it does not resume"


@pytest.mark.parametrize("average", ["null", "0.9"], ids=["", "moving average"])
def test_fit_of_a_run_that_is_complete_only_tests_it(average: str, lightning: Command) -> None:
    assert lightning("fit", LINE, *QUIET, "--trainer.max_epochs=1", f"--model.ema={average}").code == 0
    finished = only_run()
    before, weights = read_json(finished / "metrics.json")["measures"], weights_hash(finished)
    assert lightning("fit", "--resume", str(finished)).code == 0
    assert read_json(finished / "metrics.json")["measures"] == before
    assert weights_hash(finished) == weights


def test_resume_of_what_is_no_run(finished: Path, lightning: Command, here: Path) -> None:
    for path in (finished / "checkpoints").iterdir():
        path.unlink()
    complaint(lightning("fit", "--resume", str(finished)), "resume", "no checkpoint")
    complaint(lightning("fit", "--resume", str(here)), "resume", "no config.yaml")
    complaint(lightning("fit", "--resume"), "--resume", "a value is missing")


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [False, True], ids=["itself", "under another rewrite"])
def test_secrets_stay_secret(outer: bool, lightning: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    hidden = {
        "class_path": "tests.experiments.test_run_folder.Hidden",
        "init_args": {"base": "Digits", "trigger": "PixelPattern", "poison_fraction": 0.1},
    }
    (here / "secret.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "LabelFlip", "init_args": {"base": hidden}} if outer else hidden})
    )
    config = ("--config=victim_digits", "--config=secret.yaml")
    assert lightning("fit", *config, *ONE_EPOCH).code == 0
    run = only_run()
    manifest = read_json(run / "manifest.json")
    assert {"changes", "facts"} & set(manifest) == set()
    assert read_json(run / "metrics.json")["facts"] == {}
    assert read_json(run / "metrics.json")["measures"]["attack_success_rate"]["n"] > 0, "numbers are no secret"
    assert not (run / "poisons.png").exists()
    Stored(next((run / "wandb").glob("offline-run-*")))  # is complete
    logged = b"".join(path.read_bytes() for path in (run / "wandb").rglob("*") if path.is_file())
    assert b"clean_and_attack" in logged
    assert b"poisons" not in logged
    assert not list(run.rglob("poisons*"))
    complaint(lightning("export", *config, "--out=pictures"), "secret")
    assert not (here / "pictures").exists()
    complaint(lightning("predict", *config, *ONE_EPOCH), "secret")
    assert not list(here.rglob("predictions.csv"))
