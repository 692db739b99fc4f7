"""The command: what answers at once, where configs come from and which value wins, and how it ends."""

from __future__ import annotations

import contextlib
import inspect
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer

from classifiers.backbones import Backbone
from classifiers.classifier import ImageClassifier
from datamodules.augment import Augmentation
from datamodules.datamodule import ImageDataModule
from datamodules.rewrite import Rewrite
from datamodules.triggers import Trigger
from experiments import Result, run
from experiments.__main__ import main
from experiments.cli import start
from experiments.registry import PACKAGES, configs_folder, import_all
from tests.experiments.running import ONE_EPOCH, QUIET, Outcome, complaint, first_checkpoint, fork, only_run

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"


def config_of(*args: str, command: str = "fit") -> Any:
    """The configuration as it was understood, as plain values."""
    line = start([command, *args], act=False, keep=False)
    return yaml.safe_load(line.text)


# --- at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", ["--help", "--version", "list", "fit --config=nosuch", "ftt", "accept -h"])
def test_answers_without_the_heavy_imports(args: list[str]) -> None:
    code = (
        "import sys, time; began = time.perf_counter(); from experiments.__main__ import main; main(sys.argv[1:]);"
        "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules), 'heavy';"
        "sys.exit(time.perf_counter() - began > 0.5)"
    )
    for _ in range(3):  # others work on these cores
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
        assert "heavy" not in done.stderr, done.stderr
        if done.returncode == 0:
            return
    raise AssertionError(f"took more than half a second three times: {done.stderr}")


