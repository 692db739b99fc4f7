"""Data that are broken, hostile or not what they seem end in one line that names the file and the remedy."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import InputError
from datamodules.sources.cifar import CIFAR10
from datamodules.sources.gtsrb import GTSRB
from datamodules.sources.image_folder import ImageFolder, stratified
from datamodules.sources.mnist import MNIST
from datamodules.sources.npz import Npz
from tests import fixtures_data as fixtures


def line_of(caught: pytest.ExceptionInfo[InputError], *words: object) -> str:
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word} is not in: {text}"
    return text


# --- image folders ---------------------------------------------------------------------------------------------------
@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train/ and test/ with four classes each."""
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    fixtures.write_image_folder(tmp_path)
    return tmp_path / "image_folder"


def folder(train: Path, test: Path | None = None, **kwargs: Any) -> ImageFolder:
    return ImageFolder(str(train), None if test is None else str(test), size=16, **kwargs)


def test_the_parent_of_train_and_test_is_no_set_of_classes(root: Path) -> None:
    with pytest.raises(InputError) as caught:
        folder(root)
    line_of(caught, "splits and not classes (test, train)", f"train: {root}/train, test: {root}/test")
    (root / "test").rename(root.parent / "elsewhere")
    with pytest.raises(InputError) as caught:
        folder(root)
    line_of(caught, "splits and not classes (train)")
    (root / "train").rename(root / "Validation")
    (root / "TRAIN").mkdir()
    with pytest.raises(InputError) as caught:
        folder(root)
    line_of(caught, "splits and not classes")


def test_folders_of_other_programs_are_no_classes(root: Path) -> None:
    before = folder(root / "train", root / "test").read().digest
    for part in (root / "train", root / "test", root / "train" / "ant"):
        for name in ("__MACOSX", "@eaDir"):
            (part / name).mkdir()
            Image.new("RGB", (20, 20)).save(part / name / "001.jpg")
    made = folder(root / "train", root / "test")
    assert tuple(made.class_names) == fixtures.FOLDER_CLASSES
    assert made.read().digest == before


@pytest.mark.parametrize("how", ["the same", "dots", "a link", "inside", "round it"])
def test_a_test_set_is_not_the_training_set(root: Path, how: str) -> None:
    (root / "link").symlink_to(root / "train")
    test = {
        "the same": root / "train",
        "dots": root / "test" / ".." / "train",
        "a link": root / "link",
        "inside": root / "train" / "ant",
        "round it": root,
    }[how]
    with pytest.raises(InputError) as caught:
        folder(root / "train", test)
    line_of(caught, f"test = {str(test)!r}", "test_fraction")


def test_images_that_are_links_to_training_images_test_nothing(root: Path) -> None:
    there = next((root / "train" / "ant").glob("*.*"))
    (root / "test" / "ant" / f"link{there.suffix}").symlink_to(there)
    with pytest.raises(InputError) as caught:
        folder(root / "train", root / "test").prepare_data()
    line_of(caught, "1 of its 33 images are links to training images", f"link{there.suffix}")


def test_one_class_is_none(root: Path) -> None:
    (root / "one").mkdir()
    (root / "train" / "ant").rename(root / "one" / "ant")
    with pytest.raises(InputError) as caught:
        folder(root / "one")
    line_of(caught, "one sub-folder, 'ant'")


@pytest.mark.parametrize("kind", ["a folder in itself", "a file that is itself", "the data folder"])
def test_links_in_a_circle(root: Path, kind: str) -> None:
    if kind == "a folder in itself":
        (root / "train" / "ant" / "loop").symlink_to(root / "train" / "ant")
        with pytest.raises(InputError) as caught:
            folder(root / "train", root / "test").prepare_data()
        line_of(caught, root / "train" / "ant" / "loop", "remove the link")
    elif kind == "a file that is itself":
        loop = root / "train" / "ant" / "loop.png"
        loop.symlink_to(loop)
        with pytest.raises(InputError) as caught:
            folder(root / "train", root / "test").prepare_data()
        line_of(caught, loop, "mend or remove it")
        (root / "train" / "loop").symlink_to(root / "train" / "loop")
        with pytest.raises(InputError) as caught:
            folder(root / "train", root / "test")
        line_of(caught, root / "train" / "loop", "mend or remove it")
    else:
        (root / "data").symlink_to(root / "data")
        for source in (MNIST, CIFAR10):
            with pytest.raises(InputError) as caught:
                source(data_dir=str(root / "data")).prepare_data()
            line_of(caught, root / "data")
        with pytest.raises(InputError) as caught:
            folder(root / "data")
        line_of(caught, "there is no")


