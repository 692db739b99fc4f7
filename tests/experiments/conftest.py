"""Each test of the command works in a folder of its own, where its runs are kept too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experiments.running import Outcome, call


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: nothing lands in the checkout."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def lightning(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command, in this process: ``lightning("fit", "--config=badnets_digits")``."""
    return lambda *args: call(capsys, args)
