"""What there is: every attack, defence, datamodule, backbone, trigger and config with its one line.

Read from the source files, without importing them, so that `lightning list` answers at once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOTS = {
    "Attacks and defences": "Rewrite",
    "Data": "Source",
    "Models": "ImageClassifier",
    "Backbones": "Backbone",
    "Triggers": "Trigger",
    "Augmentation": "Augmentation",
}
"""Heading → the class that all of its kind descend from."""

FAMILIES = ("datamodules", "classifiers", "poisoning", "extraction", "watermark")


def catalogue(root: Path, configs: Path) -> dict[str, list[tuple[str, str]]]:
    """Name and description of all there is, by heading.

    Args:
        root: The folder that holds the packages.
        configs: The folder of YAMLs.

    Returns:
        Heading → sorted (name, first line of the docstring or of the YAML's comment).
    """
    bases: dict[str, set[str]] = {}
    lines: dict[str, str] = {}
    abstract: set[str] = set()
    for family in FAMILIES:
        for path in sorted((root / family).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {name for base in node.bases if (name := _name(base))}
                    lines[node.name] = (ast.get_docstring(node) or "").split("\n")[0]
                    if _is_abstract(node):
                        abstract.add(node.name)
    found = {}
    for heading, ancestor in ROOTS.items():
        names = [name for name in bases if ancestor in _ancestors(name, bases) and name not in abstract]
        if heading == "Models":
            names.append(ancestor)
        found[heading] = sorted((name, lines[name]) for name in names if not name.startswith("_"))
    found["Configs"] = sorted(
        (str(path.relative_to(configs).with_suffix("")), _first_comment(path)) for path in configs.rglob("*.yaml")
    )
    return found


def _is_abstract(node: ast.ClassDef) -> bool:
    decorators = (d for item in node.body if isinstance(item, ast.FunctionDef) for d in item.decorator_list)
    return any(_name(decorator) == "abstractmethod" for decorator in decorators)


def _name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _ancestors(name: str, bases: dict[str, set[str]]) -> Iterator[str]:
    for base in bases.get(name, ()):
        yield base
        yield from _ancestors(base, bases)


def _first_comment(path: Path) -> str:
    line = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def print_catalogue(root: Path, configs: Path, words: Sequence[str] = ()) -> bool:
    """Print it, by heading; False if there is nothing to print.

    Args:
        root: See `catalogue`.
        configs: See `catalogue`.
        words: All of which are in what is printed, whatever their case; none: all is printed.
    """
    found = False
    for heading, everything in catalogue(root, configs).items():
        rows = [row for row in everything if all(word.lower() in " ".join(row).lower() for word in words)]
        if not rows:
            continue
        found = True
        width = max((len(name) for name, _ in rows), default=0)
        print(f"\n{heading}")
        for name, line in rows:
            print(f"  {name:<{width}}  {line}")
    return found
