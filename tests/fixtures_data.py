"""Writes tiny data sets (64 training and 32 test images) in the form in which each source finds its own on disk.

The brightness of an image tells its class, so that a model can learn it. Every function returns what it wrote, with the
pixels as (N, H, W, C); where decoding changes them, tests compare with another decoder instead.
"""

from __future__ import annotations

import bz2
import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TRAIN, TEST = 64, 32

FOLDER_CLASSES = ("ant", "bee", "class10", "class2")
"""Of the image folder, in the order that the source gives them."""


class Written(NamedTuple):
    """Images uint8 (N, H, W, C) and labels int64 (N,) of both splits."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def pictures(
    n: int, classes: int, shape: tuple[int, int, int], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise round a grey that rises with the class. All classes occur if `n` suffices, else they are spread out."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes if n >= classes else np.arange(n) * classes // n
    greys = 20 + labels * (200 / (classes - 1))
    noise = rng.integers(-15, 16, (n, *shape))
    return (greys[:, None, None, None] + noise).astype(np.uint8), labels.astype(np.int64)


def both(classes: int, shape: tuple[int, int, int], seed: int) -> Written:
    return Written(*pictures(TRAIN, classes, shape, seed), *pictures(TEST, classes, shape, seed + 1))


def _write_idx(folder: Path, written: Written, parts: tuple[str, str] = ("train", "t10k")) -> None:
    folder.mkdir(parents=True)
    for part, images, labels in ((parts[0], *written[:2]), (parts[1], *written[2:])):
        for name, values in (("images-idx3", images[..., 0]), ("labels-idx1", labels.astype(np.uint8))):
            head = bytes((0, 0, 8, values.ndim)) + b"".join(length.to_bytes(4, "big") for length in values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(head + values.tobytes())


def write_mnist(folder: Path) -> Written:
    written = both(10, (28, 28, 1), 1)
    _write_idx(folder / "MNIST" / "raw", written)
    return written


def write_fashion_mnist(folder: Path) -> Written:
    written = both(10, (28, 28, 1), 3)
    _write_idx(folder / "FashionMNIST" / "raw", written)
    return written


def write_kmnist(folder: Path) -> Written:
    written = both(10, (28, 28, 1), 17)
    _write_idx(folder / "KMNIST" / "raw", written)
    return written


def write_emnist_letters(folder: Path) -> Written:
    """On disk each image is transposed, and labels begin with 1."""
    written = both(26, (28, 28, 1), 19)
    lying = Written(
        written.train_images.transpose(0, 2, 1, 3), written.train_labels + 1,
        written.test_images.transpose(0, 2, 1, 3), written.test_labels + 1,
    )  # fmt: skip
    _write_idx(folder / "EMNIST" / "raw", lying, ("emnist-letters-train", "emnist-letters-test"))
    return written


def write_usps(folder: Path) -> Written:
    """What is returned is 16×16; on disk it is text, pixels in [−1, 1] with six decimals, labels from 1 on."""
    written = both(10, (16, 16, 1), 21)
    target = folder / "USPS"
    target.mkdir(parents=True)
    for name, images, labels in (("usps", *written[:2]), ("usps.t", *written[2:])):
        rows = [
            f"{label + 1} " + " ".join(f"{at}:{value / 127.5 - 1:.6f}" for at, value in enumerate(image.ravel(), 1))
            for image, label in zip(images, labels, strict=True)
        ]
        (target / f"{name}.bz2").write_bytes(bz2.compress(("\n".join(rows) + "\n").encode()))
    return written


def _records(images: NDArray[np.uint8], *labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """CIFAR's binary records: label bytes, then the red, green and blue planes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.column_stack([*(column.astype(np.uint8) for column in labels), planes])


def write_cifar10_binary(folder: Path) -> Written:
    written = both(10, (32, 32, 3), 5)
    target = folder / "cifar-10-batches-bin"
    target.mkdir(parents=True)
    for i, rows in enumerate(np.array_split(_records(*written[:2]), 5), 1):
        (target / f"data_batch_{i}.bin").write_bytes(rows.tobytes())
    (target / "test_batch.bin").write_bytes(_records(*written[2:]).tobytes())
    (target / "batches.meta.txt").write_text("airplane\nautomobile\n", encoding="utf-8")
    return written


