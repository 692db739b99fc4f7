"""Faults of one line that the tests must see: each is put in by itself, and the tests named beside it must fail.

The lists are the ``.toml`` files of this folder. ``make mutants`` runs them, which takes minutes; that every list is up
to date is checked by ``tests/test_mutants.py``.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: Unique over all lists.
        file: What it changes, from the root of the repository.
        old: The fragment that is replaced; it occurs there exactly once.
        new: What takes its place.
        tests: pytest's ids of those that must fail: ``tests/…/test_x.py::test_y``, a case of it, or a whole file.
        why: What would be wrong, or why nothing is.
        equivalent: Whether it changes nothing that could be told: then the tests must pass.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    equivalent: bool = field(default=False, kw_only=True)


def read(folder: Path) -> list[Mutant]:
    """The mutants of all lists in a folder, by the names of the lists.

    Raises:
        ValueError: If an entry lacks something or has something unknown, or a name occurs twice.
    """
    found: list[Mutant] = []
    for path in sorted(folder.glob("*.toml")):
        lists: dict[str, list[dict[str, Any]]] = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := set(lists) - {"mutant", "equivalent"}:
            raise ValueError(f"{path.name}: {sorted(unknown)}: entries are [[mutant]] or [[equivalent]]")
        for kind, entries in lists.items():
            for entry in entries:
                try:
                    given = {**entry, "tests": tuple(entry["tests"])}
                    found.append(Mutant(**given, equivalent=kind == "equivalent"))
                except (KeyError, TypeError) as error:
                    raise ValueError(f"{path.name}: {entry.get('name', entry)}: {error}") from error
    names = [mutant.name for mutant in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two mutants are called {', '.join(twice)}")
    return found


def apply(mutant: Mutant, root: Path) -> str:
    """The source of its file with the fault in it.

    Raises:
        ValueError: If there is no such file, or the fragment does not occur exactly once: the list is stale.
    """
    path = root / mutant.file
    if not path.is_file():
        raise ValueError(f"{mutant.name}: there is no {mutant.file}")
    source = path.read_text(encoding="utf-8")
    if (times := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: its fragment occurs {times} times in {mutant.file}: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)
