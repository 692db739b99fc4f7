"""Every shipped YAML runs: an experiment by itself, a part together with one. A new file needs no new test."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments.registry import configs_folder
from tests.experiments.running import QUIET, TWO, Outcome, only_run, read_json

FOLDER = configs_folder()
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "defaults")
PARTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("*/*.yaml"))
LIGHT = ("--trainer.max_epochs=1", "--trainer.precision=32-true", "--model.compile=false", *TWO, *QUIET)
SHORT = {"rounds": 1, "surrogate_steps": 1, "noise_steps": 1, "surrogate_epochs": 1, "iterations": 1, "poisons": 1}
"""How long crafting takes here, in a config that has such a key."""
ELSEWHERE = {
    "poison_frogs_dog_fish": (
        "--data.base.base.train=image_folder/train", "--data.base.base.test=image_folder/test",
        "--data.backbone.pretrained=false", "--model.backbone.pretrained=false",
    ),
    **dict.fromkeys(
        (f"{method}_{data}" for method in ("mixmatch", "fixmatch") for data in ("mnist", "cifar_cpu", "cifar")),
        ("--data.budget=20",),
    ),
    **dict.fromkeys((f"knockoff_noise_{data}" for data in ("digits", "mnist", "cifar_cpu")), ("--data.budget=64",)),
}  # fmt: skip
"""Options in the stead of data and weights that are not to be had here, and of budgets larger than the tiny sets."""
IMAGES = {
    "data/dog_fish": (
        "--data.base.train=image_folder/train", "--data.base.test=image_folder/test", "--data.base.size=32",
        "--data.base.val_fraction=0.2",
    ),
}  # fmt: skip
"""Options in the stead of folders of images that are not to be had here."""
SHAPES = {"digits": "1,8,8", "mnist": "1,28,28", "cifar": "3,32,32"}
"""Of the images of a config with this in its name."""
Command = Callable[..., Outcome]


def shortened(name: str) -> list[str]:
    """Options that make crafting short."""
    data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["data"]
    given = data["init_args"] if isinstance(data, dict) else {}
    options = [f"--data.{key}={value}" for key, value in SHORT.items() if key in given]
    if isinstance(given.get("base"), dict) and "per_class" in given["base"]["init_args"]:
        options.append("--data.base.per_class=3")
    return options


def narrowed(name: str) -> list[str]:
    """Options that make the networks meant for a GPU narrow."""
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    options = []
    for part in ("model", "data"):
        given = config[part]
        if isinstance(given, str):
            given = yaml.safe_load((FOLDER / given).read_text(encoding="utf-8"))
        given = given.get("init_args", {})
        backbone = given.get("backbone") or {}
        wide = 64 if backbone.get("class_path") == "ResNet18" else 0  # unless it says otherwise
        if backbone.get("init_args", {}).get("width", wide) > 16:
            options.append(f"--{part}.backbone.width=8")
        if given.get("generator_width", 0) > 16:
            options.append(f"--{part}.generator_width=8")
    return options


def made_before(name: str) -> list[str]:
    """The experiments whose weights an experiment starts from."""
    return re.findall(r"weights: runs/(\w+)", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that several experiments start from."""
    return tmp_path_factory.mktemp("made")


def make(needed: str, made: Path, lightning: Command) -> None:
    """The run that an experiment starts from, trained once."""
    if not (made / needed).exists():
        make_keys(needed, lightning)
        assert lightning("fit", "--config", needed, *narrowed(needed), *LIGHT).code == 0
        shutil.copytree(Path("runs", needed), made / needed)
    shutil.copytree(made / needed, Path("runs", needed), dirs_exist_ok=True)


