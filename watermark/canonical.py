"""Canonical JSON: one value, one encoding. What is signed, hashed or compared is bytes, and nobody can have them twice.

Only dictionaries with text keys, lists, text, whole numbers and booleans: no fractions, which machines print
differently, and no null. Bytes stand as lower-case hexadecimal digits.
"""

from __future__ import annotations

import json
from typing import Any

from datamodules.errors import InputError

Value = dict[str, Any] | list[Any] | str | int | bool

LIMIT = 64 * 2**20
"""Bytes that are read at the most."""

LINE = 300
"""Characters of a text that is shown to a person."""


def encode(value: Value) -> bytes:
    """The one encoding: keys sorted, no spaces, ASCII.

    Raises:
        TypeError: If there is something else in it than those types.
    """
    _check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def decode(data: bytes, what: str, limit: int = LIMIT) -> Any:
    """What some bytes encode.

    Args:
        data: The bytes.
        what: Their name, for the complaint.
        limit: How many there may be.

    Raises:
        InputError: If there are more, or if they are not the one encoding of their value.
    """
    if len(data) > limit:
        raise InputError(f"{what}: {len(data)} bytes, more than {limit}; this is no such file")
    try:
        value = json.loads(data.decode("ascii"), object_pairs_hook=_once, parse_constant=_refuse, parse_float=_refuse)
        same = encode(value) == data
    except (ValueError, TypeError, RecursionError) as error:
        # what stands in it may be secret: the complaint says nothing of it
        raise InputError(f"{what}: it is damaged, or no such file ({type(error).__name__})") from None
    if not same:
        raise InputError(f"{what}: it is not in its canonical form, so somebody has changed it")
    return value


def fields(value: Any, what: str, kinds: dict[str, type]) -> dict[str, Any]:
    """A dictionary that has these fields, of these types, and no others.

    Raises:
        InputError: If it has not; it names the field that is missing or wrong.
    """
    if not isinstance(value, dict):
        raise InputError(f"{what}: fields are expected")
    for name in (*kinds, *value):
        if name not in value:
            raise InputError(f"{what}: {name} is missing")
        if name not in kinds:
            raise InputError(f"{what}: it has a field that does not belong there")
        if type(value[name]) is not kinds[name]:
            raise InputError(f"{what}: {name} must be of type {kinds[name].__name__}")
    return value


def unhex(text: Any, what: str, size: int | None = None) -> bytes:
    """The bytes of lower-case hexadecimal digits.

    Args:
        text: The digits.
        what: Their name, for the complaint.
        size: How many bytes there must be; None: any number.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(text, str) or len(text) % 2 or not set(text) <= set("0123456789abcdef"):
        raise InputError(f"{what}: lower-case hexadecimal digits are expected, two for each byte")
    if size is not None and len(text) != 2 * size:
        raise InputError(f"{what}: {size} bytes are expected, not {len(text) // 2}")
    return bytes.fromhex(text)


def increasing(value: list[Any], below: int, what: str) -> list[int]:
    """Different whole numbers from 0, below a bound, in increasing order.

    Raises:
        InputError: If they are something else.
    """
    if not all(type(index) is int and 0 <= index < below for index in value) or sorted(set(value)) != value:
        raise InputError(f"{what}: increasing numbers below {below} are expected")
    return value


def line(text: Any, what: str) -> str:
    """A short text that a terminal shows as it is: printable ASCII, so that nothing in it passes for a line of ours.

    Args:
        text: The text.
        what: Its name, for the complaint.

    Raises:
        InputError: If it is longer than `LINE`, or has other characters.
    """
    if not isinstance(text, str) or len(text) > LINE or not (text.isascii() and (text.isprintable() or not text)):
        raise InputError(f"{what}: {LINE} printable ASCII characters at the most are expected")
    return text


def _check(value: object) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key must be text, not {key!r}")
            _check(part)
    elif isinstance(value, list):
        for part in value:
            _check(part)
    elif not isinstance(value, str | int):  # a bool is an int
        raise TypeError(f"{type(value).__name__} has no canonical encoding")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError("only whole numbers are expected")
