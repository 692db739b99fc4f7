"""Standard output as it may be: in any encoding, full, or closed. The standard library alone."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


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


@contextmanager
def whether_read_or_not() -> Iterator[None]:
    """Go on with the work when nobody reads what is printed any more: ``lightning fit … | head -1``."""
    before = sys.stdout
    own: Any = _Unread(before)
    sys.stdout = own
    try:
        yield
    finally:
        if sys.stdout is own:
            sys.stdout = before


class _Unread:
    """A stream that may lose its reader, or its terminal: from then on what is printed goes nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as much as there is somebody to read it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if there is somebody to read it."""
        self._try(self._stream.flush)

    def _try(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            lost()
