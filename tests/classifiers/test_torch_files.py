"""Files of torch's: whatever bit of them is flipped, what is read is what was written, or it is refused."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from classifiers.backbones import MLP, TorchVision
from classifiers.backbones.named import load_file
from classifiers.classifier import ImageClassifier
from classifiers.torch_files import check_torch, read_torch
from classifiers.weights import load_checkpoint, load_weights, save_weights
from datamodules.errors import InputError
from tests.helpers import mlp, refused, tiny_trainer

HELD = {"state_dict": {"net.x": torch.arange(300.0), "net.y": torch.ones(3, 3)}, "epoch": 3, "steps": [1, 2.5]}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "some.ckpt"
    torch.save(HELD, path)
    return path


def same(found: Any) -> bool:
    """Whether it is `HELD`, by type and value."""
    return repr(found) == repr(HELD) and all(
        torch.equal(found["state_dict"][name], value)
        for name, value in HELD["state_dict"].items()  # type: ignore[index]
    )


def flipped(whole: bytes, bit: int) -> bytes:
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def outside_of_members(path: Path) -> list[int]:
    """The bytes of an archive that are no member's content: headers, names, sizes, the table at the end."""
    inside: set[int] = set()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                start = content._orig_compress_start  # type: ignore[attr-defined]
            inside |= set(range(start, start + member.file_size))
    blank = path.read_bytes()
    return [place for place in range(len(blank)) if place not in inside and blank[place : place + 1] != b"Z"]


def test_two_hundred_flips_of_a_checkpoint(written: Path) -> None:
    whole, noise = written.read_bytes(), random.Random(3)
    refusals = 0
    for _ in range(200):
        written.write_bytes(flipped(whole, noise.randrange(8 * len(whole))))
        try:
            found = load_checkpoint(written)
        except InputError:
            refusals += 1
        else:
            assert same(found)
    assert refusals >= 80, "what no member holds is padding, for the most part"
    written.write_bytes(whole)
    assert same(load_checkpoint(written))


def test_flips_outside_of_the_members(written: Path) -> None:
    """A header can turn a member into an empty folder, another one, or none; its checksum tells nothing of that."""
    whole, noise = written.read_bytes(), random.Random(5)
    bits = [8 * place + bit for place in outside_of_members(written) for bit in range(8)]
    with zipfile.ZipFile(written) as archive:
        table = 8 * archive.start_dir
    chosen = noise.sample([bit for bit in bits if bit >= table], 500) + noise.sample(bits, 100)
    attributes = [8 * (place + 38) + 4 for place in range(len(whole)) if whole.startswith(b"PK\x01\x02", place)]
    for bit in chosen + attributes:
        written.write_bytes(flipped(whole, bit))
        try:
            found = read_torch(written)
        except InputError:
            continue
        assert same(found), f"bit {bit % 8} of byte {bit // 8}"
        assert bit not in attributes


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in members:
            change(archive, member, content)
    path.write_bytes(buffer.getvalue())


def compressed(archive: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
    archive.writestr(member.filename, content, zipfile.ZIP_DEFLATED)


def twice(archive: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
    archive.writestr(member.filename, content)
    if member.filename.endswith("data/0"):
        archive.writestr(member.filename, bytes(len(content)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("change", "word"), [(compressed, "compressed"), (twice, "two members have one name")])
def test_archives_that_torch_does_not_write(
    change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None], word: str, written: Path
) -> None:
    rewritten(written, change)
    with refused(written.name, word):
        read_torch(written)


@pytest.mark.parametrize(
    "change", [lambda x: x + b"\0", lambda x: x + b"more" * 99, lambda x: b"MZ" + x, lambda x: b"\0" * 4 + x[4:]]
)
def test_bytes_before_and_after_the_archive(change: Callable[[bytes], bytes], written: Path) -> None:
    written.write_bytes(change(written.read_bytes()))
    with refused(written.name):
        read_torch(written)
    with refused(written.name):
        check_torch(written)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(share: float, written: Path) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole[: int(share * len(whole))])
    with refused(written.name, "truncated"):
        read_torch(written, unchecked=True)


# --- every door -------------------------------------------------------------------------------------------------------
def a_checkpoint(path: Path) -> ImageClassifier:
    from datamodules.sources.digits import Digits

    data = Digits()
    model: ImageClassifier = mlp(data)
    trainer = tiny_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, data)
    trainer.save_checkpoint(path)
    return model


