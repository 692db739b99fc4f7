"""Reading YAML: what its own reader takes without a word is refused here, before anything is made of it.

A key that is given twice (the last would win), an alias that holds itself, aliases that unfold to more than any
configuration has, and values nested too deep to be read. PyYAML alone; nothing heavy is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import InputError, bad

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster

_MOST = 100_000
"""Values of a document, aliases unfolded."""


def read_yaml(path: Path, field: str = "config") -> Any:
    """The content of a YAML file.

    Raises:
        InputError: If it cannot be read, or `check_yaml` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text, f"{field} = {str(path)!r}")
        return yaml.safe_load(text)  # whose complaints are clearer than the fast one's
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise bad(field, str(path), f"it cannot be read as YAML ({' '.join(str(error).split())})") from error


def check_yaml(text: str, where: str = "YAML") -> None:
    """Refuse a document that does not say what it seems to; one that is no YAML is left to its reader.

    Args:
        text: The document.
        where: What it is called, for the error.

    Raises:
        InputError: If a key is given twice, or its aliases make a circle or unfold to too much.
    """
    try:
        root = yaml.compose(text, LOADER)
        if root is not None:
            _count(root, where, {}, set())
    except yaml.YAMLError:
        return
    except RecursionError as error:
        raise InputError(f"{where}: its values are nested too deep") from error


def _count(node: yaml.Node, where: str, known: dict[int, int], above: set[int]) -> int:
    """How many values a node unfolds to; each node is looked at once, however often it is referred to."""
    if id(node) in above:
        raise InputError(f"{where}: line {node.start_mark.line + 1}: an alias that holds itself; write its values out")
    if id(node) in known:
        return known[id(node)]
    above.add(id(node))
    total = 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in seen:
                    text = f"the key {key.value!r} is given twice, here and in line {seen[name]}; keep one"
                    raise InputError(f"{where}: line {line}: {text}")
                seen[name] = line
            total += _count(key, where, known, above) + _count(value, where, known, above)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(part, where, known, above) for part in node.value)
    above.discard(id(node))
    if total > _MOST:
        raise InputError(f"{where}: line {node.start_mark.line + 1}: its aliases unfold to more than {_MOST:,} values")
    known[id(node)] = total
    return total
