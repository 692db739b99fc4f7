"""One-shot kills in bulk: the study's function on a few digits, from weights to rows and pictures."""

from __future__ import annotations

import csv
import inspect
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
from datamodules.classes import Classes
from datamodules.errors import InputError
from datamodules.measures import SAME_TARGETS, wilson
from datamodules.sources.digits import Digits
from experiments.bulk import frog_scene, poison_frogs
from experiments.bulk.poison_frogs import one_shot
from experiments.studies.spec import find_study, read_study
from poisoning.extractor import load_extractor


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
        "rule": "forward_backward",
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
    model = load_extractor(given["judge"], (1, 8, 8))
    images = Digits().read().test_images
    with torch.no_grad():
        plain = model(images).argmax(1)
    common = plain.bincount(minlength=10).argsort(descending=True)[:3].tolist()
    assert (plain == common[2]).any()
    data = Classes(Digits(), common[:2])
    data.setup()
    expected = torch.full_like(plain, -1)
    expected[plain == common[0]] = 0
    expected[plain == common[1]] = 1
    judge = frog_scene._judge(given["judge"], data, data, 10)
    assert torch.equal(judge.answers(images), expected)
    right = expected[torch.isin(Digits().read().test_labels, torch.tensor(common[:2]))] == data.test_set.labels
    assert (judge.accuracy.value, judge.accuracy.n) == (pytest.approx(float(right.double().mean())), len(right))
    two = frog_scene._judge(weights(tmp_path / "two.safetensors", 2, 0), data, data, 10)
    assert set(two.answers(images).tolist()) <= {0, 1}
    with pytest.raises(InputError, match="it knows 8 classes; 10 or 2"):
        frog_scene._judge(given["extractor"], data, data, 10)


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("crafted again")


def backbone(hidden: int) -> dict[str, Any]:
    """A network as a config has it, with the random weights that it is made with."""
    return {"class_path": "classifiers.backbones.MLP", "init_args": {"hidden": [hidden]}}


def test_networks_of_a_config_attack_judge_and_are_attacked(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"extractor": backbone(40), "judge": backbone(64), "scales": [0.01], "target_seed": 0, "epochs": 30}
    torch.manual_seed(1)
    rows = one_shot(tmp_path, 0, **given)
    assert (rows[0]["features"], rows[0]["training_images"]) == (40, 40)
    judge = rows[0]["judge_accuracy"]
    assert judge["n"] == rows[0]["clean_accuracy_before"]["n"] == rows[0]["clean_drop"]["n"] > 60
    assert judge["value"] > 0.8  # its last layer was trained on all training images of the two classes
    assert rows[0]["unmodified_base_clean_label"]["value"] > 0.5 > rows[0]["label_noise_clean_label"]["value"]
    assert rows[0]["target_success"]["unit"] == SAME_TARGETS
    # another seed of the victims, or another victim, in a process whose global generator stands elsewhere
    torch.manual_seed(2)
    monkeypatch.setattr(poison_frogs, "collide", never)
    other = one_shot(tmp_path, 1, **given)
    assert other[0]["l2"] == rows[0]["l2"]
    assert other[0]["clean_accuracy"] != rows[0]["clean_accuracy"]
    black = one_shot(tmp_path, 0, **given, victim=backbone(24))
    assert black[0]["features"] == 24
    assert [black[0][name] for name in ("l2", "relative_distance")] == [
        rows[0][name] for name in ("l2", "relative_distance")
    ]
    assert black[0]["confidence_after"] != rows[0]["confidence_after"]
    # the mislabelled target itself is at distance 0 in any network
    assert next(row for row in black if row["poison"] == "target")["relative_distance"] == 0


def test_fewer_targets_are_the_first_of_many(tmp_path: Path, given: dict[str, Any]) -> None:
    targets = []
    for limit in (4, 9):
        one_shot(tmp_path, 0, **{**given, "limit": limit, "scales": [1.0], "controls": False, "target_seed": 3})
        with (tmp_path / "trials.csv").open() as file:
            targets.append([line["target"] for line in csv.DictReader(file)])
    assert targets[0] == targets[1][:4]
    assert len(set(targets[1])) == 9


