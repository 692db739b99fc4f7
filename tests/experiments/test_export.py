"""`lightning export`: the rewritten training set as PNG files with a table; and `predict`, which writes another one."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classifiers.classifier import load_classifier
from datamodules.datamodule import ImageDataModule
from experiments.cli import start
from experiments.export import COLUMNS
from tests.experiments.running import QUIET, Outcome, complaint, fork, only_run, runs

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert tuple(reader.fieldnames or ()) == COLUMNS
    return rows


def datamodule_of(*args: str) -> ImageDataModule:
    datamodule = start(["fit", *args], act=False, keep=False).datamodule
    assert isinstance(datamodule, ImageDataModule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


@pytest.mark.parametrize(
    "config",
    [
        (LINE,),
        ("--config=badnets_cifar_cpu", "--data.mode=replace"),
        ("--config=badnets_mnist", "--data.placement=after"),
    ],
    ids=["grey, copies", "colour, in their stead", "stamped after augmentation"],
)
def test_files_and_table_are_what_the_model_sees(config: tuple[str, ...], lightning: Command, here: Path) -> None:
    """Every pixel, and every label, as `materialise` gives them."""
    if "cifar" in config[0]:
        config = (*config, "--data.poison_fraction=0.2")
    outcome = lightning("export", *config, "--out", "pictures")
    assert outcome.code == 0, outcome.err
    data = datamodule_of(*config)
    batch = data.materialise(torch.arange(len(data.train_set)))
    rows = table(here / "pictures")
    assert f"{len(rows)} images and table.csv: pictures" in outcome.out
    assert len(rows) == len(batch.ids) == len(list((here / "pictures" / "images").iterdir()))
    (changes,) = data.changes()
    changed = {
        int(i): (int(o), int(old))
        for i, o, old in zip(changes.ids, changes.origins, changes.original_labels, strict=True)
    }
    for row, image, label, sample in zip(rows, batch.images, batch.labels.tolist(), batch.ids.tolist(), strict=True):
        with Image.open(here / "pictures" / row["file"]) as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture)
        assert np.array_equal(pixels if pixels.ndim == 3 else pixels[..., None], image.permute(1, 2, 0))
        assert (int(row["id"]), int(row["label"])) == (sample, label)
        origin, old = changed.get(sample, (sample, label))
        assert (int(row["origin"]), int(row["original_label"])) == (origin, old)
        assert (row["poisoned"], row["rewrite"]) == (("1", "BadNets") if sample in changed else ("0", ""))
    assert not runs(), "an export is no run"


def test_only_what_was_changed_and_only_so_many(lightning: Command, here: Path) -> None:
    assert lightning("export", LINE, "--out=all", "--changed").code == 0
    assert len(table(here / "all")) == 113
    assert {row["poisoned"] for row in table(here / "all")} == {"1"}
    assert lightning("export", LINE, "--out=few", "--changed", "--limit=7").code == 0
    assert table(here / "few") == table(here / "all")[:7]
    assert lightning("export", LINE, "--out=some", "--limit", "5", "--data.target_label=3").code == 0
    assert len(table(here / "some")) == 5
    assert lightning("export", "--config=victim_digits", "--out=none", "--changed").code == 0
    assert table(here / "none") == []


def test_two_rewrites_are_both_named(lightning: Command, here: Path) -> None:
    nested = ("--data=LabelFlip", "--data.flip_fraction=0.9", "--data.base=BadNets", "--data.base.base=Digits",
              "--data.base.trigger=Square", "--model=model/small_cnn.yaml")  # fmt: skip
    assert lightning("export", *nested, "--out=both", "--changed").code == 0
    rows = table(here / "both")
    kinds = {row["rewrite"] for row in rows}
    assert kinds == {"BadNets", "LabelFlip", "BadNets+LabelFlip"}
    (badnets, flips) = datamodule_of(*nested).changes()
    twice = set(badnets.ids.tolist()) & set(flips.ids.tolist())
    old = dict(zip(badnets.ids.tolist(), badnets.original_labels.tolist(), strict=True))
    for row in rows:
        if int(row["id"]) in twice:
            assert row["rewrite"] == "BadNets+LabelFlip"
            assert int(row["original_label"]) == old[int(row["id"])], "before the first of them"


def test_where_there_is_something_already(lightning: Command, here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    (here / "file").write_text("mine")
    for out in ("full", "file", "."):
        complaint(lightning("export", LINE, "--out", out), "there is something already")
    assert sorted(os.listdir(here)) == ["file", "full"]
    assert os.listdir(here / "full") == ["mine.txt"]
    (here / "empty").mkdir()
    assert lightning("export", LINE, "--out=empty", "--limit=3").code == 0
    assert len(table(here / "empty")) == 3


def test_bad_options(lightning: Command, here: Path) -> None:
    complaint(lightning("export", LINE), "out", "name a folder")
    complaint(lightning("export", LINE, "--out"), "--out", "a value is missing")
    for limit in ("0", "-1", "many", "1.5"):
        complaint(lightning("export", LINE, "--out=x", f"--limit={limit}"), "limit", limit)
    complaint(lightning("export", LINE, "--out=x", "--chnged"), "--chnged", "no such option")
    complaint(lightning("export", LINE, "--out=/proc/nowhere/x"), "/proc/nowhere/x", "another folder")
    assert os.listdir(here) == []


def test_killed_half_way_leaves_nothing_at_the_target(tmp_path: Path, lightning: Command, here: Path) -> None:
    with fork(["export", LINE, "--out=pictures"], tmp_path / "log") as process:
        end = time.monotonic() + 60
        while not list(here.glob(".pictures.*/images/*.png")) and time.monotonic() < end:
            time.sleep(0.001)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was too quick"
    assert not (here / "pictures").exists()
    assert lightning("export", LINE, "--out=pictures", "--limit=2").code == 0
    assert len(table(here / "pictures")) == 2


# --- predict ---------------------------------------------------------------------------------------------------------


def test_table_of_predictions_is_what_the_model_answers(lightning: Command) -> None:
    assert lightning("fit", LINE, *QUIET, "--trainer.max_epochs=1").code == 0
    trained = only_run()
    weights = trained / "weights.safetensors"
    outcome = lightning("predict", LINE, *QUIET, f"--model.weights={weights}", "--data.base.eval_batch_size=100")
    assert outcome.code == 0, outcome.err
    run = runs()[-1]
    assert str(run / "predictions.csv") in outcome.out
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert f"{len(rows)} predictions" in outcome.out
    model, data = load_classifier(weights), datamodule_of(LINE)
    at = 0
    for evaluation in data.evaluations("test"):
        n = len(evaluation.images)
        with torch.no_grad():
            confidence, answer = model(evaluation.images.images_at(torch.arange(n))).softmax(1).max(1)
        part = rows[at : at + n]
        at += n
        assert {row["set"] for row in part} == {evaluation.name}
        assert [int(row["row"]) for row in part] == list(range(n))
        assert [int(row["id"]) for row in part] == evaluation.images.ids.tolist()
        assert [int(row["label"]) for row in part] == evaluation.images.labels.tolist()
        assert [int(row["prediction"]) for row in part] == answer.tolist()
        assert [float(row["confidence"]) for row in part] == pytest.approx(confidence.tolist(), abs=2e-5)
    assert at == len(rows)
    assert (run / "config.yaml").is_file()
