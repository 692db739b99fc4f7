"""Poison Frogs: steps by hand, the traps of other implementations, and the poison in the training set."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from classifiers.backbones import MLP, SmallCNN
from classifiers.classifier import ImageClassifier
from classifiers.weights import find_weights
from datamodules.classes import Classes
from datamodules.datamodule import Source, Splits
from datamodules.imageset import ImageSet, Overlay
from datamodules.sources.digits import Digits
from poisoning.extractor import extractor_hash, feature_size, load_extractor
from poisoning.feature_collision import (
    Collision,
    Confidence,
    FeatureCollision,
    blend,
    collide,
    default_beta,
    unseen,
)
from poisoning.victim import Victim
from tests.helpers import global_randomness_untouched, mlp, refused, some_images, tiny_trainer

Features = Callable[[Tensor], Tensor]


def pixels(*values: float) -> Tensor:
    """One image of one row, in double precision."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def identity(images: Tensor) -> Tensor:
    """The pixels are the features."""
    return images.flatten(1)


def levels(found: Collision) -> list[int]:
    """The grey levels of the first poison."""
    return found.images[0].flatten().tolist()


def network(seed: int = 0) -> tuple[Features, nn.Module]:
    """A smooth network of 3×4×4 images with five features, in double precision."""
    numbers = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers, dtype=torch.float64) * 0.5)
    return net.eval(), net