def make_keys(name: str, lightning: Command) -> None:
    """The keys that an experiment marks with."""
    for key in re.findall(r"key: (keys/\w+)", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")):
        shape = next(shape for data, shape in SHAPES.items() if data in name)
        assert lightning("keygen", "--out", key, "--classes=10", "--shape", shape, "--n=12").code == 0


def test_there_are_some() -> None:
    assert {"badnets_digits", "badnets_mnist", "badnets_cifar", "badnets_gtsrb", "user_digits"} <= set(EXPERIMENTS)
    assert {"data/mnist", "model/small_cnn", "trainer/cpu", "trainer/gpu", "debug/smoke"} <= set(PARTS)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_says_in_its_first_line_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.startswith("# ")
    assert len(first) > 10


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_fits_and_tests(name: str, made: Path, lightning: Command) -> None:
    make_keys(name, lightning)
    for needed in made_before(name):
        make(needed, made, lightning)
    options = [*narrowed(name), *shortened(name), *ELSEWHERE.get(name, ())]
    outcome = lightning("fit", "--config", name, *options, *LIGHT)
    assert outcome.code == 0, outcome.err
    (run,) = Path("runs", name).iterdir()
    found = read_json(run / "metrics.json")["measures"]
    assert found["clean_accuracy"]["n"] > 0
    assert ("attack_success_rate" in found) == name.startswith(
        ("badnets", "repair", "prune", "fine_prune", "quantise", "smooth")
    )
    assert {"config.yaml", "manifest.json", "weights.safetensors", "curves.png"} <= set(os.listdir(run))


@pytest.mark.parametrize("name", [name for name in PARTS if name.startswith("data/")])
def test_data_goes_under_an_attack_and_into_any_model(name: str, lightning: Command) -> None:
    boxes = "gtsrb" in name
    images = IMAGES.get(name, ())
    outcome = lightning(
        "fit", "--config=badnets_digits", f"--data.base={name}.yaml", "--data.poison_fraction=0.05",
        *(["--data.trigger=YellowSquare"] if boxes else []), *images, *LIGHT,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    source = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["class_path"]
    config = yaml.safe_load((only_run() / "config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["init_args"]["base"]["class_path"].endswith(f".{source}")


@pytest.mark.parametrize("name", [name for name in PARTS if name.startswith("model/")])
def test_model_trains_on_any_data(name: str, lightning: Command) -> None:
    config = "watermark_cifar_cpu" if "watermarked" in name else "victim_cifar_cpu"
    make_keys(config, lightning)
    outcome = lightning("fit", f"--config={config}", f"--model={name}.yaml", *LIGHT)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", [name for name in PARTS if name.startswith(("logger/", "debug/"))])
def test_overlay_runs(name: str, lightning: Command, here: Path) -> None:
    if name == "logger/mlflow":
        pytest.importorskip("mlflow")
    two = [] if name == "debug/overfit" else TWO
    outcome = lightning("fit", "--config=badnets_digits", "--config", name, "--trainer.max_epochs=1", *QUIET, *two)
    assert outcome.code == 0, outcome.err
    run = only_run()
    assert run.parent.name == "badnets_digits", "an overlay names no run"
    loggers = {
        "logger/csv": {"csv"},
        "logger/tensorboard": {"csv", "tensorboard"},
        "logger/mlflow": {"csv", "mlflow.db"},
    }
    assert loggers.get(name, set()) == {"csv", "tensorboard", "mlflow.db"} & set(os.listdir(run))
    assert os.listdir(here) == ["runs"], "everything lies in the run's folder"


@pytest.mark.parametrize("name", [name for name in PARTS if name.startswith("trainer/")])
def test_trainer_overlay_is_understood(name: str, lightning: Command) -> None:
    outcome = lightning("fit", "--config=badnets_digits", "--config", name, "--print_config")
    assert outcome.code == 0, outcome.err
    printed = yaml.safe_load(outcome.out)["trainer"]
    asked = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["trainer"]
    assert {key: printed[key] for key in asked} == asked


def test_no_kind_of_part_is_left_out() -> None:
    tested = {"data", "model", "logger", "debug", "trainer", "studies"}  # the last in test_studies.py
    assert {name.split("/")[0] for name in PARTS} <= tested, "write a test for the new folder of parts"
