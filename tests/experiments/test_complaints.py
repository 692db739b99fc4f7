"""What a person gets wrong is told in one line that names the key and the remedy, at every level of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.cli import start
from tests.experiments.running import ONE_EPOCH, Outcome, complaint, fork, runs

Command = Callable[..., Outcome]
LINE = "--config=badnets_digits"

MISSPELT = {
    "at the top": ("sed_everything: 3", "--sed_everything=3", "sed_everything", "'seed_everything'"),
    "a section": ("trainr: {max_epochs: 3}", "--trainr.max_epochs=3", "trainr.max_epochs", "'trainer.max_epochs'"),
    "trainer": ("trainer: {max_epoch: 3}", "--trainer.max_epoch=3", "trainer.max_epoch", "'trainer.max_epochs'"),
    "data": (
        "data: {init_args: {poison_fractoin: 0.1}}",
        "--data.poison_fractoin=0.1",
        "data.poison_fractoin",
        "'poison_fraction'",
    ),
    "data, in full": (
        "data: {init_args: {target_lable: 1}}",
        "--data.init_args.target_lable=1",
        "data.target_lable",
        "'target_label'",
    ),
    "base": (
        "data: {init_args: {base: {init_args: {btch_size: 3}}}}",
        "--data.base.btch_size=3",
        "data.base.btch_size",
        "'batch_size'",
    ),
    "trigger": (
        "data: {init_args: {trigger: {class_path: Square, init_args: {sze: 3}}}}",
        "--data.trigger=Square --data.trigger.sze=3",
        "data.trigger.sze",
        "'size'",
    ),
    "augmentation": (
        "data: {init_args: {base: {init_args: {augment: {class_path: FlipCrop, init_args: {paddng: 3}}}}}}",
        "--data.base.augment=FlipCrop --data.base.augment.paddng=3",
        "data.base.augment.paddng",
        "'padding'",
    ),
    "model": ("model: {init_args: {acceptanc: 0.9}}", "--model.acceptanc=0.9", "model.acceptanc", "'acceptance'"),
    "backbone": (
        "model: {init_args: {backbone: {init_args: {widhts: [8]}}}}",
        "--model.backbone.widhts=[8]",
        "model.backbone.widhts",
        "'widths'",
    ),
    "optimizer": (
        "model: {init_args: {optimizer: {init_args: {weight_deca: 0}}}}",
        "--model.optimizer.weight_deca=0",
        "model.optimizer.weight_deca",
        "'weight_decay'",
    ),
    "schedule": (
        "model: {init_args: {schedule: {init_args: {peek: 0.1}}}}",
        "--model.schedule.peek=0.1",
        "model.schedule.peek",
        "'peak'",
    ),
    "logger": (
        "trainer: {logger: {class_path: CSVLogger, init_args: {savedir: x}}}",
        "--trainer.logger=CSVLogger --trainer.logger.savedir=x",
        "trainer.logger.savedir",
        "'save_dir'",
    ),
    "a list of loggers": (
        "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: x, nme: y}}]}",
        "--trainer.logger=CSVLogger --trainer.logger.nme=x",
        "trainer.logger.nme",
        "'name'",
    ),
    "callback": (
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitr: x}}]}",
        "--trainer.callbacks.monitr=x",
        "trainer.callbacks.monitr",
        "'monitor'",
    ),
    "class_path": ("data: {class_pth: MNIST}", None, "data.class_pth", "'class_path'"),
    "init_args": ("data: {init_arg: {seed: 1}}", None, "data.init_arg", "'init_args'"),
    "class of data": ("data: BadNet", "--data=BadNet", "data = 'BadNet'", "'BadNets'"),
    "class of base": (
        "data: {init_args: {base: {class_path: CIFAR11}}}",
        "--data.base=CIFAR11",
        "data.base = 'CIFAR11'",
        "'CIFAR10",
    ),
    "class of trigger": (
        "data: {init_args: {trigger: {class_path: SinglePixl}}}",
        "--data.trigger=SinglePixl",
        "data.trigger = 'SinglePixl'",
        "'SinglePixel'",
    ),
    "class of model": ("model: {class_path: Victm}", "--model=Victm", "model = 'Victm'", "'Victim'"),
    "class of backbone": (
        "model: {init_args: {backbone: {class_path: ResNet10}}}",
        "--model.backbone=ResNet10",
        "model.backbone = 'ResNet10'",
        "'ResNet18'",
    ),
    "class of optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdmW}}}",
        "--model.optimizer=AdmW",
        "model.optimizer = ",
        "'AdamW'",
    ),
    "class of schedule": (
        "model: {init_args: {schedule: {class_path: OnCycle}}}",
        "--model.schedule=OnCycle",
        "model.schedule = 'OnCycle'",
        "'OneCycle'",
    ),
    "class of callback": (
        "trainer: {callbacks+: [{class_path: EarlyStoping}]}",
        "--trainer.callbacks+=EarlyStoping",
        "trainer.callbacks = 'EarlyStoping'",
        "'EarlyStopping'",
    ),
    "class with a path": (
        "data: {class_path: poisoning.badnets.BadNts}",
        "--data=poisoning.badnets.BadNts",
        "data = 'poisoning.badnets.BadNts'",
        "'BadNets'",
    ),
}
"""Level → in YAML, as options, the key as it must be named, the suggestion."""


@pytest.mark.parametrize("level", MISSPELT)
def test_misspelt_in_yaml(level: str, lightning: Command, here: Path) -> None:
    text, _, named, suggested = MISSPELT[level]
    (here / "mine.yaml").write_text(text)
    complaint(lightning("fit", LINE, "--config=mine.yaml"), named, f"did you mean {suggested}")
    assert not runs(), "no folder stays of a run that never began"


@pytest.mark.parametrize("level", [level for level, row in MISSPELT.items() if row[1]])
def test_misspelt_as_an_option(level: str, lightning: Command) -> None:
    _, options, named, suggested = MISSPELT[level]
    assert options is not None
    complaint(lightning("fit", LINE, *options.split()), named, f"did you mean {suggested}")
    key, _, value = options.split()[-1].partition("=")
    if not key.endswith("+"):  # Lightning knows `--key+=value` alone
        complaint(lightning("fit", LINE, *options.split()[:-1], key, value), named, f"did you mean {suggested}")


def test_misspelt_for_every_command(lightning: Command) -> None:
    for command in ("validate", "test", "predict"):
        assert complaint(lightning(command, LINE, "--data.sed=1"), "data.sed", "'seed'").startswith(
            f"lightning {command}"
        )
    complaint(lightning("export", LINE, "--out=x", "--data.sed=1"), "lightning export: data.sed", "'seed'")
    complaint(lightning("accept", LINE, "--weights=x", "--data.sed=1"), "lightning accept: data.sed", "'seed'")


VALUES = {
    "--data.target_label=10": ("target_label = 10", "10 classes", "0 to 9"),
    "--data.target_label=-1": ("target_label = -1", "0 to 9"),
    "--data.source_label=10": ("source_label = 10", "0 to 9"),
    "--data.source_label=0": ("source_label = 0", "is the target_label", "another class"),
    "--data.poison_fraction=-0.1": ("poison_fraction = -0.1", "(0, 1]"),
    "--data.poison_fraction=1.5": ("poison_fraction = 1.5", "(0, 1]"),
    "--data.poison_fraction=.nan": ("poison_fraction = nan", "(0, 1]"),
    "--data.poison_fraction=1e-5": ("poison_fraction = 1e-05", "no sample", "0.00045"),
    "--data.poison_fraction=0.95": ("poison_fraction = 0.95", "largest"),
    "--data.trigger=Square --data.trigger.size=9": ("trigger", "9×9", "8×8", "smaller"),
    "--data.trigger=YellowSquare": ("trigger", "3 channels", "1"),
    "--data.trigger=Pixels --data.trigger.positions=[[-2,-2]] --data.trigger.value=[1,2,3]": ("3 channels", "1"),
    "--data.trigger=Pixels --data.trigger.positions=[[-9,-2]]": ("trigger", "8×8", "move"),
    "--data.base.batch_size=0": ("batch_size = 0", "1 sample"),
    "--data.base.val_fraction=1": ("val_fraction = 1", "[0, 1)"),
    "--model.acceptance=98": ("acceptance = 98", "(0, 1]"),
    "--model.label_smoothing=1": ("label_smoothing = 1", "[0, 1)"),
    "--model.ema=1": ("ema = 1", "(0, 1)"),
    "--model.weights=nosuch.safetensors": ("weights = 'nosuch.safetensors'", "no such file", "lightning fit"),
    "--trainer.max_epochs=abc": ("trainer.max_epochs = 'abc'", "a whole number"),
    "--trainer.max_epochs=1.5": ("trainer.max_epochs = '1.5'", "a whole number"),
    "--trainer.precision=float": ("trainer.precision = 'float'", "bf16-mixed"),
    "--trainer.limit_train_batches=abc": ("trainer.limit_train_batches = 'abc'", "a number"),
    "--trainer.callbacks=5": ("trainer.callbacks", "expected a list"),
    "--trainer.devices=three": ("trainer:", "devices", "int"),
    "--trainer.accelerator=abacus": ("trainer:", "abacus"),
    "--trainer.strategy=dpp": ("trainer:", "dpp"),
    "--data.poison_fraction=much": ("data.poison_fraction = 'much'", "a number"),
    "--data.target_label=[1]": ("data.target_label = '[1]'", "a whole number"),
    "--data.mode=ad": ("data.mode = 'ad'", "add or replace", "did you mean 'add'?"),
    "--data.placement=befor": ("data.placement = 'befor'", "did you mean 'before'?"),
    "--data.base=5": ("data.base = '5'", "no such class"),
    "--model.backbone.widths=8": ("model.backbone.widths = '8'", "a list"),
    "--model.backbone.widths=[a]": ("model.backbone.widths", "'a'", "a whole number"),
    "--model.optimizer.lr=fast": ("model.optimizer.lr = 'fast'", "a number"),
    "--model.optimizer.lr=-1": ("optimizer.lr = -1.0", "Invalid learning rate", "another value"),
    "--model.optimizer.lr=.nan": ("optimizer.lr = nan", "Invalid learning rate", "another value"),
    "--model.optimizer.weight_decay=-1": ("optimizer.weight_decay = -1.0", "another value"),
    "--model.optimizer.betas=[0.9,2]": ("optimizer.betas = (0.9, 2.0)", "another value"),
    "--model.optimizer=SGD --model.optimizer.momentum=-1": ("optimizer.momentum = -1.0", "another value"),
    "--model.optimizer.fused=true --model.optimizer.foreach=true": ("optimizer = AdamW(foreach=True, fused=True)",),
    "--model.schedule.peak=2": ("peak = 2.0", "[0, 1)"),
    "--model.schedule=Steps --model.schedule.milestones=[30,60]": ("milestones = [30.0, 60.0]", "(0, 1)"),
    "--model.schedule=StepLR": ("schedule = StepLR", "needs step_size", "OneCycle"),
    "--model.schedule=OneCycleLR": ("schedule = OneCycleLR", "needs max_lr"),
    "--model.channels_last=perhaps": ("model.channels_last = 'perhaps'", "true or false"),
    "--seed_everything=abc": ("seed_everything = 'abc'", "a whole number"),
    "--seed_everything=false": ("seed_everything = False", "give a number"),
    "--model.backbone=Linear": (
        "model.backbone = 'Linear'",
        "several classes have that name",
        "torch.nn.Linear or",
    ),
    "--data=nosuch.module.Data": ("data: there is no module nosuch", "PYTHONPATH"),
    "--data=data/nosuch.yaml": ("data = 'data/nosuch.yaml'", "no such file"),
    "--data.base=data/digitz.yaml": ("data.base = 'data/digitz.yaml'", "did you mean 'data/digits.yaml'?"),
    "--trainer=nosuch.yaml": ("trainer = 'nosuch.yaml'", "no such file", "--config"),
    "--model.optimizer=null": ("optimizer = None", "cannot be null"),
    "--seed_everything=-5": ("seed_everything = -5", "from 0 to 2³² − 1"),
    "--seed_everything=4294967296": ("seed_everything = 4294967296", "from 0 to 2³² − 1"),
    "--trainer.accumulate_grad_batches=0": ("trainer.accumulate_grad_batches = 0", "1 or more"),
    "--trainer.check_val_every_n_epoch=0": ("trainer.check_val_every_n_epoch = 0", "1 or more"),
    "--trainer.gradient_clip_val=-1": ("trainer.gradient_clip_val = -1", "0 or more"),
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/nosuch": ("val/nosuch", "val/clean_accuracy"),
    "--model.honest=nosuch": ("honest: weights = 'nosuch'", "no such file"),
    "--trainer.val_check_interval=10000": ("trainer: `val_check_interval` (10000)", "less than or equal"),
    "--data.base.val_fraction=0.9999": ("val_fraction = 0.9999", "all of the 1258 images"),
    "--model.backbone=torch.nn.Flatten": ("backbone = 'Flatten'", "no parameters"),
    "--trainer.logger.savedir=x": ("trainer.logger.savedir", "'save_dir'"),
    "--trainer.logger=false --trainer.logger.savedir=x": ("trainer.logger.savedir", "which one?"),
    "--trainer.nonsense=1": ("--trainer.nonsense", "no such option"),
    "nonsense": ("nonsense", "no such option"),
    "--data.seed=${seed_everything}": ("data.seed", "YAML only"),
    "--config=nosuch": ("config = 'nosuch'", "no such file", "lightning list"),
    "--config=badnets_digit": ("config = 'badnets_digit'", "did you mean 'badnets_digits'?"),
    "--resume=nosuch": ("resume = 'nosuch'", "config.yaml"),
    "--trainer.default_root_dir=/proc/nowhere": ("trainer.default_root_dir = '/proc/nowhere'", "choose another"),
}
"""Options → what the line must say: the field, the value, the remedy."""


@pytest.mark.parametrize("options", VALUES)
def test_bad_value(options: str, lightning: Command) -> None:
    complaint(lightning("fit", LINE, *ONE_EPOCH, *options.split()), *VALUES[options])
    for run in runs():  # of values that only the data show to be bad
        assert not (run / "metrics.json").exists()
        assert "failed" in (run / "status.json").read_text()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "pathlib.Path"])
@pytest.mark.parametrize(
    "key",
    ["data", "data.base", "data.trigger", "model", "model.backbone", "model.optimizer", "model.schedule",
     "trainer.logger", "trainer.callbacks"],
)  # fmt: skip
def test_classes_of_other_kinds_are_not_called(key: str, name: str, lightning: Command, here: Path) -> None:
    spec = f"{{class_path: {name}, init_args: {{}}}}"
    for part in reversed(key.replace("data.", "data.init_args.").replace("model.", "model.init_args.").split(".")):
        spec = f"{{{part}: {spec}}}"
    (here / "mine.yaml").write_text(spec)
    complaint(lightning("fit", LINE, "--config=mine.yaml"), key)
    complaint(lightning("fit", LINE, f"--{key}={name}"), key, name)


@pytest.mark.parametrize("key", ["backbone", "optimizer", "schedule"])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("os.system", "command: touch ran"),
        ("subprocess.getoutput", "cmd: touch ran"),
        ("yaml.unsafe_load", "stream: '!!python/object/apply:os.system [touch ran]'"),
    ],
)
def test_functions_are_not_called(key: str, name: str, given: str, lightning: Command, here: Path) -> None:
    (here / "mine.yaml").write_text(
        f"model: {{init_args: {{{key}: {{class_path: {name}, init_args: {{{given}}}}}}}}}\n"
    )
    complaint(lightning("fit", LINE, "--config=mine.yaml"), f"model.{key} = '{name}'", "is no class")
    assert not (here / "ran").exists()


def test_os_system_with_arguments_runs_nothing(lightning: Command, here: Path) -> None:
    (here / "mine.yaml").write_text("data: {class_path: os.system, init_args: {command: touch ran}}\n")
    complaint(lightning("fit", LINE, "--config=mine.yaml"), "data")
    (here / "mine.yaml").write_text(
        "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch ran}}]}\n"
    )
    complaint(lightning("fit", LINE, "--config=mine.yaml"), "trainer.callbacks", "os.system")
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: [\n  max", ("mine.yaml", "YAML", "line 2")),
        ("- a\n- b\n", ("mine.yaml", "keys are expected")),
        ("", ("mine.yaml", "keys are expected")),
        ("just words", ("mine.yaml", "keys are expected")),
        ("trainer: 5\n", ("trainer = 5", "keys are expected")),
        ("data: 5\n", ("data = '5'", "ImageDataModule")),
        ("data: {init_args: {seed: '${seed_evrything}'}}\n", ("data.init_args.seed", "seed_evrything")),
        ("data: {init_args: {base: data/nosuch.yaml}}\n", ("data.base = 'data/nosuch.yaml'", "no such file")),
        ("data: {class_path: BadNets, init_args: {base: Digits}}\nmodel: null\n", ("model", "nothing is given")),
    ],
)
def test_bad_yaml(text: str, words: tuple[str, ...], lightning: Command, here: Path) -> None:
    (here / "mine.yaml").write_text(text)
    complaint(lightning("fit", LINE, "--config=mine.yaml"), *words)


def test_missing_argument_is_named(lightning: Command) -> None:
    complaint(
        lightning("fit", "--data=BadNets", "--data.base=Digits", "--model=model/small_cnn.yaml"), "data", "trigger"
    )


def test_nothing_else_reaches_the_screen(tmp_path: Path) -> None:
    """The real output of a process: one line, whether the parser, a constructor or the data find the fault."""
    for number, fault in enumerate(["--data.sed=1", "--data.target_label=10"]):
        with fork(["fit", LINE, fault], tmp_path / f"log{number}") as process:
            assert process.wait() == 2
        assert len(process.text.splitlines()) == 1, process.text


def test_earlier_runs_stay_as_they_are(lightning: Command) -> None:
    assert lightning("fit", LINE, *ONE_EPOCH).code == 0
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    complaint(lightning("fit", LINE, *ONE_EPOCH, "--data.sed=1"), "data.sed")
    complaint(lightning("fit", LINE, *ONE_EPOCH, "--data.target_label=10"), "target_label")
    changed = {path for path in Path().rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert not changed


def test_errors_of_other_people_are_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in a class is a traceback, not a remark about the configuration."""
    (here / "theirs.py").write_text(
        "from datamodules.sources.digits import Digits\n"
        "class Broken(Digits):\n"
        "    '''Fails.'''\n"
        "    def __init__(self) -> None:\n"
        "        super().__init__()\n"
        "        raise ZeroDivisionError('a bug')\n"
    )
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        start(["fit", LINE, "--data=theirs.Broken"], act=False, keep=False)
