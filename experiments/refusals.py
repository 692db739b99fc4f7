"""What Lightning's own parts refuse, in one line: its callbacks, its tuner, its restoring of a checkpoint.

They raise what they like – RuntimeError, KeyError, NotImplementedError – and a new one may raise something else. So it
is not the errors that are known here but the places: an error that comes from one of those parts, and not from code of
ours that the part called, is about what was configured.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import FrameType, TracebackType

import lightning
from lightning import Callback, Trainer

from datamodules.errors import InputError

_LIGHTNING = Path(lightning.__file__).parent
_OURS = Path(__file__).parent.parent
_RESTORING = "checkpoint_connector.py"


def refusal_of(error: BaseException) -> InputError | None:
    """The one line for an error of a part of Lightning's; None if it is of another place."""
    text = _said(error)
    missing = re.search(r"Requirement '([\w.-]+)[^']*' not met", text)
    name = missing[1] if missing else getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name:
        part = _part(error)
        where = f"trainer.callbacks: {part}" if part else "trainer"
        return InputError(f"{where} needs the package {name}, which is not installed; install it, or leave that out")
    if "more than one stateful callback" in text:
        kind = (re.search(r"of type `(\w+)`", text) or ["", "one"])[1]
        return InputError(f"trainer.callbacks: {kind} is listed twice with the same settings; leave one out")
    frames = list(_frames(error.__traceback__))
    if any(Path(frame.f_code.co_filename).name == _RESTORING for frame in frames) and _is_theirs(frames):
        path = next((_path(frame) for frame in frames if Path(frame.f_code.co_filename).name == _RESTORING), "")
        remedy = "it does not fit what is trained here"
        return InputError(f"ckpt_path = {path!r}: {remedy} ({text}); start from its weights: --model.weights")
    part = _part(error)
    if part is None:
        return None
    if isinstance(error, NotImplementedError):
        return InputError(f"trainer.callbacks: {part} leaves {frames[-1].f_code.co_name} to a subclass; name one")
    return InputError(f"trainer.callbacks: {part}: {text}")


def _said(error: BaseException) -> str:
    """Its message, in one line of a bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    return text if len(text) <= 300 else f"{text[:300]} …"


def _frames(trace: TracebackType | None) -> list[FrameType]:
    found = []
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found


def _part(error: BaseException) -> str | None:
    """The class of the callback of Lightning's that an error comes from; None if it comes from elsewhere."""
    frames = _frames(error.__traceback__)
    for number, frame in reversed(list(enumerate(frames))):
        it = frame.f_locals.get("self")
        theirs = Path(frame.f_code.co_filename).is_relative_to(_LIGHTNING / "pytorch" / "callbacks")
        if isinstance(it, Callback) and theirs:
            return type(it).__name__ if _is_theirs(frames[number:]) else None
    return None


def _is_theirs(frames: list[FrameType]) -> bool:
    """Whether the last of the frames, where it happened, was not reached through code of ours, or of the user's."""
    files = [Path(frame.f_code.co_filename) for frame in frames]
    inner = [file for file in files if file.is_relative_to(_LIGHTNING)]
    after = files[len(files) - files[::-1].index(inner[-1]) :] if inner else files
    return all("site-packages" in file.parts or "lib" in file.parts for file in after)


def _path(frame: FrameType) -> str:
    """The checkpoint that was being restored."""
    connector = frame.f_locals.get("self")
    trainer = getattr(connector, "trainer", None)
    return str(getattr(trainer, "ckpt_path", "")) if isinstance(trainer, Trainer) else ""
