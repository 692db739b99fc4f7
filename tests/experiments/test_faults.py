"""When things go wrong: signals, damaged and hostile files, a full disk, missing data, a loss that is NaN."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from classifiers.weights import load_checkpoint
from datamodules.errors import InputError
from experiments import pictures
from experiments.checkpoints import AtomicCheckpointIO
from tests.experiments.running import (
    ONE_EPOCH,
    QUIET,
    Outcome,
    complaint,
    first_checkpoint,
    fork,
    only_run,
    read_json,
    runs,
    weights_hash,
)

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"
HERE = "tests.experiments.test_faults"

DROPOUT = (
    "--model.backbone=classifiers.backbones.MLP",
    "--model.backbone.hidden=[32]",
    "--model.backbone.dropout=0.4",
    "--data.base.augment=FlipCrop",
    "--data.base.augment.padding=1",
    "--data.base.batch_size=200",
)
AVERAGE = (
    "--model.ema=0.9",
    "--model.backbone.widths=[4,8]",
    "--data.base.augment=FlipCrop",
    "--data.base.augment.padding=1",
    "--data.placement=after",
    "--data.base.batch_size=200",
)


WHOLE: dict[tuple[str, ...], tuple[str, Any, Any]] = {}
"""Options → weights' hash, metrics and curves of the run that nothing interrupted."""


WORKERS = (
    "--data.base=MNIST", "--data.base.batch_size=12", "--data.base.num_workers=1", "--data.base.augment=FlipCrop",
    "--model.backbone.widths=[4]", "--model.schedule=null",
)  # fmt: skip