def test_what_was_killed_goes_on_with_its_part(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"scales": [1.0], "controls": False}
    whole = one_shot(tmp_path, 0, **given)
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(poison_frogs, "PART", 2)
    monkeypatch.setattr(frog_scene.Network, "together", 2)
    sizes: list[int] = []
    collide = poison_frogs.collide

    def counted(features: Any, targets: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(targets))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return collide(features, targets, *args, **options)

    monkeypatch.setattr(poison_frogs, "collide", counted)
    with pytest.raises(KeyboardInterrupt):
        one_shot(tmp_path, 0, **given)
    again = one_shot(tmp_path, 0, **given)
    assert sizes == [2, 2, 2, 2]  # of six, four were there
    assert again[0]["l2"] == pytest.approx(whole[0]["l2"], rel=0.02)  # rounding of batches, then of grey levels


def test_features_of_large_images_are_kept(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"scales": [1.0], "judge": backbone(16), "controls": False}
    plain = one_shot(tmp_path, 0, **given)
    monkeypatch.setattr(frog_scene, "LARGE", 64)
    assert one_shot(tmp_path, 0, **given) == plain
    kept = [each for each in (tmp_path / "cache" / "features").iterdir() if each.is_dir()]
    assert len(kept) == 4  # of test and training images, the extractor's and the judge's
    monkeypatch.setattr(frog_scene, "features_in_parts", never)
    data = Classes(Digits(), [3, 5])
    data.setup()
    network = frog_scene.Network(given["judge"], data, "judge")
    assert network.features_of(data.train_set).shape[1] == 16


@pytest.mark.parametrize("size", ["quick", "mnist", "paper", "cifar", "real", "real_full", "imagenet"])
def test_every_size_asks_for_what_there_is(size: str) -> None:
    study = read_study(find_study("poison_frogs_one_shot"), size)
    for stage in study.stages:
        if stage.function is None:
            continue
        grid = {key.replace(".", "_"): values[0] for key, values in stage.grid.items()}
        given_twice = {*grid} & {*stage.arguments} | {*stage.inputs} & {*stage.arguments}
        assert not given_twice, "a study refuses it"
        called = inspect.signature(one_shot).bind(Path(), 0, **{**stage.arguments, **stage.inputs, **grid})
        assert "extractor" in called.arguments
        networks = [called.arguments.get(name) for name in ("extractor", "judge", "victim")]
        for given in networks:
            if isinstance(given, dict):
                assert set(given) == {"class_path", "init_args"}
                assert given["class_path"] in ("EfficientNetLite", "InceptionV3")
        if len(stage.seeds) > 1:  # of victims: what was crafted for one of them is there for all
            assert called.arguments["target_seed"] == 0


def test_the_published_size_on_small_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dogs and fish, InceptionV3: all that differs is how many, how long, and that the weights are random."""
    private = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 3)):
        for number, name in enumerate(("dog", "fish")):
            folder = tmp_path / "data" / "dog_fish" / split / name
            folder.mkdir(parents=True)
            for at in range(count):
                shade = 80 + 90 * number + 30 * torch.randn(3, 20, 24, generator=private)
                image = shade.clamp(0, 255).byte().permute(1, 2, 0).numpy()
                Image.fromarray(image).save(folder / f"{at}.png")
    monkeypatch.setenv("PHARMAKON_DATA", str(tmp_path / "data"))
    study = read_study(find_study("poison_frogs_one_shot"), "imagenet")
    (stage,) = study.stages
    assert stage.function == "experiments.bulk.poison_frogs.one_shot"
    arguments = dict(stage.arguments)
    assert arguments["extractor"] == {"class_path": "InceptionV3", "init_args": {"pretrained": True}}
    assert (arguments["per_class"], arguments["iterations"], arguments.get("limit")) == (900, 1000, None)
    random = {"class_path": "InceptionV3", "init_args": {"pretrained": False}}
    few = {"extractor": random, "per_class": 3, "iterations": 2, "limit": 2, "epochs": 3}
    rows = one_shot(tmp_path, 0, **{**arguments, **few})
    assert rows[0]["features"] == 2048
    assert rows[0]["trials"] == rows[0]["target_success"]["n"] == 2
    assert rows[0]["clean_drop"]["n"] == 6
    assert {path.name for path in tmp_path.glob("*.png")} == {"poisons.png", "confidence.png", "boundary.png"}


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
        ({"extractor": {"class_path": "InceptionV4"}}, "extractor"),
        ({"judge": {"class_path": "MLP", "init_args": {"hiden": [3]}}}, "judge.*hidden"),
        ({"victim": {"class_path": "EfficientNetLite", "init_args": {"version": 7}}}, "version = 7"),
        ({"rule": "adm"}, "rule"),
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
