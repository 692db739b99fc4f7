"""Rounds: what is asked, paid for and trained on, in one process and several, at once and after an interruption."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier, load_classifier
from classifiers.schedules import OneCycle
from datamodules.imageset import UNLABELLED, ImageSet
from datamodules.sources.digits import Digits
from extraction.active_learning import STRATEGIES, ActiveLearning
from extraction.jacobian_augmentation import JacobianAugmentation, stepped
from extraction.oracle import LocalOracle
from extraction.rounds import Asked, predicted
from extraction.selection import entropy, margin
from extraction.surrogate import Surrogate
from tests.experiments.running import QUIET, only_run, ranks, read_json
from tests.helpers import mlp, refused, tiny_trainer


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


def by_rounds(rounds: int, epochs: int = 1, **kwargs: Any) -> Trainer:
    quiet = {"max_epochs": rounds * epochs, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}
    return tiny_trainer(**{**quiet, **kwargs})


def surrogate(data: Any, **kwargs: Any) -> Surrogate:
    torch.manual_seed(1)
    return mlp(data, Surrogate, **{"optimizer": partial(torch.optim.Adam, lr=0.01), **kwargs})


def sets_of(data: Any, each: list[list[int]]) -> Callback:
    """Collects the ids that each epoch trains on."""

    class Collect(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            each.append(data.train_set.ids.tolist())

    return Collect()


# --- what is asked ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_image_is_asked_about_twice_and_the_budget_is_spent(victim: str, strategy: str) -> None:
    data = ActiveLearning(Digits(batch_size=50), LocalOracle(victim, "label"), 101, strategy, 3, 0.2, candidates=100)
    seen: list[list[int]] = []
    by_rounds(3, 2, callbacks=[sets_of(data, seen)]).fit(surrogate(data), data)
    # a fifth of 101, then half of the 81 that are left, then the rest; each round trains for two epochs
    assert [len(ids) for ids in seen] == [20, 20, 61, 61, 101, 101]
    for before, after in pairwise(seen):
        assert after[: len(before)] == before, "a round keeps what was asked before it"
    assert len(set(seen[-1])) == 101
    facts = data.facts()
    assert (facts["queries"], facts["samples"], facts["rounds"]) == (101, 101, 3)
    everything = data.train_set.images_at(torch.arange(101))
    with torch.no_grad():
        assert torch.equal(data.train_set.labels, load_classifier(victim)(everything).argmax(1))


def test_a_budget_in_samples_is_that_of_all_rounds(victim: str) -> None:
    data = ActiveLearning(Digits(batch_size=50), LocalOracle(victim), 100, "margin", 3, 0.2, samples_budget=40)
    seen: list[list[int]] = []
    by_rounds(3, callbacks=[sets_of(data, seen)]).fit(surrogate(data), data)
    assert [len(ids) for ids in seen] == [8, 24, 40]
    assert data.facts()["samples"] == 40


def test_a_pool_that_is_smaller_than_the_budget_is_asked_about_whole(victim: str) -> None:
    data = ActiveLearning(Digits(batch_size=500), LocalOracle(victim, "label"), 10**6, "margin", 2, 0.001)
    by_rounds(2).fit(surrogate(data), data)
    assert sorted(data.train_set.ids.tolist()) == sorted(data.base.train_set.ids.tolist())
    assert data.facts()["queries"] == len(data.base.train_set)


def test_the_first_round_is_the_seeds_and_the_next_the_surrogates(victim: str) -> None:
    def asked(seed: int, learning: int) -> list[int]:
        data = ActiveLearning(Digits(batch_size=50), LocalOracle(victim, "label"), 60, "margin", 2, 0.5, seed=seed)
        torch.manual_seed(learning)
        by_rounds(2).fit(mlp(data, Surrogate), data)
        return data.train_set.ids.tolist()

    one, other, third = asked(3, 0), asked(3, 1), asked(4, 0)
    assert one[:30] == other[:30]
    assert one[30:] != other[30:]
    assert one[:30] != third[:30]
    assert asked(3, 0) == one


@pytest.mark.parametrize("strategy", ["entropy", "margin"])
def test_what_is_chosen_is_the_least_certain_of_what_is_left(victim: str, strategy: str) -> None:
    data = ActiveLearning(Digits(), LocalOracle(victim, "label"), 60, strategy, 2, 0.5)
    data.prepare_data()
    data.setup("fit")
    pool, model = data.base.train_set, surrogate(data).eval()
    first = data.first(pool)
    asked = Asked(first[0], first[1], torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64))
    images, ids = data.choose(1, model, pool, asked)
    assert len(images) == len(ids) == 30
    scores = predicted(model, pool, torch.arange(len(pool)))
    uncertain = -entropy(scores) if strategy == "entropy" else margin(scores)
    left = ~torch.isin(pool.ids, asked.ids)
    chosen = torch.isin(pool.ids, ids)
    assert not (chosen & ~left).any()
    assert uncertain[chosen].max() <= uncertain[left & ~chosen].min()


def test_k_center_starts_at_what_was_asked_about(victim: str) -> None:
    data = ActiveLearning(Digits(), LocalOracle(victim, "label"), 60, "k_center", 2, 0.5)
    data.prepare_data()
    data.setup("fit")
    pool, model = data.base.train_set, surrogate(data).eval()
    scores = predicted(model, pool, torch.arange(len(pool))).double()
    for rows in (torch.arange(30), torch.arange(700, 730)):
        none = torch.zeros(30, dtype=torch.int64)
        ids = data.choose(1, model, pool, Asked(pool.images_at(rows), pool.ids[rows], none, none))[1]
        centres = rows
        for chosen in torch.searchsorted(pool.ids, ids).tolist():  # each is as far as can be from all before it
            far = torch.cdist(scores, scores[centres]).amin(1)
            assert float(far[chosen]) >= float(far.max()) - 1e-5
            centres = torch.cat([centres, torch.tensor([chosen])])


@pytest.mark.parametrize("strategy", ["dfal", "dfal_k_center"])
def test_dfal_asks_about_the_nearest_to_a_boundary(victim: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def distance(model: Any, images: Tensor) -> Tensor:
        return images.flatten(1).sum(1)

    monkeypatch.setattr("extraction.active_learning.deepfool", distance)
    data = ActiveLearning(Digits(), LocalOracle(victim, "label"), 60, strategy, 2, 0.5, candidates=10**6)
    data.prepare_data()
    data.setup("fit")
    pool, none = data.base.train_set, torch.zeros(30, dtype=torch.int64)
    images, ids = data.first(pool)
    found = data.choose(1, surrogate(data).eval(), pool, Asked(images, ids, none, none))[1]
    left = ~torch.isin(pool.ids, ids)
    far = distance(None, pool.images_at(torch.arange(len(pool))).float() / 255)
    chosen, limit = torch.isin(pool.ids, found), far[left].sort().values
    most = limit[29] if strategy == "dfal" else limit[int(left.sum()) // 2 - 1]
    assert int(chosen.sum()) == 30
    assert far[chosen].max() <= most + 1e-4


def test_dfal_looks_at_no_more_candidates_than_it_was_given(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def distance(model: Any, images: Tensor) -> Tensor:
        looked.append(len(images))
        return torch.arange(len(images), dtype=torch.float32)

    monkeypatch.setattr("extraction.active_learning.deepfool", distance)
    data = ActiveLearning(Digits(), LocalOracle(victim, "label"), 60, "dfal", 2, 0.5, candidates=70)
    by_rounds(2).fit(surrogate(data), data)
    assert sum(looked) == 70


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"max_epochs": 3}, ["trainer.max_epochs = 3", "2 rounds"]),
        ({"max_epochs": 1}, ["trainer.max_epochs = 1", "2 rounds"]),
        ({"reload_dataloaders_every_n_epochs": 0}, ["trainer.reload_dataloaders_every_n_epochs = 0", "set it to 1"]),
    ],
)
def test_a_trainer_that_does_not_fit_is_refused_before_anything_is_asked(
    victim: str, trainer: dict[str, int], words: list[str]
) -> None:
    data = ActiveLearning(Digits(), LocalOracle(victim, "label"), 60, rounds=2)
    with refused(*words):
        by_rounds(2, **trainer).fit(surrogate(data), data)
    assert data.spent is None


# --- what is trained --------------------------------------------------------------------------------------------------
def test_each_round_trains_from_scratch(victim: str) -> None:
    made = partial(surrogate, schedule=partial(OneCycle, peak=0.5))
    data = ActiveLearning(Digits(batch_size=20), LocalOracle(victim, "label"), 60, "random", 2, 0.5, seed=3)
    starts: list[dict[str, Tensor]] = []
    used: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            used.append(trainer.optimizers[0].param_groups[0]["lr"])
            if _[1] == 0:
                starts.append({name: value.clone() for name, value in pl_module.state_dict().items()})
                assert not trainer.optimizers[0].state, "no momentum of the round before"

    model = made(data)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    by_rounds(2, callbacks=[Watch()]).fit(model, data)
    assert len(starts) == 2
    for start in starts:
        assert all(torch.equal(start[name], value) for name, value in initial.items())
    # the schedule begins anew, with as many steps as the round has: one of 30 images, then three of 20
    assert used == pytest.approx([0.01 / 1.5, 0.01 / 2.5, 0.02 / 2.5, 0.01 / 1.5])


def test_a_moving_average_begins_anew_too(victim: str) -> None:
    data = ActiveLearning(Digits(batch_size=60), LocalOracle(victim, "label"), 60, "random", 2, 0.5)
    model = surrogate(data, ema=0.999)
    # one step in the last round: an average that begins with it is what was trained, whatever its decay
    trained: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            trained.update({name: value.clone() for name, value in pl_module.net.state_dict().items()})

    by_rounds(2, callbacks=[Watch()]).fit(model, data)
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, trained[name])


# --- interruptions and several processes ------------------------------------------------------------------------------
def test_resuming_asks_and_trains_as_if_nothing_had_happened(
    victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared() -> tuple[ActiveLearning, Surrogate]:
        data = ActiveLearning(Digits(batch_size=8), LocalOracle(victim, "label"), 60, "margin", 3, 0.4, seed=3)
        return data, surrogate(data, schedule=partial(OneCycle, peak=0.5))

    class CopyStore(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step in (2, 5, 11):
                shutil.copytree(tmp_path / "cache", tmp_path / f"cache {trainer.global_step}")

    data, model = prepared()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    by_rounds(3, enable_checkpointing=True, callbacks=[CopyStore(), keep]).fit(model, data)
    for step in (2, 5, 11):  # in the first, second and third round
        monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / f"cache {step}"))
        again, resumed = prepared()
        torch.manual_seed(99)
        by_rounds(3).fit(resumed, again, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert again.train_set.digest() == data.train_set.digest(), step
        assert again.facts() == data.facts(), "nothing is paid for twice"
        for name, tensor in model.net.state_dict().items():
            assert torch.equal(resumed.net.state_dict()[name], tensor), (step, name)


def test_two_processes_ask_once_and_train_on_the_same(
    victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["fit", "--config=active_learning_digits", f"--data.oracle.weights={victim}", "--data.strategy=k_center",
            "--data.rounds=2", "--data.budget=75", "--trainer.max_epochs=2", *QUIET]  # fmt: skip
    with ranks(line, tmp_path) as processes:
        for process in processes:
            assert process.wait() == 0, process.text
    manifest = read_json(only_run() / "manifest.json")
    assert manifest["facts"]["queries"] == manifest["facts"]["samples"] == 75
    ids = manifest["changes"][0]["ids"]
    assert len(set(ids)) == len(ids) == 75


# --- Jacobian augmentation --------------------------------------------------------------------------------------------
def test_a_step_by_hand() -> None:
    slopes = torch.tensor([[1.0, -2.0, 0.0, 3.0], [-1.0, 1.0, 1.0, 1.0]])

    def linear(images: Tensor) -> Tensor:
        return images.flatten(1) @ slopes.T

    images = torch.tensor([[[[100, 100], [100, 250]]], [[[5, 0], [254, 255]]]], dtype=torch.uint8)
    up = stepped(linear, images, torch.tensor([0, 1]), 0.1)  # 25.5 → 26 of 255, as Python rounds to even
    assert up.flatten(1).tolist() == [[126, 74, 100, 255], [0, 26, 255, 255]]
    down = stepped(linear, images, torch.tensor([0, 1]), -0.1)
    assert down.flatten(1).tolist() == [[74, 126, 100, 224], [31, 0, 228, 229]]
    assert up.dtype == torch.uint8


def jacobian(victim: str, **kwargs: Any) -> JacobianAugmentation:
    return JacobianAugmentation(Digits(batch_size=64), LocalOracle(victim, "label"), **kwargs)


def test_rounds_double_until_the_budget_is_spent_and_only_new_images_are_asked_about(victim: str) -> None:
    data = jacobian(victim, budget=100, seeds=15, rounds=5, period=2)
    seen: list[list[int]] = []
    by_rounds(5, callbacks=[sets_of(data, seen)]).fit(surrogate(data), data)
    assert [len(ids) for ids in seen] == [15, 30, 60, 100, 100]
    assert data.facts()["queries"] == 100
    (changes,) = data.changes()
    assert (changes.origins[:15] == changes.ids[:15]).all()
    assert (changes.origins[15:] == -1).all()
    assert (changes.original_labels[15:] == UNLABELLED).all()
    assert len(set(changes.ids.tolist())) == 100
    # of images that were made, at most one whole step lies between each and one that was asked before
    images = data.train_set.images_at(torch.arange(30)).float()
    assert (images[15:, None] - images[None, :15]).abs().flatten(2).amax(2).amin(1).le(26).all()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """How many images each round steps from, and how far."""
    found: list[tuple[int, float]] = []

    def record(model: Any, images: Tensor, labels: Tensor, step: float) -> Tensor:
        found.append((len(images), step))
        return images

    monkeypatch.setattr("extraction.jacobian_augmentation.stepped", record)
    return found


def test_the_sign_changes_every_period_and_late_rounds_step_from_a_reservoir(
    victim: str, steps: list[tuple[int, float]]
) -> None:
    data = jacobian(victim, budget=10**4, seeds=4, rounds=8, step=0.2, period=3, reservoir_after=4, reservoir=10)
    by_rounds(8).fit(surrogate(data), data)
    # rounds 1 … 4 double; 5, 6 and 7 step from ten
    assert [n for n, _ in steps] == [4, 8, 16, 32, 10, 10, 10]
    assert [step for _, step in steps] == [0.2, 0.2, 0.2, -0.2, -0.2, -0.2, 0.2]


def test_each_image_is_stepped_from_along_its_own_answer(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = load_classifier(victim), []

    def record(surrogate: Any, images: Tensor, labels: Tensor, step: float) -> Tensor:
        with torch.no_grad():
            seen.append(bool((labels == model(images).argmax(1)).all()) and len(labels.unique()) > 1)
        return stepped(surrogate, images, labels, step)

    monkeypatch.setattr("extraction.jacobian_augmentation.stepped", record)
    data = jacobian(victim, budget=300, seeds=30, rounds=5, reservoir_after=2, reservoir=20)
    by_rounds(5).fit(surrogate(data), data)
    assert seen == [True] * 4


def test_one_round_is_the_seeds_alone(victim: str) -> None:
    data = jacobian(victim, budget=30, seeds=30, rounds=1)
    by_rounds(1).fit(surrogate(data), data)
    assert isinstance(data.train_set, ImageSet)
    assert len(data.train_set) == 30
    assert set(data.train_set.ids.tolist()) <= set(data.base.train_set.ids.tolist())


def test_a_classifier_that_is_no_surrogate_trains_too(victim: str) -> None:
    data = ActiveLearning(Digits(batch_size=50), LocalOracle(victim, "label"), 60, "margin", 2)
    by_rounds(2).fit(mlp(data, ImageClassifier), data)
    assert len(data.train_set) == 60
