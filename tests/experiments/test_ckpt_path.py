"""``--ckpt_path`` of another run, of another network, with another optimizer, of what is no checkpoint: one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from classifiers.weights import load_checkpoint
from experiments import pictures
from tests.experiments.running import FAST, Outcome, complaint, read_json, runs

Command = Callable[..., Outcome]
PATH = "strange.ckpt"
MORE = ("--trainer.max_epochs=3", "--trainer.logger=false")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a short run, and are looked at elsewhere."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)


KEPT: list[bytes] = []
"""A checkpoint of two epochs, once made."""


@pytest.fixture
def path(lightning: Command, here: Path) -> str:
    """A checkpoint of another run's."""
    if not KEPT:
        assert lightning("fit", *FAST, "--trainer.logger=false", "--trainer.default_root_dir=made").code == 0
        KEPT.append(next(Path("made").rglob("*.ckpt")).read_bytes())
    (here / "other.ckpt").write_bytes(KEPT[0])
    return "other.ckpt"


def said(outcome: Outcome, *words: str) -> None:
    """`complaint`, whatever notes were printed before."""
    complaint(outcome._replace(out=""), *words)


def test_of_another_run(path: str, lightning: Command) -> None:
    assert lightning("fit", *FAST, f"--ckpt_path={path}", *MORE).code == 0
    assert read_json(runs()[-1] / "metrics.json")["epochs"] == 3
    assert lightning("test", *FAST, f"--ckpt_path={path}").code == 0


def test_with_another_optimizer(path: str, lightning: Command) -> None:
    given = ("fit", *FAST, f"--ckpt_path={path}", *MORE)
    said(lightning(*given, "--model.optimizer=SGD", "--model.optimizer.lr=0.1"), "model.optimizer = 'SGD'", "momentum")
    said(lightning(*given, "--model.optimizer=RMSprop"), "model.optimizer = 'RMSprop'", "--model.weights")


def test_a_learning_rate_that_the_checkpoint_overrules_is_told(path: str, lightning: Command) -> None:
    outcome = lightning("fit", *FAST, f"--ckpt_path={path}", *MORE, "--model.optimizer.lr=0.5")
    assert outcome.code == 0, outcome.err
    assert any("lr = " in note and "not 0.5" in note for note in read_json(runs()[-1] / "metrics.json")["notes"])


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
def test_of_another_network(command: str, path: str, lightning: Command) -> None:
    given = (command, *FAST, f"--ckpt_path={path}", *MORE)
    said(
        lightning(*given, "--model.backbone.hidden=[9]"), path, "another network than MLP", "(8, 64), expected (9, 64)"
    )


def test_with_another_schedule(path: str, lightning: Command) -> None:
    given = ("fit", *FAST, f"--ckpt_path={path}", *MORE)
    assert lightning(*given, "--model.schedule=null").code == 0
    without = {**load_checkpoint(Path(path)), "lr_schedulers": []}
    torch.save(without, path)
    said(lightning(*given), "model.schedule", "--model.schedule=null")
    assert lightning(*given, "--model.schedule=null").code == 0


def test_words_of_lightnings(lightning: Command, here: Path) -> None:
    for command in ("fit", "test"):
        for word in ("best", "last", "hpc"):
            said(lightning(command, *FAST, f"--ckpt_path={word}"), f"ckpt_path = '{word}'", "none yet", "--resume RUN")
    kept = (
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.dirpath=kept",
        "--trainer.callbacks.save_last=true",
    )
    assert lightning("fit", *FAST, *kept).code == 0
    assert lightning("fit", *FAST, *kept, "--ckpt_path=last", *MORE).code == 0, "a folder of the user's has a last one"
    assert read_json(runs()[-1] / "metrics.json")["epochs"] == 3


def test_a_folder(path: str, lightning: Command, here: Path) -> None:
    said(lightning("test", *FAST, "--ckpt_path=."), "ckpt_path = '.'", "folder")
    (here / "config.yaml").touch()
    said(lightning("test", *FAST, "--ckpt_path=."), "a run's folder", "--resume .")


RECORD: Any = {"Record": {"history": [{"epoch": 0.0}]}}
STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "no optimizer": ({"optimizer_states": None}, "weights alone"),
    "empty optimizer": ({"optimizer_states": []}, "weights alone"),
    "optimizer of text": ({"optimizer_states": ["x"]}, "optimizer_states[0]"),
    "optimizer of another size": ({"optimizer_states": [{"state": {}, "param_groups": [{"params": [0]}]}]}, "not fit"),
    "no schedules": ({"lr_schedulers": None}, "lr_schedulers"),
    "no version": ({"pytorch-lightning_version": None}, "pytorch-lightning_version"),
    "no weights": ({"state_dict": None}, "state_dict"),
    "weights in a list": ({"state_dict": [1, 2]}, "state_dict"),
    "weights of text": ({"state_dict": {"net.body.1.weight": "x"}}, "another network"),
    "callbacks in a list": ({"callbacks": [1]}, "callbacks"),
    "a callback's state in a list": ({"callbacks": {"Record": [1]}}, "callbacks.Record"),
    "a history of text": ({"callbacks": {"Record": {"history": "x"}}}, "callbacks.Record.history"),
    "a history of words": ({"callbacks": {"Record": {"history": [{"epoch": "x"}]}}}, "callbacks.Record.history"),
    "another state": ({"callbacks": {**RECORD, "RunCheckpoint": {"a": 1}}}, "does not fit"),
    "epoch as text": ({"epoch": "three"}, "epoch"),
    "step below zero": ({"global_step": -1}, "global_step"),
    "no loops": ({"loops": None}, "loops"),
    "empty loops": ({"loops": {"fit_loop": {}}}, "loops.fit_loop"),
    "loops in a list": ({"loops": [1]}, "loops"),
    "losses of text": ({"losses": "x"}, "losses"),
    "gradients of text": ({"gradients": "x"}, "gradients"),
    "size of text": ({"batch_size": "x"}, "batch_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_whole_but_strange(name: str, path: str, lightning: Command) -> None:
    changes, word = STRANGE[name]
    content = {**load_checkpoint(Path(path)), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, PATH)
    said(lightning("fit", *FAST, f"--ckpt_path={PATH}", *MORE), PATH, word)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, [1]], ids=["empty", "no version", "a list"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_no_checkpoint_at_all(command: str, content: Any, lightning: Command) -> None:
    torch.save(content, PATH)
    said(lightning(command, *FAST, f"--ckpt_path={PATH}"), PATH, "checkpoint")
