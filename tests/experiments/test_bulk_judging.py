"""What the numbers of Poison Frogs' studies rest on: who is asked in which mode, who judges, and who is counted."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from classifiers.backbones import MLP
from classifiers.classifier import load_classifier
from datamodules.imageset import ImageSet
from datamodules.measures import wilson
from datamodules.sources.digits import Digits
from experiments.bulk import end_to_end as study
from experiments.bulk.end_to_end import end_to_end, fine_tune
from experiments.bulk.outcomes import Trials, outcome
from experiments.bulk.poison_frogs import one_shot
from tests.helpers import Watched, global_randomness_untouched, mlp, some_images


def digits() -> Digits:
    data = Digits()
    data.setup()
    return data


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a network that knows nine in ten of the digits."""
    data = digits()
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


# --- one-shot kills ---------------------------------------------------------------------------------------------------
def test_clean_label_is_what_the_judge_takes_for_the_bases_class(
    knowing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge knows the digits: a base is of its class, and a target under the base's label is not."""
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    rows = one_shot(
        tmp_path, 0, extractor=knowing, judge=knowing, source="data/digits.yaml", classes=[3, 5], per_class=20,
        choose="random", scales=[1.0], iterations=3, epochs=2, limit=20,
    )  # fmt: skip
    kept = {row["poison"]: row["clean_label"]["value"] for row in rows if row["part"] == "control"}
    assert kept["base"] > 0.8
    assert kept["target"] < 0.2
    [crafted] = [row for row in rows if row["part"] == "all"]
    assert crafted["label_noise_clean_label"]["value"] == kept["target"]
    assert crafted["unmodified_base_clean_label"]["value"] == kept["base"]


END: dict[str, Any] = {
    "source": "data/digits.yaml", "target_label": 3, "base_label": 5, "trials": 4, "images": 40, "poisons": 2,
    "iterations": 2, "epochs": 1,
}  # fmt: skip


# --- end to end -------------------------------------------------------------------------------------------------------
def test_a_victim_is_trained_with_dropout_and_its_batch_norm_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    warm = mlp(digits(), backbone=Watched)
    warm.save(tmp_path / "warm.safetensors")
    warm = load_warm(tmp_path / "warm.safetensors")
    before = {name: value.clone() for name, value in warm.net.named_buffers()}
    Watched.seen.clear()
    victim = fine_tune(warm, *few_images(), 2, 5, 1e-3, 0)
    seen, Watched.seen[:] = list(Watched.seen), []
    assert [training for training, _ in seen] == [True] * 8
    fine_tune(load_warm(tmp_path / "warm.safetensors"), *few_images(), 1, 5, 1e-3, seed=1)
    first, second, other = (torch.cat([x for _, x in part]) for part in (seen[:4], seen[4:], Watched.seen))
    assert not torch.equal(first, second)  # each epoch has an order of its own
    assert not torch.equal(first, other)  # and each seed
    assert not victim.training
    # dropout is of the seed, whatever was drawn before
    again = load_warm(tmp_path / "warm.safetensors")
    with global_randomness_untouched():
        fine_tune(again, *few_images(), 2, 5, 1e-3, 0)
    assert all(torch.equal(one, other) for one, other in zip(victim.parameters(), again.parameters(), strict=True))
    assert int(victim.net.get_buffer("body.2.num_batches_tracked")) == 8
    assert not torch.equal(victim.net.get_buffer("body.2.running_mean"), before["body.2.running_mean"])


def few_images() -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=noise), torch.arange(20) % 10


def load_warm(path: Path) -> Any:
    return load_classifier(path, Watched)


def test_the_judge_of_a_control_knows_a_target_from_a_base(knowing: str, tmp_path: Path) -> None:
    [row] = end_to_end(
        tmp_path, 0, weights=knowing, judge=knowing, crafted=False, opacity=1.0, **{**END, "poisons": 5, "trials": 6}
    )
    assert row["poison"] == "the target itself"
    assert row["clean_label"]["value"] == 0  # targets are images that the network gets right
    assert row["clean_label_of_bases"]["value"] > 0.8
    # 30 images, but six targets: what is known of one is known of its copies
    assert row["clean_label"]["high"] == pytest.approx(wilson(0, 6).high)


def test_each_victim_begins_at_the_warm_start(knowing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Tensor] = []
    tune = study.fine_tune

    def noted(model: Any, *rest: Any) -> Any:
        begun.append(model.net.head.weight.detach().clone())
        return tune(model, *rest)

    monkeypatch.setattr(study, "fine_tune", noted)
    end_to_end(tmp_path, 0, weights=knowing, opacity=0.3, **{**END, "learning_rate": 0.01})
    assert len(begun) == 4
    assert all(torch.equal(each, begun[0]) for each in begun)


class Knows(nn.Module):
    """Answers as the test set has it, and calls some images another class."""

    device = torch.device("cpu")

    def __init__(self, test: ImageSet, wrong: set[int], called: int) -> None:
        super().__init__()
        images = test.images_at(torch.arange(len(test)))
        self.labels = {
            image.numpy().tobytes(): called if sample in wrong else label
            for image, label, sample in zip(images, test.labels.tolist(), test.ids.tolist(), strict=True)
        }

    def forward(self, images: Tensor) -> Tensor:
        labels = [self.labels[image.numpy().tobytes()] for image in images]
        return 10 * nn.functional.one_hot(torch.tensor(labels), 10).float()


def test_targets_do_not_count_in_the_clean_accuracy(
    knowing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"weights": knowing, "opacity": 0.3, **END}
    end_to_end(tmp_path, 0, **options)
    with (tmp_path / "trials.csv").open(newline="") as file:
        targets = {int(line["target_id"]) for line in csv.DictReader(file)}
    assert len(targets) == 4
    model = Knows(digits().test_set, targets, 5)
    monkeypatch.setattr(study, "fine_tune", lambda *_, **__: model)
    [row] = end_to_end(tmp_path, 0, **options)
    assert row["target_success"]["value"] == 1
    accuracy = row["clean_accuracy"]
    assert (accuracy["value"] if isinstance(accuracy, dict) else accuracy) == 1
    model = Knows(digits().test_set, targets, 7)  # wrong, but not as the attacker wants it
    [row] = end_to_end(tmp_path, 0, **options)
    assert (row["target_success"]["value"], row["target_misclassified"]["value"]) == (0, 1)


# --- triggerless attacks ----------------------------------------------------------------------------------------------
def test_what_became_of_a_target_by_hand() -> None:
    test = some_images(5)  # labels 0, 1, 2, 3, 0
    drawn = Trials(torch.tensor([1]), torch.tensor([2]), torch.zeros(1, 1, dtype=torch.int64))
    before, answers = (torch.eye(4)[labels] for labels in ([0, 1, 2, 3, 0], [0, 2, 2, 3, 1]))
    for after, success, right in ((answers, True, False), (before, False, True), (torch.eye(4)[[3] * 5], False, False)):
        found = outcome(0, after, before, test, drawn, 0)
        others = after.argmax(1) == test.labels
        assert (found.success, found.right, found.success_before, found.right_before) == (success, right, False, True)
        assert (found.hits, found.cases) == (int(others[[0, 2, 3, 4]].sum()), 4)  # the target is not among them
