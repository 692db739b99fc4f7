"""A holdout cut from the poisoned pool: what it holds, what is measured on it, and how the gate errs by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from classifiers.backbones import MLP
from datamodules.datamodule import ImageDataModule
from datamodules.imageset import Overlay
from datamodules.sources.digits import Digits
from poisoning.holdout import PoisonedHoldout
from poisoning.label_flip import LabelFlip
from poisoning.unlearnable import Unlearnable
from poisoning.victim import Victim
from tests.helpers import mlp, refused, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*the surrogate still errs.*")


def cut(base: ImageDataModule, **kwargs: Any) -> PoisonedHoldout:
    data = PoisonedHoldout(base, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def test_it_is_cut_from_the_poisoned_pool() -> None:
    data = cut(LabelFlip(Digits(), 0.3, kind="pairwise"), fraction=0.1)
    pool, clean = data.base.train_set, Digits()
    clean.setup()
    assert (len(data.train_set), len(data.val_set)) == (1132 - 113, 113)
    ids = torch.cat([data.train_set.ids, data.val_set.ids])
    assert torch.equal(ids.sort().values, pool.ids.sort().values)
    labels = dict(zip(pool.ids.tolist(), pool.labels.tolist(), strict=True))
    for part in (data.train_set, data.val_set):
        assert part.labels.tolist() == [labels[sample] for sample in part.ids.tolist()]
    true = dict(zip(clean.train_set.ids.tolist(), clean.train_set.labels.tolist(), strict=True))
    wrong = sum(labels[sample] != true[sample] for sample in data.val_set.ids.tolist())
    facts = data.facts()
    assert (facts["holdout_images"], facts["holdout_poisoned"]) == (113, wrong)
    assert 0.15 < wrong / 113 < 0.45
    assert cut(Digits(), fraction=0.1).facts()["holdout_poisoned"] == 0


def test_poisoned_is_what_any_rewrite_changed() -> None:
    data = cut(LabelFlip(LabelFlip(Digits(), 0.2, seed=1), 0.2, seed=2, name="again"), fraction=0.2)
    one, other = ({*changes.ids.tolist()} & {*data.val_set.ids.tolist()} for changes in data.changes())
    assert one - other
    assert other - one
    assert data.facts()["holdout_poisoned"] == len(one | other)


def test_images_in_it_are_as_poisoned_as_those_trained_on() -> None:
    noisy = Unlearnable(
        Digits(), partial(MLP, hidden=[8]), kind="class_wise", rounds=1, step_size=20.0, epsilon=64, poison_fraction=0.5
    )
    data = cut(noisy, fraction=0.2)
    pool, rows = data.base.train_set, torch.arange(1132)
    images = dict(zip(pool.ids.tolist(), pool.images_at(rows), strict=True))
    for image, sample in zip(data.val_set.images_at(torch.arange(226)), data.val_set.ids.tolist(), strict=True):
        assert torch.equal(image, images[sample])
    changed = {*data.changes()[0].ids.tolist()}
    assert data.facts()["holdout_poisoned"] == len(changed & {*data.val_set.ids.tolist()}) > 60


def test_the_seed_alone_cuts_it() -> None:
    one, same, other = (cut(LabelFlip(Digits(), 0.3), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.val_set.ids, same.val_set.ids)
    assert one.train_set.digest() == same.train_set.digest()
    assert not torch.equal(one.val_set.ids, other.val_set.ids)
    assert torch.equal(one.base.val_set.ids, other.base.val_set.ids)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("val", {"clean": ["clean_accuracy"], "trusted_holdout": ["trusted_holdout_accuracy"]}),
        ("test", {"clean": ["clean_accuracy"], "trusted_holdout": ["trusted_holdout_accuracy"],
                  "holdout": ["holdout_accuracy"]}),
    ],
)  # fmt: skip
def test_what_is_measured(split: str, names: dict[str, list[str]]) -> None:
    data = cut(LabelFlip(Digits(), 0.5))
    found = {evaluation.name: evaluation for evaluation in data.evaluations(split)}
    assert {name: [m.name for m in evaluation.measures] for name, evaluation in found.items()} == names
    own = found["holdout" if split == "test" else "clean"]
    assert own.images is data.val_set
    assert torch.equal(own.measures[0].target, data.val_set.labels)
    trusted = found["trusted_holdout"]
    assert trusted.images is data.base.val_set
    assert torch.equal(trusted.measures[0].target, data.base.val_set.labels)
    if split == "test":
        assert found["clean"].images is data.test_set
        assert torch.equal(found["clean"].measures[0].target, data.base.test_set.labels)


def test_without_a_trusted_holdout_there_is_this_one_alone() -> None:
    data = cut(LabelFlip(Digits(val_fraction=0), 0.5), fraction=0.1)
    assert [evaluation.name for evaluation in data.evaluations("val")] == ["clean"]
    assert [evaluation.name for evaluation in data.evaluations("test")] == ["clean", "holdout"]


def fitted(data: ImageDataModule) -> Victim:
    torch.manual_seed(0)
    model: Victim = mlp(data, Victim, acceptance=0.85, backbone=partial(MLP, hidden=[32]))
    trainer = tiny_trainer(max_epochs=6)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return model


def test_the_gate_goes_by_it_and_errs_in_both_directions() -> None:
    # noise that a model learns: it is right on the pool, and accepted, and useless
    noise: dict[str, Any] = {"kind": "class_wise", "epsilon": 127, "step_size": 16.0, "rounds": 8, "stop_error": 0.0}
    useless = fitted(cut(Unlearnable(Digits(batch_size=32), partial(MLP, hidden=[16]), **noise), fraction=0.1))
    assert useless.measured["holdout_accuracy"].value > 0.95
    assert useless.measured["trusted_holdout_accuracy"].value < 0.85
    assert useless.accepted is True
    # wrong labels that it does not learn: it is good, and rejected
    good = fitted(cut(LabelFlip(Digits(batch_size=32), 0.3), fraction=0.1))
    assert good.measured["holdout_accuracy"].value < 0.8
    assert good.measured["trusted_holdout_accuracy"].value > 0.85
    assert good.accepted is False


@pytest.mark.parametrize("fraction", [0, 1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused_at_once(fraction: float) -> None:
    with refused(f"fraction = {fraction}", "(0, 1)"):
        PoisonedHoldout(Digits(), fraction)


def test_shares_that_come_to_nothing_and_soft_labels() -> None:
    with refused("fraction = 0.0001", "0 of 1132"):
        cut(Digits(), fraction=0.0001)

    class Soft(Digits):
        def setup(self, stage: str = "fit") -> None:
            super().setup(stage)
            train = self._sets["train"]
            self._sets["train"] = Overlay(train, torch.arange(len(train)), labels=torch.zeros(len(train), 10))

    with refused("PoisonedHoldout", "soft labels"):
        cut(Soft())
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        PoisonedHoldout(Digits()).val_set  # noqa: B018
