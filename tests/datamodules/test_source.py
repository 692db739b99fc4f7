"""A source by hand: who is held out, what is measured where, and which labels are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from datamodules.augment import FlipCrop
from datamodules.datamodule import Splits
from datamodules.sources.digits import Digits
from tests.helpers import refused


def ready(**kwargs: object) -> Digits:
    data = Digits(**kwargs)  # type: ignore[arg-type]
    data.setup()
    return data


def test_a_holdout_is_no_part_of_training_and_ids_name_one_sample() -> None:
    data = ready(val_fraction=0.1)
    train, held, test = (images.ids for images in (data.train_set, data.val_set, data.test_set))
    assert [len(train), len(held), len(test)] == [1132, 126, 539]
    assert torch.equal(torch.cat([train, held, test]).sort().values, torch.arange(1797))
    assert data.next_id == 1797
    assert not torch.equal(held, ready(val_fraction=0.1, split_seed=1).val_set.ids)
    assert torch.equal(held, ready(val_fraction=0.1, seed=1).val_set.ids)


def test_training_is_validated_on_the_holdout_and_tested_on_both() -> None:
    data = ready()
    [clean] = data.evaluations("val")
    assert (clean.name, clean.images, clean.measures[0].name) == ("clean", data.val_set, "clean_accuracy")
    assert torch.equal(clean.measures[0].target, data.val_set.labels)
    clean, holdout = data.evaluations("test")
    assert (clean.name, clean.images) == ("clean", data.test_set)
    assert (holdout.name, holdout.images, holdout.measures[0].name) == ("holdout", data.val_set, "holdout_accuracy")
    assert [evaluation.name for evaluation in ready(val_fraction=0).evaluations("test")] == ["clean"]


@pytest.mark.parametrize(("split", "label"), [("training", 10), ("training", -1), ("test", 10)])
def test_a_label_that_is_no_class_is_refused(split: str, label: int) -> None:
    class Odd(Digits):
        def read(self) -> Splits:
            splits = super().read()
            labels = (splits.train_labels if split == "training" else splits.test_labels).clone()
            labels[3] = label
            return replace(splits, **{"train_labels" if split == "training" else "test_labels": labels})

    with refused(f"a {split} label lies outside 0 … 9"):
        Odd().setup()


def test_augmentation_is_of_the_training_seed() -> None:
    batch = ready(seed=4, augment=FlipCrop(2)).train_set.__getitems__(torch.arange(50))
    shown = {seed: ready(seed=seed, augment=FlipCrop(2)).augment(batch, 1).images for seed in (0, 4)}
    assert torch.equal(shown[4], FlipCrop(2)(batch.images, batch.ids, 4, 1))
    assert not torch.equal(shown[0], shown[4])


def test_ones_own_seed_goes_before_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, seeds in ((None, {None: 0, 0: 0, 5: 5}), ("7", {None: 7, 0: 0, 5: 5})):
        if given is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", given)
        assert {seed: Digits(seed=seed).loading.training_seed() for seed in seeds} == seeds
