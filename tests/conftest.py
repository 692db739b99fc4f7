"""What holds in every test: tiny data, an own cache, W&B off, no network, one thread, the environment restored."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fixtures_data

torch.set_num_threads(1)  # two jobs share two cores; and a process that never had a pool of threads can be forked


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the tiny data sets, written once; or what ``PHARMAKON_TEST_DATA`` names, where many sessions share them."""
    if shared := os.environ.get("PHARMAKON_TEST_DATA"):
        return Path(shared)
    folder = tmp_path_factory.mktemp("data")
    fixtures_data.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the store keeps what is costly, for all tests of a process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A test hands the process on as it got it; what it did not is put back where that can be done, and told of.

    Set up before all others, so that what they restore is restored when this looks. The global generators are not
    among it: each run seeds them, and no test rests on them.
    """
    before = _handed_on()
    yield
    after = _handed_on()
    for number, handler in before["signal handlers"].items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)
    os.chdir(before["working folder"])
    torch.set_default_dtype(before["number type"])
    changed = [f"{name}: {value} became {after[name]}" for name, value in before.items() if after[name] != value]
    if changed:
        warnings.warn(f"a test left another process behind than it found: {'; '.join(changed)}", stacklevel=1)


def _handed_on() -> dict[str, Any]:
    """What all tests of a process share, and what the process got from its parent."""
    mask = os.umask(0)
    os.umask(mask)
    catchable = [number for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP)]
    return {
        "signal handlers": {number: signal.getsignal(number) for number in catchable},
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "working folder": os.getcwd(),
        "umask": mask,
        "limits": [resource.getrlimit(limit) for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)],
        "torch's threads": torch.get_num_threads(),
        "threads that would keep the process": {t for t in threading.enumerate() if not t.daemon},
        "number type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "standard streams": (sys.__stdout__, sys.__stderr__),
    }


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever this process was begun by: nohup and a shell's background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def environment(as_before: None, data_folder: Path, cache_folder: Path) -> Iterator[None]:
    """Nothing of the machine's environment reaches a test; what a test sets, such as the run's seed, does not stay."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("PL_", "WANDB_", "SLURM_"))]:
        del os.environ[name]
    os.environ |= {
        "PHARMAKON_DATA": str(data_folder),
        "PHARMAKON_CACHE": str(cache_folder),
        "WANDB_MODE": "disabled",
        "WANDB_CACHE_DIR": str(cache_folder),
        "WANDB_CONFIG_DIR": str(cache_folder),
        "OMP_NUM_THREADS": "1",
    }
    yield
    test = os.environ.get("PYTEST_CURRENT_TEST")
    os.environ.clear()
    os.environ.update(before)
    if test is not None:
        os.environ["PYTEST_CURRENT_TEST"] = test


@pytest.fixture(autouse=True)
def no_network(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that would reach for another machine fails at once."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"no network in tests: {address[0]}")
        connect(self, address)

    resolve = socket.getaddrinfo

    def known(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (None, "", "127.0.0.1", "::1", "localhost", socket.gethostname()):
            raise socket.gaierror(f"no network in tests: {host}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "getaddrinfo", known)
