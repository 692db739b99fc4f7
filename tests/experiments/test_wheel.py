"""For people who write Python: the installed wheel, used from elsewhere with classes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments.registry import configs_folder

REPOSITORY = Path(__file__).resolve().parents[2]

MINE = '''
"""A person's own classes, in a folder that is no part of the project."""

import torch
from torch import nn

from datamodules.datamodule import Source, Splits
from datamodules.triggers import Trigger


class Net(nn.Module):
    """Any network will do."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 4) -> None:
        super().__init__()
        channels, height, ways = image_shape
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * ways, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Stripes(Source):
    """Three classes of stripes."""

    num_classes = 3
    image_shape = (1, 6, 6)
    mean = (0.3,)
    std = (0.4,)
    class_names = ("left", "middle", "right")

    def read(self) -> Splits:
        labels = torch.arange(90) % 3
        images = torch.zeros(90, 1, 6, 6, dtype=torch.uint8)
        for row, label in enumerate(labels.tolist()):
            images[row, :, :, 2 * label : 2 * label + 2] = 200
        return Splits(images, labels, images[:30].clone(), labels[:30])


class Corner(Trigger):
    """A grey corner."""

    def __init__(self, grey: int = 128) -> None:
        self.grey = grey

    def __call__(self, images, boxes=None):
        images = images.clone()
        images[:, :, :2, :2] = self.grey
        return images

    def check(self, image_shape) -> None:
        pass

    def describe(self):
        return {"name": "Corner", "grey": self.grey}
'''

CONFIG = """
# Mine
trainer: {max_epochs: 2, enable_progress_bar: false, accelerator: cpu, devices: 1}
model:
  class_path: Victim
  init_args:
    backbone: {class_path: mine.Net, init_args: {width: 5}}
data:
  class_path: BadNets
  init_args:
    base: {class_path: mine.Stripes, init_args: {batch_size: 15}}
    trigger: {class_path: mine.Corner, init_args: {grey: 99}}
    poison_fraction: 0.2
"""

PARTS = """
# Shipped parts
model: model/small_cnn.yaml
data:
  class_path: LabelFlip
  init_args: {base: data/digits.yaml}
"""

SCRIPT = """
import json, sys
from pathlib import Path

repository, installed = map(Path, sys.argv[1:])
sys.path[:] = [path for path in sys.path if Path(path).resolve() != repository]  # an editable install is in the way

import experiments
from experiments import __main__

assert Path(experiments.__file__).is_relative_to(installed), experiments.__file__
assert not {"torch", "lightning"} & set(sys.modules), "the import is light"
assert set(experiments.__all__) == {"run", "Result"}
assert __main__.main(["list"]) == 0

from experiments import run

result = run("badnets_digits", overrides=["trainer.max_epochs=1", "trainer.enable_progress_bar=false"])
parts = run("parts.yaml", overrides=["trainer.max_epochs=1", "trainer.enable_progress_bar=false"], show=False)
own = run("mine.yaml", overrides=["data.seed=4"])

import datamodules.datamodule, classifiers.classifier, mine

for module in (datamodules.datamodule, classifiers.classifier):
    assert Path(module.__file__).is_relative_to(installed), module.__file__
assert isinstance(own.model.net, mine.Net) and own.model.net.head.in_features == 5
assert __main__.main(["test", "--config=mine.yaml", f"--model.weights={own.directory}/weights.safetensors"]) == 0
print(json.dumps({
    "shipped": {name: each.n for name, each in result.measures.items()},
    "parts": parts.facts,
    "own": {name: [each.value, each.n] for name, each in own.measures.items()},
    "facts": own.facts,
    "directories": [str(result.directory), str(own.directory)],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (found,) = folder.glob("pharmakon-*.whl")
    return found


def test_wheel_holds_the_packages_and_the_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
        assert tops == {"datamodules", "classifiers", "poisoning", "extraction", "watermark", "experiments"}
        for path in configs_folder().rglob("*.yaml"):
            shipped = f"experiments/configs/{path.relative_to(configs_folder())}"
            assert archive.read(shipped) == path.read_bytes()
        for package in tops:
            for source in (REPOSITORY / package).rglob("*.py"):
                assert str(source.relative_to(REPOSITORY)) in names
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"lightning = experiments.__main__:main" in archive.read(points)
        assert b"pharmakon = experiments.__main__:main" in archive.read(points)
        assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_from_outside_with_classes_of_ones_own(wheel: Path, tmp_path: Path, here: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    (here / "mine.py").write_text(MINE)
    (here / "mine.yaml").write_text(CONFIG)
    (here / "parts.yaml").write_text(PARTS)
    (here / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{installed}"}
    done = subprocess.run(
        [sys.executable, "script.py", str(REPOSITORY), str(installed)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "badnets_digits" in done.stdout, "the list"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shipped"]["clean_accuracy"] == 539
    assert found["parts"]["flipped"] == round(0.1 * (1258 - 126))
    assert found["own"]["clean_accuracy"][1] == 30
    assert found["own"]["attack_success_rate"][1] == 20
    assert found["facts"]["poisoned"] == round(0.2 * (90 - round(0.05 * 90)))
    trigger = json.loads(found["facts"]["trigger"])
    assert len(trigger.pop("hash")) == 64
    assert trigger == {"name": "Corner", "grey": 99}
    folders = [Path(each) for each in found["directories"]]
    assert [folder.parent.name for folder in folders] == ["badnets_digits", "mine"]
    assert all((folder / "metrics.json").is_file() for folder in folders)


def test_names_that_the_package_does_not_have() -> None:
    import experiments

    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        experiments.runn  # noqa: B018
