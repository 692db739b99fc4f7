"""What holds in every test: tiny data, an own cache, W&B off, no network, one thread, the environment restored."""

from __future__ import annotations

import os
import socket
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
def environment(data_folder: Path, cache_folder: Path) -> Iterator[None]:
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
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
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
