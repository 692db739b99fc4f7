"""Label flipping: as many wrong labels as asked for, all of them wrong, and no image touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.imageset import ImageSet, Overlay
from datamodules.sources.digits import Digits
from poisoning.label_flip import LabelFlip, flipped
from tests.helpers import refused, uniformity


def label_flip(base: Any = None, **kwargs: Any) -> LabelFlip:
    data = LabelFlip(base or Digits(), **kwargs)
    data.setup("fit")
    return data


def before_and_after(data: LabelFlip) -> tuple[Tensor, Tensor]:
    return data.base.train_set.labels, data.train_set.labels


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["random", "pairwise"])
def test_as_many_as_asked_for_and_each_is_wrong(kind: str, fraction: float) -> None:
    data = label_flip(kind=kind, flip_fraction=fraction)
    before, after = before_and_after(data)
    wanted = round(fraction * 1132)
    assert int((before != after).sum()) == wanted
    assert data.facts()["flipped"] == wanted
    [changes] = data.changes()
    assert len(changes.ids) == wanted
    assert torch.equal(changes.ids, changes.origins)
    assert torch.equal(changes.ids, data.train_set.ids[before != after])
    assert torch.equal(changes.labels, after[before != after])
    assert torch.equal(changes.original_labels, before[before != after])
    if kind == "pairwise":
        assert torch.equal(changes.labels, (changes.original_labels + 1) % 10)


def test_to_one_class_leaves_its_own_images_alone() -> None:
    data = label_flip(kind="to_class", target_label=7, flip_fraction=0.3)
    before, after = before_and_after(data)
    changed = before != after
    assert int(changed.sum()) == round(0.3 * 1132)
    assert after[changed].unique().tolist() == [7]
    assert 7 not in before[changed]
    with refused("flip_fraction = 0.9", "of 1014 eligible", "largest here is 0.89"):  # 118 of 1,132 are sevens
        label_flip(kind="to_class", target_label=7, flip_fraction=0.9)


def test_two_in_one_set_keep_their_facts() -> None:
    inner = LabelFlip(Digits(), 0.1, "pairwise", seed=1, name="first")
    facts = label_flip(inner, flip_fraction=0.2, seed=2).facts()
    assert (facts["flipped_first"], facts["flip_fraction_first"], facts["flip_seed_first"]) == (113, 0.1, 1)
    assert (facts["flipped"], facts["flip_fraction"], facts["flip_seed"]) == (226, 0.2, 2)


def test_images_ids_and_the_other_sets_are_untouched() -> None:
    plain = Digits()
    plain.setup()
    data = label_flip(flip_fraction=0.5)
    rows = torch.arange(1132)
    assert torch.equal(data.train_set.images_at(rows), plain.train_set.images_at(rows))
    assert torch.equal(data.train_set.ids, plain.train_set.ids)
    for found, expected in ((data.val_set, plain.val_set), (data.test_set, plain.test_set)):
        assert found.digest() == expected.digest()
    assert data.train_set.digest() != plain.train_set.digest()


def test_random_labels_are_uniform_over_the_wrong_ones() -> None:
    labels = torch.arange(10).repeat(4000)
    wrong = flipped(labels, 10, "random", None, seed=0)
    assert (wrong != labels).all()
    assert (int(wrong.min()) >= 0, int(wrong.max()) < 10) == (True, True)
    steps = (wrong - labels) % 10 - 1
    assert uniformity(steps, 9) > 1e-4
    assert uniformity(labels * 9 + steps, 90) > 1e-4  # for each class


def test_the_images_are_drawn_uniformly() -> None:
    counts = torch.zeros(1132, dtype=torch.int64)
    base = Digits()
    base.setup()
    for seed in range(60):
        data = LabelFlip(base, 0.25, seed=seed)
        data.setup()
        counts += data.train_set.labels != base.train_set.labels
    assert int(counts.sum()) == 60 * 283
    # the mean is 15, the deviation of a binomial 3.35
    assert int(counts.min()) > 1
    assert int(counts.max()) < 31


def test_the_seed_determines_images_and_labels() -> None:
    one, same, other = (label_flip(seed=seed, flip_fraction=0.3) for seed in (1, 1, 2))
    assert one.train_set.digest() == same.train_set.digest()
    assert one.changes()[0].ids.tolist() != other.changes()[0].ids.tolist()
    common = torch.isin(one.changes()[0].ids, other.changes()[0].ids)
    theirs = torch.isin(other.changes()[0].ids, one.changes()[0].ids)
    assert not torch.equal(one.changes()[0].labels[common], other.changes()[0].labels[theirs])


def test_unlabelled_samples_stay_unlabelled() -> None:
    class Half(LabelFlip):
        def rewrite(self, train: ImageSet) -> ImageSet:
            labels = train.labels.clone()
            labels[::2] = -1
            return super().rewrite(Overlay(train, torch.arange(len(train)), labels=labels))

    for kind in ("random", "pairwise"):
        data = Half(Digits(), 0.5, kind=kind)  # type: ignore[arg-type]
        data.setup()
        assert (data.train_set.labels[::2] == -1).all()
        assert (data.train_set.labels[1::2] != data.base.train_set.labels[1::2]).all()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"flip_fraction": -0.1}, ["flip_fraction = -0.1", "(0, 1]"]),
        ({"flip_fraction": 1.5}, ["flip_fraction = 1.5"]),
        ({"flip_fraction": float("nan")}, ["flip_fraction = nan"]),
        ({"kind": "any"}, ["kind = 'any'", "random, pairwise or to_class"]),
        ({"kind": "to_class"}, ["target_label = None", "to_class"]),
        ({"kind": "random", "target_label": 3}, ["target_label = 3", "to_class"]),
        ({"kind": "to_class", "target_label": 10}, ["target_label = 10", "10 classes"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        LabelFlip(Digits(), **kwargs)


def test_fractions_that_come_to_nothing_and_soft_labels() -> None:
    with refused("flip_fraction = 0.0001", "1132"):
        label_flip(flip_fraction=0.0001)

    class Soft(LabelFlip):
        def rewrite(self, train: ImageSet) -> ImageSet:
            return super().rewrite(Overlay(train, torch.arange(len(train)), labels=torch.zeros(len(train), 10)))

    with refused("LabelFlip", "soft labels"):
        Soft(Digits()).setup()