def test_all_broken_files_are_named_at_once(root: Path) -> None:
    broken = sorted((root / "train" / "bee").glob("*.*"))[:3]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        folder(root / "train", root / "test").prepare_data()
    line_of(caught, *broken)
    for path in (root / "train").rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        folder(root / "train", root / "test").prepare_data()
    line_of(caught, "(and 54 more)")


@pytest.mark.parametrize(
    ("counts", "fraction"), [((2, 2, 2, 2), 0.5), ((1, 9), 0.3), ((7, 5, 30), 0.2), ((2, 40), 0.9)]
)
def test_a_stratified_draw(counts: tuple[int, ...], fraction: float) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    draws = [stratified(labels, fraction, seed) for seed in range(5)]
    for drawn in draws:
        taken = labels[drawn].bincount(minlength=len(counts))
        assert int(drawn.sum()) == min(round(fraction * len(labels)), len(labels) - len(counts))
        assert bool((labels[~drawn].bincount(minlength=len(counts)) > 0).all()), "each class stays in training"
        assert bool(((taken - fraction * torch.tensor(counts)).abs() <= 1).all()) or max(counts) == 40
    assert len({tuple(drawn.tolist()) for drawn in draws}) > 1
    assert torch.equal(draws[0], stratified(labels, fraction, 0))


# --- tables and arrays -----------------------------------------------------------------------------------------------
def test_labels_that_are_too_few_name_their_file(tmp_path: Path) -> None:
    fixtures.write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack(">I", fixtures.TRAIN - 1) + data[8:-1])
    with pytest.raises(InputError) as caught:
        MNIST(data_dir=str(tmp_path)).setup()
    line_of(caught, path, "63 labels for 64 images")


def test_a_bad_row_of_a_table_is_what_is_to_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    fixtures.write_gtsrb(tmp_path)
    table = tmp_path / "gtsrb" / "GT-final_test.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3] = ";x".join(lines[3].rsplit(";", 1))
    table.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        GTSRB(data_dir=str(tmp_path)).prepare_data()
    assert "remove the folder" not in line_of(caught, table, "line 4", "mend or remove that line")


def npz(path: Path, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return str(path)


def array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def header(text: str) -> bytes:
    padded = text.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


GOOD = {
    "x_train": array(np.arange(50 * 64, dtype=np.uint8).reshape(50, 8, 8)),
    "y_train": array(np.arange(50) % 5),
    "x_test": array(np.arange(10 * 64, dtype=np.uint8).reshape(10, 8, 8)),
    "y_test": array(np.arange(10) % 5),
}


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (50, 8, 8",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-50, -8, 8), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1, " * 30 + "), }",
        "{'descr': 'zz', 'fortran_order': False, 'shape': (50, 8, 8), }",
        "{" * 100,
        "\x00" * 100,
        "'''",
        "[1, 2]",
    ],
)
def test_a_broken_header(tmp_path: Path, text: str) -> None:
    path = npz(tmp_path / "x.npz", **{**GOOD, "x_train": header(text) + bytes(3200)})
    with pytest.raises(InputError) as caught:
        Npz(path)
    line_of(caught, path)


def test_labels_are_counted_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path / "x.npz", **{**GOOD, "y_train": array(np.zeros(5_000_000, np.int64))})
    read = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        data = read(self, n)
        assert len(data) < 10**6, "all of it was read"
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    with pytest.raises(InputError) as caught:
        Npz(path)
    line_of(caught, "50 images in x_train, 5000000 labels in y_train")


def test_an_array_larger_than_the_memory_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Npz(npz(tmp_path / "x.npz", **GOOD))
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 3199)
    with pytest.raises(InputError) as caught:
        made.setup()
    line_of(caught, "x_train unpacks to 3,200 bytes", "3,199 of memory")


def test_a_constant_channel_is_named_with_its_file(tmp_path: Path) -> None:
    grey = np.arange(50 * 64, dtype=np.uint8).reshape(50, 8, 8)
    images = np.stack([grey, np.full_like(grey, 7), grey], -1)
    path = npz(tmp_path / "x.npz", **{**GOOD, "x_train": array(images), "x_test": array(images[:10])})
    made = Npz(path)
    with pytest.raises(InputError) as caught:
        _ = made.std
    line_of(caught, path, "channel 1 of x_train has one value")
    assert Npz(path, mean=(0.5,) * 3, std=(0.5,) * 3).std == (0.5,) * 3


def test_arrays_by_other_names_are_told_how_to_be_called(tmp_path: Path) -> None:
    names = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}
    path = npz(tmp_path / "x.npz", **{name: GOOD[ours] for name, ours in names.items()})
    with pytest.raises(InputError) as caught:
        Npz(path)
    line_of(caught, "rename", *(f"{name} to {ours}" for name, ours in names.items()))
