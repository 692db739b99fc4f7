"""Several processes of one run: how long the first waits for the others, and what is said when one is gone."""

from __future__ import annotations

import os
from datetime import timedelta
from importlib import import_module
from typing import Any

from datamodules.errors import InputError, RunError, bad

PATIENCE = "PHARMAKON_RENDEZVOUS"
"""The environment variable for the seconds in which all processes of a run must have met."""

_DEFAULT = 300.0
_LOST = ("connection closed by peer", "connection reset by peer", "socket closed", "broken pipe", "timed out waiting")


def bound_rendezvous() -> None:
    """Have processes wait for each other at the beginning as long as `PATIENCE` says, and not for half an hour.

    Later waits, such as for a first process that crafts poisons, are as long as the strategy says.

    Raises:
        InputError: If it is no number above 0.
    """
    c10d: Any = import_module("torch.distributed.distributed_c10d")
    given = os.environ.get(PATIENCE, str(_DEFAULT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise bad(PATIENCE, given, "seconds are expected, more than 0")
    original = getattr(c10d.rendezvous, "unbounded", c10d.rendezvous)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        limit = timedelta(seconds=seconds)
        return original(*args, **{**kwargs, "timeout": min(limit, kwargs.get("timeout") or limit)})

    vars(bounded)["unbounded"] = original
    c10d.rendezvous = bounded


def lost(error: BaseException) -> RunError | InputError | None:
    """What an error of torch's communication means; None if it is none."""
    text = " ".join(str(error).split())
    low = text.lower()
    ours = type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError) and any(word in low for word in ("gloo", "nccl", "tcpstore"))
    )
    if not ours:
        return None
    if "eaddrinuse" in low or "address already in use" in low:
        return bad("MASTER_PORT", os.environ.get("MASTER_PORT"), "it is in use on this machine; choose another")
    if "clients joined" in low:
        return RunError(
            f"not all processes of this run began within {os.environ.get(PATIENCE, f'{_DEFAULT:g}')} s: see what the "
            f"others say; where they need longer, set {PATIENCE}=SECONDS"
        )
    if type(error).__name__ != "RuntimeError" or any(word in low for word in _LOST):
        return RunError(
            f"another process of this run is gone: see what it said last, and go on with --resume ({text[:160]})"
        )
    return None
