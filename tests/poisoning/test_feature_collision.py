"""Poison Frogs: the poison in the training set, its measures and its store."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from classifiers.weights import find_weights
from datamodules.classes import Classes
from datamodules.datamodule import Source, Splits
from datamodules.imageset import ImageSet, Overlay
from datamodules.sources.digits import Digits
from poisoning.collision import collide, default_beta
from poisoning.extractor import extractor_hash, feature_size, load_extractor
from poisoning.feature_collision import Confidence, FeatureCollision, unseen
from poisoning.victim import Victim
from tests.helpers import global_randomness_untouched, mlp, refused, some_images, tiny_trainer

Features = Callable[[Tensor], Tensor]


def test_the_probability_of_the_wanted_class() -> None:
    metric = Confidence()
    metric.update(torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([0, 1]))
    assert float(metric.compute()) == 0.5
    metric.update(torch.tensor([[-100.0, 100.0]]), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx(2 / 3)


# --- extractors -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An extractor of digits other than 3 and 5, trained for a moment."""
    data = Classes(Digits(), [0, 1, 2, 4, 6, 7, 8, 9])
    torch.manual_seed(0)
    model = mlp(data, backbone=partial(MLP, hidden=[64]))
    tiny_trainer(max_epochs=3).fit(model, data)
    path = tmp_path_factory.mktemp("extractor") / "weights.safetensors"
    model.save(path)
    return str(path)


def test_an_extractor_is_frozen_and_costs_no_randomness(weights: str) -> None:
    with global_randomness_untouched():
        extractor = load_extractor(weights, (1, 8, 8))
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert feature_size(extractor) == 64
    with refused("weights", "1×8×8", "3×32×32"):
        load_extractor(weights, (3, 32, 32))


def test_its_hash_tells_it_from_others(weights: str, tmp_path: Path) -> None:
    extractor = load_extractor(weights, (1, 8, 8))
    extractor.save(tmp_path / "same.safetensors")
    assert extractor_hash(tmp_path / "same.safetensors") == extractor_hash(weights) == extractor_hash(extractor)
    other = ImageClassifier(partial(MLP, hidden=[64]), 8, (1, 8, 8), (0.1,), Digits.std, weights=weights)
    other.save(tmp_path / "other.safetensors")  # the same weights see other numbers
    assert extractor_hash(tmp_path / "other.safetensors") != extractor_hash(weights)


def test_weights_are_found_in_the_newest_finished_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "extractor_mnist"
    with refused("extractor_mnist", "lightning fit --config extractor_mnist"):
        find_weights(runs)
    for run in ("2026-01-02_00-00-00", "2026-01-01_00-00-00", "2026-01-03_00-00-00"):
        (runs / run).mkdir(parents=True)
    with refused("lightning fit --config extractor_mnist"):
        find_weights(runs)
    for run in ("2026-01-02_00-00-00", "2026-01-01_00-00-00"):
        (runs / run / "weights.safetensors").touch()
    assert find_weights(runs) == runs / "2026-01-02_00-00-00" / "weights.safetensors"
    assert find_weights(runs / "2026-01-01_00-00-00").parent.name == "2026-01-01_00-00-00"


def test_a_backbone_may_come_with_weights_of_its_own(weights: str) -> None:
    backbone = partial(MLP, hidden=[8])
    made: list[FeatureCollision] = []
    for _ in range(2):
        torch.manual_seed(1)  # as if they had been read from a file
        data = FeatureCollision(Classes(Digits(), [3, 5]), None, 0, 1, iterations=1, backbone=backbone)
        data.setup()
        made.append(data)
    assert made[0].train_set.digest() == made[1].train_set.digest()
    assert made[0].facts()["beta"] == 0.25 * (8 / 64) ** 2
    assert made[0].facts()["extractor"] == made[1].facts()["extractor"] != extractor_hash(weights)
    with refused("weights", "backbone"):
        FeatureCollision(Classes(Digits(), [3, 5]), None, 0, 1)


# --- the datamodule ---------------------------------------------------------------------------------------------------
def frogs(weights: str, **kwargs: Any) -> FeatureCollision:
    """3 against 5, 40 images of each; the target is a 3."""
    settings = {"target_label": 0, "base_label": 1, "iterations": 40, **kwargs}
    data = FeatureCollision(Classes(Digits(), [3, 5], 40), weights, **settings)
    data.prepare_data()
    data.setup()
    return data


def poisons(data: FeatureCollision) -> ImageSet:
    rows = torch.isin(data.train_set.ids, data.changes()[-1].ids).nonzero().flatten()
    return data.train_set.select(rows)


def row_of(images: ImageSet, identity: int) -> int:
    return int((images.ids == identity).nonzero())


