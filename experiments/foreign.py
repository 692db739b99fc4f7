"""Errors of code that is not ours – torch, Lightning, numpy, the system – as the one line that a person can act on.

A library has no one way to refuse a value, and what it raises for one that makes no sense may be any error. What can be
known is where it was raised: in an optimizer, in a logger, in a profiler; and that names the part of the configuration.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Collection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace

from datamodules.errors import InputError, bad

PARTS = {
    "torch/optim/lr_scheduler.py": "model.schedule",
    "torch/optim/": "model.optimizer",
    "lightning/pytorch/loggers/": "trainer.logger",
    "lightning/pytorch/profilers/": "trainer.profiler",
    "lightning/pytorch/callbacks/": "trainer.callbacks",
    "lightning/pytorch/strategies/": "trainer.strategy",
    "lightning/fabric/strategies/": "trainer.strategy",
    "lightning/pytorch/plugins/": "trainer.plugins",
    "lightning/fabric/plugins/": "trainer.plugins",
    "lightning/pytorch/accelerators/": "trainer.accelerator",
    "lightning/fabric/accelerators/": "trainer.accelerator",
    "lightning/pytorch/trainer/connectors/": "trainer",
}
"""Where an error was raised → what of the configuration is made of that; the first that fits."""

OURS = tuple(
    f"{Path(__file__).resolve().parent.parent}/{family}/"
    for family in ("datamodules", "classifiers", "poisoning", "extraction", "watermark", "experiments")
)


def blamed(error: BaseException) -> InputError | None:
    """What a library's error is about, as far as the place where it was raised tells; None if it does not."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = frame.filename.replace("\\", "/")
        if name.startswith(OURS):
            return None
        for place, part in PARTS.items():
            if f"/{place}" in name:
                return InputError(f"{part}: {_words(error)}; give other values, or choose another")
    return None


def check_nulls(value: Any, where: str, linked: Collection[str] = ()) -> None:
    """Refuse null for an argument that takes none: the parser lets it pass, and comparing it is a TypeError.

    Args:
        value: A part of the configuration as the parser holds it.
        where: Its key.
        linked: Arguments that the parser fills in later.

    Raises:
        InputError: If there is one.
    """
    if isinstance(value, list):
        for part in value:
            check_nulls(part, where)
    if not isinstance(value, Namespace):
        return
    path, given = value.get("class_path"), value.get("init_args")
    if isinstance(path, str) and isinstance(given, Namespace):
        for name, parameter in _parameters(path).items():
            if name in given and given[name] is None and name not in linked and not _takes_null(parameter):
                default = "" if parameter.default is parameter.empty else f", or leave it out for {parameter.default!r}"
                raise bad(f"{where}.{name}", None, f"a value is needed ({parameter.annotation}){default}")
    for name, part in vars(value).items():
        check_nulls(part, where if name == "init_args" else f"{where}.{name}")


def _takes_null(parameter: inspect.Parameter) -> bool:
    """Whether an argument may be null, or is not known well enough to say that it may not."""
    takes = parameter.annotation
    if parameter.default is None or not isinstance(takes, str):
        return True
    named = re.fullmatch(r"[A-Z]\w*", takes)  # an alias or a class: what is behind it is not looked up
    return bool(named or re.search(r"\b(None|Any|Optional|object)\b", takes))


def _parameters(path: str) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(resolve_name(path)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}


def _words(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    words = " ".join("".join(each if each.isprintable() else " " for each in str(error)).split())
    return f"{words[:299]}…" if len(words) > 300 else words or type(error).__name__


def unforeseen(error: BaseException) -> str:
    """One line of an error that nothing else explains: its kind, its words, and where it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" (in {last[0].name}, {last[0].filename}:{last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {_words(error)}{where}; set PHARMAKON_TRACEBACK=1 to see how it came to that"


def out_of_memory(error: BaseException) -> str | None:
    """What memory was asked for; None if that is not what went wrong. Libraries have no one error for it."""
    text = " ".join(str(error).split())
    kinds = ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory", "could not create a primitive")
    if type(error).__name__ not in kinds and not (isinstance(error, RuntimeError) and any(w in text for w in words)):
        return None
    asked = re.search(r"allocate (\d[\d.]* ?\w+)|allocate memory: you tried to allocate (\d+ bytes)", text)
    return f"out of memory{f' ({asked[0]})' if asked else ''}"
