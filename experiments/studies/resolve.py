"""What a cell's config comes to: all defaults, the versions of its classes, the digest of its data.

Nothing is made but the source of the data: an input's weights are not there yet when a study is planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name
from typing import Any

import yaml

from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError
from experiments.arguments import prepare
from experiments.cli import CommandLine, Parser, start
from experiments.registry import import_all
from experiments.studies.cells import UNIMPORTANT, whole


@dataclass(frozen=True)
class Resolved:
    """What determines a cell's result, as far as its config tells.

    Attributes:
        text: The config with all defaults.
        data: The digest of its source's training set; empty if the data are not there.
        versions: Class → its version, of all classes in the config.
        absent: Why there are no data; empty if there are.
    """

    text: str
    data: str
    versions: Mapping[str, int]
    absent: str


@cache
def resolve(configs: tuple[str, ...], options: tuple[str, ...]) -> Resolved:
    """Resolve a config with options; each once.

    Args:
        configs: Names or paths of configs; later ones win.
        options: Such as ``--data.seed=1``.

    Raises:
        InputError: If a key or a type is wrong, in one line.
    """
    parsed = deepcopy(_parsed(configs, options).resolved)
    parsed["trainer"] = {key: value for key, value in parsed["trainer"].items() if key not in UNIMPORTANT}
    versions = {path: int(getattr(resolve_name(path), "version", 1)) for path in _class_paths(parsed)}
    data, absent = _data(json.dumps(_source(parsed["data"])))
    pool = (parsed["data"].get("init_args") or {}).get("pool")
    if not absent and isinstance(pool, Mapping):
        _, absent = _data(json.dumps(_source(pool)))
    return Resolved(yaml.safe_dump(whole(parsed)), data, versions, absent)


@cache
def check(configs: tuple[str, ...], options: tuple[str, ...]) -> None:
    """See that a config takes these options.

    Raises:
        InputError: If a key or a type is wrong, in one line.
    """
    _parsed(configs, options)


class _Parsed(CommandLine):
    """A command that is parsed, and nothing is made of it."""

    def _set_seed(self) -> None:
        """Leave the random numbers of this process alone."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


def _parsed(configs: Sequence[str], options: Sequence[str]) -> CommandLine:
    args = ["fit", *(part for config in configs for part in ("--config", config)), *options]
    import_all()
    prepared = prepare(args)
    try:
        return _Parsed(prepared.args, prepared.name, act=False, keep=False, show=False)
    except Exception:
        start(args, act=False, keep=False)  # says in one line what is wrong, as `lightning fit` does
        raise


def _source(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the rewrites are wrapped round."""
    while isinstance(base := (data.get("init_args") or {}).get("base"), Mapping):
        data = base
    return data


@cache
def _data(source: str) -> tuple[str, str]:
    """The digest of a source's training set; or nothing, and why it is not there."""
    parser = Parser()
    parser.add_argument("--data", type=ImageDataModule)
    made = parser.instantiate(parser.parse_object({"data": json.loads(source)})).data
    try:
        made.prepare_data()
    except InputError as error:
        return "", str(error)
    made.setup("fit")
    return made.train_set.digest(), ""


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _class_paths(part)
