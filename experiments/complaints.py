"""Turning the parser's pages of trouble into one line that names the field, the value and the remedy."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from datamodules.errors import InputError, did_you_mean

_KEY = re.compile(r"Parser key ['\"]([\w.\[\]]+)['\"]")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_GROUP = re.compile(r"(?:Subcommand|Group) '([\w.]+)' does not accept option '([^']+)'")
_IMPORT = re.compile(
    r"Expected a dot import path string: (\S+)|Import path (\S+) does not correspond to a subclass of (\w+)"
)
_MODULE = re.compile(r"No module named '?([\w.]+)'?|module '([\w.]+)' has no attribute '(\w+)'")


def input_error(error: BaseException | None) -> InputError | None:
    """The InputError in the chain of causes, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException, known: Iterable[str]) -> str:
    """What a person needs to know of an error from parsing or instantiating a configuration.

    Args:
        error: As raised.
        known: All keys and option names at the top, for suggestions.
    """
    text = str(error)
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        word = found[1].split("=")[0].lstrip("-")
        return f"--{word}: there is no such option{did_you_mean(word, known)}"
    if found := _GROUP.search(text):
        return f"{found[2]}: there is no such key{did_you_mean(found[2], known)}"
    branch = _branch(text)
    keys = list(dict.fromkeys(_KEY.findall(branch)))
    where = ".".join(keys)
    classes = _CLASS.findall(branch)
    if found := _OPTION.search(branch):
        option = found[1]
        if not classes:
            return f"{option}: there is no such key{did_you_mean(option, known)}"
        short = classes[-1].rsplit(".", 1)[-1]
        hint = did_you_mean(option, _arguments(classes[-1]))
        return f"{where}.{option}: {short} has no such argument{hint}"
    if found := _IMPORT.search(branch):
        name = found[1] or found[2]
        what = f"is no {found[3]}" if found[3] else "there is no such class"
        return f"{where} = {name!r}: {what}{did_you_mean(name, _class_names())}"
    if found := _MODULE.search(branch):
        return f"{where}: {' '.join(found[0].split())}{did_you_mean(found[3] or found[1] or '', _class_names())}"
    return _leaf(branch, where)


def _branch(text: str) -> str:
    """The part of the report that is about the value given, without the alternatives that do not apply."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*- Expected a <class 'NoneType'>", line)]
    cut = next((i for i, line in enumerate(lines) if line.strip().startswith("Given value")), len(lines))
    return "\n".join(lines[:cut])


def _leaf(branch: str, where: str) -> str:
    """The innermost lines, for what has no pattern of its own."""
    skip = ("Parser key", "Does not validate against any", "Subtypes:", "Errors:", "Problem with given class_path")
    kept = [line.strip().removeprefix("- ") for line in branch.splitlines() if line.strip()]
    kept = [line for line in kept if not line.startswith(skip)] or kept
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", "; ".join(dict.fromkeys(kept)))
    return f"{where}: {text}" if where else text


def _arguments(class_path: str) -> list[str]:
    """The names of a class's constructor arguments."""
    import importlib

    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _class_names() -> list[str]:
    """All classes that YAML may name."""
    from pathlib import Path

    from experiments.catalogue import catalogue
    from experiments.registry import configs_folder

    found = catalogue(Path(__file__).resolve().parent.parent, configs_folder())
    return [name for heading, rows in found.items() if heading != "Configs" for name, _ in rows]
