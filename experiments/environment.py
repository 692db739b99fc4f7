"""What a configuration takes from the environment stays there: ``${oc.env:TOKEN}`` is looked up, and never written.

A run's config.yaml, its manifest, what loggers are told and ``--print_config`` have the interpolation, so that the run
can be repeated where the variable has another value; in messages, metrics and statuses the value is put back into it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

SHORTEST = 6
"""Shorter values are not looked for in other text: a 1 or a word such as "cpu" stands there for other reasons."""

Place = tuple[Any, ...]
"""Keys, and numbers in lists, from the top."""

_values: dict[str, str] = {}  # value → the interpolation that stands for it
_asked: list[str] = []  # names of variables, as they are looked up
_kept: ContextVar[dict[Place, str]] = ContextVar("kept")


def begin() -> None:
    """Forget the places of the configuration before."""
    _kept.set({})


def keep(content: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration with the interpolations of the environment in their places.

    Args:
        content: Of the last configuration that was parsed, with or without the name of the command at its top.
    """
    whole = deepcopy(content)
    for place, raw in _kept.get({}).items():
        holder: Any = whole
        steps = place if place[0] in whole else place[1:]
        try:
            for step in steps[:-1]:
                holder = holder[step]
            if holder[steps[-1]] is not None:
                holder[steps[-1]] = raw
        except (KeyError, IndexError, TypeError):
            pass  # it is not shown
    found: dict[str, Any] = redact(whole)
    return found


def redact(value: Any) -> Any:
    """Text, or lists and mappings with text in them, with values of the environment replaced by what stands for them.

    Args:
        value: Anything; what is no text stays.
    """
    if isinstance(value, str):
        for secret, interpolation in _values.items():
            value = value.replace(secret, interpolation)
        return value
    if isinstance(value, dict):
        return {key: redact(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact(part) for part in value]
    return value


def watch() -> None:
    """Have the parser note where it looks up the environment, and what it finds; once in a process."""
    import jsonargparse._core as core
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    resolve = core.omegaconf_apply

    def env(key: str, *default: Any) -> Any:
        _asked.append(key)
        if len(value := os.environ.get(key, "")) >= SHORTEST:
            _values[value] = f"${{oc.env:{key}}}"
        return oc.env(key, *default)

    def watched(parser: Any, config: Any) -> Any:
        if "${" in str(config) and "oc.env:" in str(config):
            text = parser.dump(config, skip_validation=True, skip_unset=False, skip_link_targets=False)
            _kept.get().update(_places(OmegaConf.create(text), ()))
        return resolve(parser, config)

    OmegaConf.register_resolver("oc.env", env, replace=True)
    core.omegaconf_apply = watched


def _places(node: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """Where the environment is looked up, directly or by way of another key, and what stands there."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key in node if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)
        if child._is_interpolation():
            _asked.clear()
            try:
                OmegaConf.to_container(OmegaConf.create({"found": node[key]}), resolve=True)
            except OmegaConfBaseException:
                continue  # told when it is resolved in earnest
            if _asked:
                yield (*place, key), child._value()
        elif OmegaConf.is_config(child) and not child._is_none():
            yield from _places(child, (*place, key))
