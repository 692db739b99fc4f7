"""What each command does once the heavy imports are in: exit status and complaints."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from datamodules.errors import InputError
from experiments.arguments import COMMANDS, prepare


def execute(args: list[str]) -> int:
    """Run a command; its exit status."""
    command = args[0]
    try:
        if command in COMMANDS:
            prepare(args)  # a config or a run that is not there is told before the heavy imports
        return _action(command)(args)
    except InputError as error:
        print(f"lightning {command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"lightning {command}: {error.filename or 'the disk'}: {error.strerror}; free space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if isinstance(stop, SIGTERMException):
            return 143
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way of ending on Ctrl-C
            return 130
        raise


def _action(command: str) -> Callable[[list[str]], int]:
    if command == "accept":
        from experiments.accept import accept

        return accept
    if command == "export":
        from experiments.export import export

        return export
    if command == "serve":
        from experiments.serve import serve

        return serve
    if command == "study":
        from experiments.studies.command import study

        return study
    if command == "report":
        from experiments.report import report

        return report
    return _run


def _run(args: list[str]) -> int:
    from experiments.cli import start

    start(args)
    return 0
