"""The rules of the house, read off the source: who may import whom, and what no module may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.catalogue import ROOTS, catalogue

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "datamodules": set(),
    "classifiers": {"datamodules"},
    "poisoning": {"datamodules", "classifiers"},
    "extraction": {"datamodules", "classifiers"},
    "watermark": {"datamodules", "classifiers"},
    "experiments": {"datamodules", "classifiers", "poisoning", "extraction", "watermark"},
}
"""Imports go one way, and the three families do not know each other."""

FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "random"}
"""Reading them can run code; and `random` is Python's global generator."""

DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS |= {f"{name}_like" for name in ("rand", "randn", "randint")}
"""Functions of torch that use the global generator unless they are given one."""


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """The top-level packages that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else str(node.module).split(".")[0]


def dotted(node: ast.expr) -> str:
    """``np.random.seed`` of such an expression; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def wrong_imports(source: str, package: str) -> list[str]:
    """Packages of ours that a module of `package` must not import."""
    allowed = MAY_IMPORT[package] | {package}
    return [name for name in imported(ast.parse(source), package) if name in {*MAY_IMPORT, "tests"} - allowed]


def forbidden(source: str) -> list[str]:
    """What no module may do: run code from data, or touch a global generator."""
    tree, found = ast.parse(source), []
    found += [f"import {name}" for name in imported(tree, "") if name in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name.startswith(("np.random.", "numpy.random.")) and node.attr not in ("default_rng", "Generator"):
                found.append(name)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}

        def is_true(value: ast.expr | None) -> bool:
            return isinstance(value, ast.Constant) and value.value is True

        if name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"):
            found.append(name)
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"):
            found.append(name)
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            found.append("torch.load without weights_only=True")
        if (
            "weights_only" in keywords
            and isinstance(keywords["weights_only"], ast.Constant)
            and not is_true(keywords["weights_only"])
        ):
            found.append("weights_only is not True")
        if "allow_pickle" in keywords and is_true(keywords["allow_pickle"]):
            found.append("allow_pickle=True")
        if name.startswith("torch.") and name[6:] in DRAWS and "generator" not in keywords:
            found.append(f"{name} without a generator")
    return found


# --- the rules --------------------------------------------------------------------------------------------------------
def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 40
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@each_file
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not wrong_imports(path.read_text(encoding="utf-8"), package)


@each_file
def test_nothing_runs_code_from_data_or_touches_a_global_generator(path: Path) -> None:
    assert not forbidden(path.read_text(encoding="utf-8"))


@each_file
def test_every_module_says_what_it_is(path: Path) -> None:
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert len(first) > 10
    assert first.endswith((".", "!", "?", ":", "…")), first


@pytest.mark.parametrize("heading", [*ROOTS, "Configs"])
def test_all_that_the_catalogue_shows_says_what_it_is(heading: str) -> None:
    shown = catalogue(ROOT, ROOT / "configs")[heading]
    assert shown
    for name, line in shown:
        assert len(line) > 5, f"{name} has no first line"


def test_the_catalogue_shows_every_class_that_can_be_named() -> None:
    shown = {name for heading in ROOTS for name, _ in catalogue(ROOT, ROOT / "configs")[heading]}
    assert {"BadNets", "LabelFlip", "Digits", "CIFAR10", "Victim", "SmallCNN", "SinglePixel", "FlipCrop"} <= shown
    assert not {"Rewrite", "Source", "Backbone", "Trigger", "Augmentation"} & shown


# --- the scanner itself -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        ("datamodules", "import classifiers.weights", ["classifiers"]),
        ("datamodules", "def f():\n    from poisoning import badnets", ["poisoning"]),
        ("classifiers", "from datamodules.errors import bad", []),
        ("classifiers", "import experiments", ["experiments"]),
        ("poisoning", "from extraction.oracle import Oracle", ["extraction"]),
        ("extraction", "if TYPE_CHECKING:\n    import watermark.keys as keys", ["watermark"]),
        ("watermark", "from . import keys\nimport torch", []),
        ("experiments", "import poisoning, watermark, extraction", []),
        ("experiments", "from tests.helpers import mlp", ["tests"]),
    ],
)
def test_a_wrong_import_is_seen(package: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(source, package) == wrong


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import random",
        "torch.manual_seed(0)",
        "np.random.seed(0)",
        "x = np.random.rand(3)",
        "numpy.random.shuffle(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "trainer.fit(model, ckpt_path=p, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "torch.randperm(5)",
        "torch.randn_like(x)",
        "torch.hub.load('a', 'b')",
    ],
)
def test_what_is_forbidden_is_seen(source: str) -> None:
    assert forbidden(source)


@pytest.mark.parametrize(
    "source",
    [
        "from datamodules.random import draw",
        "torch.Generator().manual_seed(5)",
        "np.random.default_rng(0)",
        "def f(r: np.random.Generator) -> None: ...",
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "yaml.safe_load(text)",
        "np.load(path)",
        "torch.randperm(5, generator=g)",
        "load(path, weights_only=chosen)",
    ],
)
def test_what_is_allowed_is_not_seen(source: str) -> None:
    assert not forbidden(source)