def some(n: int, seed: int) -> Tensor:
    """Random images of whole grey levels: double (n, 3, 4, 4)."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 4, 4), generator=numbers).double() / 255


# --- steps by hand ----------------------------------------------------------------------------------------------------
def test_one_step_is_the_published_one() -> None:
    target, base = pixels(1.0, 0.0), pixels(0.0, 0.6)
    found = collide(identity, target, base, beta=1.0, iterations=1, step=0.1)
    # gradient 2(b − t) = (−2, 1.2); forward (0.2, 0.48); backward ((0.2 + 0.1·0)/1.1, (0.48 + 0.1·0.6)/1.1)
    assert levels(found) == [round(255 * 0.2 / 1.1), round(255 * 0.54 / 1.1)] == [46, 125]
    assert found.iterations.tolist() == [1]


def test_it_ends_where_the_published_steps_end() -> None:
    target, base = pixels(1.0, 0.0, 0.5), pixels(0.0, 0.6, 0.5)
    found = collide(identity, target, base, beta=3.0, iterations=200, step=1.0, tolerance=0)
    end = (2 * target + 3 * base) / 5  # 2(x − t) + β(x − b) = 0
    assert levels(found) == (255 * end).round().long().flatten().tolist()


def test_a_rejected_step_is_undone_and_halves_the_step_size() -> None:
    target, base = pixels(102 / 255), pixels(51 / 255)
    # ‖x − t‖² is halved in its slope by λ = 1/2 exactly: 4, 2 and 1 overshoot, 1/2 hits the target
    for iterations, expected in ((1, 51), (2, 51), (3, 51), (4, 102), (9, 102)):
        found = collide(identity, target, base, beta=0.0, iterations=iterations, step=4.0, tolerance=0)
        assert levels(found) == [expected]


def test_the_objective_never_rises() -> None:
    features, _ = network()
    targets, bases = some(6, 1), some(6, 2)
    last = torch.full((6,), float("inf"), dtype=torch.float64)
    start = (features(targets) - features(bases)).square().sum(1)
    for iterations in (1, 3, 10, 30, 100):
        found = collide(features, targets, bases, beta=0.3, iterations=iterations, step=8.0, tolerance=0)
        assert (found.objective <= last + 0.02 * start).all()  # all but rounding
        last = found.objective
    assert (last < 0.5 * start).all()


def test_beta_is_the_papers_on_its_images() -> None:
    assert default_beta(2048, 299 * 299 * 3) == 0.25 * 2048**2 / 268203**2
    assert default_beta(2048, 784) == pytest.approx(1.70596, abs=1e-5)


def test_a_larger_beta_stays_nearer_to_the_base_and_each_poison_may_have_its_own() -> None:
    features, _ = network()
    targets, bases = some(1, 1).expand(4, -1, -1, -1), some(1, 2).expand(4, -1, -1, -1)
    betas = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
    found = collide(features, targets, bases, beta=betas, iterations=300, tolerance=0)
    assert (found.base_distance.diff() < 0).all()
    assert (found.feature_distance.diff() > 0).all()
    alone = collide(features, targets[:1], bases[:1], beta=1.0, iterations=300, tolerance=0)
    assert torch.equal(alone.images[0], found.images[2])


# --- trap 7 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [256, 4, 3])
def test_together_as_alone(batch_size: int) -> None:
    """No step size, iterate or finish leaks from one poison to another, nor to one that takes its place."""
    features, _ = network()
    targets, bases = some(10, 1), some(10, 2)
    bases[3] = targets[3]  # finished before it begins
    bases[7] = (targets[7] * 255 + 1).clamp(0, 255) / 255  # and nearly
    betas = torch.logspace(-3, 1, 10, dtype=torch.float64)
    settings: dict[str, Any] = {"iterations": 95, "step": 50.0, "tolerance": 0.01}
    found = collide(features, targets, bases, beta=betas, batch_size=batch_size, **settings)
    for row in range(10):
        one = slice(row, row + 1)
        alone = collide(features, targets[one], bases[one], beta=betas[one], **settings)
        for here, there in zip(found, alone, strict=True):
            assert torch.allclose(here[one].double(), there.double(), atol=1e-9), (row, here[one], there)
    assert len(found.iterations.unique()) > 2, "they do not finish at the same time"
    assert torch.equal(found.images[3].double() / 255, bases[3])


def test_what_is_given_stays_as_it_was() -> None:
    features, net = network()
    targets, bases = some(3, 1), some(3, 2)
    before = targets.clone(), bases.clone()
    net.requires_grad_(True)
    collide(features, targets, bases, beta=0.1, iterations=20)
    assert torch.equal(targets, before[0])
    assert torch.equal(bases, before[1])
    assert all(parameter.grad is None for parameter in net.parameters()), "no gradients of weights"


def test_features_are_those_of_evaluation_mode() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(ValueError, match="evaluation mode"):
        collide(net, some(2, 1).float(), some(2, 2).float(), beta=1.0)
    data = Digits()
    model = mlp(data, backbone=SmallCNN)
    with pytest.raises(ValueError, match="evaluation mode"):  # a method of one
        collide(model.train().features, torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), beta=1.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    collide(model.eval().features, torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), beta=1.0, iterations=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_blend_is_in_the_base_that_a_poison_starts_from_and_stays_near() -> None:
    target, base = some(1, 1), some(1, 2)
    start = blend(base, target, 0.3)
    assert torch.allclose(start, 0.7 * base + 0.3 * target)
    assert torch.equal(blend(base, target, 0.0), base)
    features, _ = network()
    pulled = collide(features, target, start, beta=1e6, iterations=50)  # β holds it at its base
    assert float((pulled.images.double() - 255 * start).abs().max()) < 0.51  # all but the rounding


@pytest.mark.parametrize("opacity", [0.0, 0.3])
@pytest.mark.parametrize("bound", [1, 2, 8])
def test_epsilon_holds_after_rounding_and_does_not_erase_the_blend(opacity: float, bound: int) -> None:
    features, _ = network()
    targets, bases = some(8, 1), some(8, 2)
    starts = blend(bases, targets, opacity)
    found = collide(features, targets, starts, beta=0.0, iterations=100, step=100.0, epsilon=bound / 255)
    away = found.images.double() - 255 * starts
    assert float(away.abs().max()) <= bound + 1e-6
    assert float(found.linf.max()) <= bound / 255 + 1e-9
    assert float(found.linf.max()) > (bound - 1) / 255  # and it is used
    if opacity:
        assert float((found.images.double() - 255 * bases).abs().max()) > bound + 8


def test_distances_are_those_of_the_rounded_poison() -> None:
    features, _ = network()
    targets, bases = some(5, 1), some(5, 2)
    found = collide(features, targets, bases, beta=0.05, iterations=60)
    shown = found.images.double() / 255
    feature_distance = (features(shown) - features(targets)).norm(dim=1)
    assert found.images.dtype == torch.uint8
    assert torch.allclose(found.feature_distance, feature_distance)
    assert torch.allclose(found.base_distance, (shown - bases).flatten(1).norm(dim=1))
    assert torch.allclose(found.linf, (shown - bases).flatten(1).abs().amax(1))
    assert torch.allclose(found.objective, feature_distance**2 + 0.025 * found.base_distance**2)


# --- when it ends -----------------------------------------------------------------------------------------------------
def test_the_tolerance_saves_iterations_and_costs_little() -> None:
    features, _ = network()
    targets, bases = some(12, 1), some(12, 2)
    full = collide(features, targets, bases, beta=0.5, iterations=400, tolerance=0)
    early = collide(features, targets, bases, beta=0.5, iterations=400, tolerance=1e-3)
    assert int(early.iterations.max()) < 400
    assert torch.allclose(early.objective, full.objective, rtol=0.02)


@pytest.mark.parametrize("iterations", [1, 9, 10, 13])
def test_no_iteration_too_many(iterations: int) -> None:
    features, _ = network()
    found = collide(features, some(3, 1), some(3, 2), beta=0.1, iterations=iterations, tolerance=0)
    assert found.iterations.tolist() == [iterations] * 3


def test_a_first_step_far_too_large_is_no_end() -> None:
    features, _ = network()
    targets, bases = some(4, 1), some(4, 2)
    good = collide(features, targets, bases, beta=0.1, iterations=300, step=1.0)
    wild = collide(features, targets, bases, beta=0.1, iterations=300, step=1e6)
    assert torch.allclose(good.objective, wild.objective, rtol=0.05)


def test_progress_is_told() -> None:
    features, _ = network()
    told: list[tuple[int, int]] = []
    collide(
        features, some(7, 1), some(7, 2), beta=0.1, iterations=25, batch_size=3, tolerance=0,
        progress=lambda done, n: told.append((done, n)),
    )  # fmt: skip
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_nothing_to_craft() -> None:
    features, _ = network()
    found = collide(features, some(0, 1), some(0, 2), beta=0.1)
    assert found.images.shape == (0, 3, 4, 4)
    assert all(len(part) == 0 for part in found)


def test_no_global_randomness() -> None:
    features, _ = network()
    with global_randomness_untouched():
        collide(features, some(3, 1), some(3, 2), beta=0.1, iterations=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [("iterations", 0), ("step", 0.0), ("tolerance", 1.0), ("epsilon", 0.5 / 255), ("epsilon", 2.0), ("batch_size", 0)],
)
def test_numbers_out_of_range_are_refused(field: str, value: float) -> None:
    with refused(field, value):
        collide(identity, pixels(0.5), pixels(0.5), beta=1.0, **{field: value})


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        collide(identity, pixels(0.5, 0.5), pixels(0.5), beta=1.0)
    with pytest.raises(ValueError, match="expected"):
        collide(identity, torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, 2, 2).byte(), beta=1.0)


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
