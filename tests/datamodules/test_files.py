"""Files that are whole or not there."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from datamodules.files import sweep, under_way, write_atomically
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


# --- what killed processes leave --------------------------------------------------------------------------------------
def killed_at_work(target: Path, folder: bool = False) -> str:
    """The name of what a process had under way when it was killed."""
    child = os.fork()
    if child == 0:
        with under_way(target, folder) as path:
            (path / "secret" if folder else path).write_bytes(b"half")
            time.sleep(60)
        os._exit(0)
    end = time.monotonic() + 20
    while not (found := [path for path in target.parent.glob(".*.part") if folder or path.stat().st_size]):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found[0].name


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_a_killed_process_left_is_swept(folder: bool, tmp_path: Path) -> None:
    name = killed_at_work(tmp_path / "one", folder)
    assert (tmp_path / name).exists()
    write_atomically(tmp_path / "another", b"whole")
    assert os.listdir(tmp_path) == ["another"]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_a_living_one_is_at_work_on_is_not(folder: bool, tmp_path: Path) -> None:
    """Whatever its number: one of another container may have ours, or that of a process which is gone."""
    with under_way(tmp_path / "one", folder) as path:
        other = path.with_name(".one.999999999-00000000.part")
        path.rename(other)
        sweep(tmp_path)
        write_atomically(tmp_path / "one.txt", b"")
        assert other.exists()
        other.rename(path)
    assert os.listdir(tmp_path) == ["one.txt"]


@pytest.mark.parametrize("name", [".x.ckpt.4711.part", ".key.0123456789abcdef.part", ".x.json.4711-01234567.part"])
def test_names_of_what_is_under_way(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mk.json").write_bytes(b"{}")
    sweep(tmp_path)
    assert not os.listdir(tmp_path)


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = {"film.part", ".film.part", ".x.1.partial", ".4711.part", "x.4711.part", ".x.4711.part.txt", ".x.abc.part"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / ".x.12.part").symlink_to(tmp_path / "target")
    sweep(tmp_path)
    assert {*names, "target"} <= set(os.listdir(tmp_path))
    sweep(tmp_path / "absent")


def test_where_there_are_no_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / ".x.12.part").touch()
    monkeypatch.setattr(fcntl, "flock", none)
    write_atomically(tmp_path / "x", b"whole")
    assert set(os.listdir(tmp_path)) == {"x", ".x.12.part"}


def test_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
        with under_way(tmp_path / "folder", folder=True) as path:
            path.rename(tmp_path / "folder")
        with under_way(tmp_path / "secret", mode=0o600) as path:
            path.rename(tmp_path / "secret")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "folder": 0o750, "secret": 0o600}
