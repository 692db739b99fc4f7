"""Importing what YAML may name by its bare class, and finding the configs."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import at_home, full_path

PACKAGES = ("datamodules", "classifiers", "poisoning", "extraction", "watermark")
"""The packages whose classes can be named in YAML."""


def import_all() -> None:
    """Import every module of the families, so that YAML can name their classes without a path."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(found.name)


def configs_folder() -> Path:
    """The shipped YAMLs: beside the packages in a checkout, inside this one in a wheel."""
    here = Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def find_config(name: str) -> str:
    """The path of a config given by path or by name.

    Args:
        name: A path; or the name of a shipped config: ``badnets_digits``, ``trainer/ddp``, with or without ``.yaml``
            and a leading ``configs/``.

    Raises:
        InputError: If there is none – it suggests the nearest name – or it is no YAML of keys.
    """
    if name.startswith("{"):
        return name
    folder = configs_folder()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    for path in (full_path(name), folder / f"{short}.yaml"):
        if path.is_file():
            _check(path)
            return str(path)
    known = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    hint = did_you_mean(short, known) or " (lightning list shows the shipped ones)"
    raise InputError(f"config = {name!r}: there is no such file, and no shipped config of that name{hint}")


def shipped(value: str) -> str:
    """The path of a shipped YAML that was given as, say, ``data/mnist.yaml``; anything else as it is.

    A file of that name in the working directory – which, while a YAML is read, is that YAML's folder – comes first. A
    path that begins with the home folder is made whole.
    """
    value = at_home(value)
    if not value.endswith(".yaml") or Path(value).exists():
        return value
    path = configs_folder() / value.removeprefix("configs/")
    return str(path) if path.is_file() else value


def _check(path: Path) -> None:
    from experiments.documents import read_yaml

    content = read_yaml(path)
    if isinstance(content, dict) and "class_path" in content:
        name = path.parent.name if path.parent.name in ("model", "data") else "data"
        part = str(path.relative_to(configs_folder())) if path.is_relative_to(configs_folder()) else str(path)
        raise bad(
            "config", str(path), f"there is no such key as class_path in a config; it is a part of one: --{name}={part}"
        )
    if not isinstance(content, dict):
        raise bad("config", str(path), "keys are expected, such as trainer, model and data")
