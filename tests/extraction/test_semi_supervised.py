"""Semi-supervised extraction: the answers that were paid for, the rest of the pool, and what is learned from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.augment import Augmentation, FlipCrop
from datamodules.imageset import labelled
from datamodules.sources.digits import Digits
from extraction.fixmatch import FixMatchSurrogate, fixmatch_loss
from extraction.knockoff_nets import KnockoffNets
from extraction.mixmatch import MixMatchSurrogate, beta, mix, mixmatch_loss, sharpen
from extraction.oracle import LocalOracle
from extraction.semi_supervised import SemiSupervised, SemiSupervisedSurrogate
from tests.helpers import global_randomness_untouched, mlp, refused, tiny_trainer

METHODS = (MixMatchSurrogate, FixMatchSurrogate)
each_method = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A victim that knows digits."""
    folder = tmp_path_factory.mktemp("victim")
    torch.manual_seed(0)
    data = Digits(batch_size=32, seed=0)
    model = mlp(data, backbone=partial(MLP, hidden=[32]), optimizer=partial(torch.optim.Adam, lr=0.01))
    tiny_trainer(max_epochs=12, limit_val_batches=0).fit(model, data)
    model.save(folder / "victim.safetensors")
    return str(folder / "victim.safetensors")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))


def data(victim: str, mode: str = "label", budget: int = 40, **kwargs: object) -> SemiSupervised:
    return SemiSupervised(Digits(seed=3), LocalOracle(victim, mode), budget, 16, 48, **kwargs)  # type: ignore[arg-type]


def ready(data: KnockoffNets) -> KnockoffNets:
    data.prepare_data()
    data.setup("fit")
    return data


# --- the data ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["label", "scores"])
def test_the_answers_are_knockoffs_and_the_rest_of_the_pool_has_no_label(trained: str, mode: str) -> None:
    found = ready(data(trained, mode))
    alone = ready(KnockoffNets(Digits(), LocalOracle(trained, mode), 40))
    asked = labelled(found.train_set.labels)
    assert asked.tolist() == [True] * 40 + [False] * (len(found.base.train_set) - 40)
    assert torch.equal(found.train_set.ids[:40], alone.train_set.ids)
    assert torch.equal(found.train_set.labels[:40], alone.train_set.labels)
    rows = torch.arange(len(found.train_set))
    assert torch.equal(found.train_set.images_at(rows[:40]), alone.train_set.images_at(rows[:40]))
    assert sorted(found.train_set.ids.tolist()) == found.base.train_set.ids.tolist()
    assert found.facts()["queries"] == 40, "what has no answer was not asked about"


def test_images_stay_with_their_ids(trained: str) -> None:
    found = ready(data(trained))
    there = found.base.train_set
    where = torch.searchsorted(there.ids, found.train_set.ids)
    rows = torch.arange(len(there))
    assert torch.equal(found.train_set.images_at(rows), there.images_at(where))


def test_another_pool_has_new_ids(trained: str) -> None:
    found = ready(data(trained, pool=Digits(split_seed=5)))
    assert set(found.train_set.ids.tolist()).isdisjoint(found.base.train_set.ids.tolist())
    assert len(found.train_set) == len(found.base.train_set)
    assert int(found.changes()[0].origins.max()) == -1


def test_each_batch_has_both_kinds(trained: str) -> None:
    batches = list(ready(data(trained)).train_dataloader())
    assert len(batches) == (len(ready(data(trained)).train_set) - 40) // 48
    assert all(labelled(batch.labels).tolist() == [True] * 16 + [False] * 48 for batch in batches)


def test_what_is_refused(trained: str) -> None:
    with refused("labelled_batch = 0"):
        SemiSupervised(Digits(), LocalOracle(trained), labelled_batch=0)
    with refused("budget = 5000", "without an answer"):
        ready(data(trained, budget=5000))
    for value in ({"copies": 0}, {"sharpening": 0.0}, {"alpha": 1.5}, {"ramp": 2.0}, {"unlabelled_weight": -1.0}):
        [(name, wrong)] = value.items()
        with refused(f"{name} = {wrong}"):
            mlp(Digits(), MixMatchSurrogate, **value)
    with refused("threshold = 2"):
        mlp(Digits(), FixMatchSurrogate, threshold=2)


@pytest.mark.parametrize("mode", ["label", "scores"])
def test_a_plain_classifier_does_not_train_on_what_has_no_label(trained: str, mode: str) -> None:
    some = data(trained, mode)
    with refused("have no label"):
        tiny_trainer(max_steps=1).fit(mlp(some), some)


