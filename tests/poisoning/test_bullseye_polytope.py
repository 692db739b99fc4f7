"""Bullseye Polytope: the poisons' mean feature, the room of ε, and poisons in the place of their bases."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from classifiers.backbones import SmallCNN
from classifiers.classifier import ImageClassifier
from datamodules.sources.digits import Digits
from poisoning.bullseye_polytope import BullseyePolytope, centre, off_centre
from poisoning.targets import Confidence, box, in_place, rounded, target_row
from tests.helpers import global_randomness_untouched, mlp, refused, some_images, tiny_trainer


def pixels(images: Tensor) -> Tensor:
    """Features that are the pixels themselves."""
    return images.flatten(1)


def grey(*values: int) -> Tensor:
    """Images of one pixel: uint8 (len(values), 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None]


@pytest.fixture(scope="module")
def network() -> ImageClassifier:
    """A small CNN with BatchNorm for the digits, untrained, in evaluation mode."""
    data = Digits()
    private = torch.Generator().manual_seed(3)
    model: ImageClassifier = mlp(data, backbone=partial(SmallCNN, widths=[4, 8])).eval()
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=private) * 0.3
    return model


@pytest.fixture(scope="module")
def weights(network: ImageClassifier, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    network.save(path)
    return str(path)


def digits_task(targets: int = 3, poisons: int = 5) -> tuple[Tensor, Tensor]:
    """Targets and bases as `centre` wants them."""
    data = Digits()
    data.setup()
    images = data.train_set.images_at(torch.arange(targets * (poisons + 1)))
    return images[:targets], images[targets:].unflatten(0, (targets, poisons))


# --- what is measured -------------------------------------------------------------------------------------------------
def test_confidence_is_the_mean_probability_of_the_wanted_class() -> None:
    metric = Confidence()
    metric.update(torch.tensor([[1.0, 1.0], [1.0, 4.0], [9.0, 1.0]]).log(), torch.tensor([1, 0, -1]))
    metric.update(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx((0.5 + 0.2 + 0.75) / 3)


# --- the loss ---------------------------------------------------------------------------------------------------------
def test_the_distance_of_the_mean_feature_by_hand() -> None:
    poisons = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.0], [0.0, 0.8]]])[:, :, None, None]  # T = P = 2
    aims = torch.tensor([[1.0, 1.0], [0.3, 0.4]])
    # means (½, ½) and (0.3, 0.4): ½√2 / √2 = ½, and 0
    assert torch.allclose(off_centre([pixels], poisons, [aims]), torch.tensor([0.5, 0.0]))
    # each poison alone is far from the second target: it is the mean that counts
    assert float((poisons[1].flatten(1) - aims[1]).norm(dim=1).min()) > 0.4


def test_extractors_count_alike_whatever_the_scale_of_their_features() -> None:
    poisons, aims = torch.rand(2, 3, 1, 2, 2), torch.rand(2, 4)
    alone = off_centre([pixels], poisons, [aims])
    scaled = off_centre([pixels, lambda images: 1000 * pixels(images)], poisons, [aims, 1000 * aims])
    assert torch.allclose(alone, scaled)
    # and two of them give the mean: features that are all constant 1 are on target
    ones = [torch.ones(2, 1)]
    both = off_centre([pixels, lambda images: images.new_ones(len(images), 1)], poisons, [aims, *ones])
    assert torch.allclose(both, alone / 2)


def test_the_gradient_is_that_of_finite_differences() -> None:
    private = torch.Generator().manual_seed(1)
    layers = [torch.randn(9, 5, generator=private, dtype=torch.float64) for _ in range(2)]
    extractors = [lambda images, layer=layer: (pixels(images) @ layer).tanh() for layer in layers]
    x, way = torch.rand(2, 2, 3, 1, 3, 3, generator=private, dtype=torch.float64)
    aims = [features(torch.rand(2, 1, 3, 3, generator=private, dtype=torch.float64)) for features in extractors]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(off_centre(extractors, x, aims).sum(), x)
    h = 1e-6
    up, down = (float(off_centre(extractors, x.detach() + sign * h * way, aims).sum()) for sign in (1, -1))
    assert float((slope * way).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-6)


