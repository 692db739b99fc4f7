"""What each command does once the heavy imports are in: exit status and complaints."""

from __future__ import annotations

import sys
from collections.abc import Callable

from datamodules.errors import InputError, did_you_mean


def execute(args: list[str]) -> int:
    """Run a command; its exit status."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    command = args[0]
    try:
        return _action(command)(args)
    except InputError as error:
        print(f"lightning {command}: {error}", file=sys.stderr)
        return 2
    except SIGTERMException:
        return 143
    except KeyboardInterrupt:
        return 130


def _action(command: str) -> Callable[[list[str]], int]:
    from experiments.cli import COMMANDS

    if command in COMMANDS:
        return _run
    if command == "accept":
        from experiments.accept import accept

        return accept
    if command == "export":
        from experiments.export import export

        return export
    raise InputError(f"there is no such command{did_you_mean(command, [*COMMANDS, 'accept', 'export', 'list'])}")


def _run(args: list[str]) -> int:
    from experiments.cli import start

    start(args)
    return 0
