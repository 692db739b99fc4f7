"""Classes: which images stay, under which labels, and what is measured."""

from __future__ import annotations

import pytest
import torch

from datamodules.classes import Classes
from datamodules.errors import InputError
from datamodules.imageset import ImageSet, Overlay
from datamodules.sources.digits import Digits
from poisoning.label_flip import LabelFlip


def made(*args: object, **options: object) -> Classes:
    data = Classes(Digits(), *args, **options)  # type: ignore[arg-type]
    data.setup()
    return data


def test_the_classes_named_stay_and_are_numbered_in_that_order() -> None:
    data, whole = made([5, 3]), Digits()
    whole.setup()
    assert data.num_classes == 2
    assert list(data.class_names) == [whole.class_names[5], whole.class_names[3]]
    for mine, all_ in (
        (data.train_set, whole.train_set),
        (data.val_set, whole.val_set),
        (data.test_set, whole.test_set),
    ):
        there = (all_.labels == 5) | (all_.labels == 3)
        assert torch.equal(mine.ids, all_.ids[there])
        assert torch.equal(mine.labels, (all_.labels[there] == 3).long())
        rows = torch.arange(len(mine))
        assert torch.equal(mine.images_at(rows), all_.images_at(there.nonzero().squeeze(1)))


def test_images_of_each_class_are_drawn_by_the_seed_alone() -> None:
    one, again, other = made([3, 5], 40), made([3, 5], 40), made([3, 5], 40, seed=1)
    assert one.train_set.labels.bincount().tolist() == [40, 40]
    assert torch.equal(one.train_set.ids, again.train_set.ids)
    assert not torch.equal(one.train_set.ids, other.train_set.ids)
    # whichever other classes there are, a class keeps its images
    both = made([5, 7], 40)
    assert torch.equal(one.train_set.ids[one.train_set.labels == 1], both.train_set.ids[both.train_set.labels == 0])


def test_all_images_of_a_class_may_be_asked_for_and_not_one_more() -> None:
    there = int((made([3, 5]).train_set.labels == 0).sum())
    fewest = min(there, int((made([3, 5]).train_set.labels == 1).sum()))
    assert made([3, 5], fewest).train_set.labels.bincount().tolist() == [fewest, fewest]
    with pytest.raises(InputError, match=f"per_class = {fewest + 1}: there are {fewest} training images"):
        made([3, 5], fewest + 1)


def test_an_image_without_a_label_is_of_no_class() -> None:
    class Half(Digits):
        @property
        def train_set(self) -> ImageSet:
            whole = super().train_set
            labels = torch.where(torch.arange(len(whole)) % 2 == 0, -1, whole.labels)
            return Overlay(whole, torch.arange(len(whole)), labels=labels)

    data = Classes(Half(), [0, 1])
    data.setup()
    kept = made([0, 1]).train_set
    rows = torch.isin(kept.ids, data.base.train_set.ids[1::2])
    assert torch.equal(data.train_set.ids, kept.ids[rows])
    assert torch.equal(data.train_set.labels, kept.labels[rows])


def test_what_is_measured_is_about_these_classes() -> None:
    data = made([8, 1])
    clean, holdout = data.evaluations("test")
    assert [clean.name, holdout.name] == ["clean", "holdout"]
    assert torch.equal(clean.measures[0].target, data.test_set.labels)
    assert set(clean.measures[0].target.tolist()) == {0, 1}
    assert torch.equal(holdout.images.ids, data.val_set.ids)


def test_classes_of_classes() -> None:
    inner = Classes(Digits(), [9, 8, 7])
    outer = Classes(inner, [2, 0])
    outer.setup()
    assert list(outer.class_names) == [inner.class_names[2], inner.class_names[0]]
    assert torch.equal(outer.test_set.ids, made([7, 9]).test_set.ids)


@pytest.mark.parametrize(
    ("classes", "per_class", "message"),
    [
        ([1], None, "name two classes or more, each once"),
        ([1, 1], None, "name two classes or more, each once"),
        ([1, 10], None, "classes = 10: there are 10 classes, 0 to 9"),
        ([1, 2], 0, "per_class = 0: it must be 1 or more"),
        ([1, 2], 5000, "per_class = 5000: there are"),
    ],
)
def test_what_cannot_be_is_refused(classes: list[int], per_class: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(classes, per_class)


def test_it_goes_inside_attacks() -> None:
    with pytest.raises(InputError, match=r"base = 'LabelFlip': Classes goes inside attacks"):
        Classes(LabelFlip(Digits(), 0.1), [1, 2])
    attacked = LabelFlip(Classes(Digits(), [1, 2]), 0.1)
    attacked.setup()
    assert set(attacked.train_set.labels.tolist()) == {0, 1}