@pytest.mark.parametrize("how", [["lightning"], ["pharmakon"], [sys.executable, "-m", "experiments"]])
def test_is_installed_and_ours(how: list[str]) -> None:
    if len(how) == 1:
        (script,) = entry_points(group="console_scripts", name=how[0])
        assert script.load() is main
        assert script.dist is not None
        assert script.dist.name == "pharmakon"
        how = [str(Path(sys.executable).with_name(how[0]))]
    done = subprocess.run([*how, "--version"], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == f"pharmakon {version('pharmakon')}\n"


def test_help_names_every_command(lightning: Command) -> None:
    outcome = lightning("--help")
    assert outcome.code == 0
    for word in ("fit", "validate", "test", "predict", "accept", "export", "list", "--config", "--resume"):
        assert word in outcome.out
    assert lightning().code == 2, "no command is a mistake"


def test_lists_every_class_and_config(lightning: Command) -> None:
    import_all()
    listed = {line.split()[0]: line for line in lightning("list").out.splitlines() if line.startswith("  ")}
    for base in (ImageDataModule, ImageClassifier, Backbone, Trigger, Augmentation):
        for kind in concrete(base):
            if kind is Rewrite:  # changes nothing
                continue
            assert kind.__name__ in listed
            described = (inspect.getdoc(kind) or "").splitlines()[0].removeprefix(f"{kind.__name__}: ")
            assert described in listed[kind.__name__]
            assert len(described) > 10
    for path in configs_folder().rglob("*.yaml"):
        name = str(path.relative_to(configs_folder()).with_suffix(""))
        assert path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ") in listed[name]


def concrete(base: type) -> Iterator[type]:
    if not inspect.isabstract(base) and base.__module__.split(".")[0] in PACKAGES and not base.__name__.startswith("_"):
        yield base
    for child in base.__subclasses__():
        yield from concrete(child)


def test_list_of_broken_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m experiments list | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_options_of_a_command(lightning: Command) -> None:
    outcome = lightning("fit", "--help")
    assert outcome.code == 0
    assert "--trainer.max_epochs" in outcome.out
    assert "--data" in outcome.out
    outcome = lightning("fit", "--data.help=BadNets")
    assert outcome.code == 0
    assert "poison_fraction" in outcome.out


# --- which value wins ------------------------------------------------------------------------------------------------


def test_configs_by_name_and_by_path(here: Path) -> None:
    (here / "mine.yaml").write_text((configs_folder() / "badnets_mnist.yaml").read_text().replace(
        "data/", f"{configs_folder()}/data/").replace("model/", f"{configs_folder()}/model/"))  # fmt: skip
    path = str(configs_folder() / "badnets_mnist.yaml")
    want = config_of("--config=badnets_mnist")
    for given in ("badnets_mnist.yaml", "configs/badnets_mnist.yaml", path, "mine.yaml"):
        assert config_of("--config", given) == want
        assert config_of(f"-c={given}") == want


def test_later_configs_and_options_win(here: Path) -> None:
    (here / "one.yaml").write_text(
        "trainer: {max_epochs: 3, max_steps: 30}\ndata: {init_args: {poison_fraction: 0.2}}\n"
    )
    (here / "two.yaml").write_text("trainer: {max_epochs: 4}\n")
    config = config_of(LINE, "--config=one.yaml", "--config=two.yaml")
    assert config["trainer"]["max_epochs"] == 4
    assert config["trainer"]["max_steps"] == 30
    assert config["data"]["init_args"]["poison_fraction"] == 0.2
    config = config_of(LINE, "--config=two.yaml", "--config=one.yaml", "--trainer.max_epochs=5", "--data.seed", "8")
    assert config["trainer"]["max_epochs"] == 5
    assert config["data"]["init_args"]["seed"] == 8


def test_defaults_lose_to_everything(here: Path) -> None:
    (here / "mine.yaml").write_text("seed_everything: 7\ntrainer: {use_distributed_sampler: true, logger: false}\n")
    config = config_of(LINE, "--config=mine.yaml")
    assert config["seed_everything"] == 7
    assert config["trainer"]["use_distributed_sampler"] is True
    assert config["trainer"]["logger"] is False
    assert config["trainer"]["num_sanity_val_steps"] == 0, "what was not mentioned stays"


def test_interpolation_takes_the_value_that_wins(here: Path) -> None:
    (here / "one.yaml").write_text(
        "seed_everything: 3\ndata: {init_args: {seed: '${seed_everything}', target_label: '${trainer.devices}'}}\n"
    )
    (here / "two.yaml").write_text("seed_everything: 5\n")
    one = (LINE, "--config=one.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1")
    assert config_of(*one)["data"]["init_args"]["seed"] == 3
    assert config_of(*one, "--config=two.yaml")["data"]["init_args"]["seed"] == 5
    config = config_of(*one, "--config=two.yaml", "--seed_everything=6")
    assert config["data"]["init_args"]["seed"] == 6
    assert config["data"]["init_args"]["target_label"] == 1


def test_datamodules_nest_on_the_command_line() -> None:
    config = config_of(
        "--data=LabelFlip", "--data.flip_fraction=0.3", "--data.base=BadNets", "--data.base.trigger=Square",
        "--data.base.trigger.size=2", "--data.base.base=Digits", "--data.base.base.batch_size=17", "--model=Victim",
        "--model.backbone=SmallCNN", "--model.backbone.widths=[4,8]", "--model.optimizer=Adam",
        "--model.optimizer.lr=0.1",
    )  # fmt: skip
    data = config["data"]
    assert data["class_path"] == "poisoning.label_flip.LabelFlip"
    assert data["init_args"]["flip_fraction"] == 0.3
    inner = data["init_args"]["base"]
    assert inner["class_path"] == "poisoning.badnets.BadNets"
    assert inner["init_args"]["trigger"] == {"class_path": "datamodules.triggers.Square"} | {
        "init_args": inner["init_args"]["trigger"]["init_args"]
    }
    assert inner["init_args"]["trigger"]["init_args"]["size"] == 2
    assert inner["init_args"]["base"]["init_args"]["batch_size"] == 17
    model = config["model"]["init_args"]
    assert model["backbone"]["init_args"]["widths"] == [4, 8]
    assert model["optimizer"]["init_args"]["lr"] == 0.1


def test_shipped_parts_by_name_on_the_command_line() -> None:
    config = config_of(LINE, "--data=data/mnist.yaml", "--model", "configs/model/badnets_cnn.yaml")
    assert config["data"]["class_path"] == "datamodules.sources.mnist.MNIST"
    assert config["model"]["init_args"]["backbone"]["class_path"].endswith("BadNetsCNN")


def test_shipped_parts_in_a_yaml_from_elsewhere(here: Path, tmp_path: Path) -> None:
    text = (configs_folder() / "badnets_digits.yaml").read_text()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "badnets_digits.yaml").write_text(text.replace("model/small", "configs/model/small"))
    want = config_of(LINE)
    assert config_of(f"--config={folder}/badnets_digits.yaml") == want
    content = yaml.safe_load(text)
    assert config_of("--config", json.dumps(content)) == want, "a dictionary names them too"

    (folder / "data").mkdir()  # what lies beside the YAML comes first, and names shipped parts in its turn
    (folder / "data/digits.yaml").write_text("class_path: LabelFlip\ninit_args: {base: data/digits_0_to_4.yaml}\n")
    base = config_of(f"--config={folder}/badnets_digits.yaml")["data"]["init_args"]["base"]
    assert base["class_path"].endswith("LabelFlip")
    assert base["init_args"]["base"]["init_args"]["classes"] == [0, 1, 2, 3, 4]
    (here / "data").mkdir()  # the working directory has no say in a YAML that lies elsewhere
    (here / "data/digits_0_to_4.yaml").write_text("class_path: MNIST\n")
    assert config_of(f"--config={folder}/badnets_digits.yaml")["data"]["init_args"]["base"] == base


def test_of_two_classes_of_one_name_ours_is_meant(here: Path) -> None:
    import torchvision.ops

    assert issubclass(torchvision.ops.MLP, torch.nn.Module)
    (here / "short.yaml").write_text("model: {init_args: {backbone: MLP}}\n")
    (here / "long.yaml").write_text("model: {init_args: {backbone: {class_path: MLP, init_args: {hidden: [7]}}}}\n")
    for given in (["--model.backbone=MLP"], ["--config=short.yaml"], ["--config=long.yaml"]):
        backbone = config_of(LINE, *given)["model"]["init_args"]["backbone"]
        assert backbone["class_path"] == "classifiers.backbones.MLP"
    assert backbone["init_args"]["hidden"] == [7]
    other = config_of(LINE, "--model.backbone=torch.nn.Flatten", command="validate")
    assert other["model"]["init_args"]["backbone"]["class_path"] == "torch.nn.Flatten"


