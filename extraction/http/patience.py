"""What a server does about those who connect and say nothing: it waits for a while, and for so many at a time.

uvicorn closes a connection that rests after an answer; it waits forever for the first request, and for the rest of one
that has begun. Whoever opens idle connections would take all that there may be, and need no key for it.
"""

from __future__ import annotations

import asyncio
from typing import Any

WAITING = 256
"""So many connections may have no whole header yet; one more drops the one that has waited longest."""

PATIENCE = 10.0
"""Seconds that a header may take."""


def patient(seconds: float = PATIENCE, most: int = WAITING) -> type[asyncio.Protocol]:
    """The protocol of uvicorn, for its ``http`` setting; a request is a request once its header is there.

    Args:
        seconds: That a header may take, from the connection on, or from its first byte on a connection that was used.
        most: Connections without a whole header, of all together.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    waiting: dict[Patient, asyncio.TimerHandle] = {}

    class Patient(H11Protocol):
        """H11Protocol that drops whoever keeps it waiting."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait()
            else:
                self._done()

        def connection_lost(self, exc: Exception | None) -> None:
            self._done()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self not in waiting:
                waiting[self] = self.loop.call_later(seconds, self._drop)
            if len(waiting) > most:
                next(iter(waiting))._drop()

        def _done(self) -> None:
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

        def _drop(self) -> None:
            self._done()
            self.transport.abort()

    return Patient
