"""The stages of `reconnaissance`: who is a member, what is imitated, what counts as success."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier, load_classifier
from datamodules.datamodule import ImageDataModule
from datamodules.share import Share
from datamodules.sources.digits import Digits
from datamodules.store import load_tensors
from experiments.bulk import reconnaissance as stages
from experiments.bulk.fitting import start_config
from experiments.bulk.reconnaissance import adversarial, membership
from extraction.knockoff_nets import KnockoffNets
from extraction.oracle import LocalOracle
from tests.helpers import mlp, refused

CONFIGS: dict[str, Any] = {
    "configs": ["victim_digits_overfitted"],
    "surrogate_configs": ["knockoff_digits"],
    "surrogate_overrides": {"data.budget": 1000},
}


def trained(path: Path, seed: int, rows: slice = slice(None)) -> str:
    """A small network that knows the digits fairly well."""
    data = Digits()
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp(data, backbone=partial(MLP, hidden=[32]))
    batch = data.train_set.__getitems__(torch.arange(1132)[rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(model(batch.images), batch.labels).backward()
        optimizer.step()
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A victim, one of almost the same weights, and one of its own."""
    folder = tmp_path_factory.mktemp("networks")
    victim = trained(folder / "victim.safetensors", 0)
    near = load_classifier(victim)
    with torch.no_grad():
        near.net.get_parameter(next(name for name, _ in near.net.named_parameters())).mul_(1.01)
    near.save(folder / "near.safetensors")
    return {
        "victim": victim,
        "surrogate": str(folder / "near.safetensors"),
        "independent": trained(folder / "independent.safetensors", 1, slice(0, 200)),
    }