def test_lists_grow(here: Path) -> None:
    (here / "more.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: EarlyStopping\n      init_args: {monitor: val/clean_accuracy}\n"
    )
    kinds = [
        each["class_path"].rsplit(".", 1)[-1] for each in config_of(LINE, "--config=more.yaml")["trainer"]["callbacks"]
    ]
    assert kinds == ["ModelCheckpoint", "EarlyStopping"]
    args = ("--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=epoch")
    callbacks = config_of(LINE, *args)["trainer"]["callbacks"]
    assert [each["class_path"].rsplit(".", 1)[-1] for each in callbacks] == ["ModelCheckpoint", "LearningRateMonitor"]
    assert callbacks[1]["init_args"]["logging_interval"] == "epoch"


@pytest.mark.parametrize("source", ["Digits", "MNIST", "CIFAR100", "GTSRB", "Npz", "ImageFolder"])
def test_what_the_data_know_is_not_typed_again(source: str, data_folder: Path) -> None:
    more = {
        "Npz": ["--data.path=images.npz"],
        "ImageFolder": ["--data.train=image_folder/train", "--data.test=image_folder/test"],
    }.get(source, [])
    line = start(
        ["fit", "--data", source, *more, "--model=Victim", "--model.backbone=classifiers.backbones.MLP"],
        act=False,
        keep=False,
    )
    data, model = line.datamodule, line.model
    assert isinstance(data, ImageDataModule)
    assert model.num_classes == data.num_classes
    assert model.image_shape == data.image_shape
    assert model.architecture.mean == data.mean
    assert model.architecture.std == data.std
    assert not {"num_classes", "image_shape", "mean", "std"} & set(yaml.safe_load(line.text)["model"]["init_args"])


# --- what a run is called, and where it goes -------------------------------------------------------------------------


def test_named_after_the_last_experiment(lightning: Command, here: Path) -> None:
    (here / "mine.yaml").write_text("trainer: {max_epochs: 1}\n")
    for configs, name in (
        ([LINE, "--config=debug/smoke"], "badnets_digits"),
        ([LINE, "--config=mine.yaml", "--config=trainer/cpu"], "mine"),
    ):
        assert lightning("fit", *configs, *ONE_EPOCH, f"--trainer.default_root_dir={name}s").code == 0
        assert only_run(f"{name}s").parent.name == name


def test_of_a_config_without_a_command_or_a_model(lightning: Command) -> None:
    complaint(lightning("fit"), "data", "model", "--config")
    complaint(lightning("fit", "--config=data/digits"), "there is no such key")
    complaint(lightning("fit", "--config"), "--config", "a value is missing")
    complaint(lightning("fit", "--data=Digits"), "model", "nothing is given")
    complaint(lightning("fti", LINE), "fti", "did you mean 'fit'?")
    complaint(lightning("--config=badnets_digits", "fit"), "there is no such command")


def test_ways_to_end(tmp_path: Path) -> None:
    """By Ctrl-C: 130, with Lightning's own way out in between."""
    with fork(["fit", LINE, *QUIET, "--trainer.max_epochs=1000"], tmp_path / "log") as process:
        run = first_checkpoint(process).parent.parent
        process.send(signal.SIGINT)
        assert process.wait() == 130, process.text
        assert "Traceback" not in process.text
        assert '"interrupted"' in (run / "status.json").read_text()
        assert ("go on with" in process.text) == any((run / "checkpoints").glob("*.ckpt"))


class Swallowed(Callback):
    """A Ctrl-C at a moment when Python drops exceptions, as in a destructor."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """In the third step."""
        if trainer.global_step == 2:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_a_swallowed_ctrl_c_ends_the_step(interruptible: None) -> None:
    assert main(["fit", LINE, *QUIET, f"--trainer.callbacks+={__name__}.Swallowed", "--trainer.max_steps=1000"]) == 130
    assert '"interrupted"' in (only_run() / "status.json").read_text()


# --- from Python -----------------------------------------------------------------------------------------------------


def test_run_gives_what_the_command_leaves() -> None:
    result = run(LINE.partition("=")[2], overrides=[option.removeprefix("--") for option in ONE_EPOCH])
    assert isinstance(result, Result)
    assert result.directory == only_run()
    assert result.measures["attack_success_rate"].n == 494
    assert result.accepted is False
    assert result.facts["poisoned"] == 113
    assert result.seconds > 0
    assert isinstance(result.model, ImageClassifier)


def test_run_takes_dictionaries() -> None:
    small = {"trainer": {"max_epochs": 1, "limit_train_batches": 2, "logger": False, "enable_progress_bar": False}}
    result = run("badnets_digits", small, {"data": {"init_args": {"target_label": 3}}}, overrides=["--data.seed=4"])
    assert result.datamodule.target_label == 3
    assert result.datamodule.seed == 4
    assert result.directory.parent.name == "badnets_digits"
    assert main(["test", LINE, *QUIET, "--trainer.logger=false"]) == 0, "another command in the same process"
