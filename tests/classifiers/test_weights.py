"""Weights files: what is read is what was written, or an error; and nothing in a file runs."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classifiers.backbones import MLP, SmallCNN
from classifiers.classifier import ImageClassifier, MisfitError, load_classifier
from classifiers.weights import (
    Architecture,
    content_hash,
    load_checkpoint,
    load_weights,
    save_weights,
)
from datamodules.errors import InputError
from datamodules.sources.digits import Digits
from tests.helpers import mlp, refused, tiny_trainer

SHAPE, MEAN, STD = (3, 8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def cnn(**kwargs: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(partial(SmallCNN, widths=[4, 6]), 7, SHAPE, MEAN, STD, **kwargs)


def some_pixels(n: int = 9) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A weights file of a model whose BatchNorm has seen something."""
    model = cnn()
    model(some_pixels())
    path = tmp_path / "weights.safetensors"
    model.eval().save(path)
    return path


def described(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


# --- there and back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_file_alone_rebuilds_the_classifier(tmp_path: Path, channels_last: bool) -> None:
    model = cnn(channels_last=channels_last)
    model(some_pixels())  # BatchNorm's statistics are part of a model
    model.eval()
    path = tmp_path / "weights.safetensors"
    digest = model.save(path)
    rebuilt = load_classifier(path)
    assert not rebuilt.training
    with torch.no_grad():
        assert torch.equal(rebuilt(some_pixels()), model(some_pixels()))
        assert torch.equal(rebuilt(some_pixels().float() / 255), model(some_pixels().float() / 255))
    assert type(rebuilt.net) is SmallCNN
    assert rebuilt.architecture == replace(model.architecture, init_args={"widths": [4, 6]})
    assert (rebuilt.architecture.mean, rebuilt.architecture.std) == (MEAN, STD)
    assert digest == content_hash(model.net.state_dict()) == rebuilt.save(tmp_path / "again.safetensors")
    assert described(tmp_path / "again.safetensors") == described(path)  # its order in the file is safetensors' affair


def test_mean_and_std_come_from_the_file(tmp_path: Path) -> None:
    model = cnn().eval()
    other = ImageClassifier(partial(SmallCNN, widths=[4, 6]), 7, SHAPE, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).eval()
    other.net.load_state_dict(model.net.state_dict())
    for name, each in (("one", model), ("other", other)):
        each.save(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            assert torch.equal(load_classifier(tmp_path / f"{name}.safetensors")(some_pixels()), each(some_pixels()))
    assert not torch.allclose(model(some_pixels()), other(some_pixels()))


def test_a_file_is_a_plain_safetensors_file(saved: Path) -> None:
    tensors = load_file(saved)
    assert set(tensors) == set(cnn().net.state_dict())
    architecture = json.loads(described(saved)["architecture"])
    assert architecture["class_path"] == "classifiers.backbones.cnn.SmallCNN"
    assert architecture["image_shape"] == [3, 8, 8]
    # and one from elsewhere, without our description, is taken where its names and shapes fit
    save_file(tensors, saved.with_name("foreign.safetensors"))
    model = cnn(weights=str(saved.with_name("foreign.safetensors")))
    assert all(torch.equal(value, tensors[name]) for name, value in model.net.state_dict().items())
    with refused("foreign.safetensors", "no architecture"):
        load_classifier(saved.with_name("foreign.safetensors"))


def test_tied_weights_are_stored_twice(tmp_path: Path) -> None:
    class Tied(MLP):
        def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
            super().__init__(image_shape, num_classes, [5])
            self.also_head = self.head

    model = ImageClassifier(Tied, 3, (1, 2, 2), (0.5,), (0.5,))
    model.save(tmp_path / "tied.safetensors")
    other = ImageClassifier(Tied, 3, (1, 2, 2), (0.5,), (0.5,), weights=str(tmp_path / "tied.safetensors"))
    assert torch.equal(other.net.head.weight, model.net.head.weight)  # type: ignore[union-attr, arg-type]


def test_a_backbone_of_ones_own_is_given_as_a_class(tmp_path: Path) -> None:
    model = ImageClassifier(Mine, 4, (1, 3, 3), (0.5,), (0.5,)).eval()
    path = tmp_path / "mine.safetensors"
    model.save(path)
    with refused("mine.safetensors", "Mine", "not one of this project's", "backbone"):
        load_classifier(path)
    rebuilt = load_classifier(path, backbone=Mine)
    pixels = some_pixels()[:, :1, :3, :3]
    assert torch.equal(rebuilt(pixels), model(pixels))


class Mine(nn.Module):
    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(image_shape[1] * image_shape[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.flatten(1))
        return logits


def test_pretrained_weights_are_not_looked_for_when_a_model_is_rebuilt(tmp_path: Path) -> None:
    model = cnn()
    path = tmp_path / "pretrained.safetensors"
    given = replace(model.architecture, init_args={"widths": [4, 6], "pretrained": "/absent/weights.pth"})
    save_weights(path, model.net.state_dict(), given)
    assert torch.equal(load_classifier(path)(some_pixels()), model.eval()(some_pixels()))


def test_a_checkpoint_of_lightnings_gives_its_weights(tmp_path: Path) -> None:
    data = Digits()
    model = mlp(data)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = mlp(data, weights=str(tmp_path / "last.ckpt"))
    assert all(torch.equal(x, y) for x, y in zip(other.parameters(), model.parameters(), strict=True))
    assert load_weights(tmp_path / "last.ckpt")[1] is None


# --- damage -----------------------------------------------------------------------------------------------------------
def test_every_flipped_bit_is_noticed_or_changes_nothing(saved: Path) -> None:
    whole = saved.read_bytes()
    before = load_classifier(saved)
    expected = before(some_pixels())
    header = int.from_bytes(whole[:8], "little") + 8
    noise = torch.Generator().manual_seed(0)
    places = torch.randint(header, len(whole), (40,), generator=noise).tolist()  # in the numbers
    places += torch.randint(0, header, (160,), generator=noise).tolist()  # in names, shapes, hash, mean and std
    messages: list[str] = []
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (number % 8)
        saved.write_bytes(damaged)
        try:
            found = load_classifier(saved)
        except InputError as error:
            messages.append(str(error))
        else:
            assert place < header
            assert torch.equal(found(some_pixels()), expected)
    assert all("\n" not in message and saved.name in message for message in messages)
    assert len(messages) >= 195


def test_a_changed_mean_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    assert whole.count(b"0.1, 0.2, 0.3") == 1
    saved.write_bytes(whole.replace(b"0.1, 0.2, 0.3", b"0.1, 0.2, 0.4"))
    with refused("weights.safetensors", "hash", "altered or damaged"):
        load_classifier(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with refused("weights.safetensors", "truncated, or not a safetensors file"):
        load_classifier(saved)
    saved.with_suffix(".ckpt").write_bytes(b"")
    torch.save({"state_dict": {"net.x": torch.zeros(1000)}}, saved.with_suffix(".ckpt"))
    checkpoint = saved.with_suffix(".ckpt").read_bytes()
    saved.with_suffix(".ckpt").write_bytes(checkpoint[: int(share * len(checkpoint))])
    with refused("weights.ckpt"):
        load_weights(saved.with_suffix(".ckpt"))


def test_weights_of_another_normalisation_are_warned_of(saved: Path) -> None:
    other = [0.25] * len(MEAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cnn(weights=str(saved))
    with pytest.warns(UserWarning, match="trained with another mean and std"):
        ImageClassifier(partial(SmallCNN, widths=[4, 6]), 7, SHAPE, other, STD, weights=str(saved))


def test_weights_that_do_not_fit_are_refused(saved: Path) -> None:
    tensors, architecture = load_weights(saved)
    assert architecture is not None

    def load(found: dict[str, Tensor]) -> None:
        save_weights(saved, found, architecture)
        cnn(weights=str(saved))

    load(tensors)
    with pytest.raises(MisfitError):
        load({**tensors, "extra": torch.zeros(1)})
    with refused("SmallCNN", "extra is left over"):
        load({**tensors, "extra": torch.zeros(1)})
    with refused("head.bias is missing"):
        load({name: tensor for name, tensor in tensors.items() if name != "head.bias"})
    with refused("head.bias has shape (8,), expected (7,)"):
        load({**tensors, "head.bias": torch.zeros(8)})
    with refused("and 1 more"):
        load({**tensors, "head.bias": torch.zeros(8), "head.weight": torch.zeros(8, 6)})
    with refused("MLP", "made for SmallCNN"):
        save_weights(saved, tensors, architecture)
        mlp(Digits(), weights=str(saved))


def test_weights_that_do_not_fit_change_nothing(saved: Path) -> None:
    tensors, architecture = load_weights(saved)
    assert architecture is not None
    save_weights(saved, {**tensors, "head.bias": torch.zeros(8)}, architecture)
    model = cnn()
    before = content_hash(model.net.state_dict())
    with pytest.raises(MisfitError):
        model.load(saved)
    assert content_hash(model.net.state_dict()) == before


def test_what_is_not_there(tmp_path: Path) -> None:
    with refused("weights = ", "absent.safetensors", "no such file"):
        load_weights(tmp_path / "absent.safetensors")
    with refused("no such file"):
        load_weights(tmp_path)  # a folder
    for address in (
        "https://example.org/weights.safetensors",
        "http://example.org/a.ckpt",
        "s3://bucket/w.safetensors",
    ):
        with refused(address, "a file of this machine"):
            load_weights(address)


# --- hostile files ----------------------------------------------------------------------------------------------------
class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, form: str) -> None:
    went_off, path = tmp_path / "went_off", tmp_path / "evil.ckpt"
    bomb = Bomb(went_off)
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": bomb}))
    elif form == "nested":
        torch.save({"state_dict": {"net.x": torch.zeros(1)}, "callbacks": [{"state": bomb}]}, path)
    else:
        torch.save({"state_dict": bomb}, path, _use_new_zipfile_serialization=form == "zip")
    for read in (load_weights, load_checkpoint, lambda p: mlp(Digits(), weights=str(p)), load_classifier):
        with refused("evil.ckpt", "refused", "might run code"):
            read(path)  # type: ignore[operator]
    assert not went_off.exists()
    if form == "pickle":  # which does go off for whoever unpickles it
        pickle.loads(path.read_bytes())
        assert went_off.exists()


def test_a_pickle_by_the_name_of_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "went_off")))
    with refused("weights.safetensors", "not a safetensors file"):
        load_weights(path)
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize(
    ("class_path", "words"),
    [
        ("os.system", ["os.system", "not one of this project's"]),
        ("subprocess.Popen", ["subprocess.Popen"]),
        ("torch.nn.Linear", ["torch.nn.Linear"]),
        ("classifiers.backbones_of_mine.Net", ["classifiers.backbones_of_mine.Net", "not one of this project's"]),
        ("classifiers.classifier.ImageClassifier", ["not one of this project's"]),
        ("SmallCNN", ["SmallCNN"]),
        ("", ["not one of this project's"]),
        ("classifiers.backbones.absent.Net", ["there is no backbone classifiers.backbones.absent.Net"]),
        ("classifiers.backbones.cnn.Absent", ["there is no backbone classifiers.backbones.cnn.Absent"]),
        ("classifiers.backbones.cnn.conv3x3", ["there is no backbone"]),
        ("classifiers.backbones.backbone.Backbone", ["cannot be rebuilt"]),
        ("classifiers.backbones.cnn.BadNetsCNN", ["16×16"]),
        ("classifiers.backbones.mlp.MLP", ["cannot be rebuilt", "widths"]),
    ],
)
def test_a_file_does_not_choose_what_is_imported(saved: Path, class_path: str, words: list[str]) -> None:
    tensors, architecture = load_weights(saved)
    assert architecture is not None
    init_args = {} if class_path.endswith("BadNetsCNN") else architecture.init_args
    save_weights(saved, tensors, replace(architecture, class_path=class_path, init_args=init_args))
    with refused(*words):
        load_classifier(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": -1},
        {"num_classes": 8},
        {"std": (0.0, 1.0, 1.0)},
        {"mean": (0.5,)},
        {"image_shape": (1, 8, 8)},
        {"image_shape": (3, 0, 8)},
        {"init_args": {"widths": [4, 6], "more": 1}},
        {"init_args": {"widths": [4, 5]}},
    ],
)
def test_a_description_that_does_not_fit_the_tensors_is_refused(saved: Path, change: dict[str, Any]) -> None:
    tensors, architecture = load_weights(saved)
    assert architecture is not None
    save_weights(saved, tensors, replace(architecture, **change))
    with refused():
        load_classifier(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"class_path": "x"}', "null"])
