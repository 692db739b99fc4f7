"""The command's front: whatever its streams, its YAML and other people's code are like, it ends in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError
from experiments.documents import check_yaml
from experiments.foreign import blamed, check_nulls, out_of_memory
from tests.experiments.running import ONE_EPOCH, QUIET, Outcome, call, complaint, only_run, read_json

Command = Callable[..., Outcome]
LINE = ("--config=badnets_digits", "--trainer.logger=false", "--model.backbone.widths=[4,4]", *ONE_EPOCH)
ROOT = Path(__file__).resolve().parent.parent.parent


# --- streams ---------------------------------------------------------------------------------------------------------
def shell(words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command of the front in a shell: it imports next to nothing."""
    line = words.replace("lightning", f"{sys.executable} -m experiments")
    return subprocess.run(
        ["bash", "-c", line], check=False, cwd=ROOT, env={**os.environ, **environment}, capture_output=True
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_encoding_that_does_not_have_every_letter(encoding: str) -> None:
    found = shell("lightning list", PYTHONIOENCODING=encoding)
    assert (found.returncode, found.stderr) == (0, b"")
    assert b"badnets_digits" in found.stdout
    assert b"?" in found.stdout, "there are letters that it does not have"


def test_a_locale_without_unicode() -> None:
    found = shell("lightning list", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["list", "--help", "--version"])
def test_a_full_disk_behind_the_output(command: str) -> None:
    found = shell(f"lightning {command} > /dev/full")
    assert found.returncode == 2
    assert found.stderr.decode().splitlines() == [
        f"lightning {command}: what was to be printed cannot be: No space left on device"
    ]


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-", "| head -1"])
def test_closed_streams(redirected: str) -> None:
    for command in ("list", "--help"):
        found = shell(f"set -o pipefail; lightning {command} {redirected}")
        assert found.returncode in (0, 141), found
        assert found.stderr == b""


def test_a_list_of_what_has_some_words(capsys: pytest.CaptureFixture[str]) -> None:
    everything = call(capsys, ("list",)).out
    some = call(capsys, ("list", "BadNets", "digits"))
    assert some.code == 0
    lines = [line for line in some.out.splitlines() if line.startswith("  ")]
    assert 0 < len(lines) < 20
    assert all("badnets" in line.lower() and "digits" in line.lower() for line in lines)
    assert {line.split()[0] for line in lines} <= {line.split()[0] for line in everything.splitlines() if line.strip()}
    nothing = call(capsys, ("list", "xyzzy"))
    assert (nothing.code, nothing.out, len(nothing.err.splitlines())) == (2, "", 1)


# --- words -----------------------------------------------------------------------------------------------------------
WORDS = {
    "badnets_digits": "a config is named by an option: --config badnets_digits",
    "configs/badnets_digits.yaml": "a config is named by an option: --config",
    "badnet_digits": "by --config NAME – did you mean 'badnets_digits'?",
    "trainer.max_epochs=3": "an option begins with two dashes: --trainer.max_epochs=3",
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_is_no_option(word: str, lightning: Command) -> None:
    complaint(lightning("fit", word), word, WORDS[word])
    complaint(lightning("fit", "--config", "badnets_digits", word), word, WORDS[word])


def test_a_part_is_no_config(lightning: Command) -> None:
    complaint(lightning("fit", "--config", "model/small_cnn.yaml"), "--model=model/small_cnn.yaml")
    complaint(lightning("fit", "--config", "data/digits"), "--data=data/digits.yaml")


# --- YAML ------------------------------------------------------------------------------------------------------------
YAML = {
    "twice": ("trainer:\n  max_epochs: 1\n  max_epochs: 2\n", "line 3: the key 'max_epochs' is given twice"),
    "twice, far apart": ("seed_everything: 1\ntrainer: {}\nseed_everything: 2\n", "here and in line 1"),
    "in a circle": ("data: &a\n  base: *a\n", "line 1: an alias that holds itself"),
    "in a circle of lists": ("data: &a [1, *a]\n", "an alias that holds itself"),
    "a bomb": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{y}: &{y} [{','.join(10 * [f'*{x}'])}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
        "unfold to more than 100,000 values",
    ),
    "deep": ("a: " + 5000 * "[" + 5000 * "]", "too deep"),
    "binary": ("a: \x00", "cannot be read as YAML"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_does_not_say_what_it_seems_to(case: str, lightning: Command, tmp_path: Path) -> None:
    text, words = YAML[case]
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    complaint(lightning("fit", "--config=badnets_digits", "--config", str(tmp_path / "x.yaml")), "x.yaml", words)
    complaint(lightning("study", "--config", str(tmp_path / "x.yaml")), "x.yaml")


def test_a_part_of_a_config_is_read_as_strictly(lightning: Command, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("class_path: Digits\ninit_args:\n  batch_size: 8\n  batch_size: 9\n")
    (tmp_path / "whole.yaml").write_text("data: part.yaml\nmodel: model/small_cnn.yaml\n")
    complaint(lightning("fit", "--config", str(tmp_path / "whole.yaml")), "part.yaml", "line 4", "'batch_size'")
    complaint(lightning("fit", *LINE, "--data.trigger={class_path: Square, class_path: Patch}"), "'class_path'")


def test_what_yaml_may_do() -> None:
    for text in (
        "",
        "a: 1\nb: {a: 1}\n",
        "a: &x {b: 1}\nc: *x\nd: *x\n",
        "a: &x {b: 1}\nc: {<<: *x, b: 2}\n",
        "1: a\n'1': b\n",
    ):
        check_yaml(text)


# --- what is not ours ------------------------------------------------------------------------------------------------
NULLS = {
    "--model.label_smoothing=null": ("model.label_smoothing = None", "a value is needed (float)", "0.0"),
    "--data.base.batch_size=null": ("data.base.batch_size = 'None'", "a whole number"),
    "--data.trigger.size=null": ("data.trigger",),
}


@pytest.mark.parametrize("option", NULLS)
def test_null_where_a_value_is_needed(option: str, lightning: Command) -> None:
    complaint(lightning("fit", *LINE, option), *NULLS[option])


def test_null_where_it_means_something() -> None:
    data = {"class_path": "datamodules.sources.digits.Digits", "init_args": Namespace(augment=None, batch_size=8)}
    check_nulls(Namespace(**data), "data")
    check_nulls(None, "data")
    data["init_args"] = Namespace(batch_size=None)
    with pytest.raises(InputError, match=r"data\.batch_size = None"):
        check_nulls(Namespace(**data), "data")
    check_nulls(Namespace(**data), "data", ["batch_size"])


OPTIMIZERS = ("--model.optimizer=Adam", "--model.optimizer.lr=0.1")


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_what_an_optimizer_refuses_in_its_first_step(option: str, lightning: Command) -> None:
    outcome = lightning("fit", *LINE, *OPTIMIZERS, f"--model.optimizer.{option}=true")
    assert outcome.code == 2
    assert "lightning fit: model.optimizer: " in outcome.err
    assert "Traceback" not in outcome.err
    assert read_json(only_run() / "status.json")["status"] == "failed"


def test_an_error_of_ours_is_blamed_on_nobody() -> None:
    with pytest.raises(InputError) as caught:
        check_yaml("a: 1\na: 2\n")
    assert blamed(caught.value) is None
    try:
        torch.optim.SGD([torch.zeros(1)], lr=-1)
    except ValueError as error:
        found = blamed(error)
    assert str(found).startswith("model.optimizer: Invalid learning rate")


OUT = {
    "torch on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12800 bytes."),
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
    "Python": MemoryError(),
}  # fmt: skip


@pytest.mark.parametrize("who", OUT)
def test_out_of_memory_names_the_batch_size(who: str, lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OUT[who]

    monkeypatch.setattr(ImageClassifier, "loss", fail)
    outcome = lightning("fit", *LINE, "--data.base.batch_size=48")
    assert outcome.code == 2, outcome
    assert "lightning fit: out of memory" in outcome.err
    assert "lower batch_size (now 48) or eval_batch_size (now 512)" in outcome.err
    assert "Traceback" not in outcome.err
    assert read_json(only_run() / "status.json")["status"] == "failed"


def test_other_errors_are_not_out_of_memory() -> None:
    assert out_of_memory(RuntimeError("size mismatch")) is None
    assert out_of_memory(ValueError("out of memory")) is None


def test_what_nobody_foresaw_is_one_line(lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by\nnought")

    monkeypatch.setattr(ImageClassifier, "loss", fail)
    outcome = lightning("fit", *LINE)
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith("lightning fit: ZeroDivisionError: by nought (in fail, ")
    assert "PHARMAKON_TRACEBACK=1" in last
    monkeypatch.setenv("PHARMAKON_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        lightning("fit", *LINE)


def test_an_error_of_the_system_names_its_file(
    lightning: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error", "/a/file")

    monkeypatch.setattr(ImageClassifier, "loss", fail)
    outcome = lightning("fit", *LINE, *QUIET)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == "lightning fit: /a/file: Input/output error"
