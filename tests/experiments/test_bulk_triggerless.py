"""Triggerless attacks in bulk: who is attacked, what victims are trained on, and what counts as success."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier, load_classifier
from datamodules.datamodule import ImageDataModule
from datamodules.sources.digits import Digits
from experiments.bulk import end_to_end as one
from experiments.bulk import triggerless as many
from experiments.bulk.end_to_end import end_to_end, fine_tune, read_source
from experiments.bulk.triggerless import ATTACKS, Headed, craft, draw_trials, from_scratch, transfer
from poisoning.collision import Collision
from tests.helpers import mlp, refused

QUICK = {
    "feature_collision": {"iterations": 3},
    "bullseye_polytope": {"iterations": 3},
    "gradient_matching": {"iterations": 3, "restarts": 1},
}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of each test's own: some victims here are no real ones."""
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network that knows the digits fairly well."""
    data = Digits()
    data.setup()
    model = mlp(data, backbone=partial(MLP, hidden=[32]))
    private = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=private) / weight.shape[-1] ** 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = data.train_set.__getitems__(torch.arange(1132))
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(model(batch.images), batch.labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    model.save(path)
    return str(path)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- who is attacked --------------------------------------------------------------------------------------------------
def test_targets_get_another_class_and_bases_are_of_that_class() -> None:
    train, test = torch.arange(400) % 10, torch.arange(50) % 10
    drawn = draw_trials(train, test, 10, trials=30, poisons=6, seed=0)
    assert len(drawn.targets.unique()) == 30
    assert (drawn.wanted != test[drawn.targets]).all()
    assert drawn.bases.shape == (30, 6)
    assert (train[drawn.bases] == drawn.wanted[:, None]).all()
    assert all(len(row.unique()) == 6 for row in drawn.bases)
    again, other = (draw_trials(train, test, 10, 30, 6, seed) for seed in (0, 1))
    assert torch.equal(again.bases, drawn.bases)
    assert not torch.equal(other.targets, drawn.targets)
    assert len(drawn.wanted.unique()) > 5


def test_targets_of_one_victim_have_no_base_in_common() -> None:
    train, test = torch.arange(60) % 3, torch.arange(30) % 3
    drawn = draw_trials(train, test, 3, trials=12, poisons=4, seed=0, targets_per_victim=4)
    for first in range(0, 12, 4):
        assert len(drawn.bases[first : first + 4].unique()) == 16
    assert len(drawn.bases.unique()) < 48  # the next victim's may be the same
    with refused("poisons = 21", "20 training images"):
        draw_trials(train, test, 3, 1, 21, 0)
    with refused("poisons = 15", "left"):
        draw_trials(train, test, 3, 8, 15, 0, 8)
    with refused("trials = 31"):
        draw_trials(train, test, 3, 31, 1, 0)
    with refused("targets_per_victim = 0"):
        draw_trials(train, test, 3, 1, 1, 0, 0)


# --- crafting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_stays_within_epsilon_and_lowers_its_objective(attack: str, weights: str) -> None:
    network = load_classifier(weights)
    data = Digits()
    data.setup()
    drawn = draw_trials(data.train_set.labels, data.test_set.labels, 10, 3, 4, 0)
    bases = data.train_set.images_at(drawn.bases.flatten()).unflatten(0, (3, 4))
    made, left = craft(
        attack, network, network, data.test_set.images_at(drawn.targets), drawn.wanted, bases,
        data.train_set.ids[drawn.bases], 30, 0, None, {key: 20 for key in QUICK.get(attack, {}) if key == "iterations"},
    )  # fmt: skip
    assert made.shape == bases.shape
    assert made.dtype == torch.uint8
    change = (made.int() - bases.int()).abs()
    if attack == "none":
        assert int(change.max()) == 0
        assert left.tolist() == [1, 1, 1]
    else:
        assert 15 < int(change.max()) <= 30
        assert (left < 0.99).all()


def test_there_are_no_other_attacks() -> None:
    with refused("attack = 'poison_frogs'", "feature_collision"):
        many._check_attack("poison_frogs")


def test_a_layer_on_a_frozen_extractor_has_that_layers_gradient_alone(weights: str) -> None:
    extractor = load_classifier(weights).requires_grad_(False)
    matrix, bias = torch.randn(2, 32), torch.randn(2)
    network = Headed(extractor, matrix.clone(), bias.clone())
    images = torch.rand(5, 1, 8, 8)
    expected = extractor.features(images) @ matrix.T + bias
    assert torch.allclose(network(images), expected, atol=1e-5)
    assert [tuple(each.shape) for each in network.parameters() if each.requires_grad] == [(2, 32), (2,)]
    assert not network.training


# --- transfer ---------------------------------------------------------------------------------------------------------
TRANSFER: dict[str, Any] = {
    "source": "data/digits.yaml", "classes": [3, 5], "per_class": 30, "poisons": 5, "epsilon": 20, "trials": 6,
    "epochs": 10, "batch_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_row_sums_up_the_trials(attack: str, weights: str, tmp_path: Path) -> None:
    [row] = transfer(tmp_path, 0, attack=attack, extractor=weights, options=QUICK, **TRANSFER)
    trials = table(tmp_path / "trials.csv")
    assert len(trials) == 6
    columns = ("success", "right", "success_before", "right_before")
    names = ("target_success", "target_right", "target_success_before", "target_right_before")
    for name, column in zip(names, columns, strict=True):
        assert (row[name]["n"], row[name]["unit"]) == (6, "targets")
        assert row[name]["value"] == pytest.approx(sum(int(each[column]) for each in trials) / 6)
        assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert row["clean_accuracy"] == pytest.approx(sum(float(each["accuracy"]) for each in trials) / 6, rel=1e-4)
    assert row["epsilon_reached"] == max(int(each["epsilon_reached"]) for each in trials)
    assert row["poisoned_share"] == row["poisoned_share_per_target"] == 5 / 60
    assert row["victims"] == 6
    both = [each for each in trials if each["right_before"] == "1"]
    assert row["target_success_if_right"]["n"] == len(both)
    assert row["target_success_if_right"]["value"] == pytest.approx(sum(int(e["success"]) for e in both) / len(both))
    assert row["clean_accuracy"] > 0.9
    # two classes: a target is right or has the class of its bases
    assert all(int(each["success"]) + int(each["right"]) == 1 for each in trials)
    assert all(int(each["success_before"]) + int(each["right_before"]) == 1 for each in trials)
    [again] = transfer(tmp_path, 0, attack=attack, extractor=weights, options=QUICK, **TRANSFER)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in row.items() if "seconds" not in k
    }


def copies(
    attack: str, extractor: Any, network: Any, targets: Tensor, wanted: Tensor, bases: Tensor, *rest: Any
) -> Any:
    """Not an attack but label noise: the targets themselves for poisons."""
    return targets[:, None].expand(bases.shape).contiguous(), torch.ones(len(targets))


def test_success_is_seen_where_there_is_some(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "craft", copies)
    [row] = transfer(tmp_path, 0, attack="none", extractor=weights, **{**TRANSFER, "epochs": 60})
    assert row["target_success"]["value"] == 1
    assert row["target_right"]["value"] == 0
    assert row["confidence_median"] > 0.5
    assert row["epsilon_reached"] > 100  # and nothing hides how much was changed


# --- from scratch -----------------------------------------------------------------------------------------------------
def test_victims_are_trained_on_the_poisons_of_their_targets(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ImageDataModule] = []
    seeds: list[int] = []
    start = many._start

    def fit(line: Any, data: ImageDataModule) -> ImageClassifier:
        data.prepare_data()
        data.setup("fit")
        seen.append(data)
        return load_classifier(weights)

    def noted(configs: Any, overrides: Any, seed: int) -> Any:
        seeds.append(seed)
        return start(configs, overrides, seed)

    monkeypatch.setattr(many, "craft", copies)
    monkeypatch.setattr(many, "_fit", fit)
    monkeypatch.setattr(many, "_start", noted)
    [row] = from_scratch(
        tmp_path, 4, attack="none", weights=weights, configs=["victim_digits"], trials=3, targets_per_victim=2,
        poison_fraction=0.005,
    )  # fmt: skip
    trials = table(tmp_path / "trials.csv")
    twins, seen = seen[::2], seen[1::2]  # each victim's twin, and the victim
    assert len(seen) == len(twins) == 2  # of two targets and of one
    assert seeds[1::2] == seeds[2::2]
    assert len(set(seeds[1:])) == 2
    assert not any(isinstance(twin, many.Poisoned) for twin in twins)
    assert [each["victim"] for each in trials] == ["0", "0", "2"]
    assert row["victims"] == 2
    assert row["poisoned_share"] == 2 * row["poisoned_share_per_target"] == 12 / 1132
    plain = Digits()
    plain.setup()
    rows = torch.arange(1132)
    test = dict(
        zip(plain.test_set.ids.tolist(), plain.test_set.images_at(torch.arange(len(plain.test_set))), strict=True)
    )
    for data, own in zip(seen, (trials[:2], trials[2:]), strict=True):
        images, labels = data.train_set.images_at(rows), data.train_set.labels
        assert torch.equal(labels, plain.train_set.labels)
        changed = (images != plain.train_set.images_at(rows)).flatten(1).any(1)
        assert int(changed.sum()) == 6 * len(own)  # round(0.005 · 1132) each
        for each in own:
            target = test[int(each["target_id"])]
            where = (images == target).flatten(1).all(1)
            assert int(where.sum()) == 6
            assert set(labels[where].tolist()) == {int(each["base_label"])} != {int(each["target_label"])}
    assert row["poisons"] == 6


def test_a_victim_is_trained_as_its_config_says(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"weights": weights, "configs": ["victim_digits"], "trials": 2, "options": QUICK}
    [row] = from_scratch(
        tmp_path, 0, attack="gradient_matching", overrides={"trainer.max_epochs": 4}, targets_per_victim=2, **options
    )
    assert row["target_success"]["n"] == 2
    assert (row["target_success"]["low"], row["target_success"]["high"]) == (0, 1)  # one victim says nothing of others
    assert row["poisons"] == 11
    assert row["clean_accuracy"] > 0.6
    with monkeypatch.context() as context:  # a victim without poisons is the twin in the attack's cell, from the store
        context.setattr(many, "_fit", None)
        [none] = from_scratch(
            tmp_path, 0, attack="none", overrides={"trainer.max_epochs": 4}, targets_per_victim=2, **options
        )
    assert none["target_success"] == none["target_success_before"] == row["target_success_before"]
    assert none["target_right"] == row["target_right_before"]
    with refused("config", "no such file"):
        from_scratch(tmp_path, 0, attack="none", **{**options, "configs": ["no_such_config"]})


# --- end to end -------------------------------------------------------------------------------------------------------
END: dict[str, Any] = {
    "source": "data/digits.yaml", "target_label": 3, "base_label": 5, "trials": 3, "images": 60, "test_images": 100,
    "iterations": 4, "epochs": 2, "batch_size": 16,
}  # fmt: skip


def test_fine_tuning_is_adam_on_all_layers(weights: str) -> None:
    images, labels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 10
    model = fine_tune(load_classifier(weights), images, labels, 1, 20, 1e-3, 0)
    other = load_classifier(weights)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    cross_entropy(other(images), labels).backward()
    optimizer.step()
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-5), name
        assert not torch.equal(value, load_classifier(weights).state_dict()[name])
    small = fine_tune(load_classifier(weights), images, labels, 2, 6, 1e-3, 0)
    again = fine_tune(load_classifier(weights), images, labels, 2, 6, 1e-3, 0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())


def test_few_poisons_are_the_first_of_many(weights: str) -> None:
    data = Digits()
    data.setup()
    network = load_classifier(weights)
    chosen = [one._choose(network, data.test_set, 3, 5, 4, count, 0) for count in (0, 3, 12)]
    assert all(torch.equal(targets, chosen[0][0]) for targets, _ in chosen)
    assert torch.equal(chosen[1][1], chosen[2][1][:, :3])
    targets, bases = chosen[2]
    assert (data.test_set.labels[targets] == 3).all()
    assert (data.test_set.labels[bases] == 5).all()
    assert all(len(row.unique()) == 12 for row in bases)
    with torch.no_grad():
        assert (network(data.test_set.images_at(targets)).argmax(1) == 3).all()
    with refused("poisons = 1000"):
        one._choose(network, data.test_set, 3, 5, 4, 1000, 0)
    with refused("trials = 1000", "right"):
        one._choose(network, data.test_set, 3, 5, 1000, 1, 0)
    with refused("base_label = 3"):
        one._choose(network, data.test_set, 3, 3, 1, 1, 0)


@pytest.mark.parametrize("poisons", [0, 1, 4])
def test_a_row_for_each_number_of_poisons(poisons: int, weights: str, tmp_path: Path) -> None:
    [row] = end_to_end(tmp_path, 0, weights=weights, poisons=poisons, opacity=0.3, **END)
    trials = table(tmp_path / "trials.csv")
    assert len(trials) == row["target_success"]["n"] == 3
    assert row["target_success"]["value"] == sum(int(each["success"]) for each in trials) / 3
    assert row["clean_accuracy"] == pytest.approx(sum(float(each["accuracy"]) for each in trials) / 3)
    assert row["clean_images"] == 60
    assert row["poisoned_share"] == poisons / (60 + poisons)
    assert row["target_success"]["unit"] == "targets"
    accuracies = [float(each["accuracy"]) for each in trials]
    assert row["worst_clean_drop"] == pytest.approx(row["clean_accuracy_before"] - min(accuracies))
    assert row["poison"] == ("crafted" if poisons else "none")
    assert (tmp_path / "poisons.png").exists() == (poisons > 0)
    assert abs(row["clean_drop"]) < 0.1
    assert ("relative_distance" in row) == (poisons > 0)


def test_bases_are_blended_before_crafting_and_poisons_are_added(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[Tensor, Tensor]] = []
    trained: list[tuple[Tensor, Tensor]] = []

    def collide(features: Any, targets: Tensor, bases: Tensor, **_: Any) -> Collision:
        begun.append((targets, bases))
        zero = torch.zeros(len(bases))
        return Collision((targets * 255).round().to(torch.uint8), zero, zero, zero, zero, zero.long())

    tune = one.fine_tune

    def noted(model: Any, images: Tensor, labels: Tensor, *rest: Any) -> Any:
        trained.append((images, labels))
        return tune(model, images, labels, *rest)

    monkeypatch.setattr(one, "collide", collide)
    monkeypatch.setattr(one, "fine_tune", noted)
    options = {**END, "epochs": 20, "learning_rate": 1e-3}
    [row] = end_to_end(tmp_path, 0, weights=weights, poisons=8, opacity=0.25, **options)
    assert row["target_success"]["value"] == 1  # the targets themselves, labelled as the base class
    [(targets, starts)] = begun
    data = Digits()
    data.setup()
    found, bases = one._choose(load_classifier(weights), data.test_set, 3, 5, 3, 8, 0)
    plain = data.test_set.images_at(bases.flatten()).float() / 255
    aims = data.test_set.images_at(found).float().repeat_interleave(8, 0) / 255
    assert torch.allclose(starts, 0.75 * plain + 0.25 * aims, atol=1e-6)
    assert torch.allclose(targets, aims)
    for number, (images, labels) in enumerate(trained):
        assert images.shape[0] == labels.shape[0] == 68
        assert (labels[60:] == 5).all()
        assert torch.equal(images[60:], data.test_set.images_at(found[number : number + 1]).expand(8, -1, -1, -1))
        assert torch.equal(images[:60], trained[0][0][:60])


CONTROLS = [(0, "bases as they are"), (0.5, "blended, not crafted"), (1, "the target itself")]


@pytest.mark.parametrize(("opacity", "called"), CONTROLS)
def test_controls_are_not_crafted(
    opacity: float, called: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Tensor] = []

    def noted(model: Any, images: Tensor, *_: Any) -> Any:
        trained.append(images[60:])
        return model.eval()

    monkeypatch.setattr(one, "collide", None)
    monkeypatch.setattr(one, "fine_tune", noted)
    given = {"weights": weights, "judge": weights, "poisons": 4, "opacity": opacity, "crafted": False}
    [row] = end_to_end(tmp_path, 0, **given, **END)
    data = Digits()
    data.setup()
    network = load_classifier(weights)
    targets, bases = one._choose(network, data.test_set, 3, 5, 3, 4, 0)
    for number, images in enumerate(trained):
        target, own = (data.test_set.images_at(rows).float() for rows in (targets[number : number + 1], bases[number]))
        assert torch.equal(images, (own + opacity * (target - own)).round().to(torch.uint8))
    assert row["poison"] == called
    assert row["iterations_run"] == 0
    assert 0 <= row["relative_distance"] <= 1.001
    if opacity == 0:
        assert row["relative_distance"] == pytest.approx(1)
        assert row["clean_label"] == row["clean_label_of_bases"]
    with torch.no_grad():
        said = [network(images).argmax(1) == 5 for images in trained]
    assert row["clean_label"]["value"] == pytest.approx(float(torch.cat(said).double().mean()))
    assert (row["clean_label"]["n"], row["clean_label"]["unit"]) == (12, "poisons")
    if opacity == 1:  # the network that chose the targets gets them right
        assert row["clean_label"]["value"] == row["target_success"]["value"] == 0
        assert row["relative_distance"] < 1e-5
        assert row["clean_label"]["high"] > 0.5  # twelve poisons, and three targets


def test_what_end_to_end_refuses(weights: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"weights": weights, "poisons": 1, "opacity": 0.3, **END}
    with refused("opacity = 1.1", "from 0 to 1"):
        end_to_end(tmp_path, 0, **{**given, "opacity": 1.1})
    data = Digits()
    data.setup()
    two = ImageClassifier(partial(MLP, hidden=[4]), 2, data.image_shape, data.mean, data.std)
    two.save(tmp_path / "two.safetensors")
    with refused("judge", "2 classes", "10"):
        end_to_end(tmp_path, 0, judge=str(tmp_path / "two.safetensors"), **given)


def test_sources_are_read_from_yaml(tmp_path: Path) -> None:
    assert isinstance(read_source("data/digits.yaml"), Digits)
    with refused("source = 'data/none.yaml'"):
        read_source("data/none.yaml")