def write_cifar10_npz(folder: Path) -> Written:
    """The same images as `write_cifar10_binary`."""
    written = both(10, (32, 32, 3), 5)
    folder.mkdir(parents=True, exist_ok=True)
    _save_npz(folder / "cifar10.npz", written, np.uint8)
    return written


def write_cifar100_binary(folder: Path) -> Written:
    written = both(100, (32, 32, 3), 7)
    target = folder / "cifar-100-binary"
    target.mkdir(parents=True)
    for name, images, labels in (("train", *written[:2]), ("test", *written[2:])):
        (target / f"{name}.bin").write_bytes(_records(images, labels // 5, labels).tobytes())
    return written


def write_svhn(folder: Path) -> Written:
    """The returned label of the digit 0 is 0; on disk it is 10."""
    from scipy.io import savemat

    written = both(10, (32, 32, 3), 9)
    target = folder / "SVHN"
    target.mkdir(parents=True)
    for name, images, labels in (("train", *written[:2]), ("test", *written[2:])):
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(target / f"{name}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y}, do_compression=True)
    return written


def write_gtsrb(folder: Path) -> None:
    """Signs of 43 kinds, 20 to 51 pixels wide, each in a box that is brighter than what is round it."""
    rng = np.random.default_rng(11)
    base = folder / "gtsrb" / "GTSRB"
    rows: dict[Path, list[list[object]]] = {}
    counts: dict[int, int] = {}
    for i in range(TRAIN + TEST):
        training = i < TRAIN
        label = i % 43 if training else (i * 7) % 43
        width, height = (int(side) for side in rng.integers(20, 52, 2))
        x1, y1, x2, y2 = width // 5, height // 6, width - width // 6, height - height // 5
        pixels = rng.integers(0, 16, (height, width, 3))
        pixels[y1:y2, x1:x2] += 20 + label * 5
        if training:
            number = counts[label] = counts.get(label, -1) + 1
            place, name = base / "Training" / f"{label:05d}", f"00000_{number:05d}.ppm"
            table = place / f"GT-{label:05d}.csv"
        else:
            place, name = base / "Final_Test" / "Images", f"{i - TRAIN:05d}.ppm"
            table = folder / "gtsrb" / "GT-final_test.csv"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / name)
        rows.setdefault(table, []).append([name, width, height, x1, y1, x2, y2, label])
    for table, lines in rows.items():
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
            writer.writerows(lines)


def write_image_folder(folder: Path) -> None:
    """``image_folder/train`` and ``…/test``: four classes, PNG and JPEG, 40 to 89 pixels, of several pixel modes."""
    rng = np.random.default_rng(13)
    forms = (("png", "RGB"), ("jpg", "RGB"), ("png", "L"), ("JPEG", "RGB"), ("png", "RGBA"), ("png", "P"))
    for split, n in (("train", TRAIN), ("test", TEST)):
        for i in range(n):
            label = i % len(FOLDER_CLASSES)
            place = folder / "image_folder" / split / FOLDER_CLASSES[label]
            if i >= n - len(FOLDER_CLASSES):
                place /= "deeper"
            place.mkdir(parents=True, exist_ok=True)
            width, height = rng.integers(40, 90, 2)
            pixels = (30 + 60 * label + rng.integers(-15, 16, (height, width, 3))).astype(np.uint8)
            suffix, mode = forms[i % len(forms)]
            Image.fromarray(pixels).convert(mode).save(place / f"{i:03d}.{suffix}")


def _save_npz(path: Path, written: Written, label_type: type[np.integer] = np.int64) -> None:
    train_images, train_labels, test_images, test_labels = written
    np.savez(
        path,
        x_train=train_images,
        y_train=train_labels.astype(label_type),
        x_test=test_images,
        y_test=test_labels.astype(label_type),
    )


def write_npz(folder: Path) -> Written:
    """``images.npz``: ten classes, colour, 16×16, channels last."""
    written = both(10, (16, 16, 3), 15)
    folder.mkdir(parents=True, exist_ok=True)
    _save_npz(folder / "images.npz", written)
    return written


def write_all(folder: Path) -> None:
    """Everything, into one data folder."""
    write_mnist(folder)
    write_fashion_mnist(folder)
    write_kmnist(folder)
    write_emnist_letters(folder)
    write_usps(folder)
    write_cifar10_binary(folder)
    write_cifar10_npz(folder)
    write_cifar100_binary(folder)
    write_svhn(folder)
    write_gtsrb(folder)
    write_image_folder(folder)
    write_npz(folder)
