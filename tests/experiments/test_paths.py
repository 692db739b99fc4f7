"""A path is made whole once, where it enters: no folder is ever called ``~``."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datamodules.files import at_home, full_path
from experiments import arguments, commands
from experiments.cli import run, start
from tests.experiments.running import ONE_EPOCH, Outcome, complaint

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of one's own; afterwards nothing in the working directory is called like a short form of it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    yield folder
    assert not [path for path in Path().rglob("*") if path.name.startswith(("~", "$"))]


@pytest.mark.parametrize("form", ["~/x/y", "~/x/y/", "$HOME/x/y", "${HOME}/x/y", "~//x/./y"])
def test_short_forms(form: str, home: Path) -> None:
    assert full_path(form) == home / "x" / "y"


@pytest.mark.parametrize(
    "text", ["", "x/~", "a~b", "~nobody_of_that_name/x", "$HOMEX/x", "${HOMES}", "~x", "$1", "1e-3"]
)
def test_other_text_stays(text: str) -> None:
    assert at_home(text) == text


def test_arguments(home: Path) -> None:
    given = ["--out=~/a", "--out", "~/b", "--data.base.train=$HOME/c", "word", "--flag", "~/d", "--x=a=~/e"]
    made = [f"--out={home}/a", "--out", f"{home}/b", f"--data.base.train={home}/c", "word", "--flag", f"{home}/d"]
    assert arguments.made_whole(given) == [*made, "--x=a=~/e"]


@pytest.mark.parametrize("command", sorted({*commands.ACTIONS, "fit", "test"}))
def test_every_command_gets_whole_paths(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(commands, "_action", lambda _: lambda args: seen.append(args) or 0)
    assert commands.execute([command, "--key=~/a", "--out", "~/b"]) == 0
    assert seen == [[command, f"--key={home}/a", "--out", f"{home}/b"]]


def test_no_constructor_takes_a_path_as_it_is() -> None:
    """Below the command line a text that a person may have given becomes a path by `full_path`, and by nothing else."""
    found = []
    for package in ("datamodules", "classifiers", "poisoning", "extraction", "watermark"):
        for file in sorted((ROOT / package).rglob("*.py")):
            found += [f"{file.name}:{line}" for line in _plain_paths(ast.parse(file.read_text(encoding="utf-8")))]
    assert [place.partition(":")[0] for place in found] == ["files.py"], "full_path itself"


def _plain_paths(tree: ast.AST) -> Iterator[int]:
    """Where a parameter that may be text, or an attribute of the object, is handed to `Path`."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        texts = {each.arg for each in given if each.annotation is not None and "str" in ast.unparse(each.annotation)}
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Path" and call.args:
                parts = list(ast.walk(call.args[0]))
                own = any(isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self" for part in parts)
                if own or any(isinstance(part, ast.Name) and part.id in texts for part in parts):
                    yield call.lineno


def test_a_whole_run_below_the_home_folder(home: Path, lightning: Command) -> None:
    """Configuration, checkpoints, weights and logs in one place, and found again."""
    outcome = lightning("fit", LINE, *ONE_EPOCH, "--trainer.default_root_dir=~/runs")
    assert outcome.code == 0, outcome.err
    (folder,) = (home / "runs" / "badnets_digits").iterdir()
    assert {"config.yaml", "checkpoints", "csv", "weights.safetensors"} <= set(os.listdir(folder))
    assert "~" not in (folder / "config.yaml").read_text(encoding="utf-8")
    short = f"~/runs/badnets_digits/{folder.name}"
    assert lightning("fit", f"--resume={short}/", "--trainer.max_epochs=2").code == 0
    assert (folder / "checkpoints" / "epoch=1.ckpt").is_file()
    checkpoint = f"--ckpt_path={short}/checkpoints/epoch=1.ckpt"
    for key in (f"--model.weights={short}/weights.safetensors", checkpoint, "--model.weights=~/runs/badnets_digits/"):
        assert lightning("test", f"--config={short}/config.yaml", key).code == 0
    complaint(lightning("fit", "--resume=~/runs/nothing"), f"{home}/runs/nothing")
    assert lightning("export", LINE, "--out=~/images", "--limit=3").code == 0
    assert len(list((home / "images" / "images").iterdir())) == 3


def test_paths_in_a_yaml(home: Path) -> None:
    config = {
        "trainer": {
            "default_root_dir": "~/runs",
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "$HOME/logs"}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "~/kept"}}],
        },
        "data": {
            "class_path": "BadNets",
            "init_args": {
                "base": {"class_path": "MNIST", "init_args": {"data_dir": "~/data"}},
                "trigger": {"class_path": "Patch", "init_args": {"picture": "~/patch.png"}},
            },
        },
    }
    Image.new("L", (3, 3), 255).save(home / "patch.png")
    Path("paths.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for given in (
        "--config=paths.yaml",
        f"--config={yaml.safe_dump(config, default_flow_style=True, width=9999).strip()}",
    ):
        line = start(["fit", LINE, given], act=False, keep=False)
        assert str(line.trainer.loggers[0].save_dir if line.trainer.loggers else f"{home}/logs") == f"{home}/logs"
        assert any(str(getattr(each, "dirpath", "")) == f"{home}/kept" for each in line.trainer.callbacks)  # type: ignore[attr-defined]
        assert line.datamodule.base.data_dir == home / "data"
        assert line.resolved["trainer"]["default_root_dir"] == f"{home}/runs"


def test_paths_given_to_run(home: Path) -> None:
    options = [option.removeprefix("--") for option in (*ONE_EPOCH, "--trainer.logger=false")]
    first = run("badnets_digits", {"trainer": {"default_root_dir": "~/runs"}}, overrides=options, show=False).directory
    assert first.parent == home / "runs" / "badnets_digits"
    assert run(resume=f"~/runs/badnets_digits/{first.name}", show=False).directory == first


def test_paths_given_to_classes(home: Path) -> None:
    """Of Python's callers."""
    from classifiers.classifier import ImageClassifier, load_classifier
    from classifiers.weights import find_weights
    from datamodules.sources.npz import Npz
    from datamodules.store import Store
    from extraction.http.keys import Keys
    from extraction.ledger import Ledger
    from tests.helpers import mlp
    from watermark import keys

    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
    images[:, 0, 0] = np.arange(20)
    np.savez(home / "some.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = Npz("~/some.npz")
    model: ImageClassifier = mlp(data)
    model.save("~/weights.safetensors")
    assert find_weights("$HOME/weights.safetensors") == home / "weights.safetensors"
    assert torch.equal(next(load_classifier("~/weights.safetensors").net.parameters()), next(model.net.parameters()))
    Ledger("~/ledger.sqlite")
    Keys("~/ledger.sqlite.keys")
    assert Store("~/store").root == home / "store"
    keys.keygen("~/keys/mine", classes=4, shape=(1, 8, 8), n=8)
    assert keys.VerificationKey.read("~/keys/mine").digest
    assert {"ledger.sqlite", "ledger.sqlite.keys", "keys"} <= set(os.listdir(home))