# --- crafting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (112, [102, 122]),  # the mean of 100 and 120 is 110: both rise by 2, and neither is 112
        (200, [108, 128]),  # out of reach: as far as ε goes
        (10, [92, 112]),
    ],
)
def test_poisons_of_one_pixel_by_hand(target: int, expected: list[int]) -> None:
    made = centre([pixels], grey(target), grey(100, 120)[None], epsilon=8, iterations=400, step=0.001)
    assert made.images.flatten().tolist() == expected
    assert float(made.before) == pytest.approx(abs(target - 110) / target)
    assert float(made.distance) == pytest.approx(abs(target - sum(expected) / 2) / target, abs=1e-6)


def test_epsilon_holds_after_rounding_and_at_the_ends_of_the_scale() -> None:
    bases = grey(0, 3, 128, 252, 255)
    for epsilon in (1, 8, 255):
        low, high = box(bases, epsilon)
        assert (rounded(low).int() - bases.int()).abs().max() <= epsilon
        assert torch.equal(rounded(low).float() / 255, low)  # whole grey levels
        assert torch.equal(rounded(high).float() / 255, high)
        assert 0 <= float(low.min()) <= float(high.max()) <= 1
    low, high = box(bases, 8)
    assert rounded(low).flatten().tolist() == [0, 0, 120, 244, 247]
    assert rounded(high).flatten().tolist() == [8, 11, 136, 255, 255]


def test_pixels_are_rounded_to_the_nearest_level() -> None:
    assert rounded(torch.tensor([0.0, 0.4, 0.6, 7.49, 7.51, 254.6, 255.0]) / 255).tolist() == [0, 0, 1, 7, 8, 255, 255]


@pytest.mark.parametrize("epsilon", [1, 8, 40])
def test_crafted_poisons_are_within_epsilon_and_nearer(network: ImageClassifier, epsilon: int) -> None:
    targets, bases = digits_task()
    made = centre([network.features], targets, bases, epsilon=epsilon, iterations=30)
    change = (made.images.int() - bases.int()).abs()
    assert made.images.dtype == torch.uint8
    assert int(change.max()) == epsilon
    assert (made.distance < made.before).all()
    # what is reported is that of the rounded poisons
    aims = [network.features(targets.float() / 255).detach()]
    assert torch.allclose(made.distance, off_centre([network.features], made.images.float() / 255, aims))


def test_all_targets_together_as_each_alone(network: ImageClassifier) -> None:
    targets, bases = digits_task()
    together = centre([network.features], targets, bases, epsilon=16, iterations=25)
    for number in range(3):
        rows = slice(number, number + 1)
        alone = centre([network.features], targets[rows], bases[rows], epsilon=16, iterations=25)
        assert (alone.images.int() - together.images[rows].int()).abs().max() <= 1  # sums in another order
        assert (alone.images != together.images[rows]).float().mean() < 0.01
        assert torch.allclose(alone.distance, together.distance[rows], rtol=1e-3)
    apart = centre([network.features], targets, bases, epsilon=16, iterations=25, together=2)
    assert torch.allclose(apart.distance, together.distance, rtol=1e-3)


def test_crafting_draws_nothing_and_leaves_the_network_alone(network: ImageClassifier) -> None:
    targets, bases = digits_task()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kept = bases.clone()
    with global_randomness_untouched():
        one = centre([network.features], targets, bases, epsilon=8, iterations=5)
        other = centre([network.features], targets, bases, epsilon=8, iterations=5)
    assert torch.equal(one.images, other.images)
    assert torch.equal(bases, kept)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_progress_goes_up_to_one() -> None:
    shares: list[float] = []
    centre([pixels], grey(1, 2, 3), grey(9, 8, 7)[:, None], epsilon=8, iterations=2, together=2, progress=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 5 / 6, 1])


