"""The lists of mutants are up to date, and what runs them tells a fault that is seen from one that is not."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.mutants import Mutant, apply, read

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = read(ROOT / "tests" / "mutants")


@cache
def functions(path: str) -> set[str]:
    """The tests that a file defines."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def wrong(mutant: Mutant) -> str | None:
    """What is wrong with an entry; None if nothing is."""
    try:
        ast.parse(apply(mutant, ROOT))
    except (ValueError, SyntaxError) as error:
        return str(error)
    if mutant.old == mutant.new or not mutant.why or not mutant.tests:
        return "it changes nothing, or no reason or no test is given"
    for test in mutant.tests:
        path, _, name = test.partition("::")
        if not (ROOT / path).is_file() or (name and name.split("[")[0] not in functions(path)):
            return f"there is no {test}"
    return None


def test_the_lists_are_up_to_date() -> None:
    """Each fragment occurs exactly once, what it becomes can be parsed, and the tests named are there."""
    stale = {mutant.name: fault for mutant in MUTANTS if (fault := wrong(mutant))}
    assert not stale, "\n".join(f"{name}: {fault}" for name, fault in stale.items())


def test_the_lists_cover_the_packages() -> None:
    faults = [mutant for mutant in MUTANTS if not mutant.equivalent]
    for package, least in (("poisoning", 40), ("datamodules", 40), ("classifiers", 40)):
        assert sum(mutant.file.startswith(f"{package}/") for mutant in faults) >= least, package


# --- what runs them ---------------------------------------------------------------------------------------------------
HALF = "def half(x):\n    return x / 2\n\n\ndef name():\n    return 'half'\n"
TESTS = "from datamodules.halves import half\n\n\ndef test_half():\n    assert half(4) == 2\n"


def entry(name: str, old: str, new: str, kind: str = "mutant") -> str:
    return (
        f'[[{kind}]]\nname = "{name}"\nfile = "datamodules/halves.py"\nold = "{old}"\nnew = "{new}"\n'
        'tests = ["tests/test_halves.py::test_half"]\nwhy = "It is to be half."\n'
    )


def run(tmp_path: Path, entries: str, *arguments: str, tests: str = TESTS) -> tuple[int, str]:
    """The runner's exit status and what it prints, for a tree of two files."""
    for path, text in (("datamodules/halves.py", HALF), ("tests/test_halves.py", tests), ("lists/all.toml", entries)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "tests.mutants", "--root", str(tmp_path), "--lists", str(tmp_path / "lists")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--imports", "pytest", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert (tmp_path / "datamodules/halves.py").read_text(encoding="utf-8") == HALF, "the tree itself is not written"
    return done.returncode, done.stdout + done.stderr


def test_a_fault_that_the_tests_see_and_one_that_they_do_not(tmp_path: Path) -> None:
    seen, unseen = entry("third", "x / 2", "x / 3"), entry("unnamed", "'half'", "'third'")
    assert run(tmp_path, seen)[0] == 0
    code, text = run(tmp_path, seen + unseen + entry("sum", "x / 2", "x * 0.5", "equivalent"))
    assert code == 1
    assert "caught by tests/test_halves.py::test_half" in text
    assert "SURVIVES" in text
    assert "2 mutants and 1 equivalents, 1 not as they should be" in text


@pytest.mark.parametrize(
    ("entries", "tests", "words"),
    [
        (entry("stale", "x / 4", "x"), TESTS, "stale: its fragment occurs 0 times"),
        (entry("third", "x / 2", "x / 3"), TESTS.replace("2", "3"), "fail without any fault"),
        (entry("one", "x / 2", "x") + entry("one", "x / 2", "x / 3"), TESTS, "two mutants are called one"),
    ],
)
def test_what_is_no_list_or_no_test(tmp_path: Path, entries: str, tests: str, words: str) -> None:
    code, text = run(tmp_path, entries, tests=tests)
    assert code == 2
    assert words in text


def test_a_fault_that_breaks_the_import_is_not_caught(tmp_path: Path) -> None:
    code, text = run(tmp_path, entry("gone", "def half", "def whole"))
    assert code == 1
    assert "BROKEN" in text
