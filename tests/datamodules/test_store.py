"""The store under kill −9, concurrency, damage and full disks; its files against the safetensors library's reader."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file

from datamodules import store as module
from datamodules.errors import InputError
from datamodules.imageset import ImageSet
from datamodules.store import ImageWriter, Store, entry_digest, load_metadata, load_tensors, lock, save_tensors

KEY = {"data": "abc", "epsilon": 8 / 255, "classes": [1, 2], "on": True}


def make(folder: Path) -> None:
    """Two files of fixed content."""
    save_tensors(folder / "a.safetensors", {"x": torch.arange(50_000)})
    (folder / "b.json").write_text('{"value": 1}', encoding="utf-8")


def holds_what_make_wrote(folder: Path) -> bool:
    x = load_tensors(folder / "a.safetensors")["x"]
    return torch.equal(x, torch.arange(50_000)) and json.loads((folder / "b.json").read_text()) == {"value": 1}


def child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; its exit status is 0 if it returns."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool are not in the child: it would wait for them
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """The exit status; minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(root: Path, kind: str = "kind") -> set[str]:
    """What lies in the folder of a kind, but for lock files."""
    return {path.name for path in (root / kind).iterdir() if path.suffix != ".lock"}


# --- building --------------------------------------------------------------------------------------------------------
def test_an_entry_is_built_once_and_its_table_is_true(tmp_path: Path) -> None:
    calls = []

    def counted(folder: Path) -> None:
        calls.append(folder)
        make(folder)

    first = Store(tmp_path).build("kind", KEY, counted)
    assert Store(tmp_path).build("kind", dict(reversed(KEY.items())), counted) == first
    assert len(calls) == 1
    assert calls[0].parent == first.parent  # next to its place: a rename across file systems is none
    assert holds_what_make_wrote(first)
    entry = json.loads((first / "entry.json").read_text())
    assert entry["key"] == KEY
    for name in ("a.safetensors", "b.json"):
        data = (first / name).read_bytes()
        assert entry["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    canonical = json.dumps({"kind": "kind", "key": KEY, "format": 1}, sort_keys=True, separators=(",", ":"))
    assert first == tmp_path / "kind" / hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("other", [{**KEY, "epsilon": 0.1}, {**KEY, "more": None}, {"data": "abc"}])
def test_another_key_is_another_entry(tmp_path: Path, other: dict[str, object]) -> None:
    store = Store(tmp_path)
    store.build("kind", KEY, make)
    assert store.find("kind", KEY) is not None
    assert store.find("kind", other) is None
    assert store.find("other-kind", KEY) is None


def test_tuples_and_numbers_as_keys_are_found_again(tmp_path: Path) -> None:
    store, key = Store(tmp_path), {"shape": (3, 32, 32), "table": {10: "a", 9: "b"}}
    assert store.build("kind", key, make) == store.find("kind", key)


@pytest.mark.parametrize("key", [{"path": Path("x")}, {"p": float("nan")}, {"t": torch.ones(1)}])
def test_a_key_that_json_cannot_hold_is_refused(tmp_path: Path, key: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"JSON|compliant"):
        Store(tmp_path).build("kind", key, make)


@pytest.mark.parametrize("kind", ["", "..", "a/b", "a b"])
def test_a_kind_is_a_plain_word(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        Store(tmp_path).folder(kind, KEY)


@pytest.mark.parametrize("name", ["weights.pt", "x.pkl", "entry.json", "images.npy"])
def test_only_safetensors_and_json_are_stored(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Store(tmp_path).build("kind", KEY, lambda folder: (folder / name).write_bytes(b"{}"))
    assert names(tmp_path) == set()


def test_what_make_raises_is_raised_and_nothing_stays(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        make(folder)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Store(tmp_path).build("kind", KEY, broken)
    assert names(tmp_path) == set()
    with pytest.raises(ValueError, match="none was written"):
        Store(tmp_path).build("kind", KEY, lambda folder: None)
    assert holds_what_make_wrote(Store(tmp_path).build("kind", KEY, make))


def test_the_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PHARMAKON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert Store().root == tmp_path / "home" / ".cache" / "pharmakon"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store().root == tmp_path / "xdg" / "pharmakon"
    monkeypatch.setenv("PHARMAKON_CACHE", "~/mine")
    assert Store().root == tmp_path / "home" / "mine"


def test_everything_is_flushed_before_the_entry_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(handle: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    folder = Store(tmp_path).build("kind", KEY, make)
    at = events.index(("rename", folder.name))
    flushed = {name for _, name in events[:at]}
    assert {"a.safetensors", "b.json", "entry.json"} < flushed
    assert any(name.startswith(f"{folder.name}.tmp-") for name in flushed)
    assert ("sync", "kind") in events[at:]


# --- killed builders -------------------------------------------------------------------------------------------------
def test_killed_at_any_line_the_entry_is_absent_or_whole(tmp_path: Path) -> None:
    """The builder is killed at line 1, 3, 5 … of the store's code, until it gets through."""
    outcomes = []
    for line in range(1, 10_000, 2):
        root = tmp_path / str(line)

        def killed(line: int = line, root: Path = root) -> None:
            left = line

            def trace(frame: FrameType, event: str, _: object) -> Any:
                nonlocal left
                if frame.f_code.co_filename != module.__file__:
                    return None
                left -= event == "line"
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            Store(root).build("kind", KEY, make)

        ended = status_of(child(killed))
        found = Store(root).find("kind", KEY)
        outcomes.append(found is not None)
        if found is not None:
            assert holds_what_make_wrote(found)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if line % 5 == 0:  # whoever comes next has it, and finds nothing left lying about
            folder = Store(root).build("kind", KEY, make)
            assert holds_what_make_wrote(folder)
            assert names(root) == {folder.name}
    assert len(outcomes) > 60  # there were that many lines to be killed at
    assert outcomes[0] is False
    assert outcomes[-1] is True


def test_killed_at_random_moments_the_entry_is_absent_or_whole(tmp_path: Path) -> None:
    rng, outcomes = random.Random(0), []

    def slow(folder: Path) -> None:
        for part in range(6):
            save_tensors(folder / f"{part}.safetensors", {"x": torch.full((10_000,), part)})
            time.sleep(0.005)

    start = time.perf_counter()
    Store(tmp_path / "timed").build("kind", KEY, slow)
    duration = time.perf_counter() - start
    for trial in range(12):
        root = tmp_path / str(trial)
        pid = child(lambda root=root: Store(root).build("kind", KEY, slow))
        time.sleep(rng.uniform(0, duration) if trial else 0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcomes.append(Store(root).find("kind", KEY) is not None)
        folder = Store(root).build("kind", KEY, slow)
        assert names(root) == {folder.name}
        for part in range(6):
            assert torch.equal(load_tensors(folder / f"{part}.safetensors")["x"], torch.full((10_000,), part))
    assert not all(outcomes)  # some were killed in time


# --- several processes -----------------------------------------------------------------------------------------------
def test_eight_processes_build_once(tmp_path: Path) -> None:
    log, root = tmp_path / "log", tmp_path / "root"

    def work() -> None:
        def logged(folder: Path) -> None:
            with log.open("a") as file:
                file.write(f"built {os.getpid()}\n")
            time.sleep(0.2)
            make(folder)

        folder = Store(root).build("kind", KEY, logged)
        with log.open("a") as file:
            file.write(f"digest {entry_digest(folder)}\n")

    children = [child(work) for _ in range(8)]
    assert [status_of(pid) for pid in children] == [0] * 8
    lines = log.read_text().splitlines()
    assert sum(line.startswith("built") for line in lines) == 1
    digests = [line for line in lines if line.startswith("digest")]
    assert len(digests) == 8
    assert len(set(digests)) == 1


def test_a_waiter_takes_over_from_a_killed_builder(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def endless(folder: Path) -> None:
        (folder / "half.json").write_text("{")
        started.touch()
        time.sleep(60)

    builder = child(lambda: Store(tmp_path).build("kind", KEY, endless))
    while not started.exists():
        time.sleep(0.005)
    waiter = child(lambda: Store(tmp_path).build("kind", KEY, make))
    time.sleep(0.1)
    assert os.waitpid(waiter, os.WNOHANG) == (0, 0)  # it waits
    os.kill(builder, signal.SIGKILL)
    os.waitpid(builder, 0)
    assert status_of(waiter) == 0
    folder = Store(tmp_path).find("kind", KEY)
    assert folder is not None
    assert names(tmp_path) == {folder.name}


def test_a_lock_file_that_lies_about_locks_nobody_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.folder("kind", KEY)
    folder.parent.mkdir()
    folder.with_name(f"{folder.name}.lock").write_text("12345")
    (folder.parent / f"{folder.name}.tmp-12345-abc").mkdir()
    assert holds_what_make_wrote(store.build("kind", KEY, make))
    assert names(tmp_path) == {folder.name}


def test_a_lock_excludes_others(tmp_path: Path) -> None:
    path = tmp_path / "some.lock"
    with lock(path), path.open("ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- damage ----------------------------------------------------------------------------------------------------------
def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip_a_bit(folder / "a.safetensors"),
    "a truncated file": lambda folder: os.truncate(folder / "a.safetensors", 1000),
    "an emptied file": lambda folder: os.truncate(folder / "b.json", 0),
    "a missing file": lambda folder: (folder / "b.json").unlink(),
    "a missing table": lambda folder: (folder / "entry.json").unlink(),
    "a truncated table": lambda folder: os.truncate(folder / "entry.json", 50),
    "a flipped bit in the table": lambda folder: flip_a_bit(folder / "entry.json"),
    "a table that is none": lambda folder: (folder / "entry.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_set_aside_and_built_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store = Store(tmp_path)
    folder = store.build("kind", KEY, make)
    for n in (1, 2):
        DAMAGES[damage](folder)
        assert store.find("kind", KEY) is None
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert store.build("kind", KEY, make) == folder
        assert len(caplog.messages) == 1
        assert f"{folder.name}.damaged-{n}" in caplog.messages[0]
        assert "\n" not in caplog.messages[0]
        assert holds_what_make_wrote(folder)
    assert names(tmp_path) == {folder.name, f"{folder.name}.damaged-1", f"{folder.name}.damaged-2"}


@pytest.mark.parametrize("position", range(0, 400, 13))
def test_no_bit_of_a_small_file_can_flip_unseen(tmp_path: Path, position: int) -> None:
    store = Store(tmp_path)
    folder = store.build("kind", {}, lambda folder: save_tensors(folder / "a.safetensors", {"x": torch.arange(40)}))
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    (folder / "a.safetensors").write_bytes(data)
    assert store.find("kind", {}) is None


def test_an_entry_under_another_keys_name_is_not_taken_for_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.build("kind", KEY, make)
    other = store.folder("kind", {"another": "key"})
    folder.rename(other)
    assert store.find("kind", {"another": "key"}) is None


def test_a_process_hashes_an_unchanged_entry_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    folder = store.build("kind", KEY, make)
    hashed: list[str] = []
    real = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda path: (hashed.append(path.name), real(path))[1])
    monkeypatch.setattr(module, "_checked", {})
    for _ in range(3):
        store.build("kind", KEY, make)
    assert sorted(hashed) == ["a.safetensors", "b.json"]
    os.utime(folder / "b.json", ns=(1, 1))
    store.build("kind", KEY, make)
    assert sorted(hashed) == ["a.safetensors", "a.safetensors", "b.json", "b.json"]


# --- full and read-only disks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no room") as caught:
        Store(tmp_path).build("kind", KEY, make)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "kind") in str(caught.value)
    assert names(tmp_path) == set()
    monkeypatch.undo()
    assert holds_what_make_wrote(Store(tmp_path).build("kind", KEY, make))


@pytest.mark.parametrize("writer", ["save_tensors", "ImageWriter"])
def test_a_write_that_the_kernel_cuts_off_leaves_nothing(tmp_path: Path, writer: str) -> None:
    """With a real limit on file sizes, so that write() itself fails half-way."""

    def big(folder: Path) -> None:
        images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
        if writer == "save_tensors":
            save_tensors(folder / "a.safetensors", {"images": images})
        else:
            with ImageWriter(folder / "a.safetensors", 100, (3, 32, 32)) as file:
                file.write(images)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            Store(tmp_path).build("kind", KEY, big)
        except InputError as error:
            (tmp_path / "error").write_text(str(error))

    assert status_of(child(limited)) == 0
    assert "no room" in (tmp_path / "error").read_text()
    assert names(tmp_path) == set()


def test_an_error_of_makes_own_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Store(tmp_path).build("kind", KEY, lambda folder: (tmp_path / "missing.txt").read_text())
    assert names(tmp_path) == set()


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="PHARMAKON_CACHE") as caught:
        Store(tmp_path / "file").build("kind", KEY, make)
    assert "\n" not in str(caught.value)


def test_a_whole_entry_is_read_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Store(tmp_path).build("kind", KEY, make)
    for path in (tmp_path / "kind").glob("*.lock"):
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(module, "_checked", {})
    assert Store(tmp_path).build("kind", KEY, make) == folder
    assert sorted(tmp_path.rglob("*")) == before


# --- tensors ---------------------------------------------------------------------------------------------------------
def various() -> dict[str, torch.Tensor]:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    tensors = {str(kind): (torch.arange(15) - 7).to(kind).view(3, 5) for kind in [*kinds, torch.int8]}
    return {
        **tensors,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6).view(2, 3).T,
        "ä – name": torch.ones(1),
    }


def test_tensors_come_back_and_the_library_reads_the_same(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", various()
    save_tensors(path, tensors, {"note": "größer", "a": "1"})
    for read in (load_tensors(path), load_file(path)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name
    assert load_metadata(path) == {"note": "größer", "a": "1"}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "größer", "a": "1"}


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    tensors = various()
    save_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    save_file({"x": torch.arange(4)}, tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["x"], torch.arange(4))
    assert load_metadata(tmp_path / "x.safetensors") == {}


def test_what_the_format_cannot_hold_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.arange(4)})
    with pytest.raises(ValueError, match="complex64"):
        save_tensors(path, {"x": torch.ones(2, dtype=torch.complex64)})
    assert torch.equal(load_tensors(path)["x"], torch.arange(4))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_is_replaced_and_never_written_over(tmp_path: Path) -> None:
    """Who has a map of the old file goes on seeing it."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(4)})
    old = load_tensors(path)["x"]
    save_tensors(path, {"x": torch.arange(10, 14)})
    assert old.tolist() == [0, 1, 2, 3]
    assert load_tensors(path)["x"].tolist() == [10, 11, 12, 13]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.arange(4)})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        save_tensors(path, {"x": torch.arange(5)})
    assert torch.equal(load_tensors(path)["x"], torch.arange(4))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04\x95 a pickle", b"\xff" * 100])
def test_an_unreadable_file_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    for read in (load_tensors, load_metadata):
        with pytest.raises(InputError, match=r"x\.safetensors") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether the tensor's memory is a map of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return True
    return False


def test_tensors_are_maps_of_the_file_and_writing_to_them_does_not_change_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"images": torch.zeros(50, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(50)})
    before = path.read_bytes()
    read = load_tensors(path)
    assert mapped(read["images"], path)
    assert mapped(read["labels"], path)
    assert mapped(ImageSet(read["images"], read["labels"], torch.arange(50)).images[10:], path)
    assert not mapped(read["images"].clone(), path)
    read["images"][3] = 7
    assert path.read_bytes() == before
    assert int(load_tensors(path)["images"].sum()) == 0


def test_a_map_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.arange(100_000)})
    x = load_tensors(path)["x"]
    path.unlink()
    assert torch.equal(x, torch.arange(100_000))


# --- images, part by part --------------------------------------------------------------------------------------------
def test_images_written_in_parts_are_one_tensor_beside_small_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    images = torch.randint(0, 256, (37, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, boxes, flags = torch.arange(37), torch.zeros(37, 4), torch.ones(37, dtype=torch.bool)
    with ImageWriter(path, 37, (3, 5, 7), {"labels": labels, "boxes": boxes, "flags": flags}, {"a": "b"}) as writer:
        for start in range(0, 37, 10):
            writer.write(images[start : start + 10])
        boxes += 2.5  # small tensors may be filled until the end
    for read in (load_tensors(path), load_file(path)):
        assert torch.equal(read["images"], images)
        assert torch.equal(read["labels"], labels)
        assert torch.equal(read["boxes"], torch.full((37, 4), 2.5))
        assert read["flags"].all()
    assert load_metadata(path) == {"a": "b"}
    assert mapped(load_tensors(path)["images"], path)


def test_an_unfinished_file_of_images_is_no_safetensors_file(tmp_path: Path) -> None:
    path, images = tmp_path / "x.safetensors", torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    writer = ImageWriter(path, 3, (1, 4, 4))
    writer.write(images)
    with pytest.raises(SafetensorError):
        load_file(path)
    writer.close()
    assert torch.equal(load_file(path)["images"], images)
    with contextlib.suppress(KeyError), ImageWriter(path, 3, (1, 4, 4)) as writer:
        writer.write(images)
        raise KeyError
    with pytest.raises(SafetensorError):
        load_file(path)


def test_images_must_be_as_announced(tmp_path: Path) -> None:
    path, images = tmp_path / "x.safetensors", torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 images were announced, more came"), ImageWriter(path, 2, (1, 4, 4)) as w:
        w.write(images)
    with pytest.raises(ValueError, match="4 images were announced, 3 came"), ImageWriter(path, 4, (1, 4, 4)) as w:
        w.write(images)
    with pytest.raises(ValueError, match="uint8"), ImageWriter(path, 3, (1, 4, 4)) as w:
        w.write(images.float())
    with pytest.raises(ValueError, match=r"\(3, 4, 4\)"), ImageWriter(path, 3, (3, 4, 4)) as w:
        w.write(images)
    with pytest.raises(ValueError, match="images"):
        ImageWriter(path, 3, (1, 4, 4), {"images": images})
    labels = torch.arange(3)
    writer = ImageWriter(path, 3, (1, 4, 4), {"labels": labels})
    writer.write(images)
    labels.resize_(5)
    with pytest.raises(ValueError, match="labels"):
        writer.close()


def test_writing_images_takes_no_memory_for_them(tmp_path: Path) -> None:
    """96 MiB of images through parts of 3 MiB; the peak of a process of its own is measured."""
    report = tmp_path / "report"

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        part = torch.full((1000, 3, 32, 32), 9, dtype=torch.uint8)
        with ImageWriter(tmp_path / "x.safetensors", 32_000, (3, 32, 32)) as writer:
            for _ in range(32):
                writer.write(part)
        report.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    assert status_of(child(work)) == 0
    assert int(report.read_text()) < 20 * 1024  # KiB
    assert (tmp_path / "x.safetensors").stat().st_size > 96 * 10**6
