"""Standard output as it may be: in any encoding, full, or closed. The standard library alone."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def prepare() -> None:
    """Have both streams take any text: what their encoding does not have becomes a question mark.

    Where a stream is closed – ``lightning list >&-`` – its number goes to the null device, lest the next file that is
    opened get it, and what is printed with it.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            with suppress(OSError):
                os.fstat(number)  # it may be in use
                continue
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif hasattr(stream, "reconfigure"):
            with suppress(ValueError, OSError):
                stream.reconfigure(errors="replace")


def finish() -> str | None:
    """Write out what was printed; what is wrong with the stream, if it cannot be – and nothing if nobody reads it."""
    try:
        sys.stdout.flush()
        return None
    except BrokenPipeError:  # `lightning list | head`
        lost()
        return None
    except (OSError, ValueError) as error:
        lost()
        return f"what was to be printed cannot be written ({getattr(error, 'strerror', None) or error})"


def lost() -> None:
    """Let go of standard output: Python would complain of it once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
