"""What a user may set about the trainer: the run's checkpoint and its seed are there all the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from classifiers.classifier import ImageClassifier
from classifiers.weights import load_checkpoint
from experiments import pictures, run, seeds
from tests.experiments.running import FAST, QUIET, Outcome, complaint, only_run, read_json, runs, weights_hash

Command = Callable[..., Outcome]
CALLBACKS = "--trainer.callbacks"
STOP = ("EarlyStopping", "monitor: val/clean_accuracy, mode: max")
BEST = ("ModelCheckpoint", "monitor: val/clean_accuracy, mode: max")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a short run, and are looked at elsewhere."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)


def listed(*callbacks: tuple[str, str]) -> str:
    """An overlay whose list of callbacks replaces the default one."""
    lines = [
        f"    - class_path: lightning.pytorch.callbacks.{name}\n      init_args: {{{given}}}"
        for name, given in callbacks
    ]
    Path("own.yaml").write_text("trainer:\n  callbacks:\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return "--config=own.yaml"


# --- a list of callbacks of one's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callbacks",
    [
        [STOP],
        [BEST],
        [("ModelCheckpoint", "save_weights_only: true")],
        [("ModelCheckpoint", "dirpath: elsewhere")],
        [BEST, ("ModelCheckpoint", ""), STOP],
    ],
    ids=["none", "best", "weights", "elsewhere", "three"],
)
def test_the_runs_checkpoint_is_there_whatever_is_listed(callbacks: list[tuple[str, str]], lightning: Command) -> None:
    outcome = lightning("fit", *FAST, listed(*callbacks), "--trainer.logger=false")
    assert outcome.code == 0, outcome.err
    broken = only_run()
    assert lightning("fit", "--resume", str(broken), "--trainer.max_epochs=4").code == 0
    assert [row["epoch"] for row in history(broken)] == [0, 1, 2, 3], "it went on from the last epoch"
    assert read_json(broken / "metrics.json")["epochs"] == 4


def history(folder: Path) -> Any:
    """The curves in a run's newest whole checkpoint."""
    newest = max(folder.rglob("*.ckpt"), key=lambda path: ("callbacks" in load_checkpoint(path), path.stat().st_mtime))
    return load_checkpoint(newest)["callbacks"]["Record"]["history"]


@pytest.mark.parametrize(
    "options",
    [("=null",), ("=[]",), ("=EarlyStopping", ".monitor=val/clean_accuracy")],
    ids=["null", "empty", "= for +="],
)
def test_replaced_on_the_command_line(options: tuple[str, ...], lightning: Command) -> None:
    assert lightning("fit", *FAST, *(f"{CALLBACKS}{option}" for option in options)).code == 0
    assert os.listdir(only_run() / "checkpoints") == ["epoch=1.ckpt"]


def test_a_checkpoint_callback_beside_ours(lightning: Command) -> None:
    """The best of its own is kept beside the last; ``--resume`` takes the last."""
    best = (f"{CALLBACKS}+=ModelCheckpoint", f"{CALLBACKS}.monitor=val/clean_accuracy", f"{CALLBACKS}.filename=best")
    assert lightning("fit", *FAST, *best).code == 0
    assert sorted(os.listdir(only_run() / "checkpoints")) == ["best.ckpt", "epoch=1.ckpt"]
    assert lightning("fit", *FAST, f"{CALLBACKS}+=ModelCheckpoint").code == 0, "with the settings that ours has"


def test_the_newest_checkpoint_that_is_whole(lightning: Command) -> None:
    assert lightning("fit", *FAST).code == 0
    folder = only_run()
    ours = folder / "checkpoints" / "epoch=1.ckpt"
    alone = folder / "csv" / "mine.ckpt"
    torch.save({"state_dict": load_checkpoint(ours)["state_dict"]}, alone)
    os.utime(alone, ns=(time.time_ns() + 10**9,) * 2)
    assert lightning("fit", "--resume", str(folder)).code == 0, "not from the weights alone"
    ours.rename(folder / "kept.ckpt")
    assert lightning("fit", "--resume", str(folder)).code == 0, "from wherever it is in the folder"
    (folder / "kept.ckpt").unlink()
    complaint(lightning("fit", "--resume", str(folder)), "mine.ckpt", "weights alone", "--model.weights")
    alone.unlink()
    complaint(lightning("fit", "--resume", str(folder)), "no checkpoint", "--model.weights", str(folder))


@pytest.mark.parametrize("option", ["enable_checkpointing=false", "barebones=true"])
def test_without_checkpoints(option: str, lightning: Command) -> None:
    outcome = lightning("fit", *FAST, f"--trainer.{option}")
    assert outcome.code == 0, outcome.err
    folder = only_run()
    assert not list(folder.rglob("*.ckpt"))
    assert (folder / "csv").exists() == (option != "barebones=true")
    assert read_json(folder / "metrics.json")["measures"]["clean_accuracy"]["n"] > 0


def test_barebones_refuses_a_logger_that_was_asked_for(lightning: Command) -> None:
    complaint(lightning("fit", *FAST, "--trainer.barebones=true", "--config=logger/csv"), "barebones", "logger")


def test_what_another_run_left_when_it_failed_is_not_gone_on_from(lightning: Command, here: Path) -> None:
    (here / "kept").mkdir()
    (here / "kept" / "on_exception.ckpt").write_bytes(b"of another run")
    given = (f"{CALLBACKS}+=OnExceptionCheckpoint", f"{CALLBACKS}.dirpath=kept")
    complaint(lightning("fit", *FAST, *given), "on_exception.ckpt", "another run", "{run}/checkpoints")


