"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from datamodules.files import write_atomically
from tests.helpers import refused


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datamodules.files.os.fsync", full)
    with refused(path, "No space left on device"):
        write_atomically(path, b"new, and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]  # nothing half-written stays behind
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with refused("absent", "No such file"):
        write_atomically(tmp_path / "absent" / "file", b"")
