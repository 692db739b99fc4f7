"""Every source, on tiny data sets in its true form on disk, against what was written there or torchvision's readers."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import inspect
import io
import os
import pickle
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import functional, v2

from datamodules.datamodule import Source
from datamodules.errors import InputError
from datamodules.sources import decode, gtsrb
from datamodules.sources.cifar import CIFAR10, CIFAR100
from datamodules.sources.digits import Digits
from datamodules.sources.fetch import unpack
from datamodules.sources.gtsrb import GTSRB
from datamodules.sources.image_folder import ImageFolder
from datamodules.sources.mnist import KMNIST, MNIST, EMNISTLetters, FashionMNIST
from datamodules.sources.noise import Noise
from datamodules.sources.npz import Npz, channel_statistics
from datamodules.sources.svhn import SVHN
from datamodules.sources.usps import USPS
from tests import fixtures_data as fixtures
from tests.fixtures_data import TEST, TRAIN, Written
from tests.helpers import uniformity

KNOWN = {
    "MNIST": MNIST,
    "FashionMNIST": FashionMNIST,
    "KMNIST": KMNIST,
    "EMNISTLetters": EMNISTLetters,
    "USPS": USPS,
    "CIFAR10": CIFAR10,
    "CIFAR100": CIFAR100,
    "SVHN": SVHN,
    "GTSRB": GTSRB,
}
WRITERS: dict[str, Callable[[Path], Written]] = {
    "MNIST": fixtures.write_mnist,
    "FashionMNIST": fixtures.write_fashion_mnist,
    "KMNIST": fixtures.write_kmnist,
    "EMNISTLetters": fixtures.write_emnist_letters,
    "USPS": fixtures.write_usps,
    "CIFAR10": fixtures.write_cifar10_binary,
    "CIFAR100": fixtures.write_cifar100_binary,
    "SVHN": fixtures.write_svhn,
    "Npz": fixtures.write_npz,
}


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))


class Answer(io.BytesIO):
    """What an HTTP server would answer for a file."""

    def __init__(self, url: str) -> None:
        super().__init__(Path(url.removeprefix("file://")).read_bytes())
        self.url, self.length = url, len(self.getvalue())


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of files are answered, others are not."""

    def urlopen(request: urllib.request.Request) -> Answer:
        if request.full_url.startswith("file:"):
            return Answer(request.full_url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every data set in it; no test changes it, and none of the sources writes into it."""
    folder = tmp_path_factory.mktemp("data")
    fixtures.write_all(folder)
    before = listing(folder)
    yield folder
    assert listing(folder) == before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def source(name: str, folder: Path, **more: Any) -> Source:
    if name == "ImageFolder":
        more = {"train": "image_folder/train", "test": "image_folder/test", "size": 32, **more}
        return ImageFolder(data_dir=str(folder), **more)
    if name == "Npz":
        return Npz("images.npz", data_dir=str(folder), **more)
    return KNOWN[name](data_dir=str(folder), **more)


def ready(made: Source) -> Source:
    made.prepare_data()
    made.setup()
    return made


def one_line(caught: pytest.ExceptionInfo[InputError], *parts: object) -> None:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    for part in parts:
        assert str(part) in text


def nchw(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- all of them -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*KNOWN, "ImageFolder", "Npz"])
def test_what_is_known_before_reading_is_true_after_it(shared: Path, name: str) -> None:
    made = source(name, shared, val_fraction=0.25)
    classes, shape, mean, std = made.num_classes, made.image_shape, made.mean, made.std
    assert len(made.class_names) == len(set(made.class_names)) == classes
    assert len(mean) == len(std) == shape[0]
    assert all(0 < m < 1 for m in (*mean, *std))
    ready(made)
    assert (len(made.train_set), len(made.val_set), len(made.test_set)) == (TRAIN - 16, 16, TEST)
    ids = torch.cat([made.train_set.ids, made.val_set.ids, made.test_set.ids])
    assert ids.sort().values.tolist() == list(range(TRAIN + TEST))
    assert made.next_id == TRAIN + TEST
    for part in (made.train_set, made.val_set, made.test_set):
        batch = part.__getitems__(torch.arange(len(part)))
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert tuple(batch.images.shape[1:]) == part.image_shape == shape
        assert int(batch.labels.max()) < classes
        bright = batch.images.double().mean((1, 2, 3))
        order = torch.stack([batch.labels.double(), bright])
        if name != "GTSRB":  # its boxes are of several sizes
            assert torch.corrcoef(order)[0, 1] > 0.98  # the class can be seen, so images and labels belong together


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "USPS"])  # which is resized
def test_pixels_and_labels_are_those_on_disk(data: Path, name: str) -> None:
    written = WRITERS[name](data)
    splits = source(name, data).read()
    assert torch.equal(splits.train_images, nchw(written.train_images))
    assert torch.equal(splits.test_images, nchw(written.test_images))
    assert torch.equal(splits.train_labels, torch.from_numpy(written.train_labels))
    assert torch.equal(splits.test_labels, torch.from_numpy(written.test_labels))
    assert splits.train_images.is_contiguous()
    assert splits.test_images.is_contiguous()


@pytest.mark.parametrize("name", [*KNOWN, "ImageFolder", "Npz"])
def test_the_same_data_have_the_same_digest_and_other_splits_another(shared: Path, name: str) -> None:
    digests = [ready(source(name, shared, **more)).train_set.digest() for more in ({}, {}, {"split_seed": 1})]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", KNOWN)
def test_data_in_a_folder_that_cannot_be_written(shared: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shared, copy)
    before = listing(copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        assert len(ready(source(name, copy)).test_set) == TEST
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert listing(copy) == before  # also where whoever tests may write everywhere


@pytest.mark.parametrize("name", KNOWN)
def test_missing_data_without_a_network_are_one_line(data: Path, name: str) -> None:
    layout = {
        "MNIST": "MNIST/raw/*-ubyte",
        "FashionMNIST": "FashionMNIST/raw/*-ubyte",
        "KMNIST": "KMNIST/raw/*-ubyte",
        "EMNISTLetters": "EMNIST/raw/emnist-letters-*-ubyte",
        "USPS": "usps.bz2 and usps.t.bz2",
        "CIFAR10": "cifar-10-batches-bin",
        "CIFAR100": "cifar-100-binary",
        "SVHN": "train_32x32.mat",
        "GTSRB": "gtsrb/GTSRB/Training",
    }
    with pytest.raises(InputError) as caught:
        source(name, data).prepare_data()
    one_line(caught, name, data, layout[name], "no network here", "PHARMAKON_DATA")
    with pytest.raises(InputError) as caught:
        source(name, data).setup()
    one_line(caught, name, data, "prepare_data()")


def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        MNIST(data_dir=str(tmp_path / "file" / "data")).prepare_data()
    one_line(caught, tmp_path / "file" / "data")


def test_a_folder_that_may_not_be_read_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refused)
        with pytest.raises(InputError) as caught:
            MNIST(data_dir=str(data)).prepare_data()
    one_line(caught, data, "may not be read")


def test_the_data_folder_comes_from_the_environment(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_DATA", str(shared))
    assert len(ready(MNIST()).test_set) == TEST
    assert len(ready(Npz("images.npz")).test_set) == TEST


@pytest.mark.parametrize("kind", [*KNOWN.values(), Digits, ImageFolder, Npz])
def test_a_line_tells_what_it_is_and_all_arguments_are_documented(kind: type[Source]) -> None:
    first = (inspect.getdoc(kind) or "").splitlines()[0]
    assert 20 < len(first) < 120
    assert first.endswith(".")
    if "__init__" in vars(kind):
        for argument in list(inspect.signature(kind.__init__).parameters)[1:]:
            assert f"    {argument}: " in (inspect.getdoc(kind) or "")


# --- MNIST -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_idx_files_are_read_as_torchvision_reads_them(shared: Path, name: str) -> None:
    splits = source(name, shared).read()
    for train, images, labels in (
        (True, splits.train_images, splits.train_labels),
        (False, splits.test_images, splits.test_labels),
    ):
        theirs = getattr(datasets, name)(str(shared), train=train)
        assert torch.equal(images[:, 0], theirs.data)
        assert torch.equal(labels, theirs.targets)


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b"\0\0\x0d" + d[3:], lambda d: b""]
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_idx_file_is_one_line(data: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    fixtures.write_mnist(data)
    path = data / "MNIST" / "raw" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        ready(MNIST(data_dir=str(data)))
    one_line(caught, path, "remove it")


def test_labels_of_another_number_than_images_are_an_error(data: Path) -> None:
    fixtures.write_mnist(data)
    path = data / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3)))
    with pytest.raises(InputError) as caught:
        ready(MNIST(data_dir=str(data)))
    one_line(caught, "64", "3")


def test_mnist_is_downloaded_with_its_checksums(shared: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = data.with_name("server")
    server.mkdir()
    sums = []
    for path in sorted((shared / "MNIST" / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        (server / f"{path.name}.gz").write_bytes(packed)
        sums.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://nobody.invalid/", f"{server.as_uri()}/"])
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    made = ready(MNIST(data_dir=str(data), val_fraction=0))
    assert torch.equal(made.train_set.images, MNIST(data_dir=str(shared)).read().train_images)
    assert not list(data.rglob("*.partial"))
    shutil.rmtree(data)
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, "0" * 32) for name, _ in sums])
    with pytest.raises(InputError) as caught:
        MNIST(data_dir=str(data)).prepare_data()
    one_line(caught, "download failed", "corrupted")


def test_letters_are_downloaded_and_stand_upright(shared: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = fixtures.write_emnist_letters(data.with_name("elsewhere"))
    server = data.with_name("server")
    server.mkdir()
    with zipfile.ZipFile(server / "all.zip", "w") as archive:
        for path in sorted((shared / "EMNIST" / "raw").iterdir()):
            archive.writestr(f"gzip/{path.name}.gz", gzip.compress(path.read_bytes()))
        archive.writestr("gzip/emnist-digits-train-images-idx3-ubyte.gz", b"of no interest")
    monkeypatch.setattr(datasets.EMNIST, "url", f"{server.as_uri()}/all.zip")
    monkeypatch.setattr(datasets.EMNIST, "md5", hashlib.md5((server / "all.zip").read_bytes()).hexdigest())
    made = ready(EMNISTLetters(data_dir=str(data), val_fraction=0))
    assert made.train_set.images[:, 0].tolist() == written.train_images[..., 0].tolist()
    assert made.train_set.labels.tolist() == written.train_labels.tolist()
    assert len(list((data / "EMNIST" / "raw").iterdir())) == 4, "nothing else is left"


# --- USPS ------------------------------------------------------------------------------------------------------------
def test_usps_is_read_as_torchvision_reads_it(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for train, name in ((True, "usps"), (False, "usps.t")):
        path = shared / "USPS" / f"{name}.bz2"
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        split = "train" if train else "test"
        monkeypatch.setitem(datasets.USPS.split_list, split, ["", path.name, digest])
        theirs = datasets.USPS(str(shared / "USPS"), train=train)
        images, labels = USPS(data_dir=str(shared)).read_original(name)
        difference = images[:, 0].int() - torch.from_numpy(theirs.data).int()
        assert 0 <= int(difference.min()) <= int(difference.max()) <= 1, "they cut off, we round"
        assert labels.tolist() == theirs.targets
    written = fixtures.both(10, (16, 16, 1), 21)
    assert images[:, 0].tolist() == written.test_images[..., 0].tolist()
    assert labels.tolist() == written.test_labels.tolist()


def test_usps_is_made_larger(shared: Path) -> None:
    usps = USPS(data_dir=str(shared))
    (small, _), large = usps.read_original("usps"), usps.read().train_images
    assert large.shape == (TRAIN, 1, 28, 28)
    torch.testing.assert_close(large.float().mean((1, 2, 3)), small.float().mean((1, 2, 3)), atol=2.0, rtol=0)
    expected = functional.resize(small, [28, 28], antialias=False)
    assert int((large.int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize(
    "change",
    [lambda d: d[:-9], lambda d: bz2.compress(b"1 1:0.5\n"), lambda d: bz2.compress(b"no numbers"), lambda d: b""],
)
def test_a_damaged_usps_file_is_one_line(data: Path, change: Callable[[bytes], bytes]) -> None:
    fixtures.write_usps(data)
    path = data / "USPS" / "usps.t.bz2"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        ready(USPS(data_dir=str(data)))
    one_line(caught, path, "remove it")


# --- noise -----------------------------------------------------------------------------------------------------------
def test_noise_is_uniform_and_belongs_to_its_seed() -> None:
    one, same, other = (ready(Noise((3, 8, 8), 5, 200, seed)) for seed in (0, 0, 1))
    assert len(one.train_set) + len(one.val_set) == 200
    assert len(one.test_set) == 20
    assert uniformity(one.train_set.images_at(torch.arange(100)), 256) > 1e-3
    assert one.train_set.digest() == same.train_set.digest() != other.train_set.digest()
    with pytest.raises(InputError, match="images = 0"):
        Noise(images=0)


# --- CIFAR -----------------------------------------------------------------------------------------------------------
def test_the_binary_version_and_the_npz_are_the_same_data(data: Path) -> None:
    fixtures.write_cifar10_binary(data / "binary")
    fixtures.write_cifar10_npz(data / "npz")
    binary, npz = (ready(CIFAR10(data_dir=str(data / part))) for part in ("binary", "npz"))
    assert binary.train_set.digest() == npz.train_set.digest()


def test_the_fine_labels_of_cifar_100_are_taken(shared: Path) -> None:
    record = (shared / "cifar-100-binary" / "train.bin").read_bytes()[3074 * 63 : 3074 * 64]
    splits = CIFAR100(data_dir=str(shared)).read()
    assert record[0] != record[1]
    assert int(splits.train_labels[63]) == record[1]
    assert splits.train_images[63].flatten().tolist() == list(record[2:])


@pytest.mark.parametrize("length", [0, 3072, 3073 * 2 + 1])
def test_a_truncated_batch_is_one_line(data: Path, length: int) -> None:
    fixtures.write_cifar10_binary(data)
    path = data / "cifar-10-batches-bin" / "data_batch_3.bin"
    os.truncate(path, length)
    with pytest.raises(InputError) as caught:
        ready(CIFAR10(data_dir=str(data)))
    one_line(caught, path, length, "remove the folder cifar-10-batches-bin")


def test_a_missing_batch_is_one_line(data: Path) -> None:
    fixtures.write_cifar10_binary(data)
    path = data / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.unlink()
    with pytest.raises(InputError) as caught:
        ready(CIFAR10(data_dir=str(data)))
    one_line(caught, path.parent, "data_batch_3.bin is missing", "remove the folder")


def write_pickles(folder: Path, written: Written, name: str) -> dict[str, str]:
    """The official Python version, in form; returns each file's MD5."""
    target = folder / {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[name]
    target.mkdir(parents=True)
    parts = {"data_batch_1": written[:2], "test_batch": written[2:]}
    if name == "CIFAR100":
        parts = {"train": written[:2], "test": written[2:]}
    sums = {}
    for part, (images, labels) in parts.items():
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        key = "labels" if name == "CIFAR10" else "fine_labels"
        (target / part).write_bytes(pickle.dumps({"data": rows, key: labels.tolist()}))
    (target / "meta").write_bytes(pickle.dumps({"label_names": ["a"], "fine_label_names": ["a"]}))
    for path in target.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    return sums


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_the_python_version_is_read_where_its_checksums_hold(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written = WRITERS[name](data.with_name("elsewhere"))
    sums = write_pickles(data, written, name)
    known = getattr(datasets, name)
    train, test = ("train", "test") if name == "CIFAR100" else ("data_batch_1", "test_batch")
    monkeypatch.setattr(known, "train_list", [[train, sums[train]]])
    monkeypatch.setattr(known, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(known, "meta", {**known.meta, "filename": "meta", "md5": sums["meta"]})
    splits = ready(source(name, data)).read()
    assert torch.equal(splits.train_images, nchw(written.train_images))
    assert torch.equal(splits.test_labels, torch.from_numpy(written.test_labels))
    assert splits.train_images.is_contiguous()


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("name", "folder"), [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")])
def test_a_tampered_pickle_is_one_line_and_never_opened(data: Path, tmp_path: Path, name: str, folder: str) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (data / folder).mkdir(parents=True)
    for part in ("data_batch_1", "test_batch", "batches.meta", "train", "test", "meta"):
        (data / folder / part).write_bytes(trap)
    with pytest.raises(InputError) as caught:
        ready(source(name, data))
    one_line(caught, data / folder, "official")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # it was a trap


def pack(path: Path, folder: Path) -> str:
    """A .tar.gz of a folder; returns its MD5."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("where", ["data_dir", "server"])
@pytest.mark.parametrize(("name", "folder"), [("CIFAR10", "cifar-10-batches-bin"), ("CIFAR100", "cifar-100-binary")])
def test_the_archive_is_unpacked_from_the_data_folder_or_after_a_download(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, where: str
) -> None:
    data = tmp_path / "data_dir"
    (tmp_path / where).mkdir()
    kind = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[name]
    monkeypatch.setattr(kind, "md5", pack(tmp_path / where / kind.archive, shared / folder))
    monkeypatch.setattr(kind, "address", f"{tmp_path.as_uri()}/server/")
    splits = ready(source(name, data)).read()
    assert torch.equal(splits.train_images, kind(data_dir=str(shared)).read().train_images)
    unpacked = {path.name for path in (data / folder).iterdir()}
    assert unpacked == {path.name for path in (shared / folder).iterdir()}
    assert {path.name for path in data.iterdir()} == {folder, kind.archive, ".download.lock"}


def test_of_several_at_once_one_downloads(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "md5", pack(tmp_path / CIFAR10.archive, shared / "cifar-10-batches-bin"))
    monkeypatch.setattr(CIFAR10, "address", f"{tmp_path.as_uri()}/")
    asked: list[urllib.request.Request] = []
    answer = urllib.request.urlopen

    def slow(request: urllib.request.Request) -> Any:
        asked.append(request)
        time.sleep(0.05)
        return answer(request)

    monkeypatch.setattr(urllib.request, "urlopen", slow)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: ready(CIFAR10(data_dir=str(tmp_path / "data"))), range(4)))
    assert [len(each.test_set) for each in made] == [TEST] * 4
    assert len(asked) == 2  # torchvision follows redirections first, then downloads


def test_an_archive_of_other_bytes_is_not_unpacked(shared: Path, data: Path) -> None:
    data.mkdir()
    pack(data / CIFAR10.archive, shared / "cifar-10-batches-bin")  # its checksum is not the official one
    with pytest.raises(InputError) as caught:
        ready(CIFAR10(data_dir=str(data)))
    one_line(caught, data, "no network here")
    assert not (data / "cifar-10-batches-bin").exists()


# --- archives --------------------------------------------------------------------------------------------------------
def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


EVIL = {
    "a path with dots": member("d/../../escaped", b"x"),
    "an absolute path": member("/tmp/pharmakon-test-escaped", b"x"),
    "a symbolic link": member("d/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a symbolic link inside": member("d/link", type=tarfile.SYMTYPE, linkname="fine"),
    "a hard link": member("d/link", type=tarfile.LNKTYPE, linkname="d/fine"),
    "a device": member("d/device", type=tarfile.CHRTYPE),
    "a pipe": member("d/pipe", type=tarfile.FIFOTYPE),
    "a bomb": member("d/bomb", b"\0" * 3_000_000),
}


@pytest.mark.parametrize("evil", EVIL)
def test_an_evil_tar_is_refused_whole(tmp_path: Path, evil: str) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with tarfile.open(inside / "x.tar.gz", "w:gz") as tar:
        for info, content in (member("d/fine", b"fine"), EVIL[evil]):
            content.seek(0)
            tar.addfile(info, content)
    with pytest.raises(InputError, match="refused") as caught:
        unpack(inside / "x.tar.gz", "d", inside / "d", 1_000_000)
    one_line(caught, inside / "x.tar.gz")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "x.tar.gz"]
    assert not Path("/tmp/pharmakon-test-escaped").exists()


def test_a_bomb_in_the_headers_of_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        info, content = member("d/fine", b"fine")
        info.pax_headers = {"comment": "x" * 5_000_000}
        tar.addfile(info, content)
    assert (tmp_path / "x.tar.gz").stat().st_size < 20_000
    with pytest.raises(InputError, match="more than"):
        unpack(tmp_path / "x.tar.gz", "d", tmp_path / "d", 1_000_000)


@pytest.mark.parametrize("evil", ["../../escaped", "/absolute", "d\\..\\..\\escaped", "link", "bomb"])
def test_an_evil_zip_is_refused_whole(tmp_path: Path, evil: str) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("d/fine", b"fine")
        info = zipfile.ZipInfo(evil)
        if evil == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, b"\0" * (3_000_000 if evil == "bomb" else 10))
    with pytest.raises(InputError, match="refused"):
        unpack(inside / "x.zip", "d", inside / "d", 1_000_000)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "x.zip"]


def test_a_good_archive_is_unpacked_and_a_damaged_or_another_one_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "file").write_bytes(np.random.default_rng(0).bytes(10_000))
    pack(tmp_path / "x.tar.gz", tmp_path / "d")
    unpack(tmp_path / "x.tar.gz", "d/e", tmp_path / "out", 20_000 + 10 * 1024)
    assert (tmp_path / "out" / "file").read_bytes() == (tmp_path / "d" / "e" / "file").read_bytes()
    with pytest.raises(InputError, match="there is no other"):
        unpack(tmp_path / "x.tar.gz", "other", tmp_path / "again", 100_000)
    data = (tmp_path / "x.tar.gz").read_bytes()
    for broken in (data[:5000], data[:3000] + b"\xff" * 100 + data[3100:], b"no archive"):
        (tmp_path / "x.tar.gz").write_bytes(broken)
        with pytest.raises(InputError) as caught:
            unpack(tmp_path / "x.tar.gz", "d", tmp_path / "again", 100_000)
        one_line(caught, tmp_path / "x.tar.gz", "damaged")
        assert not (tmp_path / "again").exists()
        assert not (tmp_path / "again.partial").exists()


# --- SVHN ------------------------------------------------------------------------------------------------------------
def test_svhn_is_read_as_torchvision_reads_it(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {
        split: [url, name, hashlib.md5((shared / "SVHN" / name).read_bytes()).hexdigest()]
        for split, (url, name, _) in datasets.SVHN.split_list.items()
        if split != "extra"
    }
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    splits = SVHN(data_dir=str(shared)).read()
    theirs = datasets.SVHN(str(shared / "SVHN"), "train")
    assert torch.equal(splits.train_images, torch.from_numpy(theirs.data.copy()))
    assert splits.train_labels.tolist() == theirs.labels.tolist()
    assert 0 in theirs.labels


def test_svhn_is_found_beside_other_data_and_downloaded(
    shared: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.mkdir()
    for split in ("train", "test"):
        shutil.copy(shared / "SVHN" / f"{split}_32x32.mat", data)
    assert torch.equal(SVHN(data_dir=str(data)).read().test_images, SVHN(data_dir=str(shared)).read().test_images)
    (data / "test_32x32.mat").unlink()
    path = shared / "SVHN" / "test_32x32.mat"
    entry = [path.as_uri(), path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", {**datasets.SVHN.split_list, "test": entry})
    assert len(ready(SVHN(data_dir=str(data))).test_set) == TEST
    assert (data / "SVHN" / "test_32x32.mat").read_bytes() == path.read_bytes()
    assert [path.name for path in (data / "SVHN").iterdir()] == ["test_32x32.mat"]


def test_a_damaged_mat_file_is_one_line(data: Path) -> None:
    from scipy.io import savemat

    fixtures.write_svhn(data)
    path = data / "SVHN" / "train_32x32.mat"
    whole = path.read_bytes()
    for broken in (b"", b"no mat file at all" * 20, whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(InputError) as caught:
            ready(SVHN(data_dir=str(data)))
        one_line(caught, path, "remove it")
    savemat(path, {"X": np.zeros((32, 32, 3, 5), np.uint8), "y": np.ones((4, 1), np.uint8)})
    with pytest.raises(InputError) as caught:
        ready(SVHN(data_dir=str(data)))
    one_line(caught, path, "4 labels")


# --- GTSRB -----------------------------------------------------------------------------------------------------------
def table(path: Path) -> list[list[str]]:
    return [line.split(";") for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("size", [32, 20])
def test_gtsrb_is_what_torchvision_reads_and_resizes(shared: Path, size: int) -> None:
    made = GTSRB(data_dir=str(shared), size=size, val_fraction=0)
    assert made.image_shape == (3, size, size)
    splits = ready(made).read()
    resize = v2.Compose([v2.Resize((size, size)), v2.PILToTensor()])
    for split, images, labels in (
        ("train", splits.train_images, splits.train_labels),
        ("test", splits.test_images, splits.test_labels),
    ):
        theirs = datasets.GTSRB(str(shared), split, transform=resize)
        assert torch.equal(images, torch.stack([image for image, _ in theirs]))
        assert labels.tolist() == [label for _, label in theirs]
    assert set(splits.train_labels.tolist()) == set(range(43))


def test_boxes_of_signs_are_scaled_with_the_images(shared: Path) -> None:
    splits = ready(GTSRB(data_dir=str(shared), size=48)).read()
    assert splits.train_extras is not None
    assert splits.test_extras is not None
    boxes = splits.test_extras["boxes"]
    assert boxes.dtype == torch.float32
    assert splits.train_extras["boxes"].shape == (TRAIN, 4)
    for row, (name, *numbers) in enumerate(table(shared / "gtsrb" / "GT-final_test.csv")):
        width, height, x1, y1, x2, y2, label = map(int, numbers)
        with Image.open(shared / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / name) as image:
            assert image.size == (width, height)
        expected = [x1 * 48 / width, y1 * 48 / height, x2 * 48 / width, y2 * 48 / height]
        assert boxes[row].tolist() == pytest.approx(expected, rel=1e-6)
        a, b, c, d = (round(edge) for edge in boxes[row].tolist())
        inside = splits.test_images[row, :, b + 2 : d - 2, a + 2 : c - 2].double().mean()
        assert inside == pytest.approx(20 + 5 * label + 7.5, abs=4)  # the box is round the bright sign
        assert splits.test_images[row, :, : b - 2].double().mean() < 16


def test_boxes_follow_the_rows_of_a_split(shared: Path) -> None:
    made = ready(GTSRB(data_dir=str(shared), val_fraction=0.25))
    splits = made.read()
    assert splits.train_extras is not None
    rows = torch.arange(len(made.train_set))
    assert torch.equal(made.train_set.extras_at(rows)["boxes"], splits.train_extras["boxes"][made.train_set.ids])


def test_signs_can_be_cut_out(shared: Path) -> None:
    splits = ready(GTSRB(data_dir=str(shared), size=24, crop_to_box=True)).read()
    assert splits.test_extras is not None
    assert torch.equal(splits.test_extras["boxes"], torch.tensor([[0.0, 0.0, 24.0, 24.0]]).expand(TEST, 4))
    for row, (name, *numbers) in enumerate(table(shared / "gtsrb" / "GT-final_test.csv")):
        with Image.open(shared / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / name) as image:
            cut = image.crop(tuple(map(int, numbers[2:6]))).resize((24, 24), Image.Resampling.BILINEAR)
        assert torch.equal(splits.test_images[row], torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy()))


def test_images_are_decoded_once_and_again_only_if_a_file_changes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixtures.write_gtsrb(data)
    opened: list[Path] = []
    real = decode._open
    monkeypatch.setattr(decode, "_open", lambda path: (opened.append(path), real(path))[1])
    first = ready(GTSRB(data_dir=str(data)))
    assert len(opened) == TRAIN + TEST
    assert ready(GTSRB(data_dir=str(data))).train_set.digest() == first.train_set.digest()
    assert len(opened) == TRAIN + TEST
    path = next((data / "gtsrb" / "GTSRB" / "Training").rglob("*.ppm"))
    pixels = bytearray(path.read_bytes())
    pixels[-1] ^= 255
    path.write_bytes(pixels)
    changed = ready(GTSRB(data_dir=str(data)))
    assert len(opened) == 2 * (TRAIN + TEST)
    assert changed.train_set.digest() != first.train_set.digest()
    ready(GTSRB(data_dir=str(data), size=16))
    assert len(opened) == 3 * (TRAIN + TEST)


def test_damaged_tables_and_images_of_signs_are_one_line(data: Path) -> None:
    fixtures.write_gtsrb(data)
    path = data / "gtsrb" / "GT-final_test.csv"
    whole = path.read_text()
    for broken in ("", "Filename;Width\nx;1\n", whole.replace("00000.ppm", "missing.ppm"), whole + "x;1;1;a;b;c;d;e\n"):
        path.write_text(broken)
        with pytest.raises(InputError) as caught:
            ready(GTSRB(data_dir=str(data)))
        one_line(caught, path)
    row = whole.splitlines()[1].split(";")
    path.write_text(whole.replace(";".join(row), ";".join([*row[:5], "200", *row[6:]])))
    with pytest.raises(InputError) as caught:
        ready(GTSRB(data_dir=str(data)))
    one_line(caught, row[0], "its box is", "200")
    path.write_text(whole.replace(";".join(row), ";".join([*row[:-1], "43"])))
    with pytest.raises(InputError) as caught:
        ready(GTSRB(data_dir=str(data)))
    one_line(caught, "0 … 42")
    path.write_text(whole)
    image = data / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00003.ppm"
    os.truncate(image, 100)
    with pytest.raises(InputError) as caught:
        ready(GTSRB(data_dir=str(data)))
    one_line(caught, image)


def test_gtsrb_is_downloaded_and_unpacked(shared: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = data.with_name("server")
    server.mkdir()
    archives = []
    for name, _, part in gtsrb._ARCHIVES:
        with zipfile.ZipFile(server / name, "w") as file:
            place = shared / "gtsrb" / part
            for path in [place] if place.is_file() else sorted(place.rglob("*.*")):
                file.write(path, path.relative_to(shared / "gtsrb"))
        archives.append((name, hashlib.md5((server / name).read_bytes()).hexdigest(), part))
    monkeypatch.setattr(gtsrb, "_ADDRESS", f"{server.as_uri()}/")
    monkeypatch.setattr(gtsrb, "_ARCHIVES", tuple(archives))
    made, theirs = ready(GTSRB(data_dir=str(data))), ready(GTSRB(data_dir=str(shared)))
    every = torch.arange(len(made.train_set))
    assert torch.equal(made.train_set.images_at(every), theirs.train_set.images_at(every))
    assert {path.name for path in (data / "gtsrb").iterdir()} == {
        "GTSRB",
        "GT-final_test.csv",
        *(a[0] for a in archives),
    }


# --- folders of images -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [32, 97])
def test_image_folders_are_what_torchvision_reads_resizes_and_crops(shared: Path, size: int) -> None:
    made = ready(source("ImageFolder", shared, size=size))
    splits = made.read()
    transform = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    for split, images, labels in (
        ("train", splits.train_images, splits.train_labels),
        ("test", splits.test_images, splits.test_labels),
    ):
        theirs = datasets.ImageFolder(str(shared / "image_folder" / split), transform=transform)
        assert theirs.classes == list(made.class_names) == list(fixtures.FOLDER_CLASSES)
        assert torch.equal(images, torch.stack([image for image, _ in theirs]))
        assert labels.tolist() == theirs.targets


def is_mapped(tensor: Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(".safetensors")
    return False


@pytest.mark.parametrize("more", [{}, {"test": None}])
def test_decoded_images_are_memory_maps_in_both_splits(shared: Path, more: dict[str, Any]) -> None:
    splits = source("ImageFolder", shared, **more).read()
    assert is_mapped(splits.train_images)
    assert is_mapped(splits.test_images)
    assert not is_mapped(splits.test_images.clone())


def test_a_test_set_is_cut_from_one_folder_by_the_split_seed(shared: Path) -> None:
    everything = source("ImageFolder", shared).read()
    cuts = [source("ImageFolder", shared, test=None, test_fraction=0.25, split_seed=seed).read() for seed in (0, 0, 1)]
    for cut in cuts:
        assert (len(cut.train_labels), len(cut.test_labels)) == (48, 16)
        images = torch.cat([cut.train_images, cut.test_images]).flatten(1).tolist()
        assert sorted(images) == sorted(everything.train_images.flatten(1).tolist())
    assert torch.equal(cuts[0].test_images, cuts[1].test_images)
    assert not torch.equal(cuts[0].test_images, cuts[2].test_images)
    assert cuts[0].digest == cuts[1].digest != cuts[2].digest


def test_what_other_programs_leave_behind_is_passed_over(data: Path) -> None:
    fixtures.write_image_folder(data)
    folder = data / "image_folder" / "train"
    before = source("ImageFolder", data).read()
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "ant" / "._001.png").write_bytes(b"no image")
    (folder / "ant" / "Thumbs.db").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no class")
    made = source("ImageFolder", data)
    assert made.num_classes == 4
    assert torch.equal(made.read().train_images, before.train_images)


def test_folders_that_do_not_fit_are_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixtures.write_image_folder(data)
    root = data / "image_folder"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data, train="missing")
    one_line(caught, "train = 'missing'", tmp_path / "missing", data / "missing")
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data, train=str(root / "train" / "ant" / "deeper"))
    one_line(caught, "no sub-folders")
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data, train=str(root / "train" / "ant" / "000.png"))
    one_line(caught, "000.png", "no folder")
    (root / "test" / "bees").mkdir()
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data)
    one_line(caught, "'bees'", "did you mean 'bee'?")
    (root / "test" / "bees").rmdir()
    (root / "train" / "wasp").mkdir()
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data).prepare_data()
    one_line(caught, root / "train" / "wasp", "without images")
    (root / "train" / "wasp").rmdir()
    for field, value in (("size", 0), ("test_fraction", 1.0), ("test_fraction", 0.0), ("test_fraction", float("nan"))):
        with pytest.raises(InputError, match=field):
            source("ImageFolder", data, **{field: value})
    with pytest.raises(InputError, match="test_fraction"):
        source("ImageFolder", data, test=None, test_fraction=0.001).prepare_data()
    shutil.rmtree(root / "test")
    (root / "test" / "ant").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data).prepare_data()
    one_line(caught, root / "test", "no images")


@pytest.mark.parametrize("kind", ["truncated", "no image", "16 bits"])
def test_an_image_that_cannot_be_read_is_one_line_and_nothing_is_stored(data: Path, tmp_path: Path, kind: str) -> None:
    fixtures.write_image_folder(data)
    path = data / "image_folder" / "train" / "bee" / "001.jpg"
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "no image":
        path.write_bytes(b"\x80\x04 no image")
    else:
        path = path.with_suffix(".png")
        Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(path)
    with pytest.raises(InputError) as caught:
        source("ImageFolder", data).prepare_data()
    one_line(caught, path, "16" if kind == "16 bits" else "not a readable image")
    assert [p.suffix for p in (tmp_path / "cache" / "image-folder").iterdir()] == [".lock"]


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_shows_how_far_it_is(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(decode, "_LONG", 10)
    monkeypatch.setattr(decode, "_CHUNK", 10 * 3 * 32 * 32)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    chunked = source("ImageFolder", shared)
    chunked.prepare_data()
    shown = capsys.readouterr()
    assert ("decoding 64 images" in shown.err) == terminal
    assert shown.out == ""
    monkeypatch.setenv("PHARMAKON_CACHE", f"{os.environ['PHARMAKON_CACHE']}-2")
    monkeypatch.undo()
    assert torch.equal(chunked.read().train_images, source("ImageFolder", shared).read().train_images)


# --- .npz ------------------------------------------------------------------------------------------------------------
def arrays(**changed: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (20, 9, 7, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": rng.integers(0, 256, (8, 9, 7, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "channels last": lambda x: x,
    "channels first": lambda x: x.transpose(0, 3, 1, 2).copy(),
    "grey": lambda x: x[..., 0].copy(),
    "one channel last": lambda x: x[..., :1].copy(),
    "one channel first": lambda x: x[..., :1].transpose(0, 3, 1, 2).copy(),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_channels_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, save: Callable[..., None]
) -> None:
    monkeypatch.setattr("datamodules.sources.npz._CHUNK", 500)  # some images at a time, and a part at the end
    good = arrays()
    turn = LAYOUTS[layout]
    save(tmp_path / "x.npz", **{**good, "x_train": turn(good["x_train"]), "x_test": turn(good["x_test"])})
    made = Npz(str(tmp_path / "x.npz"))
    colour = layout.startswith("channels")
    expected = nchw(good["x_train"])[:, : 3 if colour else 1]
    assert made.image_shape == (3 if colour else 1, 9, 7)
    splits = made.read()
    assert torch.equal(splits.train_images, expected)
    assert splits.train_images.is_contiguous()
    real = expected.double() / 255
    assert made.mean == pytest.approx(real.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert made.std == pytest.approx(real.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_given_statistics_names_and_labels_of_any_integer_type(tmp_path: Path) -> None:
    for kind in (np.uint8, np.int16, np.uint64):
        y = arrays()["y_train"].astype(kind)
        np.savez(tmp_path / "x.npz", **arrays(y_train=y[:, None]))
        made = Npz(str(tmp_path / "x.npz"), mean=(0.1, 0.2, 0.3), num_classes=6, class_names=list("abcdef"))
        assert made.mean == (0.1, 0.2, 0.3)
        assert all(0.2 < value < 0.4 for value in made.std)
        assert made.num_classes == 6
        assert made.read().train_labels.tolist() == [i % 4 for i in range(20)]
    assert Npz(str(tmp_path / "x.npz")).num_classes == 4
    with pytest.raises(InputError, match="class_names"):
        Npz(str(tmp_path / "x.npz"), class_names=["a"])
    with pytest.raises(InputError, match="std"):
        Npz(str(tmp_path / "x.npz"), std=(0.1,))


OBJECTS = np.empty(20, dtype=object)
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no test images": ({"x_test": None}, "no array x_test in it; it holds x_train, y_test, y_train"),
    "no labels": ({"y_train": None}, "no array y_train"),
    "float images": ({"x_train": np.zeros((20, 9, 7, 3), np.float32)}, "x_train is float32"),
    "flat images": ({"x_train": np.zeros((20, 63), np.uint8)}, "x_train is uint8 (20, 63)"),
    "four channels": ({"x_train": np.zeros((20, 9, 7, 4), np.uint8)}, "(N, H, W, 1 or 3)"),
    "no images": ({"x_test": np.zeros((0, 9, 7, 3), np.uint8), "y_test": np.zeros(0, int)}, "N > 0"),
    "Fortran order": ({"x_train": np.asfortranarray(arrays()["x_train"])}, "Fortran"),
    "other test images": ({"x_test": np.zeros((8, 9, 7), np.uint8)}, "(1, 9, 7)"),
    "real labels": ({"y_train": np.zeros(20)}, "y_train is float64"),
    "one-hot labels": ({"y_train": np.zeros((20, 4), int)}, "y_train is int64 (20, 4)"),
    "labels from 1": ({"y_train": np.arange(20) % 4 + 1}, "labels must start at 0"),
    "labels below 0": ({"y_train": np.arange(20) % 4 - 1}, "labels must start at 0"),
    "a label too many": ({"y_test": np.arange(8)}, "y_test holds the label 7, outside 0 … 3"),
    "a label below 0": ({"y_test": np.arange(8) % 4 - 1}, "y_test holds the label -1"),
    "a huge label": ({"y_test": np.full(8, 2**64 - 1, np.uint64)}, "18446744073709551615"),
    "too few labels": ({"y_train": np.arange(19) % 4}, "20 images in x_train, 19 labels"),
    "objects as labels": ({"y_train": OBJECTS}, "Python objects"),
    "objects as images": ({"x_train": OBJECTS}, "Python objects"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_arrays_that_do_not_fit_are_one_line(tmp_path: Path, fault: str) -> None:
    changed, expected = FAULTS[fault]
    np.savez(tmp_path / "x.npz", **arrays(**changed))
    with pytest.raises(InputError) as caught:
        Npz(str(tmp_path / "x.npz"))
    one_line(caught, "x.npz", expected)


def test_a_pickle_in_an_npz_is_never_opened(tmp_path: Path) -> None:
    labels = np.empty(20, dtype=object)
    labels[:] = [Trap(tmp_path / "sprung")] * 20
    np.savez(tmp_path / "x.npz", **arrays(y_train=labels))
    with pytest.raises(InputError, match="refused"):
        Npz(str(tmp_path / "x.npz"))
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(InputError, match=r"no readable \.npz"):
        Npz(str(tmp_path / "y.npz"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_one_line(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(InputError) as caught:
        Npz(str(path))
    one_line(caught, path)
    save(path, **arrays())
    whole = path.read_bytes()
    made = Npz(str(path))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError) as caught:
        Npz(str(path))
    one_line(caught, path)
    path.write_bytes(whole[:2000] + bytes((whole[2000] ^ 4,)) + whole[2001:])  # in the pixels of x_train
    with pytest.raises(InputError) as caught:
        made.read()
    one_line(caught, path)


def test_a_shape_that_is_larger_than_the_array_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays())
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": (10**9, 9, 7, 3), "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(tmp_path / "x.npz") as old, zipfile.ZipFile(tmp_path / "y.npz", "w") as new:
        for name in old.namelist():
            new.writestr(name, head.getvalue() if name == "x_train.npy" else old.read(name))
    with pytest.raises(InputError, match=r"instead of 189,000,000,000: the file is damaged"):
        Npz("y.npz", data_dir=str(tmp_path))


def test_statistics_are_exact_whatever_the_parts() -> None:
    images = torch.randint(0, 256, (50, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics((part.numpy() for part in images.split(7)), 3)
    assert mean == pytest.approx((images.double() / 255).mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx((images.double() / 255).std((0, 2, 3), correction=0).tolist(), abs=1e-12)