# --- adversarial examples ---------------------------------------------------------------------------------------------
def test_rows_of_adversarial_examples(networks: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": "data/digits.yaml", "epsilons": [16, 32], "images": 120, "iterations": 5}
    rows = adversarial(tmp_path, 0, **networks, **options, data_pool="of the surrogate")
    found = {(row["made_on"], row["attack"], row["epsilon"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (3 * 2 + 1)
    for (name, attack, epsilon), row in found.items():
        assert row["success"]["n"] == 120
        assert row["success"]["low"] <= row["success"]["value"] <= row["success"]["high"]
        assert 0.9 * epsilon < row["epsilon_reached"] <= epsilon
        assert ("fools_its_own" in row) == (name != "noise")
        if name == "victim":
            assert row["fools_its_own"] == row["success"], "all were right before"
        if attack == "pgd":
            assert row["success"]["value"] >= found["noise", "noise", epsilon]["success"]["value"]
    success = [found[name, "pgd", 32]["success"]["value"] for name in ("victim", "surrogate", "independent")]
    assert success[0] > 0.5
    assert success[1] == pytest.approx(success[0], abs=0.1), "nearly the same network"
    assert success[2] < success[1]
    assert (tmp_path / "adversarial.png").exists()
    assert adversarial(tmp_path, 0, **networks, **options) == rows


def test_images_are_drawn_from_those_that_the_victim_gets_right(networks: dict[str, str]) -> None:
    data = Digits()
    data.setup()
    model = load_classifier(networks["victim"])
    images, labels, ids = stages._right(model, data.test_set, 1000, 0)
    with torch.no_grad():
        wrong = int(
            (model(data.test_set.images_at(torch.arange(len(data.test_set)))).argmax(1) != data.test_set.labels).sum()
        )
        assert torch.equal(model(images).argmax(1), labels)
    assert len(ids) == len(data.test_set) - wrong
    assert wrong > 0
    few, other = (stages._right(model, data.test_set, 50, seed)[2] for seed in (0, 1))
    assert len(few) == 50
    assert not torch.equal(few, other)
    assert torch.isin(few, ids).all()


def test_an_unrelated_network_leads_away_from_what_it_sees_itself(
    networks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away: list[Tensor] = []

    def noted(model: ImageClassifier, images: Tensor, labels: Tensor, **_: Any) -> Tensor:
        away.append(labels)
        return images

    monkeypatch.setattr(stages, "fgsm", noted)
    options: dict[str, Any] = {"source": "data/digits.yaml", "epsilons": [8], "images": 100, "iterations": 1}
    rows = adversarial(
        tmp_path, 0, victim=networks["victim"], surrogate=networks["surrogate"], unrelated=networks["independent"],
        **options,
    )  # fmt: skip
    data = Digits()
    data.setup()
    images, labels, _ = stages._right(load_classifier(networks["victim"]), data.test_set, 100, 0)
    with torch.no_grad():
        own = load_classifier(networks["independent"])(images).argmax(1)
    assert not torch.equal(own, labels)
    for seen, expected in zip(away, (labels, labels, own), strict=True):
        assert torch.equal(seen, expected)
    assert {row["made_on"] for row in rows} == {"noise", "victim", "surrogate", "unrelated"}


def test_a_victim_that_knows_nothing_is_no_victim(tmp_path: Path, networks: dict[str, str]) -> None:
    model = load_classifier(networks["victim"])
    model.save(tmp_path / "same.safetensors")
    data = Digits()
    data.setup()
    wrong = data.test_set.labels.new_full((len(data.test_set),), 0)
    with torch.no_grad():
        found = model(data.test_set.images_at(torch.arange(len(wrong)))).argmax(1)
    none = data.test_set.select((found != data.test_set.labels).nonzero().squeeze(1))
    with refused("no test image right"):
        stages._right(model, none, 10, 0)
    with refused("images = 0"):
        adversarial(tmp_path, 0, **networks, source="data/digits.yaml", epsilons=[8], images=0)


# --- membership -------------------------------------------------------------------------------------------------------
class Pupil:
    """In the stead of training: a table of who was trained on what, and answers that show it."""

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.seen: list[tuple[str, ImageDataModule]] = []

    def fit(self, line: Any, data: ImageDataModule) -> ImageClassifier:
        data.prepare_data()
        data.setup("fit")
        self.seen.append((type(data).__name__, data))
        return load_classifier(self.weights)


@pytest.fixture
def pupil(networks: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pupil:
    made = Pupil(networks["independent"])
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(stages, "fit", made.fit)
    monkeypatch.setattr(stages, "bootstrapped", partial(stages.bootstrapped, resamples=20))
    return made


def test_shadow_models_are_of_halves_and_their_surrogates_ask_them(
    networks: dict[str, str], tmp_path: Path, pupil: Pupil
) -> None:
    options = {**CONFIGS, "victim": networks["victim"], "surrogate": networks["surrogate"], "shadows": 4}
    rows = membership(tmp_path, 0, **options, data_pool="data/digits_others.yaml")
    assert [name for name, _ in pupil.seen] == ["Share", "KnockoffNets"] * 4
    victims = [data for _, data in pupil.seen[::2]]
    own = start_config(CONFIGS["configs"], {"data.seed": 0}, 0).datamodule
    own.setup()
    assert isinstance(own, Share)
    candidates = set(own.base.train_set.ids.tolist())
    halves = [set(data.train_set.ids.tolist()) for data in victims]
    for first in (0, 2):
        assert halves[first] | halves[first + 1] == candidates
        assert not halves[first] & halves[first + 1]
    assert halves[0] != halves[2]
    assert set(own.train_set.ids.tolist()) not in halves, "the attacker does not know the victim's"
    for _, data in pupil.seen[1::2]:
        assert isinstance(data, KnockoffNets)
        assert isinstance(data.oracle, LocalOracle)
    asked = [data.oracle.weights for _, data in pupil.seen[1::2]]  # type: ignore[attr-defined]
    assert all("shadows" in weights for weights in asked), "shadow victims, and not the victim"
    assert len(set(asked)) == 4
    assert {row["asked_about"] for row in rows} == {0.0}
    assert {row["members"] for row in rows} == {len(own.train_set)}
    again = membership(tmp_path, 0, **options, data_pool="data/digits_candidates.yaml")
    assert {row["asked_about"] for row in again} == {1.0}
    assert len(pupil.seen) == 12, "the shadow victims were in the store"
    assert (tmp_path / "roc.png").exists()


def test_rows_tell_members_from_others(
    networks: dict[str, str], tmp_path: Path, pupil: Pupil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that are sure of what they were trained on, and a victim that is: LiRA finds all its members."""
    data = start_config(CONFIGS["configs"], {"data.seed": 3}, 3).datamodule
    data.setup()
    truth = data.train_set.ids

    def shown(weights: str | Path, data: ImageDataModule, images: Tensor) -> Tensor:
        batch = data.base.train_set  # type: ignore[attr-defined]
        folder = Path(weights).parent
        known = (
            load_tensors(folder / "members.safetensors")["ids"] if (folder / "members.safetensors").exists() else truth
        )
        sure = torch.where(torch.isin(batch.ids, known), 0.9, 0.6) + 0.001 * (batch.ids % 7)
        scores = ((1 - sure) / 9)[:, None].repeat(1, 10)
        return scores.scatter(1, batch.labels[:, None], sure[:, None].to(scores))

    monkeypatch.setattr(stages, "_scores", shown)
    options = {**CONFIGS, "victim": networks["victim"], "surrogate": networks["surrogate"], "shadows": 4}
    rows = membership(tmp_path, 3, **options)
    found = {row["attack"]: row for row in rows if row["through"] == "victim"}
    for row in found.values():
        assert row["auroc"]["value"] == 1
        assert row["tpr_at_01"]["value"] == row["tpr_at_01"]["high"] == 1
        assert row["tpr_at_01"]["n"] == row["members"] + row["others"]
        assert 0.5 < row["tpr_at_01"]["low"] < 1  # no bootstrap says so, and yet it is of so many members
    assert set(found) == {"loss", "lira_offline", "lira_online", "lira_online_own_variance"}


@pytest.mark.parametrize("shadows", [0, 2, 5])
def test_a_number_of_shadow_models_that_does_not_divide_is_refused(shadows: int, tmp_path: Path) -> None:
    with refused(f"shadows = {shadows}", "even"):
        membership(tmp_path, 0, victim="v", surrogate="s", **CONFIGS, shadows=shadows)


def test_configs_of_other_data_are_refused(networks: dict[str, str], tmp_path: Path) -> None:
    options = {**CONFIGS, "victim": networks["victim"], "surrogate": networks["surrogate"], "shadows": 4}
    with refused("configs = ['victim_digits']", "must be a Share"):
        membership(tmp_path, 0, **{**options, "configs": ["victim_digits"]})
    with refused("oracle.weights: there is no such option"):
        membership(tmp_path, 0, **{**options, "surrogate_configs": ["label_flip_mnist"], "surrogate_overrides": {}})