def test_a_description_that_is_none_is_refused(saved: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, architecture = load_weights(saved)
    assert architecture is not None
    monkeypatch.setattr("classifiers.weights.json", SimpleNamespace(dumps=lambda *_, **__: text))
    save_weights(saved, tensors, architecture)
    monkeypatch.undo()
    with refused("weights.safetensors", "architecture is damaged"):
        load_weights(saved)


def test_checkpoints_of_other_makers(tmp_path: Path) -> None:
    path = tmp_path / "odd.ckpt"
    torch.save([1, 2], path)
    with refused("odd.ckpt", "not a checkpoint"):
        load_checkpoint(path)
    torch.save({"model": {}}, path)
    with refused("odd.ckpt", "without a state_dict"):
        load_weights(path)
    torch.save({"state_dict": {"net.head.weight": "text", 5: torch.zeros(1), "other.x": torch.zeros(1)}}, path)
    assert load_weights(path) == ({}, None)
    with refused("odd.ckpt", "is missing"):
        mlp(Digits(), weights=str(path))


# --- writing ----------------------------------------------------------------------------------------------------------
def test_the_content_hash_is_of_names_types_shapes_and_bytes_in_any_order_and_layout() -> None:
    one, two = torch.arange(24.0).view(1, 4, 2, 3), torch.zeros(3)
    reference = content_hash({"a": one, "b": two})
    assert content_hash({"b": two, "a": one}) == reference
    assert content_hash({"a": one.to(memory_format=torch.channels_last), "b": two}) == reference
    variants: list[dict[str, Tensor]] = [
        {"a": two, "b": one},
        {"a": one, "c": two},
        {"a": one.double(), "b": two},
        {"a": one.flatten(), "b": two},
        {"a": one + 1, "b": two},
        {"a": one},
    ]
    assert len({reference, *map(content_hash, variants)}) == 7


def test_an_architecture_survives_json(saved: Path) -> None:
    given = Architecture("a.B", 3, (1, 2, 3), (0.1,), (1 / 3,), {"deep": {"list": [1, 2.5, None, "x"]}})
    save_weights(saved, {"x": torch.zeros(1)}, given)
    assert load_weights(saved)[1] == given
