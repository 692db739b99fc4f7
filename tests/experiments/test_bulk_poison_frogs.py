"""One-shot kills in bulk: the study's function on a few digits, from weights to rows and pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError
from datamodules.measures import wilson
from datamodules.sources.digits import Digits
from experiments.bulk import poison_frogs
from experiments.bulk.poison_frogs import one_shot


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))


def weights(path: Path, classes: int, seed: int) -> str:
    """An untrained network of 24 features: random features keep the classes apart well enough."""
    source = Digits()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ImageClassifier(partial(MLP, hidden=[24]), classes, (1, 8, 8), source.mean, source.std)
    model.save(path)
    return str(path)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "extractor": weights(tmp_path / "extractor.safetensors", 8, 1),
        "judge": weights(tmp_path / "judge.safetensors", 10, 2),
        "source": "data/digits.yaml",
        "classes": [3, 5],
        "per_class": 20,
        "scales": [1.0, 0.01],
        "iterations": 40,
        "epochs": 3,
        "limit": 6,
    }


def test_rows_trials_and_pictures(tmp_path: Path, given: dict[str, Any]) -> None:
    rows = one_shot(tmp_path, 0, **given)
    whole = [row for row in rows if row["part"] == "all"]
    controls = {row["poison"]: row for row in rows if row["part"] == "control"}
    assert [(row["scale"], row["trials"]) for row in whole] == [(1.0, 6), (0.01, 6)]
    assert set(controls) == {"target", "base"}
    assert controls["target"]["relative_distance"] == 0
    assert controls["base"]["relative_distance"] == pytest.approx(1)
    assert controls["base"]["l2"] == controls["base"]["linf"] == 0
    for row in whole:
        assert row["target_success"]["n"] == 6
        assert row["label_noise_success"] == controls["target"]["target_success"]
        assert row["unmodified_base_success"] == controls["base"]["target_success"]
        assert 0 <= row["relative_distance"] < 1
        assert 0 < row["iterations_run"] <= 40
    # a smaller β lets the poison go further from its base and nearer to its target
    assert whole[1]["relative_distance"] < whole[0]["relative_distance"]
    assert whole[1]["l2"] > whole[0]["l2"]
    bins = [row for row in rows if row["part"] == "distance"]
    assert sum(row["trials"] for row in bins) == 12
    with (tmp_path / "trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 6
    assert {(line["target_class"], line["base_class"]) for line in lines} <= {("3", "5"), ("5", "3")}
    hits = [int(line["success"]) for line in lines if line["scale"] == "0.01"]
    assert sum(hits) / 6 == pytest.approx(whole[1]["target_success"]["value"])
    for name in ("poisons", "confidence", "boundary"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
    assert json.loads((tmp_path / "times.json").read_text())["trials"] == 6


def test_the_same_again_without_crafting_again(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    rows = one_shot(first, 0, **given)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("crafted again")

    monkeypatch.setattr(poison_frogs, "collide", never)
    assert one_shot(second, 0, **given) == rows
    assert (first / "trials.csv").read_bytes() == (second / "trials.csv").read_bytes()
    # other victims, the same poisons
    other = one_shot(second, 0, **{**given, "epochs": 1, "per_class": 10, "controls": False, "scale": 0.01})
    assert [row["poison"] for row in other if row["part"] != "distance"] == ["crafted"]
    assert other[0]["l2"] == rows[1]["l2"]
    with pytest.raises(AssertionError, match="crafted again"):
        one_shot(second, 0, **{**given, "epsilon": 8})


def test_epsilon_is_in_grey_levels_and_is_kept(tmp_path: Path, given: dict[str, Any]) -> None:
    (row, *_) = one_shot(tmp_path, 0, **{**given, "scales": [0.0], "epsilon": 32, "controls": False, "judge": None})
    assert 0 < row["largest_linf"] <= 32 / 255 + 1e-6
    assert "clean_label" not in row


def test_the_judge_may_know_all_classes_or_the_two(tmp_path: Path, given: dict[str, Any]) -> None:
    model = poison_frogs.load_extractor(given["judge"], (1, 8, 8))
    images = Digits().read().test_images
    with torch.no_grad():
        plain = model(images).argmax(1)
    common = plain.bincount(minlength=10).argsort(descending=True)[:3].tolist()
    assert (plain == common[2]).any()
    data = poison_frogs.Classes(Digits(), common[:2])
    expected = torch.full_like(plain, -1)
    expected[plain == common[0]] = 0
    expected[plain == common[1]] = 1
    assert torch.equal(poison_frogs._judge(given["judge"], data, 10, "cpu")(images), expected)
    two = poison_frogs._judge(weights(tmp_path / "two.safetensors", 2, 0), data, 10, "cpu")
    assert set(two(images).tolist()) <= {0, 1}
    with pytest.raises(InputError, match="it knows 8 classes; 10 or 2"):
        poison_frogs._judge(given["extractor"], data, 10, "cpu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scales": []}, "scales"),
        ({"scales": [-1.0]}, "scales"),
        ({"limit": 0}, "limit"),
        ({"epsilon": 0.03}, "epsilon"),
        ({"choose": "near"}, "nearest or random"),
        ({"source": "data/digts.yaml"}, "no such YAML"),
        ({"extractor": "runs/none"}, "lightning fit --config none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, given: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        one_shot(tmp_path, 0, **{**given, **change})
    assert "\n" not in str(caught.value)


def test_the_poisons_of_one_target_at_several_beta_are_no_targets_of_their_own() -> None:
    hits, counted = torch.tensor([[1, 1, 0, 0]] * 3).bool().flatten(), torch.ones(12).bool()
    found = poison_frogs._by_target(hits, counted, 3)
    assert (found.value, found.n, found.unit) == (0.5, 12, "poisons")
    least = wilson(2, 4)  # each target's three poisons do the same
    assert found.low < least.low < least.high < found.high
    once = counted.clone()
    once[4:] = False
    assert poison_frogs._by_target(hits, once, 3) == replace(least, unit="poisons")