def test_one_sample_is_added_with_the_label_of_its_base(weights: str) -> None:
    data = frogs(weights)
    before, after = data.base.train_set, data.train_set
    assert len(after) == len(before) + 1
    assert torch.equal(after.images_at(torch.arange(80)), before.images_at(torch.arange(80)))
    assert torch.equal(after.ids[:80], before.ids)
    poison = poisons(data)[0]
    (change,) = data.changes()
    base = row_of(data.test_set, int(change.origins))
    assert int(poison.labels) == int(data.test_set.labels[base]) == int(change.original_labels) == 1
    assert not torch.equal(poison.images, data.test_set[base].images)
    assert int(poison.ids) == data.next_id - 1
    assert data.facts()["base_ids"] == change.origins.tolist()


def test_it_is_the_crafted_image(weights: str) -> None:
    data = frogs(weights, target_index=4, seed=3)
    facts = data.facts()
    extractor = load_extractor(weights, (1, 8, 8))
    target = data.test_set[row_of(data.test_set, int(facts["target_id"]))].images  # type: ignore[arg-type]
    base = data.test_set[row_of(data.test_set, int(data.changes()[0].origins))].images
    found = collide(
        extractor.features,
        target[None].float() / 255,
        base[None].float() / 255,
        beta=default_beta(64, 64),
        iterations=40,
    )
    assert torch.equal(poisons(data)[0].images, found.images[0])
    assert facts["beta"] == 0.25
    assert facts["feature_distance"] == pytest.approx(float(found.feature_distance))
    assert float(facts["feature_distance"]) < float(facts["feature_distance_of_base"])  # type: ignore[arg-type]
    assert facts["poison_l2"] == pytest.approx(float(found.base_distance))
    assert facts["epsilon_reached"] == round(255 * float(found.linf))


def test_the_target_alone_is_measured_in_the_test_and_nowhere_else(weights: str) -> None:
    data = frogs(weights)
    assert [evaluation.name for evaluation in data.evaluations("val")] == ["clean"]
    found = data.evaluations("test")
    assert [evaluation.name for evaluation in found] == ["clean", "holdout", "target"]
    target = found[-1]
    assert target.images.ids.tolist() == [data.facts()["target_id"]]
    assert target.images.labels.tolist() == [0]
    assert [measure.name for measure in target.measures] == ["target_success", "target_confidence"]
    assert all(measure.target.tolist() == [1] for measure in target.measures)
    assert torch.equal(found[0].images.ids, data.base.test_set.ids)


def test_success_is_the_base_class_for_the_target(weights: str) -> None:
    """The poison of an attack without bounds works: a frozen extractor, a cold last layer."""
    data = frogs(weights, beta=1e-3, iterations=400, target_index=0)
    torch.manual_seed(0)
    model = mlp(
        data, Victim, backbone=partial(MLP, hidden=[64]), weights=weights, new_head=True, frozen=True,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )  # fmt: skip
    trainer = tiny_trainer(max_epochs=100)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.measured["target_success"].n == 1
    confidence, success = model.measured["target_confidence"].value, model.measured["target_success"].value
    assert success == float(confidence > 0.5)
    target = data.evaluations("test")[-1].images.images_at(torch.tensor([0]))
    assert confidence == pytest.approx(float(model(target).detach().softmax(1)[0, 1]), abs=1e-6)


def test_a_seed_draws_target_and_bases(weights: str) -> None:
    drawn = [frogs(weights, seed=seed, iterations=1).facts() for seed in range(6)]
    assert len({facts["target_id"] for facts in drawn}) > 2
    assert len({json.dumps(facts["base_ids"]) for facts in drawn}) > 2
    again = frogs(weights, seed=5, iterations=1).facts()
    assert again == drawn[5]


def test_many_poisons_have_bases_of_their_own(weights: str) -> None:
    data = frogs(weights, poisons=12, iterations=3)
    (change,) = data.changes()
    assert len(change.ids) == len(change.origins.unique()) == 12
    assert poisons(data).labels.tolist() == [1] * 12
    assert data.test_set.labels[torch.isin(data.test_set.ids, change.origins)].tolist() == [1] * 12


def test_nearest_bases_are_the_nearest_in_feature_space(weights: str) -> None:
    data = frogs(weights, poisons=3, choose="nearest", target_index=2, iterations=1)
    extractor = load_extractor(weights, (1, 8, 8))
    test = data.test_set
    features = extractor.features(test.images_at(torch.arange(len(test))))
    target = features[(test.labels == 0).nonzero().flatten()[2]]
    candidates = (test.labels == 1).nonzero().flatten()
    nearest = candidates[(features[candidates] - target).norm(dim=1).argsort()[:3]]
    assert data.changes()[0].origins.tolist() == test.ids[nearest].tolist()


def test_opacity_and_epsilon_reach_the_crafting(weights: str) -> None:
    data = frogs(weights, opacity=0.5, epsilon=2, beta=0.0, target_index=1)
    test, facts = data.test_set, data.facts()
    target = test[row_of(test, int(facts["target_id"]))].images.double()  # type: ignore[arg-type]
    base = test[row_of(test, int(data.changes()[0].origins))].images.double()
    away = poisons(data)[0].images.double() - (base + target) / 2
    assert 0 < float(away.abs().max()) <= 2
    assert int(facts["epsilon_reached"]) > 2  # type: ignore[call-overload] # of the base as it was
    assert facts["opacity"] == 0.5


