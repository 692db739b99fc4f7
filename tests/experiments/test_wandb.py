"""What reaches Weights & Biases, read back from the files of offline runs."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from experiments import run, wandb_logger
from experiments.pictures import changed_pairs
from tests.experiments.running import ONE_EPOCH, QUIET, Outcome, only_run, read_json, runs

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are offline, and none is left open."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.finish()


class Stored:
    """What the files of a W&B run hold.

    The ``.wandb`` file is in LevelDB's log format: after 7 bytes of W&B's own, blocks of 32 KiB with records of
    checksum (4 bytes), length (2), type (1: whole, 2–4: first, middle, last part) and data, which is a protobuf.
    """

    def __init__(self, folder: Path) -> None:
        (self.path,) = folder.glob("*.wandb")
        self.records = self._read()
        end = time.monotonic() + 120
        while "exit" not in self.records:  # W&B's service writes the rest after the run has ended
            assert time.monotonic() < end, f"{self.path} has no end"
            time.sleep(0.05)
            self.records = self._read()
        self.run = self.records["run"][0]
        self.config = {each.key: json.loads(each.value_json) for part in self.records["config"] for each in part.update}
        self.history = [
            {".".join(each.nested_key) or each.key: json.loads(each.value_json) for each in part.item}
            for part in self.records["history"]
        ]
        self.metrics = {each.name or each.glob_name: each for each in self.records["metric"]}
        self.artifacts = {each.name.rsplit("-", 1)[-1]: each for each in self.records.get("artifact", [])}

    def _read(self) -> dict[str, list[Any]]:
        records: dict[str, list[Any]] = {}
        for data in self._scan(self.path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        return records

    @staticmethod
    def _scan(data: bytes) -> Iterator[bytes]:
        assert b":W&B".startswith(data[:4])  # W&B's service may be at it still
        at, whole = 7, b""
        while at + 7 <= len(data):
            if (left := -at % 32768) and left < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            if at + 7 + length > len(data):
                return
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield whole
                whole = b""

    def series(self, name: str) -> list[Any]:
        """All values of a metric, in order."""
        return [row[name] for row in self.history if name in row]

    def table(self, name: str) -> Any:
        """A table's columns and rows, with the files that its images refer to in their places."""
        files = {each.path: Path(each.local_path) for each in self.artifacts[name].manifest.contents}
        content = json.loads(files[f"{name}.table.json"].read_text())
        for row in content["data"]:
            for column, cell in enumerate(row):
                if isinstance(cell, dict) and "path" in cell:
                    row[column] = files[cell["path"]]
        return content


def stored(folder: Path) -> Stored:
    (found,) = (folder / "wandb").glob("offline-run-*")
    return Stored(found)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def test_offline_run_holds_metrics_config_and_images(lightning: Command) -> None:
    assert lightning("fit", LINE, *QUIET, "--trainer.max_epochs=2").code == 0
    folder = only_run()
    found = stored(folder)

    assert found.run.project == "pharmakon"
    assert found.run.display_name == f"badnets_digits/{folder.name}"
    assert (found.run.run_group, found.run.job_type) == ("Digits", "BadNets")
    assert set(found.run.tags) == {"BadNets", "Digits", "SmallCNN"}
    assert found.run.run_id == (folder / "wandb_id").read_text()

    assert found.config["seed_everything"] == 0
    assert found.config["data"]["init_args"]["poison_fraction"] == 0.1
    assert found.config["model"]["init_args"]["backbone"]["class_path"].endswith("SmallCNN")
    assert found.config["trainer"]["max_epochs"] == 2

    for name in ("val/clean_accuracy", "val/attack_success_rate", "val/robust_accuracy", "train/loss"):
        assert len(found.series(name)) == 2, name
        assert all(np.isfinite(found.series(name)))
    for name in ("val/clean_accuracy", "val/attack_success_rate"):
        assert found.metrics[name].step_metric == "trainer/global_step"
        assert found.metrics[name].summary.last
    assert found.metrics["val/*"].step_metric == "trainer/global_step"
    assert found.metrics["train/loss"].summary.min
    measured = read_json(folder / "metrics.json")["measures"]
    for name, each in measured.items():
        assert found.series(f"test/{name}") == [pytest.approx(each["value"], abs=1e-6)]

    curves = found.table("clean_and_attack_table")
    assert curves["columns"] == ["step", "lineKey", "lineVal"]
    for key in ("clean accuracy", "attack success rate"):
        points = [(step, value) for step, line, value in curves["data"] if line == key]
        series = found.series(f"val/{key.replace(' ', '_')}")
        assert points == [(epoch + 1, pytest.approx(value, abs=1e-6)) for epoch, value in enumerate(series)]
    assert any("wandb/lineseries" in str(part) for part in found.records["config"]), "a plot, and not only its table"

    rows = {row[0]: row[1:] for row in found.table("measures")["data"]}
    assert rows == {name: [each["value"], each["low"], each["high"], each["n"]] for name, each in measured.items()}


