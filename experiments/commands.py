"""What each command does once the heavy imports are in: exit status and complaints."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pkgutil import resolve_name

from datamodules.errors import InputError, RunError
from experiments import streams
from experiments.arguments import COMMANDS, made_whole, prepare
from experiments.environment import redact

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

_DECIDE = ("verify", "check-transcript")
"""Commands whose status 1 is a verdict: whatever goes wrong with them is 2."""


def execute(args: list[str]) -> int:
    """Run a command; its exit status."""
    if args[0] not in _DECIDE:
        return _execute(args)
    try:
        return _act(args)
    except InputError as error:
        print(redact(f"lightning {args[0]}: {error}"), file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        why = "".join(each if each.isprintable() else " " for each in str(error))
        print(redact(f"lightning {args[0]}: could not be decided: {type(error).__name__}: {why}"), file=sys.stderr)
    return 2


def _act(args: list[str]) -> int:
    if args[0] in COMMANDS:
        prepare(args)  # a config or a run that is not there is told before the heavy imports
    with streams.whether_read_or_not():
        return _action(args[0])([args[0], *made_whole(args[1:])])


def _execute(args: list[str]) -> int:
    command = args[0]
    try:
        return _act(args)
    except (InputError, RunError) as error:
        print(redact(f"lightning {command}: {error}"), file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:
        raise
    except (Exception, RecursionError, MemoryError) as error:
        return _unforeseen(command, error)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if isinstance(stop, SIGTERMException):
            return 143
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's way of ending on Ctrl-C
            return 130
        raise


def _unforeseen(command: str, error: Exception) -> int:
    """Tell in one line of an error that nobody foresaw: of the system, of a library, of one's own code, of ours.

    Who has `PHARMAKON_TRACEBACK` set, or has code of his own on the way to it, gets Python's traceback.
    """
    from experiments.foreign import unforeseen

    if isinstance(error, OSError) and error.filename2 is None and error.errno is not None:
        more = "; free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"lightning {command}: {error.filename or 'the system'}: {error.strerror}{more}", file=sys.stderr)
        return 2
    if "PHARMAKON_TRACEBACK" in os.environ:
        raise error
    print(redact(f"lightning {command}: {unforeseen(error)}"), file=sys.stderr)
    return 1


def _action(command: str) -> Callable[[list[str]], int]:
    """What carries a command out; imported now, and not before."""
    action: Callable[[list[str]], int] = resolve_name(ACTIONS.get(command, "experiments.commands:_run"))
    return action


def _run(args: list[str]) -> int:
    from experiments.cli import start

    start(args)
    return 0