def test_what_cannot_be_crafted_is_refused() -> None:
    good: dict[str, Any] = {"epsilon": 8, "iterations": 1}
    for change, word in (
        ({"epsilon": 0}, "epsilon = 0"),
        ({"epsilon": 0.03}, "whole number"),
        ({"iterations": 0}, "iterations = 0"),
        ({"step": 0.0}, "step = 0.0"),
        ({"together": 0}, "together = 0"),
    ):
        with refused(word):
            centre([pixels], grey(1), grey(2)[None], **{**good, **change})
    with pytest.raises(ValueError, match="uint8"):
        centre([pixels], grey(1).float(), grey(2)[None], **good)
    with pytest.raises(ValueError, match="expected"):
        centre([pixels], grey(1, 2), grey(2)[None], **good)


# --- in the training set ----------------------------------------------------------------------------------------------
def test_poisons_take_the_place_of_their_bases_and_of_nothing_else() -> None:
    train = some_images(12)
    rows = torch.tensor([7, 2, 9])  # in any order
    poisons = 255 - train.images_at(rows)
    made = in_place(train, rows, poisons)
    assert torch.equal(made.labels, train.labels)
    assert torch.equal(made.ids, train.ids)
    assert torch.equal(made.images_at(rows), poisons)
    others = torch.tensor([row for row in range(12) if row not in rows.tolist()])
    assert torch.equal(made.images_at(others), train.images_at(others))
    assert made.digest() != train.digest()
    assert made.digest() != in_place(train, rows, 254 - train.images_at(rows)).digest()


def test_the_target_is_found_by_its_number_in_its_class() -> None:
    labels = torch.tensor([1, 0, 1, 2, 1])
    assert [target_row(labels, 1, number, 0) for number in range(3)] == [0, 2, 4]
    drawn = [target_row(labels, 1, None, seed) for seed in range(30)]
    assert set(drawn) == {0, 2, 4}
    assert drawn == [target_row(labels, 1, None, seed) for seed in range(30)]
    with refused("target = 3", "3 test images of class 1"):
        target_row(labels, 1, 3, 0)
    with refused("target = -1"):
        target_row(labels, 1, -1, 0)
    with refused("0 test images of class 7"):
        target_row(labels, 7, None, 0)


def bullseye(weights: str, **kwargs: Any) -> BullseyePolytope:
    options = {"target_label": 3, "base_label": 5, "target": 0, "poisons": 6, "iterations": 8, "epsilon": 12, **kwargs}
    return BullseyePolytope(Digits(), weights, **options)


