"""What a config takes from the environment: used, and never written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments.cli import run
from experiments.environment import redact
from tests.experiments.running import ONE_EPOCH, Outcome, complaint, only_run, weights_hash
from tests.helpers import refused

Command = Callable[..., Outcome]
SECRET = "correct horse \\ \"battery\" 'ü'"
CONFIG = """
data:
  init_args:
    poison_fraction: ${oc.decode:${oc.env:SHARE}}
trainer:
  logger:
  - class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: '{run}', name: csv, version: one, prefix: 'of ${oc.env:TOKEN}'}
  - class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: '{run}'
      name: csv
      version: ${oc.env:NONE,two}
      prefix: ${trainer.logger[0].init_args.prefix}
"""
WRITTEN = {
    ("data", "init_args", "poison_fraction"): "${oc.decode:${oc.env:SHARE}}",
    ("trainer", "logger", 0, "init_args", "prefix"): "of ${oc.env:TOKEN}",
    ("trainer", "logger", 1, "init_args", "version"): "${oc.env:NONE,two}",
}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("SHARE", "0.31415926")
    Path("secret.yaml").write_text(CONFIG, encoding="utf-8")
    return "secret.yaml"


def holders(folder: Path) -> list[Path]:
    """The files in which the secret stands, as it is or as JSON or YAML write it."""
    forms = [SECRET, json.dumps(SECRET)[1:-1], json.dumps(SECRET, ensure_ascii=False)[1:-1], "correct horse"]
    return [p for p in folder.rglob("*") if p.is_file() and any(form.encode() in p.read_bytes() for form in forms)]


def test_a_run_writes_none_of_it_and_can_be_gone_on_with(
    config: str, lightning: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = lightning("fit", "--config=badnets_digits", f"--config={config}", *ONE_EPOCH)
    assert outcome.code == 0, outcome.err
    folder = only_run()
    tables = list(folder.rglob("metrics.csv"))
    assert holders(folder) == tables, "who calls the columns of a table by a secret has asked for it"
    assert "correct horse" not in outcome.out + outcome.err
    written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for place, raw in WRITTEN.items():
        found = written
        for step in place:
            found = found[step]
        assert found == raw
    assert "${" in written["trainer"]["logger"][1]["init_args"]["prefix"]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert yaml.safe_load(manifest["config"]) == written
    assert len(manifest["changes"][0]["ids"]) == round(0.31415926 * 1132)
    before = weights_hash(folder)
    assert lightning("fit", "--resume", str(folder)).code == 0
    assert weights_hash(folder) == before
    assert holders(folder) == tables
    monkeypatch.delenv("TOKEN")
    complaint(lightning("fit", "--resume", str(folder)), "oc.env:TOKEN", "no such variable", "set it")


def test_the_printed_config_has_none_of_it(config: str, lightning: Command) -> None:
    outcome = lightning("fit", "--config=badnets_digits", f"--config={config}", "--print_config")
    assert outcome.code == 0
    assert "correct horse" not in outcome.out
    assert yaml.safe_load(outcome.out)["trainer"]["logger"][0]["init_args"]["prefix"] == "of ${oc.env:TOKEN}"
    plain = lightning("fit", "--config=badnets_digits", "--print_config").out
    assert "oc.env" not in plain, "nothing stays of the config before"


@pytest.mark.parametrize(
    "key", ["data.init_args.target_label", "trainer.accumulate_grad_batches", "data.init_args.base.class_path"]
)
def test_a_complaint_has_none_of_it(key: str, config: str, lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2hunter2")
    top, *rest = key.split(".")
    inner = "${oc.env:TOKEN}"
    for step in reversed(rest):
        inner = {step: inner}  # type: ignore[assignment]
    Path("wrong.yaml").write_text(yaml.safe_dump({top: inner}), encoding="utf-8")
    outcome = lightning("fit", "--config=badnets_digits", "--config=wrong.yaml", *ONE_EPOCH)
    line = complaint(outcome, "${oc.env:TOKEN}")
    assert "hunter2" not in line


def test_a_failed_run_says_none_of_it(config: str) -> None:
    given = {"data": {"init_args": {"poison_fraction": "${oc.decode:${oc.env:SHARE}}", "target_label": 77}}}
    with refused("target_label"):
        run("badnets_digits", given, show=False)


def test_values_too_short_to_be_told_from_other_text(monkeypatch: pytest.MonkeyPatch, lightning: Command) -> None:
    monkeypatch.setenv("TWO", "2")
    Path("few.yaml").write_text("trainer: {max_epochs: '${oc.env:TWO}'}", encoding="utf-8")
    printed = lightning("fit", "--config=badnets_digits", "--config=few.yaml", "--print_config").out
    assert yaml.safe_load(printed)["trainer"]["max_epochs"] == "${oc.env:TWO}"
    assert redact("2 of 20") == "2 of 20"


def test_a_study_takes_the_value_into_its_cells_identity(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.studies.resolve import resolve

    found = []
    for share in ("0.31415926", "0.27182818"):
        monkeypatch.setenv("SHARE", share)
        resolve.cache_clear()
        found.append(resolve(("badnets_digits", config), ()).text)
    assert found[0] != found[1]