class Interrupt(Callback):
    """Ends this process's run at one point, once in a folder.

    Args:
        where: ``train``, ``last`` (batch of the epoch), ``validation``, ``epoch_end``, ``test``.
        epoch: In this epoch.
        how: ``SIGTERM``, or ``crash``.
    """

    def __init__(self, where: str = "train", epoch: int = 1, how: str = "SIGTERM") -> None:
        self.where, self.epoch, self.how = where, epoch, how

    def _at(self, where: str, trainer: Trainer) -> None:
        if where == self.where and trainer.current_epoch == self.epoch and not Path("interrupted").exists():
            Path("interrupted").touch()
            if self.how == "crash":
                raise RuntimeError("the machine went away")
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._at("train" if trainer.fit_loop.epoch_loop.batch_idx == 2 else "", trainer)
        self._at("last" if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch else "", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._at("validation", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at("epoch_end", trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._at("test", trainer)


class Slow(Callback):
    """Takes its time, so that a signal from outside comes in the middle; with ``SLOW`` in the environment alone."""

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.03 if "SLOW" in os.environ else 0)


class Break(Callback):
    """Makes a weight NaN at the beginning of the second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            next(iter(pl_module.parameters())).data.flatten()[0] = float("nan")


def interrupt(where: str, **more: object) -> list[str]:
    given = {"where": where, **more}
    return [
        f"--trainer.callbacks+={HERE}.Interrupt",
        *(f"--trainer.callbacks.{key}={value}" for key, value in given.items()),
    ]


def curves(run: Path) -> Any:
    """Loss and holdout of each epoch, as the run's last checkpoint has them."""
    (record,) = (
        state for name, state in load_checkpoint(run / "checkpoints/epoch=2.ckpt")["callbacks"].items() if "Rec" in name
    )
    return record["history"]


def same_weights(a: Path, b: Path) -> bool:
    return weights_hash(a) == weights_hash(b)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a short run, and are looked at elsewhere."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)


# --- SIGTERM, and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [DROPOUT, AVERAGE, WORKERS], ids=["dropout", "moving average", "workers"])
@pytest.mark.parametrize(
    ("where", "epoch"), [("train", 0), ("train", 1), ("last", 1), ("last", 2), ("validation", 1), ("epoch_end", 1)]
)
def test_interrupted_run_ends_as_if_it_had_not_been(
    where: str, epoch: int, options: tuple[str, ...], lightning: Command
) -> None:
    """Bit for bit: shuffling, augmentation, dropout, moving average and the schedule go on where they were."""
    setting = ("fit", LINE, *options, *QUIET, "--trainer.max_epochs=3", "--trainer.logger=false")
    if options not in WHOLE:
        assert lightning(*setting, "--trainer.default_root_dir=whole").code == 0
        whole = only_run("whole")
        WHOLE[options] = weights_hash(whole), read_json(whole / "metrics.json"), curves(whole)
    outcome = lightning(*setting, *interrupt(where, epoch=epoch))
    broken = only_run()
    assert outcome.code == 143, outcome
    assert f"lightning fit --resume {broken}" in outcome.out
    assert read_json(broken / "status.json")["status"] == "interrupted"
    assert (broken / "checkpoints" / "interrupted.ckpt").is_file()
    assert not (broken / "metrics.json").exists()
    assert lightning("fit", "--resume", str(broken)).code == 0
    assert read_json(broken / "status.json")["status"] == "finished"
    expected, metrics, drawn = WHOLE[options]
    assert weights_hash(broken) == expected
    assert read_json(broken / "metrics.json")["measures"] == metrics["measures"]
    assert read_json(broken / "metrics.json")["epochs"] == metrics["epochs"] == 3
    if (where, epoch) != ("last", 2):  # interrupted after the last step: nothing came after that checkpoint
        assert not (broken / "checkpoints" / "interrupted.ckpt").exists()
    assert runs() == [broken]
    assert curves(broken) == drawn, "the losses of the interrupted epoch too"


def test_crashed_run_goes_on_from_the_last_epoch(lightning: Command, here: Path) -> None:
    setting = ("fit", LINE, *AVERAGE, *QUIET, "--trainer.max_epochs=3", "--trainer.logger=false")
    assert lightning(*setting).code == 0
    outcome = lightning(*setting, *interrupt("train", epoch=1, how="crash"))
    assert (outcome.code, "went away" in outcome.err) == (1, True)
    whole, broken = runs()
    status = read_json(broken / "status.json")
    assert status["status"] == "failed"
    assert "RuntimeError: the machine went away" in status["error"]
    assert lightning("fit", "--resume", str(broken)).code == 0
    assert same_weights(whole, broken)


def test_sigterm_from_outside(lightning: Command, tmp_path: Path) -> None:
    """A process of its own: exit status, checkpoint and status; then it goes on, to the same weights."""
    setting = ["fit", LINE, *DROPOUT, *QUIET, "--trainer.max_epochs=4", f"--trainer.callbacks+={HERE}.Slow"]
    with fork(setting, tmp_path / "log", environment={"SLOW": "1"}) as process:
        broken = first_checkpoint(process).parent.parent
        process.send(signal.SIGTERM)
        assert process.wait() == 143, process.text
    assert f"lightning fit --resume {broken}" in process.text
    assert "Traceback" not in process.text
    assert read_json(broken / "status.json")["status"] == "interrupted"
    state = load_checkpoint(broken / "checkpoints" / "interrupted.ckpt")
    assert 0 < state["global_step"] < 4 * 6
    assert lightning("fit", "--resume", str(broken)).code == 0
    assert lightning(*setting).code == 0
    assert same_weights(*runs())


def test_sigterm_in_the_test_that_ends_a_fit(lightning: Command) -> None:
    args = ("fit", LINE, *ONE_EPOCH, *interrupt("test"), "--data.base.eval_batch_size=50")
    outcome = lightning(*args)
    assert outcome.code == 143
    run = only_run()
    assert read_json(run / "status.json")["status"] == "interrupted"
    assert not (run / "metrics.json").exists()
    assert lightning("fit", "--resume", str(run)).code == 0
    assert read_json(run / "metrics.json")["measures"]["clean_accuracy"]["n"] == 539
    assert read_json(run / "status.json")["status"] == "finished"


def test_worker_processes_change_nothing(lightning: Command) -> None:
    for workers in (0, 2):
        outcome = lightning(
            "fit", "--config=badnets_mnist", "--data.base.augment=FlipCrop", "--data.base.batch_size=16", *QUIET,
            f"--data.base.num_workers={workers}", "--trainer.max_epochs=2",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
    assert same_weights(*runs())
    a, b = (read_json(run / "manifest.json") for run in runs())
    assert (a["train_set"], a["changes"]) == (b["train_set"], b["changes"])


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.fixture
def finished(lightning: Command) -> Path:
    """The folder of a short run."""
    assert lightning("fit", LINE, *ONE_EPOCH, "--trainer.logger=false").code == 0
    return only_run()


def checkpoint_of(run: Path) -> Path:
    (path,) = (run / "checkpoints").glob("*.ckpt")
    return path


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99], ids=["empty", "half", "nearly whole"])
def test_truncated_checkpoint(kept: float, finished: Path, lightning: Command) -> None:
    path = checkpoint_of(finished)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    before = {each: each.read_bytes() for each in finished.rglob("*") if each.is_file()}
    complaint(lightning("fit", "--resume", str(finished)), path.name, "truncated")
    complaint(lightning("test", LINE, *QUIET, f"--ckpt_path={path}"), path.name, "truncated")
    complaint(lightning("test", LINE, *QUIET, f"--model.weights={path}"), path.name, "truncated")
    assert before == {each: each.read_bytes() for each in finished.rglob("*") if each.is_file()}
    assert runs() == [finished], "refused before a folder is made"


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(form: str, finished: Path, lightning: Command, here: Path) -> None:
    path = checkpoint_of(finished)
    content = {"state_dict": {}, "optimizer_states": [], "epoch": 0, "evil": Evil()}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    complaint(lightning("fit", "--resume", str(finished)), path.name, "refused")
    for command in ("fit", "validate", "test", "predict"):
        complaint(lightning(command, LINE, *QUIET, f"--ckpt_path={path}"), path.name, "refused")
    complaint(lightning("test", LINE, *QUIET, f"--model.weights={path}"), path.name, "refused")
    complaint(lightning("accept", "--config=user_digits", "--weights", str(path)), path.name, "refused")
    with pytest.raises(InputError, match="refused"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not (here / "ran").exists()


def test_checkpoints_from_elsewhere_are_not_fetched(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    monkeypatch.setattr("urllib.request.urlopen", fetched)
    monkeypatch.setattr("fsspec.open", fetched)
    for place in ("https://example.org/x.ckpt", "s3://bucket/x.ckpt", "file:///etc/hostname"):
        for command in ("fit", "test"):
            complaint(lightning(command, LINE, *QUIET, f"--ckpt_path={place}"), place, "download it")
        complaint(lightning("test", LINE, *QUIET, f"--model.weights={place}"), place, "download it")
        with pytest.raises(InputError, match="download it"):
            AtomicCheckpointIO().load_checkpoint(place)
    assert not runs()


def test_a_checkpoint_that_is_not_there(lightning: Command) -> None:
    complaint(lightning("test", LINE, *QUIET, "--ckpt_path=nosuch.ckpt"), "ckpt_path = 'nosuch.ckpt'", "no such file")
    assert not runs()


def test_hyper_parameters_in_a_checkpoint_change_nothing(finished: Path, lightning: Command, here: Path) -> None:
    """Lightning would take them over the configuration; `_instantiator` even names what is to be imported."""
    (here / "evil.py").write_text("open('ran', 'w')\ndef make(*args, **kwargs): open('ran', 'w')\n")
    path = checkpoint_of(finished)
    content = torch.load(path, weights_only=True)
    for hyper in (
        {"_instantiator": "evil.make", "acceptance": 0.1},
        {"_class_path": "evil.make", "_instantiator": "evil.make"},
        {"acceptance": 0.1, "weights": "nosuch"},
    ):
        torch.save({**content, "hyper_parameters": hyper}, path)
        outcome = lightning("test", f"--config={finished}/config.yaml", f"--ckpt_path={path}")
        assert outcome.code == 0, outcome.err
        found = read_json(runs()[-1] / "metrics.json")
        assert found["acceptance"] == 0.95
        assert found["measures"] == read_json(finished / "metrics.json")["measures"]
    assert not (here / "ran").exists()


def test_killed_while_saving(tmp_path: Path) -> None:
    """However often, and whenever: the checkpoint is whole, an old one or a new one."""
    path = tmp_path / "checkpoints" / "x.ckpt"
    last = -1
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            number = last
            while True:
                number += 1
                AtomicCheckpointIO().save_checkpoint({"n": number, "x": torch.full((200_000,), number)}, path)
        time.sleep(0.01 + 0.017 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            content = load_checkpoint(path)
            assert content["n"] >= last
            assert bool((content["x"] == content["n"]).all())
            last = content["n"]
    assert last > 0
    assert list(path.parent.glob("*.ckpt")) == [path], "what was left half done is no checkpoint"
    AtomicCheckpointIO().save_checkpoint({"n": 0}, path)
    assert os.listdir(path.parent) == [path.name], "and goes with the next"


def test_checkpoints_do_not_go_through_the_temporary_folder(
    lightning: Command, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(here / "on another file system, and full"))
    assert lightning("fit", LINE, *ONE_EPOCH, "--trainer.logger=false").code == 0
    assert load_checkpoint(checkpoint_of(only_run()))["global_step"] == 2


def test_disk_full_while_saving_over_an_older_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="free space"):
            AtomicCheckpointIO().save_checkpoint({"n": 2, "x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path) == {"n": 1}
    assert [each for each in tmp_path.iterdir() if each.is_file()] == [path]


def test_disk_full_during_a_run(tmp_path: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    with fork(["fit", LINE, *ONE_EPOCH, "--trainer.logger=false"], tmp_path / "log", before=small_disk) as process:
        assert process.wait() == 2, process.text
    said = [line for line in process.text.splitlines() if line.startswith("lightning fit: ")]
    assert len(said) == 1
    assert "epoch=0.ckpt: cannot be written" in said[0]
    assert "free space" in said[0]
    assert "Traceback" not in process.text
    assert read_json(only_run() / "status.json")["status"] == "failed"
    assert not list(only_run().glob("checkpoints/*"))


# --- a loss that is no number ----------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(lightning: Command) -> None:
    args = (LINE, *QUIET, "--trainer.max_epochs=3", f"--trainer.callbacks+={HERE}.Break")
    complaint(lightning("fit", *args), "no longer a number", "epoch 1", "learning rate", "checkpoint")
    run = only_run()
    assert read_json(run / "status.json")["status"] == "failed"
    path = checkpoint_of(run)
    assert path.name == "epoch=0.ckpt"
    assert all(bool(x.isfinite().all()) for x in load_checkpoint(path)["state_dict"].values() if x.is_floating_point())
    assert not (run / "metrics.json").exists()


def test_divergence_in_the_first_epoch(lightning: Command) -> None:
    steep = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e20", "--model.schedule=null")
    complaint(lightning("fit", LINE, *QUIET, "--trainer.max_epochs=2", *steep), "no longer a number", "learning rate")
    assert not list(only_run().glob("checkpoints/*"))


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_missing_data_without_a_network(source: str, lightning: Command, here: Path) -> None:
    began = time.monotonic()
    line = complaint(
        lightning("fit", "--config=victim_cifar_cpu", f"--data={source}", f"--data.data_dir={here}/none", *ONE_EPOCH),
        source, f"{here}/none", "download failed", "PHARMAKON_DATA",
    )  # fmt: skip
    assert len(line) < 600
    assert time.monotonic() - began < 20
    assert read_json(only_run() / "status.json")["status"] == "failed"
    assert not list(only_run().glob("checkpoints/*")), "before training"


@pytest.mark.parametrize("config", ["badnets_mnist", "badnets_cifar_cpu", "badnets_gtsrb"])
def test_nothing_is_written_beside_the_data(config: str, lightning: Command, data_folder: Path) -> None:
    """A folder that can only be read is enough. (Root may write everywhere: it is looked at, not forbidden.)"""

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (data_folder, *data_folder.rglob("*"))}

    before = state()
    outcome = lightning("fit", "--config", config, *ONE_EPOCH)
    assert outcome.code == 0, outcome.err
    assert state() == before