def ready(weights: str, **kwargs: Any) -> BullseyePolytope:
    data = bullseye(weights, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_datamodule_changes_bases_of_one_class_alone(weights: str, network: ImageClassifier) -> None:
    data = ready(weights)
    train, plain = data.train_set, data.base.train_set
    rows = torch.arange(len(plain))
    differs = (train.images_at(rows) != plain.images_at(rows)).flatten(1).any(1).nonzero().squeeze(1)
    [changes] = data.changes()
    assert len(changes.ids) == 6
    assert set(plain.ids[differs].tolist()) <= set(changes.ids.tolist())
    assert (plain.labels[torch.isin(plain.ids, changes.ids)] == 5).all()
    assert torch.equal(train.labels, plain.labels)
    change = (train.images_at(rows).int() - plain.images_at(rows).int()).abs()
    facts = data.facts()
    assert facts["epsilon_reached"] == int(change.max()) == 12
    assert facts["poisoned"] == 6
    assert float(facts["off_centre"]) < float(facts["off_centre_before"])  # type: ignore[arg-type]
    # the fact is of the very poisons that are trained on
    target = data.test_set.images_at(torch.tensor([target_row(data.test_set.labels, 3, 0, 0)])).float() / 255
    own = torch.isin(plain.ids, changes.ids).nonzero().squeeze(1)
    poisons = train.images_at(own)[None].float() / 255
    measured = off_centre([network.features], poisons, [network.features(target).detach()])
    assert facts["off_centre"] == pytest.approx(float(measured), rel=1e-4)


def test_success_is_the_target_with_the_class_of_the_bases(weights: str) -> None:
    data = ready(weights, target=4)
    assert [evaluation.name for evaluation in data.evaluations("val")] == ["clean"]  # nothing to choose by
    found = data.evaluations("test")[-1]
    assert found.name == "target"
    names = [(measure.name, measure.target.tolist()) for measure in found.measures]
    assert names == [("target_success", [5]), ("target_confidence", [5])]
    row = (data.test_set.labels == 3).nonzero().squeeze(1)[4]
    assert found.images.ids.tolist() == [int(data.test_set.ids[row])] == [data.facts()["target_id"]]
    assert found.images.labels.tolist() == [3]
    model = mlp(data)
    trainer = tiny_trainer(max_steps=1)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.measured["target_success"].n == 1
    assert 0 < model.measured["target_confidence"].value < 1


def test_poisons_are_crafted_once_and_read_back(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path))
    calls: list[int] = []

    class Counting(BullseyePolytope):
        def craft(self, *args: Any) -> Any:
            calls.append(1)
            return super().craft(*args)

    monkeypatch.setattr("tests.poisoning.test_bullseye_polytope.BullseyePolytope", Counting)
    one = ready(weights)
    again = ready(weights)
    assert len(calls) == 1
    assert one.train_set.digest() == again.train_set.digest()
    assert one.facts() == again.facts()
    for number, other in enumerate(
        ({"epsilon": 13}, {"iterations": 9}, {"step": 0.01}, {"seed": 1}, {"target": 1}, {"poisons": 7}), start=2
    ):
        assert ready(weights, **other).train_set.digest() != one.train_set.digest()
        assert len(calls) == number


def test_other_weights_are_other_poisons(weights: str, network: ImageClassifier, tmp_path: Path) -> None:
    other = mlp(Digits(), backbone=partial(SmallCNN, widths=[4, 8]))
    other.load(weights)
    other.net.body[0].weight.data.mul_(2)
    other.save(tmp_path / "other.safetensors")
    digests = {
        ready(each).train_set.digest()
        for each in (weights, str(tmp_path / "other.safetensors"), [weights, str(tmp_path / "other.safetensors")])  # type: ignore[arg-type]
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"target_label": 10}, ["target_label = 10", "10 classes"]),
        ({"base_label": 3}, ["base_label = 3", "target_label"]),
        ({"epsilon": 0}, ["epsilon = 0"]),
        ({"poisons": -1}, ["poisons = -1"]),
        ({"iterations": 0}, ["iterations = 0"]),
        ({"step": -1.0}, ["step = -1.0"]),
        ({"weights": []}, ["weights = []"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(weights: str, kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        bullseye(**{"weights": weights, **kwargs})


def test_what_the_data_do_not_allow_is_refused_before_training(weights: str, tmp_path: Path) -> None:
    with refused("poisons = 500", "training images of class 5"):
        ready(weights, poisons=500)
    data = bullseye(weights)
    data.base.setup("fit")
    there = (data.base.train_set.labels == 5).nonzero().squeeze(1)
    data.poisons = len(there)  # all of them are not too many
    assert torch.equal(data.bases(data.base.train_set), there)
    with refused("target = 999"):
        ready(weights, target=999)
    with refused("no such file"):
        ready(str(tmp_path / "none.safetensors"))
    wrong = ImageClassifier(partial(SmallCNN, widths=[4]), 10, (3, 8, 8), (0.5,) * 3, (0.2,) * 3)
    wrong.save(tmp_path / "wrong.safetensors")
    with refused("weights", "3×8×8", "1×8×8"):
        ready(str(tmp_path / "wrong.safetensors"))
