"""A pool of processes that each take one cell after the other, and outlive neither their parent nor an interruption.

On Linux without a GPU they are forked from a server that has done all imports, once for all of them; elsewhere each
does its own. Imports take ten seconds, most small cells less.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from experiments.studies.cells import Cell
from experiments.studies.work import execute, fail

_GPUS = ("/dev/nvidiactl", "/dev/kfd")  # of drivers that do not survive a fork


class _Worker(NamedTuple):
    process: Any
    number: int
    cell: Cell | None


def start_imports() -> None:
    """Have the server begin to import, if there is to be one: meanwhile this process reads and plans."""
    if _method() == "forkserver":
        multiprocessing.set_forkserver_preload(["experiments.studies.imports"])
        before = _ignore_interrupts()  # it, and all that are forked from it, are ended by this process
        try:
            forkserver.ensure_running()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, which need not import anything: this one then need not either.

    Args:
        function: To call; it, what it is given and what it returns are pickled.
        args: Its arguments.

    Raises:
        Exception: What the function raises.
    """
    context = multiprocessing.get_context(_method())
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, args))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        value, error = mine.recv()
    except EOFError as died:
        process.join()
        raise ChildProcessError(f"{function.__name__}: its process died (exit code {process.exitcode})") from died
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return value


def _answer(pipe: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    _ignore_interrupts()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        pipe.send((function(*args), None))
    except Exception as error:
        pipe.send((None, error))


def run_in_pool(
    cells: Sequence[Cell],
    shown: Collection[str],
    out: Path,
    workers: int,
    threads: int,
    begin: Callable[[Cell], None],
    end: Callable[[Cell, str | None], None],
    until: float = math.inf,
) -> None:
    """Run cells; one whose process dies fails alone.

    Args:
        cells: To run.
        shown: The identities of those that draw their pictures.
        out: The study's folder.
        workers: The most processes.
        threads: Of torch in each.
        begin: Called with each cell that is begun.
        end: Called with each that has ended, and its error or None.
        until: When, by `time.monotonic`, no further cell is begun.
    """
    start_imports()
    context = multiprocessing.get_context(_method())
    queue = list(cells)
    busy: dict[Any, _Worker] = {}

    def hire(number: int) -> None:
        mine, theirs = context.Pipe()
        args = (theirs, out, threads, number, dict(os.environ))
        process = context.Process(target=_work, args=args)  # type: ignore[attr-defined] # typed too narrowly
        process.start()
        theirs.close()
        busy[mine] = _Worker(process, number, None)
        give(mine)

    def give(pipe: Any) -> None:
        if not queue or time.monotonic() >= until:
            pipe.send(None)
            pipe.close()
            busy.pop(pipe).process.join()
            return
        cell = queue.pop(0)
        busy[pipe] = busy[pipe]._replace(cell=cell)
        begin(cell)
        with suppress(OSError):  # it died; reading from it will tell
            pipe.send((cell, cell.identity in shown))

    try:
        for number in range(min(workers, len(cells))):
            hire(number)
        while busy:
            pipe: Any
            for pipe in wait(list(busy)):
                process, number, cell = busy[pipe]
                assert cell is not None
                try:
                    error = pipe.recv()
                except EOFError:
                    process.join()
                    error = f"its process died (exit code {process.exitcode}): out of memory?"
                    fail(cell, out, error)
                    end(cell, error)
                    del busy[pipe]
                    if queue:
                        hire(number)
                    continue
                end(cell, error)
                give(pipe)
    finally:
        for worker in busy.values():
            worker.process.kill()
        for worker in busy.values():
            worker.process.join()


def _method() -> str:
    """How processes are started."""
    return "forkserver" if sys.platform == "linux" and not any(map(os.path.exists, _GPUS)) else "spawn"


def _ignore_interrupts() -> Any:
    """The handler that was there before; None outside of the main thread, which cannot change it."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(pipe: Any, out: Path, threads: int, number: int, environment: dict[str, str]) -> None:
    """Take cells until there are none; each worker has a device of its own where there are several."""
    _ignore_interrupts()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)  # of now: the server has that of its own start
    import torch

    if torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    while (task := pipe.recv()) is not None:
        cell, show = task
        pipe.send(execute(cell, out, threads, show))


def _die_with_parent() -> None:
    """A study that was killed is begun anew: nothing of it may still be at work in its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
