"""The command `lightning`, runs, and what a run leaves behind.

In Python: ``from experiments import run``. What it needs is imported when it is asked for: that takes ten seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.cli import Result, run

__all__ = ["Result", "run"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments import cli

    return getattr(cli, name)
