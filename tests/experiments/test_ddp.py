"""Two processes on the CPU: the same poison, exact counts, one folder, and no hang."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.datamodule import Splits
from datamodules.sources.digits import Digits
from experiments.cli import start
from tests.experiments.running import (
    ONE_EPOCH,
    QUIET,
    TWO,
    Outcome,
    first_checkpoint,
    only_run,
    ranks,
    read_json,
    runs,
    weights_hash,
)

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"
HERE = "tests.experiments.test_ddp"


class Skewed(Digits):
    """Digits of which the second process sees one pixel otherwise."""

    def read(self) -> Splits:
        splits = super().read()
        if os.environ.get("RANK") == "1":
            splits.train_images[0, 0, 0, 0] ^= 1
        return splits


def test_two_processes_give_the_same_poison_and_exact_numbers(lightning: Command, tmp_path: Path) -> None:
    """539, 494 and 126 images on two ranks with a BatchNorm model; then the same weights in one process."""
    with ranks(["fit", LINE, *QUIET, "--trainer.max_epochs=2"], tmp_path) as processes:
        for process in processes:
            assert process.wait() == 0, process.text
    run = only_run()
    found = read_json(run / "metrics.json")
    assert found["world_size"] == 2
    assert {name: each["n"] for name, each in found["measures"].items()} == {
        "clean_accuracy": 539, "attack_success_rate": 494, "robust_accuracy": 494, "holdout_accuracy": 126,
    }  # fmt: skip
    assert processes[0].text.count("clean accuracy") == 1
    assert "clean accuracy" not in processes[1].text

    trained = (f"--config={run}/config.yaml", f"--model.weights={run}/weights.safetensors", "--trainer.strategy=auto")
    assert lightning("test", *trained, "--trainer.devices=1").code == 0
    alone = read_json(runs()[-1] / "metrics.json")
    assert alone["world_size"] == 1
    assert alone["measures"] == found["measures"]

    assert lightning("fit", LINE, *QUIET, "--trainer.max_epochs=1").code == 0
    two, one = (read_json(each / "manifest.json") for each in (run, runs()[-1]))
    assert two["train_set"] == one["train_set"]
    assert two["changes"] == one["changes"]
    assert two["facts"] == one["facts"]


def test_four_processes_give_the_same_poison(tmp_path: Path) -> None:
    with ranks(["fit", LINE, *ONE_EPOCH, *TWO, "--trainer.logger=false"], tmp_path, size=4) as processes:
        for process in processes:
            assert process.wait() == 0, process.text
    data = start(["fit", LINE], act=False, keep=False).datamodule
    data.setup("fit")
    assert read_json(only_run() / "manifest.json")["train_set"] == data.train_set.digest()


def test_table_of_predictions_has_every_row_once(lightning: Command, tmp_path: Path) -> None:
    options = ["predict", LINE, *QUIET, "--seed_everything=5", "--data.base.eval_batch_size=50"]
    with ranks(options, tmp_path) as processes:
        for process in processes:
            assert process.wait() == 0, process.text
    assert lightning(*options).code == 0
    two, one = ((each / "predictions.csv").read_text() for each in runs())
    assert two == one, "the same rows in the same order"
    rows = list(csv.DictReader(one.splitlines()))
    assert len(rows) == len({(row["set"], row["row"]) for row in rows}) == 539 + 494 + 126


def test_ranks_with_different_data_stop(tmp_path: Path) -> None:
    with ranks(["fit", LINE, *QUIET, f"--data.base={HERE}.Skewed", "--data.base.batch_size=64"], tmp_path) as processes:
        for process in processes:
            assert process.wait(60) == 2, process.text
            assert "lightning fit: the ranks hold different training sets" in process.text
            assert "Traceback" not in process.text
    assert read_json(only_run() / "status.json")["status"] == "failed"
    assert not list(only_run().glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.base.batch_size=63", ("batch_size = 63", "global", "62")),
        ("--trainer.use_distributed_sampler=true", ("use_distributed_sampler", "false")),
    ],
)
def test_what_cannot_be_shared_out(option: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with ranks(["fit", LINE, *QUIET, option], tmp_path) as processes:
        for process in processes:
            assert process.wait(60) == 2, process.text
            (line,) = (line for line in process.text.splitlines() if line.startswith("lightning fit: "))
            assert all(word in line for word in words), line


@pytest.mark.parametrize("told", [(0, 1), (1,)], ids=["all", "one"])
def test_interrupted_ranks_go_on_to_the_same_weights(told: tuple[int, ...], tmp_path: Path) -> None:
    """A scheduler tells every process to end, and a person any one; they stop at the same step."""
    options = ["fit", LINE, *QUIET, "--trainer.max_epochs=4", "--trainer.logger=false", "--data.base.batch_size=200",
               "--trainer.callbacks+=tests.experiments.test_faults.Slow"]  # fmt: skip
    with ranks(options, tmp_path, environment={"SLOW": "1"}) as processes:
        broken = first_checkpoint(processes[0]).parent.parent
        for rank in told:
            processes[rank].send(signal.SIGTERM)
        for process in processes:
            assert process.wait(60) == 143, process.text
    assert read_json(broken / "status.json")["status"] == "interrupted"
    for args in (["fit", "--resume", str(broken)], options):
        with ranks(args, tmp_path) as processes:
            for process in processes:
                assert process.wait() == 0, process.text
    a, b = runs()
    assert weights_hash(a) == weights_hash(b)


@pytest.mark.slow
def test_lightning_starts_the_other_process_itself(here: Path) -> None:
    """The way of a person at a terminal: the console script, and an overlay. Both processes share one folder."""
    command = [str(Path(sys.executable).with_name("lightning")), "fit", LINE, "--config=trainer/ddp_cpu"]
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    run = only_run()
    assert read_json(run / "metrics.json")["measures"]["clean_accuracy"]["n"] == 539
    assert read_json(run / "metrics.json")["world_size"] == 2
    assert done.stdout.count("clean accuracy") == 1
    assert os.listdir(here) == ["runs"]