def test_image_table_shows_what_was_poisoned(lightning: Command) -> None:
    result = run("badnets_digits", overrides=list(ONE_EPOCH))
    found = stored(result.directory)
    table = found.table("poisons")
    assert table["columns"] == ["id", "clean", "poisoned", "difference", "original label", "label"]
    pairs = changed_pairs(result.datamodule)
    assert len(table["data"]) == len(pairs) == 8
    for pair, (sample, clean, poisoned, difference, old, new) in zip(pairs, table["data"], strict=True):
        assert (sample, old, new) == (pair.id, pair.original_label, pair.label)
        assert result.directory.absolute() in clean.parents, "the run's folder holds them, not the home directory"
        assert np.array_equal(pixels(clean), pair.clean[0])
        assert np.array_equal(pixels(poisoned), pair.poisoned[0])
        assert np.array_equal(pixels(difference), pair.difference[0])
        assert not torch.equal(pair.clean, pair.poisoned)
    media = sorted((found.path.parent / "files" / "media" / "images").glob("*.png"))
    assert len(media) == 8, "also beside the run's other files, which can be moved"
    assert pixels(media[0]).shape == (8, 24)


def test_clean_and_attacked_runs_compare(lightning: Command) -> None:
    assert lightning("fit", "--config=victim_digits", *ONE_EPOCH).code == 0
    assert lightning("fit", LINE, *ONE_EPOCH).code == 0
    clean, attacked = (stored(folder).run for folder in runs())
    assert clean.run_id != attacked.run_id, "each in one process has its own"
    assert clean.run_group == attacked.run_group == "Digits"
    assert (clean.job_type, attacked.job_type) == ("clean", "BadNets")
    assert not stored(runs()[0]).artifacts.keys() & {"poisons"}


def test_names_of_the_configuration_win(lightning: Command) -> None:
    logger = "--trainer.logger=experiments.wandb_logger.Wandb"
    mine = ["--trainer.logger.project=p", "--trainer.logger.group=g", "--trainer.logger.tags=[t]"]
    assert lightning("fit", LINE, *ONE_EPOCH, logger, *mine).code == 0
    found = stored(only_run()).run
    assert (found.project, found.run_group, found.job_type, list(found.tags)) == ("p", "g", "BadNets", ["t"])


def test_resumed_run_is_the_same_run(lightning: Command) -> None:
    assert lightning("fit", LINE, *ONE_EPOCH).code == 0
    folder = only_run()
    first = stored(folder)
    assert lightning("fit", "--resume", str(folder), "--trainer.max_epochs=2").code == 0
    both = [Stored(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
    assert [each.run.run_id for each in both] == [first.run.run_id] * 2
    assert len(both[1].table("clean_and_attack_table")["data"]) == 6, "two epochs of three measures"


def test_a_notebooks_own_run_stays_open(lightning: Command, tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=tmp_path) as mine:
        assert lightning("fit", LINE, *ONE_EPOCH).code == 0
        assert wandb.run is mine


def test_runs_of_one_process_with_lightnings_own_logger_are_runs_of_their_own(lightning: Command) -> None:
    wandb.teardown()  # as in a process of its own: its service remembers the folders of earlier runs
    options = ("--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline=true")
    for _ in range(2):
        done = lightning("fit", LINE, *ONE_EPOCH, *options, "--trainer.logger.save_dir={run}")
        assert done.code == 0, done
        assert wandb.run is None
    assert len({stored(folder).run.run_id for folder in runs()}) == 2


def test_says_once_that_it_is_offline(lightning: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(wandb_logger, "_said", set())
    monkeypatch.setattr(wandb_logger, "rank_zero_info", said.append)
    for _ in range(2):
        assert lightning("fit", LINE, *ONE_EPOCH).code == 0
    assert len(said) == 1
    assert "offline" in said[0]
    assert "wandb sync" in said[0]
    assert all(stored(folder).run.run_id for folder in runs())


def test_disabled_leaves_nothing(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert lightning("fit", LINE, *ONE_EPOCH).code == 0
    assert not (only_run() / "wandb").exists()
    assert (only_run() / "metrics.json").exists()


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({}, "machine api.wandb.ai\n  login user\n  password k\n", "online"),
        ({}, "machine elsewhere.org login user password k\n", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_MODE": "online"}, "", "online"),
    ],
)
def test_mode(
    environment: dict[str, str], netrc: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_logger.Wandb()._wandb_init["mode"] == mode