# --- the pure parts ---------------------------------------------------------------------------------------------------
def test_sharpening_by_hand() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1]])
    torch.testing.assert_close(sharpen(scores, 0.5), torch.tensor([[0.36, 0.09, 0.01]]) / 0.46)
    torch.testing.assert_close(sharpen(scores, 1.0), scores)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    from scipy.stats import beta as expected
    from scipy.stats import kstest

    with global_randomness_untouched():
        shares = beta(alpha, 0, "test", 1, torch.arange(20_000))
    assert kstest(shares.numpy(), expected(alpha, alpha).cdf).pvalue > 0.01
    assert torch.equal(beta(alpha, 0, "test", 1, torch.tensor([17, 5])), shares[[17, 5]])


def test_mixing_by_hand() -> None:
    one, other = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    mixed = mix(one, other, torch.tensor([0.75, 1.0]))
    assert mixed[:, 0, 0, 0].tolist() == [0.75, 1.0]


def test_the_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [100.0, 0.0]])
    targets = torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    # log 2 for the labelled row; squared errors 1/4, 1/4, 0, 0
    expected = torch.tensor(2.0).log() + 8 * 0.125
    torch.testing.assert_close(mixmatch_loss(logits, targets, 1, 8.0), expected)
    sure = torch.tensor([[100.0, 0.0], [0.1, 0.0]], requires_grad=True)  # the second is not sure enough
    strong = torch.zeros(2, 2, requires_grad=True)
    loss = fixmatch_loss(torch.zeros(1, 2), targets[:1], sure, strong, 0.95, 3.0)
    torch.testing.assert_close(loss, torch.tensor(2.0).log() * (1 + 3.0 / 2))
    loss.backward()
    assert sure.grad is None, "a guess is no function of the weights"
    assert strong.grad is not None
    assert strong.grad[1].tolist() == [0.0, 0.0]


# --- training ---------------------------------------------------------------------------------------------------------
def fitted(kind: type[SemiSupervisedSurrogate], victim: str, mode: str = "label", **trainer: object) -> ImageClassifier:
    torch.manual_seed(1)
    some = data(victim, mode)
    model: ImageClassifier = mlp(some, kind, weak=FlipCrop(1, flip=False), ema=None)
    with global_randomness_untouched():
        tiny_trainer(**{"max_epochs": 2, "limit_val_batches": 0, **trainer}).fit(model, some)
    return model


def state(model: ImageClassifier) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.net.state_dict().values()])


@each_method
@pytest.mark.parametrize("mode", ["label", "scores"])
def test_the_same_run_twice(kind: type[SemiSupervisedSurrogate], mode: str, trained: str) -> None:
    assert torch.equal(state(fitted(kind, trained, mode)), state(fitted(kind, trained, mode)))


@each_method
def test_a_run_that_is_resumed_in_the_middle_of_an_epoch_ends_the_same(
    kind: type[SemiSupervisedSurrogate], trained: str, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    whole = state(fitted(kind, trained, enable_checkpointing=True, callbacks=[saving]))
    torch.manual_seed(9)
    some = data(trained)
    model = mlp(some, kind, weak=FlipCrop(1, flip=False), ema=None)
    trainer = tiny_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(model, some, ckpt_path=str(tmp_path / "step=7.ckpt"), weights_only=True)
    assert torch.equal(state(model), whole)


class Same(Augmentation):
    """The image itself."""

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
        return images


class Blank(Augmentation):
    """Nothing of the image."""

    def __call__(self, images: torch.Tensor, ids: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
        return torch.zeros_like(images)


def test_fixmatch_guesses_by_the_weak_copies_and_learns_on_the_strong_ones(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def record(known: torch.Tensor, targets: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((known.detach(), rest[0].detach(), rest[1].detach()))
        return fixmatch_loss(known, targets, *rest)

    monkeypatch.setattr("extraction.fixmatch.fixmatch_loss", record)
    some = data(trained)
    model = mlp(some, FixMatchSurrogate, weak=Same(), strong=Blank(), ema=None)
    tiny_trainer(max_steps=1, limit_val_batches=0).fit(model, some)
    [(known, weak, strong)] = seen
    assert (len(known), len(weak), len(strong)) == (16, 48, 48)
    torch.testing.assert_close(strong, strong[:1].expand_as(strong))
    assert float((weak - weak[:1]).abs().max()) > 1e-3
    assert float((known - known[:1]).abs().max()) > 1e-3


def test_unlabelled_images_raise_fidelity(trained: str) -> None:
    """MixMatch against the same labels, network, optimizer and steps with the unlabelled images' loss left out."""
    found = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(1)
        some = data(trained, budget=30)
        model = mlp(
            some, MixMatchSurrogate, weak=FlipCrop(1, flip=False), ema=None, unlabelled_weight=weight,
            backbone=partial(MLP, hidden=[64]), optimizer=partial(torch.optim.Adam, lr=3e-3),
        )  # fmt: skip
        trainer = tiny_trainer(max_epochs=25, limit_val_batches=0)
        trainer.fit(model, some)
        trainer.test(model, some, verbose=False)
        found[weight] = model.measured["fidelity"].value
    assert found[10.0] > found[0.0], found