# --- the seed ---------------------------------------------------------------------------------------------------------


def seed_of(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["seed_everything"]


def test_a_seed_by_chance_differs_and_is_kept(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, after other runs, and with a number in the environment that Lightning would take."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    results = [run("victim_digits", overrides=[*(each.removeprefix("--") for each in FAST[1:]), "seed_everything=true"],
                   show=False) for _ in range(3)]  # fmt: skip
    found = [seed_of(each.directory) for each in results]
    assert len(set(found)) == 3
    assert len({weights_hash(each.directory) for each in results}) == 3
    for each, seed in zip(results, found, strict=True):
        assert type(seed) is int
        assert read_json(each.directory / "metrics.json")["seed"] == seed
        assert each.datamodule.loading.training_seed() == int(os.environ["PL_GLOBAL_SEED"]) == found[-1]
    assert lightning("fit", "--config", str(results[0].directory / "config.yaml")).code == 0
    assert weights_hash(runs()[-1]) == weights_hash(results[0].directory), "its config makes the same run again"


def test_the_environments_seed_is_not_the_runs(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lightning("fit", *FAST).code == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert lightning("fit", *FAST).code == 0
    assert len({weights_hash(folder) for folder in runs()}) == 1
    assert seed_of(runs()[-1]) == 0


def test_a_seed_by_chance_for_several_processes(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Lightning starts have it in their environment; those that others start must be told."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    assert seeds.chosen_seed(True) == 7
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    assert seeds.chosen_seed(True) != 7
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    complaint(lightning("fit", *FAST, "--seed_everything=true"), "seed_everything", "give a number")


# --- what works through the sampler -----------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Ids and pixels of each batch, by stage and epoch."""
    found: dict[str, list[Any]] = {}
    for stage in ("training", "validation"):
        step = getattr(ImageClassifier, f"{stage}_step")

        def spy(self: ImageClassifier, batch: Any, *rest: Any, stage: str = stage, step: Any = step) -> Any:
            found.setdefault(f"{stage} {self.current_epoch}", []).append(
                (batch.ids.tolist(), batch.images.sum().item())
            )
            return step(self, batch, *rest)

        monkeypatch.setattr(ImageClassifier, f"{stage}_step", spy)
    return found


@pytest.mark.parametrize(
    ("share", "batches", "options"),
    [
        ("2", 2, ()),
        ("0.1", 1, ()),
        ("0.01", 1, ()),
        ("1.0", 19, ()),
        ("2", 2, ("--data.base.resident=true",)),
        ("2", 2, ("--data.base.augment=FlipCrop", "--data.base.augment.padding=1")),
        ("2", 2, ("--trainer.reload_dataloaders_every_n_epochs=1",)),
        ("0.1", 1, ("--data.base.eval_batch_size=16",)),
    ],
)
def test_overfitting_sees_the_same_batches_in_every_epoch(
    share: str, batches: int, options: tuple[str, ...], lightning: Command, seen: dict[str, list[Any]]
) -> None:
    setting = ("--config=badnets_digits", *FAST[1:3], *QUIET, "--trainer.max_epochs=3", "--trainer.logger=false")
    outcome = lightning("fit", *setting, f"--trainer.overfit_batches={share}", *options)
    assert outcome.code == 0, outcome.err
    assert len(seen["training 0"]) == batches
    assert seen["training 0"] == seen["training 1"] == seen["training 2"]
    assert len(seen["validation 0"]) > 0
    assert seen["validation 0"] == seen["validation 1"] == seen["validation 2"]


def test_the_overlay_keeps_its_promise(lightning: Command, seen: dict[str, list[Any]]) -> None:
    overlay = ("--config=debug/overfit", "--trainer.max_epochs=3")
    assert lightning("fit", "--config=badnets_digits", *overlay, *QUIET).code == 0
    assert len(seen["training 0"]) == 2
    assert seen["training 0"] == seen["training 1"] == seen["training 2"]


@pytest.mark.parametrize(
    "option",
    [
        "reload_dataloaders_every_n_epochs=1", "use_distributed_sampler=true", "val_check_interval=0.5",
        "val_check_interval=3", "check_val_every_n_epoch=2", "limit_val_batches=0", "num_sanity_val_steps=-1",
        "limit_train_batches=1.0", "callbacks=null",
    ],
)  # fmt: skip
def test_training_is_the_same_whatever_is_validated_or_reloaded(option: str, lightning: Command) -> None:
    setting = ("--config=victim_digits", *FAST[1:3], *QUIET, "--trainer.max_epochs=2", "--trainer.logger=false")
    if not SAME:
        assert lightning("fit", *setting).code == 0
        SAME.append(weights_hash(runs()[-1]))
    assert lightning("fit", *setting, f"--trainer.{option}").code == 0
    assert weights_hash(runs()[-1]) == SAME[0]


SAME: list[str] = []
"""The weights' hash of that run with nothing set."""


def test_a_share_of_the_training_batches(lightning: Command, seen: dict[str, list[Any]]) -> None:
    setting = ("--config=victim_digits", *FAST[1:3], *QUIET, "--trainer.max_epochs=2", "--trainer.logger=false")
    assert lightning("fit", *setting, "--trainer.limit_train_batches=0.25").code == 0
    assert [len(seen[f"training {epoch}"]) for epoch in (0, 1)] == [4, 4]
    assert seen["training 0"] != seen["training 1"], "another share in each epoch"
