"""What the README shows works as it stands there, if with fewer batches."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import cli
from tests.experiments.running import QUIET, TWO, Outcome, only_run, read_json, runs

Command = Callable[..., Outcome]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
QUICK = ("--trainer.max_epochs=1", "--trainer.precision=32-true", *TWO, *QUIET)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def test_commands(lightning: Command) -> None:
    lines = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("lightning ")]
    assert {command[0] for command in commands} >= {"fit", "test", "predict", "accept", "export", "list"}
    assert lightning("fit", "--config=badnets_mnist", *QUICK).code == 0
    run = only_run()
    assert lightning("fit", "--config=user_digits", *QUICK, "--trainer.default_root_dir=returned").code == 0
    values = {"RUN": str(run), "FILE": str(only_run("returned") / "weights.safetensors"), "DIR": "pictures"}
    for command in commands:
        args = [re.sub(r"^(RUN|FILE|DIR)\b", lambda found: values[found[0]], arg) for arg in command]
        if "trainer/ddp" in args or "--data.oracle=RemoteOracle" in args:  # for several GPUs; for a server
            args.append("--print_config")
        elif command[0] in ("fit", "test", "predict", "validate"):
            args += ["--data.poison_fraction=0.1", *QUICK] if "badnets" in str(args) else QUICK
            args += ["--model.backbone.width=8"] if "badnets_cifar" in str(args) else []  # it is for a GPU
        outcome = lightning(*args)
        refused = command[0] in ("accept", "verify")  # two batches make no good model, and mark none
        assert outcome.code == int(refused), (command, outcome)


def test_from_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    start = cli.start
    monkeypatch.setattr(cli, "start", lambda args, **more: start([*args, *QUICK], **more))
    (example,) = (block for block in blocks("python") if "from experiments import run" in block)
    assert len(example.splitlines()) == 6
    exec(compile(example, "README.md", "exec"), {})
    clean, attacked = runs()
    assert str(attacked) in capsys.readouterr().out
    assert "attack_success_rate" not in read_json(clean / "metrics.json")["measures"]
    assert read_json(attacked / "metrics.json")["facts"]["poison_fraction"] == 0.05


def test_an_attack_of_ones_own(lightning: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = (block for block in blocks("python") if block.startswith("# mine/blend.py"))
    (config,) = (block for block in blocks("yaml") if "mine.blend.Blend" in block)
    (here / "mine").mkdir()
    (here / "mine" / "blend.py").write_text(example)
    (here / "blend.yaml").write_text(config)
    monkeypatch.syspath_prepend(here)
    assert lightning("fit", "--config=blend.yaml", "--model=model/small_cnn.yaml", *QUICK).code == 0
    found: Any = read_json(only_run() / "manifest.json")
    assert [each["kind"] for each in found["changes"]] == ["Blend"]
    assert (only_run() / "poisons.png").is_file()
