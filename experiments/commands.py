"""What each command does once the heavy imports are in: exit status and complaints."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pkgutil import resolve_name

from datamodules.errors import InputError
from experiments.arguments import COMMANDS, prepare

ACTIONS = {
    "accept": "experiments.accept:accept",
    "export": "experiments.export:export",
    "serve": "experiments.serve:serve",
    "study": "experiments.studies.command:study",
    "report": "experiments.report:report",
    "keygen": "experiments.ownership:keygen",
    "verify": "experiments.ownership:verify",
    "check-transcript": "experiments.ownership:check_transcript",
}
"""Commands that are not Lightning's own."""


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
    """What carries a command out; imported now, and not before."""
    action: Callable[[list[str]], int] = resolve_name(ACTIONS.get(command, "experiments.commands:_run"))
    return action


def _run(args: list[str]) -> int:
    from experiments.cli import start

    start(args)
    return 0
