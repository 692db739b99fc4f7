"""Every argument of Lightning's Trainer and each of its callbacks works, or is refused in one line with the remedy."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.tuner import Tuner

from datamodules.sources.digits import Digits
from experiments import pictures
from experiments.cli import start
from tests.experiments.lightning_table import ARGUMENTS, CALLBACKS, Case, text
from tests.experiments.running import FAST, Outcome, complaint, read_json
from tests.helpers import mlp, tiny_trainer

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures; and what Lightning sets for the whole process is set back."""
    monkeypatch.setattr(pictures, "write_grid", lambda *_: False)
    monkeypatch.setattr(pictures, "write_curves", lambda *_: False)
    kept = torch.get_default_dtype(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(kept[0])
    torch.backends.cudnn.benchmark = kept[1]


def listed(cases: dict[str, list[Case]]) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name} {case.value} {case.command if case.command != 'fit' else ''}".strip())
        for name, each in cases.items()
        for case in each
    ]


def test_no_argument_of_the_trainer_is_without_an_entry() -> None:
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert known - set(ARGUMENTS) == set(), "new in Lightning: try it, and write an entry"
    assert set(ARGUMENTS) - known == set(), "gone from Lightning"


def test_no_callback_is_without_an_entry() -> None:
    known = set(lightning.pytorch.callbacks.__all__)
    assert known - set(CALLBACKS) == set(), "new in Lightning: try it, and write an entry"
    assert set(CALLBACKS) - known == set(), "gone from Lightning"


def test_the_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "lightning.md"
    remedy = "python -m tests.experiments.lightning_table > docs/lightning.md"
    assert page.read_text(encoding="utf-8") == text(), remedy


@pytest.mark.parametrize(("name", "case"), listed(ARGUMENTS))
def test_argument(name: str, case: Case, lightning: Command) -> None:
    attempt(case, [f"--trainer.{name}={case.value}"], lightning)


@pytest.mark.parametrize(("name", "case"), listed(CALLBACKS))
def test_callback(name: str, case: Case, lightning: Command) -> None:
    given = re.split(r" (?=\w+=)", case.value) if case.value else []
    attempt(case, [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{each}" for each in given)], lightning)


def attempt(case: Case, given: list[str], lightning: Command) -> None:
    """Run a case, and see that what should comes of it."""
    if case.without and importlib.util.find_spec(case.without):
        pytest.skip(f"{case.without} is installed")
    args = [case.command, *FAST, *(f"--{option}" for option in case.also), *given]
    if case.refused:
        complaint(lightning(*args)._replace(out=""), *case.check.split("|"))
        return
    line = start(args, act=case.act, keep=case.act, show=False)
    run = line.record.folder
    metrics = read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
    known = {"t": line.trainer, "run": run.resolve(), "model": line.model, "data": line.datamodule, "metrics": metrics}
    assert eval(case.check, known), case.check  # of this repository's own table
    if case.act:
        assert read_json(run / "status.json")["status"] == "finished"


def test_a_tuner_from_python(tmp_path: Path) -> None:
    """Both of its searches, on our modules; what they find is what the next fit trains with."""
    data = Digits(batch_size=64)
    model = mlp(data)
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=1, default_root_dir=tmp_path)
    tuner = Tuner(trainer)
    assert tuner.scale_batch_size(model, datamodule=data, max_trials=2, init_val=8) == 16
    assert data.batch_size == 16
    found = tuner.lr_find(model, datamodule=data, num_training=20)
    assert found is not None
    assert model.lr == found.suggestion()
    tiny_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1).fit(model, data)
    assert model.optimizers().param_groups[0]["lr"] == found.suggestion()
