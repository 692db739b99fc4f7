"""Triggered: the training set as it is, and every test image with the trigger on it, under its true label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from datamodules.classes import Classes
from datamodules.measures import Evaluation
from datamodules.sources.cifar import CIFAR10
from datamodules.sources.digits import Digits
from datamodules.sources.gtsrb import GTSRB
from datamodules.triggers import PixelPattern, Pixels, SinglePixel, YellowSquare
from poisoning.badnets import BadNets
from poisoning.triggered import Triggered
from tests.helpers import mlp, refused, tiny_trainer


def triggered(name: str | None = None) -> Triggered:
    data = Triggered(Classes(Digits(), [5, 6, 7, 8, 9]), PixelPattern(), name)
    data.prepare_data()
    data.setup("fit")
    return data


def last(data: Triggered | BadNets, split: str = "test") -> Evaluation:
    return data.evaluations(split)[-1]


def test_the_training_set_is_the_bases_own() -> None:
    data = triggered()
    assert data.train_set is data.base.train_set
    assert data.changes() == []


@pytest.mark.parametrize("split", ["val", "test"])
def test_all_images_are_measured_triggered_with_their_true_labels(split: str) -> None:
    data = triggered()
    images = {"val": data.val_set, "test": data.test_set}[split]
    found = last(data, split)
    rows = torch.arange(len(images))
    assert [measure.name for measure in found.measures] == ["triggered_accuracy"]
    assert torch.equal(found.measures[0].target, images.labels)
    assert set(images.labels.tolist()) == {0, 1, 2, 3, 4}  # no class is left out
    assert torch.equal(found.images.ids, images.ids)
    clean, stamped = images.images_at(rows), found.images.images_at(rows)
    assert torch.equal(stamped, PixelPattern()(clean))
    pattern = torch.zeros(8, 8, dtype=torch.bool)
    pattern[[-2, -3, -2, -4], [-2, -3, -4, -2]] = True
    assert (stamped[..., pattern] == 255).all()
    assert torch.equal(stamped[..., ~pattern], clean[..., ~pattern])


def test_a_model_that_falls_for_the_trigger_is_measured_so() -> None:
    """One that says class 0 where it sees the pattern, and is right elsewhere, gets class 0's share."""
    data = triggered()
    answers = {
        image.numpy().tobytes(): int(label)
        for images in (data.test_set, data.val_set)
        for image, label, _ in (images[row] for row in range(len(images)))
    }

    class Backdoored(ImageClassifier):
        def forward(self, images: Tensor) -> Tensor:
            seen = [bool((image[0, [-2, -3, -2, -4], [-2, -3, -4, -2]] == 255).all()) for image in images]
            label = [
                0 if trigger else answers[image.numpy().tobytes()] for image, trigger in zip(images, seen, strict=True)
            ]
            return torch.nn.functional.one_hot(torch.tensor(label), 5).float()

    model = mlp(data, Backdoored)
    tiny_trainer().test(model, data, verbose=False)
    n, zeros = len(data.test_set), int((data.test_set.labels == 0).sum())
    assert 0 < zeros < n
    assert model.measured["clean_accuracy"].value == 1.0
    assert model.measured["triggered_accuracy"].value == pytest.approx(zeros / n)
    assert model.measured["triggered_accuracy"].n == n


def test_two_triggers_have_a_name_each() -> None:
    data = Triggered(Triggered(Digits(), PixelPattern()), SinglePixel(), name="pixel")
    data.setup("fit")
    names = [measure.name for evaluation in data.evaluations("test") for measure in evaluation.measures]
    assert names == ["clean_accuracy", "holdout_accuracy", "triggered_accuracy", "triggered_accuracy_pixel"]
    facts = data.facts()
    assert json.loads(str(facts["measured_trigger"]))["name"] == "PixelPattern"
    assert json.loads(str(facts["measured_trigger_pixel"]))["name"] == "SinglePixel"


def test_round_an_attack_its_measures_stay() -> None:
    data = Triggered(BadNets(Digits(), PixelPattern()), PixelPattern())
    data.setup("fit")
    found = {evaluation.name: len(evaluation.images) for evaluation in data.evaluations("test")}
    assert found["all_triggered"] == len(data.test_set)
    assert found["triggered"] == int((data.test_set.labels != 0).sum())


def test_no_holdout_is_no_measure() -> None:
    data = Triggered(Digits(val_fraction=0), PixelPattern())
    data.setup("fit")
    assert [evaluation.name for evaluation in data.evaluations("val")] == []
    assert [evaluation.name for evaluation in data.evaluations("test")] == ["clean", "all_triggered"]


def test_a_sticker_is_placed_by_each_images_box(data_folder: Path) -> None:
    data = Triggered(GTSRB(16, data_dir=str(data_folder), val_fraction=0.25), YellowSquare())
    data.prepare_data()
    data.setup("fit")
    rows = torch.arange(len(data.test_set))
    boxes = data.test_set.extras_at(rows)["boxes"]
    expected = YellowSquare()(data.test_set.images_at(rows), boxes)
    assert torch.equal(last(data).images.images_at(rows), expected)


def test_what_does_not_fit_is_refused() -> None:
    with refused("trigger", "does not lie within the image"):
        Triggered(Digits(), Pixels([[-9, -1]]))
    with refused("trigger", "YellowSquare", "3 channels"):
        Triggered(Digits(), YellowSquare())  # grey images


def test_a_sticker_without_boxes_is_refused_before_training(data_folder: Path) -> None:
    data = Triggered(CIFAR10(str(data_folder), val_fraction=0.25), YellowSquare())
    data.prepare_data()
    with refused("YellowSquare", "boxes"):
        data.setup("fit")


def test_a_backdoor_is_looked_for_on_all_other_classes() -> None:
    data = Triggered(Digits(), PixelPattern(), target_label=3)
    data.setup("fit")
    (found,) = [each for each in data.evaluations("test") if each.name == "triggered"]
    (measure,) = found.measures
    assert measure.name == "attack_success_rate"
    assert measure.target.unique().tolist() == [3]
    assert len(found.images) == int((data.test_set.labels != 3).sum())
    assert 3 not in found.images.labels.tolist()
    with refused("target_label = 10"):
        Triggered(Digits(), PixelPattern(), target_label=10)