class Doubled(Source):
    """Noise of two classes, in which some test images are training images too."""

    num_classes = 2
    image_shape = (1, 8, 8)
    mean = (0.5,)
    std = (0.3,)
    class_names = ("a", "b")

    def read(self) -> Splits:
        train, test = some_images(40, classes=2), some_images(20, classes=2, seed=1)
        images = test.images.clone()
        images[0], images[2] = train.images[7], train.images[11]  # of class 0, whatever the original's
        images[1] = train.images[9]
        return Splits(train.images, train.labels, images, test.labels)


def test_images_with_a_duplicate_in_the_training_set_take_no_part(weights: str) -> None:
    def made(**kwargs: Any) -> FeatureCollision:
        data = FeatureCollision(Doubled(val_fraction=0.0), weights, 0, 1, iterations=1, **kwargs)
        data.setup()
        return data

    assert made(target_index=0).facts()["target_id"] == 40 + 4  # not 0 nor 2
    assert made(target_index=7).facts()["target_id"] == 40 + 18
    with refused("target_index = 8", "8 such test images"):
        made(target_index=8)
    data = made(poisons=9)
    assert 41 not in data.changes()[0].origins.tolist()
    with refused("poisons = 10", "9 test images"):
        made(poisons=10)


def test_duplicates_are_found_in_any_order() -> None:
    train = some_images(30)
    images = torch.cat([train.images[[4, 29]], 255 - train.images[:2], train.images[[4]]])
    assert unseen(images, train).tolist() == [False, False, True, True, False]
    assert unseen(images[:0], train).tolist() == []


def test_the_store_is_asked_once_for_all_that_determines_the_poison(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path))
    made: list[int] = []
    craft = FeatureCollision._make

    def counted(self: FeatureCollision, *args: Any) -> Any:
        made.append(1)
        return craft(self, *args)

    monkeypatch.setattr(FeatureCollision, "_make", counted)
    plain = frogs(weights, target_index=0)
    assert len(made) == 1, "prepared, then read back"
    digest = plain.train_set.digest()
    assert frogs(weights, target_index=0).train_set.digest() == digest
    assert len(made) == 1
    different: list[dict[str, Any]] = [
        {"target_index": 1}, {"seed": 1}, {"beta": 0.1}, {"iterations": 20}, {"tolerance": 0.1}, {"opacity": 0.2},
        {"epsilon": 8}, {"poisons": 2}, {"choose": "nearest"}, {"target_label": 1, "base_label": 0},
    ]  # fmt: skip
    digests = {frogs(weights, **{"target_index": 0, **other}).train_set.digest() for other in different}
    assert len(made) == 1 + len(different)
    assert len(digests - {digest}) >= len(different) - 1  # a tolerance may be met before it matters
    assert not list(tmp_path.rglob("*.pkl"))


def test_added_rows_are_no_copies(weights: str) -> None:
    data = frogs(weights, iterations=1)
    assert isinstance(data.train_set, Overlay)
    assert data.train_set.base is data.base.train_set or data.train_set.base is data.base.train_set.base  # type: ignore[attr-defined]


def test_names_keep_two_targets_apart(weights: str) -> None:
    inner = FeatureCollision(Classes(Digits(), [3, 5]), weights, 0, 1, iterations=1, name="one")
    outer = FeatureCollision(inner, weights, 1, 0, iterations=1, name="two")
    outer.setup()
    names = [measure.name for evaluation in outer.evaluations("test") for measure in evaluation.measures]
    assert {"target_success_one", "target_success_two", "target_confidence_one"} <= set(names)
    assert {"target_id_one", "target_id_two"} <= set(outer.facts())
    assert len(outer.train_set.ids.unique()) == len(outer.train_set)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_label", 2), ("base_label", -1), ("base_label", 0), ("poisons", -1), ("choose", "closest"),
        ("beta", -1.0), ("beta", float("nan")), ("iterations", 0), ("tolerance", -0.1), ("opacity", 1.0),
        ("epsilon", 0), ("epsilon", 256),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_at_once(field: str, value: Any, weights: str) -> None:
    base = Classes(Digits(), [3, 5])
    with refused(field):
        FeatureCollision(base, weights, **{"target_label": 0, "base_label": 1, field: value})


def test_missing_weights_name_the_command_that_makes_them() -> None:
    with refused("runs/extractor_digits", "lightning fit --config extractor_digits"):
        FeatureCollision(Classes(Digits(), [3, 5]), "runs/extractor_digits", 0, 1)


def test_secrets_do_not_reach_the_store(weights: str) -> None:
    class Secret(Digits):
        secret = True

    with refused("base", "secrets"):
        FeatureCollision(Secret(), weights, 0, 1)