def test_a_flipped_weight_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    model = a_checkpoint(path)
    tensor = next(model.net.parameters()).detach().numpy().tobytes()
    whole = path.read_bytes()
    assert whole.count(tensor) == 1
    path.write_bytes(flipped(whole, 8 * whole.index(tensor) + 8 * 40 + 6))
    about = {
        "num_classes": 10,
        "image_shape": (1, 8, 8),
        "mean": model.architecture.mean,
        "std": model.architecture.std,
    }
    doors: dict[str, Callable[[], object]] = {
        "load_checkpoint": lambda: load_checkpoint(path),
        "weights": lambda: load_weights(path),
        "model.weights": lambda: ImageClassifier(partial(MLP, hidden=[16]), weights=str(path), **about),  # type: ignore[arg-type]
        "load_from_checkpoint": lambda: ImageClassifier.load_from_checkpoint(path, weights_only=True),
        "pretrained": lambda: load_file(model.net, model.net.head, str(path)),  # type: ignore[arg-type]
    }
    for read in doors.values():
        with refused(path.name, "checksum"):
            read()


def test_stored_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the hub's folder was compared with its hash when it was fetched, and may have been damaged since."""
    from torchvision.models import get_model_weights, mobilenet_v3_small

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Path(get_model_weights("mobilenet_v3_small").DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(mobilenet_v3_small().state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(flipped(whole, 8 * (len(whole) // 2)))
    with refused("pretrained", "checksum"):
        TorchVision((3, 64, 64), 10, "mobilenet_v3_small", pretrained=True)


def test_a_sealed_file_as_pretrained_weights(tmp_path: Path) -> None:
    """The seal of a weights file is compared at this door too, and without its name it is no file of another maker."""
    net = MLP((1, 8, 8), 10, hidden=[4])
    model = ImageClassifier(partial(MLP, hidden=[4]), 10, (1, 8, 8), (0.5,), (0.5,))
    path = tmp_path / "weights.safetensors"
    save_weights(path, net.state_dict(), model.architecture)
    load_file(net, net.head, str(path))  # type: ignore[arg-type]
    whole = path.read_bytes()
    for damaged in (
        flipped(whole, 8 * (len(whole) - 5)),
        whole.replace(b"pharmakon-weights-1", b"pharmakon-weights-0"),
    ):
        path.write_bytes(damaged)
        with refused("pretrained", "hash"):
            load_file(net, net.head, str(path))  # type: ignore[arg-type]
    save_file(net.state_dict(), path)
    load_file(net, net.head, str(path))  # type: ignore[arg-type]


# --- the form without checksums ---------------------------------------------------------------------------------------
def test_the_old_form(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "old.pth"
    torch.save(HELD, path, _use_new_zipfile_serialization=False)
    with refused("old.pth", "no checksums", "write it anew"):
        load_checkpoint(path)
    with pytest.warns(UserWarning, match="without checksums"):
        assert same(read_torch(path, unchecked=True))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = path.rename(tmp_path / f"old-{digest[:8]}.pth")
    assert same(read_torch(named)), "its name is its checksum"


def test_what_is_neither(tmp_path: Path) -> None:
    path = tmp_path / "text.pth"
    path.write_text("no weights")
    with refused("text.pth", "not a checkpoint"):
        read_torch(path, unchecked=True)
    path.write_bytes(pickle.dumps(print))
    with refused("text.pth", "might run code"):
        read_torch(path, unchecked=True)
