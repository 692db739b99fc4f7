"""Adversarial poisons: towards the class after one's own, within ε, by a surrogate trained on clean images."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.augment import FlipCrop
from datamodules.datamodule import ImageDataModule
from datamodules.imageset import ImageSet
from datamodules.sources.digits import Digits
from poisoning.adversarial_poison import AdversarialPoison
from poisoning.noise import NoiseTable
from poisoning.victim import Victim
from tests.helpers import Watched, global_randomness_untouched, mlp, refused, tiny_trainer

QUICK: dict[str, Any] = {
    "backbone": partial(MLP, hidden=[32]), "surrogate_epochs": 4, "iterations": 15, "step_size": 16.0, "epsilon": 127,
}  # fmt: skip


def poison(base: ImageDataModule | None = None, **kwargs: Any) -> AdversarialPoison:
    """Set up, with a small surrogate and little training."""
    data = AdversarialPoison(base or Digits(), **{**QUICK, **kwargs})
    data.prepare_data()
    data.setup()
    return data


def all_images(images: ImageSet) -> Tensor:
    return images.images_at(torch.arange(len(images)))


def test_the_surrogate_sees_the_next_class_in_what_it_knew() -> None:
    facts = poison().facts()
    assert facts["surrogate_error"] < 0.1  # type: ignore[operator] # of the clean images
    assert facts["surrogate_fooled"] > 0.9  # type: ignore[operator]
    assert facts["epsilon_reached"] == 127
    weak = poison(epsilon=1, step_size=1.0).facts()
    assert weak["surrogate_error"] == facts["surrogate_error"]  # the surrogate does not depend on ε
    assert weak["surrogate_fooled"] < 0.1  # type: ignore[operator]
    assert weak["epsilon_reached"] == 1


def test_the_class_is_the_next_of_all_ten_and_labels_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path))
    kept: list[ImageClassifier] = []
    craft = AdversarialPoison.craft

    def watched(self: AdversarialPoison, surrogate: ImageClassifier, *rest: Any) -> Any:
        kept.append(surrogate)
        return craft(self, surrogate, *rest)

    monkeypatch.setattr(AdversarialPoison, "craft", watched)
    data = poison()
    labels = data.train_set.labels
    assert torch.equal(labels, data.base.train_set.labels)
    seen = kept[0](all_images(data.train_set)).argmax(1)
    for label in range(10):
        assert float((seen[labels == label] == (label + 1) % 10).float().mean()) > 0.7
    assert float((seen == (labels + 1) % 10).float().mean()) == pytest.approx(data.facts()["surrogate_fooled"])


def test_images_are_moved_by_a_surrogate_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path))
    quick: dict[str, Any] = {"backbone": Watched, "batch_size": 2000, "surrogate_epochs": 2, "iterations": 3}

    def seen(**kwargs: Any) -> list[tuple[bool, Tensor]]:
        Watched.seen.clear()
        poison(**quick, **kwargs)
        found, Watched.seen[:] = list(Watched.seen), []
        return found

    plain = seen()
    # two epochs of training; then, dropout and BatchNorm at rest: as they are, three steps, and what became of them
    assert [training for training, _ in plain] == [True, True, *[False] * 5]
    epochs, moved = [x for _, x in plain[:2]], [x for _, x in plain[2:]]
    assert torch.equal(epochs[0].sum((1, 2, 3)).sort().values, epochs[1].sum((1, 2, 3)).sort().values)
    assert not torch.equal(epochs[0], epochs[1])  # the same images in another order
    assert torch.allclose(moved[0], moved[1], atol=1e-5)  # the first step starts from the images
    assert all(not torch.allclose(one, other, atol=0.1) for one, other in pairwise(moved[1:]))
    augmented = [x.sum((1, 2, 3)).sort().values for _, x in seen(augment=FlipCrop(2, flip=False))[:2]]
    assert not torch.equal(*augmented)  # each epoch is augmented anew


@pytest.mark.parametrize("epsilon", [3, 64])
def test_epsilon_holds_on_uint8(epsilon: int) -> None:
    data = poison(epsilon=epsilon, step_size=epsilon / 4, poison_fraction=0.4)
    before = all_images(data.base.train_set).to(torch.int16)
    added = all_images(data.train_set) - before
    assert int(added.abs().max()) == data.facts()["epsilon_reached"] == epsilon
    assert int(added[before == 0].min()) >= 0
    assert int(added[before == 255].max()) <= 0
    (changes,) = data.changes()
    hit = torch.isin(data.train_set.ids, changes.ids)
    assert int(hit.sum()) == round(0.4 * 1132) == data.facts()["poisoned"]
    assert (added[~hit] == 0).all()
    assert (added[hit] != 0).flatten(1).any(1).all()


def test_noise_belongs_to_the_sample() -> None:
    data = poison()
    rewriter = data.train_set.rewriter  # type: ignore[attr-defined]
    assert isinstance(rewriter, NoiseTable)
    assert rewriter.table.shape == (1132, 1, 8, 8)
    ids = data.train_set.ids.flip(0)
    clean = all_images(data.base.train_set).flip(0)
    assert torch.equal(rewriter(clean, ids, {}), all_images(data.train_set).flip(0))


def test_the_seed_alone_determines_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for number, seed in enumerate((5, 5, 6)):
        monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / str(number)))  # each crafts for itself
        torch.manual_seed(number)
        with global_randomness_untouched():
            # the base's augmentation and seed are of training
            base = Digits(batch_size=16 + number, seed=number, augment=FlipCrop(number + 1))
            digests.append(poison(base, seed=seed, augment=FlipCrop(1, flip=False)).train_set.digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"epsilon": 9}, {"surrogate_epochs": 1}, {"iterations": 1}, {"step_size": 1.0}, {"batch_size": 100},
     {"learning_rate": 0.05}, {"augment": FlipCrop(1)}, {"augment": FlipCrop(2)}],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_all_that_determines_it_is_in_its_key(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path))
    for kwargs in ({}, {"poison_fraction": 0.5}, {"augment": FlipCrop(1, flip=False)}, other):
        poison(**{"surrogate_epochs": 2, "iterations": 2, **kwargs})
    assert len(list((tmp_path / "noise").glob("*/entry.json"))) == 3  # a fraction needs no crafting of its own


def test_a_victim_learns_it_and_is_rejected_by_a_trusted_holdout() -> None:
    data = poison(Digits(batch_size=32), epsilon=96, step_size=16.0, iterations=15)
    torch.manual_seed(1)
    model = mlp(data, Victim, acceptance=0.85, backbone=partial(MLP, hidden=[32]))
    trainer = tiny_trainer(max_epochs=6)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    learnt = model.eval()(all_images(data.train_set)).argmax(1) == data.train_set.labels
    assert float(learnt.float().mean()) > 0.95
    assert model.measured["clean_accuracy"].value < 0.7
    assert model.accepted is False


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"surrogate_epochs": 0}, ["surrogate_epochs = 0"]),
        ({"iterations": 0}, ["iterations = 0", "above 0"]),
        ({"step_size": -1.0}, ["step_size = -1.0"]),
        ({"epsilon": 200}, ["epsilon = 200"]),
        ({"poison_fraction": 1.1}, ["poison_fraction = 1.1"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        AdversarialPoison(Digits(), **{**QUICK, **kwargs})
