"""The one error that a person can mend: it names the field, the value and the remedy, in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A value, a file or a folder that a person gave is wrong; the command prints it in one line and exits with 2."""


class RunError(RuntimeError):
    """What went wrong is in no value that a person gave; the command prints it in one line and exits with 1."""


def bad(field: str, value: object, remedy: str) -> InputError:
    """The error for `value` in `field`: ``poison_fraction = 1.5: …``."""
    return InputError(f"{field} = {value!r}: {remedy}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt `word`, or the empty string: `` – did you mean 'trigger'?``."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" – did you mean '{close[0]}'?" if close else ""
