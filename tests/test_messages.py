"""What a message recommends exists: commands, options, configs, extras, targets, variables, classes."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS, USAGE

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("datamodules", "classifiers", "poisoning", "extraction", "watermark", "experiments")


@cache
def sources() -> dict[str, str]:
    """Every module's text."""
    files = sorted(path for family in FAMILIES for path in (ROOT / family).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


@cache
def texts() -> tuple[list[tuple[str, str]], set[str]]:
    """Where a text is, and the text – docstrings too, parts of f-strings joined by a ``…`` –; the classes' names."""
    found, classes = [], set()
    for path, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((f"{path}:{node.lineno}", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append((f"{path}:{node.lineno}", "".join(parts)))
            elif isinstance(node, ast.ClassDef):
                classes.add(node.name)
    return found, classes


def said(pattern: str) -> Iterator[tuple[str, str]]:
    """Where it is said, and what the pattern's group found there."""
    for where, text in texts()[0]:
        for found in re.finditer(pattern, text):
            yield where, found[1]


def test_commands() -> None:
    found = list(said(r"(?:^|[\s`:(])lightning ([a-z-]+)\b(?! (?:is|has|and|itself))"))
    assert len(found) > 30
    assert [place for place in found if place[1] not in (*COMMANDS, "command", "alone")] == []


def test_configs() -> None:
    found = list(said(r"--config[ =]([a-z][a-z0-9_/]*)\b"))
    paths = list((ROOT / "configs").rglob("*.yaml"))
    known = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in paths} | {path.stem for path in paths}
    assert len(found) > 5
    assert [place for place in found if place[1] not in (*known, "user", "config")] == []


def test_options() -> None:
    code = "\n".join(sources().values())
    taken = set(re.findall(r"""["'](--[a-z0-9-]+)["']""", code)) | set(re.findall(r"--[a-z0-9-]+", USAGE))
    sections = {"--model", "--data", "--trainer", "--ckpt_path", "--key", "--seed_everything", "--print_config"}
    wrong = [place for place in said(r"(?<![\w-])(--[a-z]+(?:[-_][a-z0-9]+)*)") if place[1] not in taken | sections]
    assert wrong == []


def test_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = list(said(r"pharmakon\[([\w,-]+)\]"))
    assert found
    assert [place for place in found if not set(place[1].split(",")) <= set(project["optional-dependencies"])] == []


def test_targets_of_make() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert [place for place in said(r"`make ([a-z]+)`") if place[1] not in targets] == []


def test_variables_of_the_environment() -> None:
    """Each is read somewhere, by its name."""
    read = set(re.findall(r"""["'](PHARMAKON_\w+)["']""", "\n".join(sources().values())))
    found = list(said(r"\b(PHARMAKON_[A-Z_]+)\b"))
    assert len(found) > 3
    assert [place for place in found if place[1] not in read] == []


@pytest.mark.parametrize("words", [r"choose ([A-Z]\w+)", r" or ([A-Z][a-z]+[A-Z]\w*)$", r"wrap it in ([A-Z]\w+)"])
def test_classes(words: str) -> None:
    known = texts()[1] | {"Adam", "AdamW", "SGD"}
    assert [place for place in said(words) if place[1] not in known] == []
