"""BadNets: how many, which ones, with which labels, and where the trigger is when the model sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.augment import FlipCrop
from datamodules.datamodule import ImageDataModule, Source, Splits
from datamodules.imageset import Batch, ImageSet, Overlay
from datamodules.measures import Evaluation
from datamodules.sources.digits import Digits
from datamodules.triggers import Patch, PixelPattern, SinglePixel, Square, Trigger, YellowSquare
from poisoning.badnets import BadNets, attacked
from poisoning.choosing import choose
from tests.helpers import mlp, refused, tiny_trainer, uniformity

PATTERN = [(-2, -2), (-3, -3), (-2, -4), (-4, -2)]


class Signs(Source):
    """Noise in colour with boxes, as GTSRB has them."""

    num_classes = 4
    image_shape = (3, 32, 32)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    class_names = tuple("abcd")

    def read(self) -> Splits:
        noise = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (60, 3, 32, 32), generator=noise, dtype=torch.uint8)
        corners = torch.randint(0, 10, (60, 2), generator=noise).float()
        boxes = torch.cat([corners, corners + 20], 1)
        labels = torch.arange(60) % 4
        return Splits(images[:40], labels[:40], images[40:], labels[40:], {"boxes": boxes[:40]}, {"boxes": boxes[40:]})


def badnets(trigger: Trigger | None = None, base: ImageDataModule | None = None, **kwargs: Any) -> BadNets:
    data = BadNets(base or Digits(), trigger or PixelPattern(), **kwargs)
    data.setup("fit")
    return data


def everything(images: ImageSet) -> Batch:
    return images.__getitems__(torch.arange(len(images)))


def poisoned(data: BadNets) -> Tensor:
    """The rows of the training set that were poisoned."""
    return torch.isin(data.train_set.ids, data.changes()[-1].ids).nonzero().flatten()


def images_of(data: ImageDataModule, ids: Tensor) -> Tensor:
    """Training images of the base by id."""
    rows = {int(i): row for row, i in enumerate(data.train_set.ids)}
    return data.train_set.images_at(torch.tensor([rows[int(i)] for i in ids]))


def evaluation(data: ImageDataModule, name: str, split: str = "test") -> Evaluation:
    return next(found for found in data.evaluations(split) if found.name == name)


def clean() -> Digits:
    data = Digits()
    data.setup()
    return data


# --- how many and which -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.1, 0.333, 0.5])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_the_fraction_is_of_the_training_set(mode: str, fraction: float) -> None:
    data = badnets(mode=mode, poison_fraction=fraction)
    n = len(clean().train_set)
    wanted = round(fraction * n)
    assert n == 1132  # 1,797 − 539 for the test − 126 held out
    assert len(data.changes()[0].ids) == wanted
    assert len(data.train_set) == (n + wanted if mode == "add" else n)
    facts = data.facts()
    assert (facts["poisoned"], facts["poison_fraction"]) == (wanted, fraction)
    assert facts["poisoned_share_of_set"] == pytest.approx(wanted / len(data.train_set))


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize(
    ("target", "source", "sources"),
    [(3, None, [0, 1, 2, 4, 5, 6, 7, 8, 9]), (3, 8, [8]), ("next", None, list(range(10))), ("next", 9, [9])],
)
def test_who_is_poisoned_and_with_what_label(
    mode: str, target: int | str, source: int | None, sources: list[int]
) -> None:
    fraction = 0.05 if source is not None else 0.4
    data = badnets(mode=mode, poison_fraction=fraction, target_label=target, source_label=source)
    [changes] = data.changes()
    assert changes.original_labels.unique().tolist() == sources
    wanted = (changes.original_labels + 1) % 10 if target == "next" else torch.full_like(changes.labels, 3)
    assert torch.equal(changes.labels, wanted)
    # the set has those labels, and all others as before
    labels = dict(zip(data.train_set.ids.tolist(), data.train_set.labels.tolist(), strict=True))
    expected = dict(zip(data.base.train_set.ids.tolist(), data.base.train_set.labels.tolist(), strict=True))
    expected |= dict(zip(changes.ids.tolist(), wanted.tolist(), strict=True))
    assert labels == expected
    assert len(changes.origins.unique()) == len(changes.origins)  # without replacement


def test_added_copies_stand_beside_their_originals() -> None:
    data = badnets(mode="add", poison_fraction=0.2)
    n, [changes] = len(data.base.train_set), data.changes()
    for found, expected in zip(data.train_set.__getitems__(range(n)), everything(data.base.train_set), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(data.train_set.ids[n:], changes.ids)
    assert changes.ids.tolist() == list(range(1797, 1797 + len(changes.ids)))  # ids that no sample of any split has
    assert torch.equal(data.train_set.images_at(poisoned(data)), PixelPattern()(images_of(data.base, changes.origins)))


def test_replaced_images_keep_their_ids() -> None:
    data = badnets(mode="replace", poison_fraction=0.2)
    [changes] = data.changes()
    assert torch.equal(changes.ids, changes.origins)
    assert torch.equal(data.train_set.ids, data.base.train_set.ids)
    before, after = everything(data.base.train_set), everything(data.train_set)
    rows = torch.isin(before.ids, changes.ids)
    assert torch.equal(after.images[rows], PixelPattern()(before.images[rows]))
    assert torch.equal(after.images[~rows], before.images[~rows])
    assert torch.equal(after.labels[~rows], before.labels[~rows])


def test_a_trigger_leaves_all_other_pixels_of_the_copies_alone() -> None:
    data = badnets(SinglePixel(), poison_fraction=0.3)
    [changes] = data.changes()
    before, after = images_of(data.base, changes.origins), data.train_set.images_at(poisoned(data))
    assert (after[:, 0, -2, -2] == 255).all()
    differs = (before != after).any(1)
    differs[:, -2, -2] = False
    assert not differs.any()


def test_the_draw_is_uniform_over_the_eligible_and_from_the_seed_alone() -> None:
    eligible = torch.arange(50) % 5 != 0
    rows = torch.stack([choose(eligible, 50, 0.2, "p", seed) for seed in range(1500)])
    assert eligible[rows].all()
    assert rows.shape == (1500, 10)
    assert all(len(each.unique()) == 10 for each in rows)
    position = torch.cumsum(eligible, 0) - 1
    assert uniformity(position[rows], 40) > 1e-4
    torch.manual_seed(1)
    assert torch.equal(choose(eligible, 50, 0.2, "p", 7), rows[7])


def test_attacked_by_hand() -> None:
    labels = torch.tensor([0, 1, 2, -1, 2])
    eligible, wanted = attacked(labels, 3, 2, None)
    assert (eligible.tolist(), wanted.tolist()) == ([True, True, False, False, False], [2] * 5)
    eligible, wanted = attacked(labels, 3, "next", None)
    assert eligible.tolist() == [True, True, True, False, True]  # an unlabelled image is nobody's
    assert wanted[[0, 1, 2, 4]].tolist() == [1, 2, 0, 0]
    assert attacked(labels, 3, 0, 2)[0].tolist() == [False, False, True, False, True]


# --- what is measured -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("target", "source", "n"), [(0, None, 494), (0, 7, 49), ("next", None, 539), ("next", 7, 49)])
def test_attack_success_is_measured_on_whom_the_attack_is_about(target: int | str, source: int | None, n: int) -> None:
    """All-to-one leaves the target class out, one-to-one takes its source class, all-to-all everyone: exact numbers."""
    data = badnets(target_label=target, source_label=source, poison_fraction=0.02)
    truth = data.test_set.labels
    asked = truth == source if source is not None else (truth != target if target != "next" else truth >= 0)
    found = evaluation(data, "triggered")
    assert len(found.images) == int(asked.sum()) == n
    success, robust = found.measures
    assert (success.name, robust.name) == ("attack_success_rate", "robust_accuracy")
    assert torch.equal(robust.target, truth[asked])
    assert torch.equal(
        success.target, (truth[asked] + 1) % 10 if target == "next" else torch.zeros(n, dtype=torch.int64)
    )
    assert not (success.target == robust.target).any()  # no hit by being right
    assert torch.equal(found.images.ids, data.test_set.ids[asked])
    assert torch.equal(everything(found.images).images, PixelPattern()(everything(data.test_set).images[asked]))
    assert torch.equal(everything(data.test_set).images, everything(clean().test_set).images)


def test_the_holdout_is_triggered_in_validation_and_clean_for_the_gate() -> None:
    data = badnets()
    held = evaluation(data, "triggered", "val")
    kept = data.val_set.labels != 0
    assert torch.equal(everything(held.images).images, PixelPattern()(everything(data.val_set).images[kept]))
    assert torch.equal(everything(evaluation(data, "holdout").images).images, everything(clean().val_set).images)
    assert [e.name for e in badnets(base=Digits(val_fraction=0)).evaluations("val")] == []


def test_the_trigger_is_stamped_when_measured_wherever_it_is_stamped_in_training() -> None:
    for placement in ("before", "after"):
        found = evaluation(badnets(placement=placement), "triggered")
        assert (everything(found.images).images[:, 0, -2, -2] == 255).all()


def test_a_model_that_always_answers_the_target_has_full_success_and_no_robust_accuracy() -> None:
    data = badnets(target_label=4)
    model = mlp(data)
    with torch.no_grad():
        model.net.head.weight.zero_()
        model.net.head.bias.copy_(torch.arange(10) == 4)
    tiny_trainer().test(model, data, verbose=False)
    measured = {name: (each.value, each.n) for name, each in model.measured.items()}
    others = int((data.test_set.labels != 4).sum())
    assert measured["attack_success_rate"] == (1.0, others)
    assert measured["robust_accuracy"] == (0.0, others)
    assert measured["clean_accuracy"] == ((539 - others) / 539, 539)


# --- before or after augmentation -------------------------------------------------------------------------------------
def test_placed_after_the_stored_images_carry_no_trigger() -> None:
    data = badnets(placement="after", poison_fraction=0.2)
    [changes] = data.changes()
    rows = poisoned(data)
    assert torch.equal(data.train_set.images_at(rows), images_of(data.base, changes.origins))
    batch = everything(data.train_set)
    before = batch.images.clone()
    stamped = data.rewrite_batch(batch)
    assert torch.equal(batch.images, before)
    assert torch.equal(stamped.images[rows], PixelPattern()(before[rows]))
    others = torch.ones(len(before), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(stamped.images[others], before[others])
    assert torch.equal(data.materialise(torch.arange(len(before))).images, stamped.images)
    assert torch.equal(stamped.labels, batch.labels)
    # without augmentation the model sees the same either way
    other = badnets(placement="before", poison_fraction=0.2)
    assert torch.equal(other.materialise(torch.arange(len(before))).images, stamped.images)
    assert other.train_set.digest() != data.train_set.digest()  # but the two sets are not the same set


def test_only_poisoned_ids_are_stamped_in_batches_of_any_make_up() -> None:
    data = badnets(placement="after", poison_fraction=0.1)
    [changes] = data.changes()
    dark = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)

    def stamped(ids: list[int]) -> list[bool]:
        n = len(ids)
        batch = Batch(
            dark.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64)
        )
        return (data.rewrite_batch(batch).images[:, 0, -2, -2] == 255).tolist()

    first, last = int(changes.ids[0]), int(changes.ids[-1])
    origin = int(changes.origins[0])
    assert stamped([last, origin, first, -1, last + 1, 10**9, first]) == [True, False, True, False, False, False, True]
    assert stamped([origin]) == [False]
    assert stamped([]) == []


def augmented(placement: str, trigger: Trigger) -> tuple[BadNets, Batch, Tensor]:
    """Poisoned samples as the model sees them in one epoch, through a real trainer's hook."""
    data = badnets(
        trigger, Digits(augment=FlipCrop(2), seed=1, batch_size=1358), placement=placement, poison_fraction=0.2
    )
    seen: list[Batch] = []
    model = mlp(data)
    step = model.training_step
    model.training_step = lambda batch, batch_idx: seen.append(batch) or step(batch, batch_idx)
    tiny_trainer(max_steps=1, limit_val_batches=0).fit(model, data)
    [batch] = seen
    return data, batch, torch.isin(batch.ids, data.changes()[0].ids)


def test_placed_after_the_trigger_is_in_its_place_and_the_image_is_moved() -> None:
    data, batch, rows = augmented("after", PixelPattern())
    assert len(batch.ids) == len(data.train_set)
    for row, column in PATTERN:
        assert (batch.images[rows, 0, row, column] == 255).all()
    moved = data.augment(data.train_set.__getitems__(poisoned(data)), 0)
    order = torch.argsort(batch.ids[rows])
    assert torch.equal(batch.images[rows][order], PixelPattern()(moved.images)[torch.argsort(moved.ids)])


def test_placed_before_the_trigger_moves_with_the_image() -> None:
    white = Patch([[255]], row=4, column=4)  # not a corner, so that the crop keeps it
    data, batch, rows = augmented("before", white)
    augment = data.base.augmentation  # type: ignore[attr-defined]
    stored = data.train_set.__getitems__(poisoned(data))
    assert (stored.images[:, 0, 4, 4] == 255).all()
    expected = augment(stored.images, stored.ids, 1, 0)
    order = torch.argsort(batch.ids[rows])
    assert torch.equal(batch.images[rows][order], expected[torch.argsort(stored.ids)])
    # where the pixel went: five rows, and five columns either way round
    marked = torch.zeros(len(stored.ids), 1, 8, 8, dtype=torch.uint8)
    marked[:, 0, 4, 4] = 1
    places = augment(marked, stored.ids, 1, 0).flatten(1).argmax(1)
    assert len(places.unique()) > 15
    assert (
        batch.images[rows][order].flatten(1)[torch.arange(len(places)), places[torch.argsort(stored.ids)]] == 255
    ).all()


def test_the_next_epoch_and_the_evaluation_are_stamped_alike() -> None:
    data = badnets(placement="after", base=Digits(augment=FlipCrop(2), seed=1))
    rows = poisoned(data)
    for epoch in (0, 1, 5):
        batch = data.rewrite_batch(data.augment(data.train_set.__getitems__(rows), epoch))
        assert (batch.images[:, 0, -2, -2] == 255).all()
    model = mlp(data)
    trainer = tiny_trainer(max_steps=1, limit_val_batches=1)
    trainer.fit(model, data)
    plain = Batch(*(part[:4] for part in everything(data.test_set)))
    assert data.on_after_batch_transfer(plain, 0) is plain  # no longer training: nothing is stamped or moved


# --- nesting ----------------------------------------------------------------------------------------------------------
def test_two_backdoors_with_names() -> None:
    inner = BadNets(Digits(), SinglePixel(), target_label=1, poison_fraction=0.1, name="pixel", seed=1)
    outer = badnets(Square(2, row=0, column=0), inner, target_label=2, poison_fraction=0.1, name="square", seed=2)
    names = [measure.name for found in outer.evaluations("test") for measure in found.measures]
    assert names == [
        "clean_accuracy",
        "holdout_accuracy",
        "attack_success_rate_pixel",
        "robust_accuracy_pixel",
        "attack_success_rate_square",
        "robust_accuracy_square",
    ]
    facts = outer.facts()
    assert facts["poisoned_pixel"] == 113
    assert facts["poisoned_square"] == round(0.1 * (1132 + 113)) == 124  # p is of the set that is poisoned
    assert len(outer.train_set) == 1132 + 113 + 124
    # the square's test images carry the square alone
    both = everything(evaluation(outer, "triggered_square").images).images
    truth = outer.test_set.labels != 2
    assert torch.equal(both, Square(2, row=0, column=0)(everything(outer.test_set).images[truth]))
    # and a copy of a poisoned image carries both
    first, second = outer.changes()
    twice = torch.isin(second.origins, first.ids)
    assert twice.any()
    copies = outer.train_set.images_at(torch.isin(outer.train_set.ids, second.ids[twice]).nonzero().flatten())
    assert (copies[:, 0, -2, -2] == 255).all()
    assert (copies[:, 0, 0, 0] == 255).all()


def test_two_backdoors_without_names_are_refused_when_measured() -> None:
    data = badnets(SinglePixel(), BadNets(Digits(), PixelPattern()))
    with refused("attack_success_rate", "robust_accuracy", "twice", "name"):
        tiny_trainer().test(mlp(data), data, verbose=False)


def test_both_placements_nest() -> None:
    inner = BadNets(Digits(), SinglePixel(), placement="after", target_label=1, seed=1, mode="replace", name="a")
    outer = badnets(Square(1, row=0, column=0), inner, placement="after", seed=2, mode="replace", name="b")
    first, second = outer.changes()
    batch = outer.materialise(torch.arange(len(outer.train_set)))
    pixel = batch.images[:, 0, -2, -2] == 255
    assert pixel[torch.isin(batch.ids, first.ids)].all()
    corner = batch.images[:, 0, 0, 0] == 255
    assert torch.equal(corner, torch.isin(batch.ids, second.ids))


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_copy_of_an_image_that_is_stamped_later_is_stamped_too(placement: Any) -> None:
    """Three deep: what the second copies of the first, and the third of both."""
    first = BadNets(Digits(), SinglePixel(), target_label=1, poison_fraction=0.5, placement="after", seed=1, name="a")
    second = BadNets(
        first, Square(1, row=0, column=0), target_label=2, poison_fraction=0.5, placement=placement, seed=2, name="b"
    )
    third = badnets(Square(1, row=0, column=7), second, target_label=3, poison_fraction=0.5, seed=3, name="c")
    batch = third.materialise(torch.arange(len(third.train_set)))
    made = [{}, {}, {}]
    for copies, changes in zip(made, third.changes(), strict=True):
        copies |= dict(zip(changes.ids.tolist(), changes.origins.tolist(), strict=True))
    twice = thrice = 0
    for image, number in zip(batch.images, batch.ids.tolist(), strict=True):
        in_third, sample = number in made[2], made[2].get(number, number)
        in_second, sample = sample in made[1], made[1].get(sample, sample)
        in_first = sample in made[0]
        found = image[0, -2, -2] == 255, image[0, 0, 0] == 255, image[0, 0, 7] == 255
        twice += in_first and in_second
        thrice += in_first and in_second and in_third
        for is_there, should in zip(found, (in_first, in_second, in_third), strict=True):
            assert is_there or not should
    assert twice > thrice > 0
    assert third.facts()["poisoned_a"] == 566, "copies made by others are not counted"


# --- stickers ---------------------------------------------------------------------------------------------------------
def test_a_sticker_lies_on_each_images_own_box() -> None:
    base = Signs(val_fraction=0.25)
    data = badnets(YellowSquare(), base, poison_fraction=0.5, target_label="next", mode="replace")
    rows = poisoned(data)
    boxes = data.train_set.extras_at(rows)["boxes"]
    assert len(boxes.unique(dim=0)) > 5
    before = base.train_set.images_at(rows)
    assert torch.equal(data.train_set.images_at(rows), YellowSquare()(before, boxes))
    changed = (data.train_set.images_at(rows) != before).any(1)
    assert (changed.flatten(1).sum(1) == 4).all()  # a tenth of 20 pixels, squared
    tested = evaluation(data, "triggered").images
    assert isinstance(tested, Overlay)
    assert torch.equal(everything(tested).images, YellowSquare()(base.test_set.images, base.test_set.extras["boxes"]))


def test_a_sticker_without_boxes_is_refused_before_training() -> None:
    class Plain(Signs):
        def read(self) -> Splits:
            splits = super().read()
            return Splits(splits.train_images, splits.train_labels, splits.test_images, splits.test_labels)

    data = BadNets(Plain(), YellowSquare())
    with refused("trigger", "YellowSquare", "boxes"):
        data.setup("fit")


# --- what cannot be ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"target_label": 10}, ["target_label = 10", "10 classes", "0 to 9"]),
        ({"target_label": -1}, ["target_label = -1"]),
        ({"target_label": 1.5}, ["target_label = 1.5"]),
        ({"target_label": "nxt"}, ["target_label = 'nxt'"]),
        ({"source_label": 10}, ["source_label = 10", "10 classes"]),
        ({"source_label": -1}, ["source_label = -1"]),
        ({"source_label": "next"}, ["source_label = 'next'"]),
        ({"source_label": 3, "target_label": 3}, ["source_label = 3", "target_label"]),
        ({"poison_fraction": -0.1}, ["poison_fraction = -0.1", "(0, 1]"]),
        ({"poison_fraction": 1.01}, ["poison_fraction = 1.01", "(0, 1]"]),
        ({"poison_fraction": float("nan")}, ["poison_fraction = nan", "(0, 1]"]),
        ({"mode": "ad"}, ["mode = 'ad'", "add", "replace"]),
        ({"placement": "during"}, ["placement = 'during'", "before", "after"]),
        ({"trigger": Square(9)}, ["trigger", "9×9", "8×8"]),
        ({"trigger": Square(3, row=7)}, ["trigger", "row 7", "8×8"]),
        ({"trigger": Square(value=[1, 2, 3])}, ["trigger", "3 channels", "the images have 1"]),
        ({"trigger": YellowSquare()}, ["trigger", "YellowSquare", "the images have 1"]),
        ({"trigger": YellowSquare(), "placement": "after", "base": Signs()}, ["placement = 'after'", "box", "before"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        BadNets(**{"base": Digits(), "trigger": PixelPattern(), **kwargs})


def test_a_fraction_that_rounds_to_none_or_asks_for_too_many_is_refused_by_numbers() -> None:
    with refused("poison_fraction = 0.0001", "1132"):
        badnets(poison_fraction=0.0001)
    with refused("poison_fraction = 0.5", "566 of 110 eligible", "largest here is 0.097173"):
        badnets(poison_fraction=0.5, source_label=3)
    with refused("poison_fraction = 1.0", "1132 of 1011 eligible"):
        badnets(poison_fraction=1.0)
    assert len(badnets(poison_fraction=1.0, target_label="next").changes()[0].ids) == 1132


@pytest.mark.parametrize("n_train", [7, 100, 1132, 49_999, 1_281_167])
@pytest.mark.parametrize("share", [0.0999, 0.5, 0.87654321])
def test_the_largest_fraction_that_an_error_names_is_possible(n_train: int, share: float) -> None:
    eligible = torch.zeros(n_train, dtype=torch.bool)
    eligible[: max(1, int(share * n_train))] = True
    with pytest.raises(ValueError, match="the largest here is") as caught:
        choose(eligible, n_train, 1.0, "p", 0)
    largest = float(str(caught.value).rsplit(" ", 1)[-1])
    there = int(eligible.sum())
    assert there - 2 <= len(choose(eligible, n_train, largest, "p", 0)) <= there


def test_soft_labels_are_refused() -> None:
    class Soft(BadNets):
        def rewrite(self, train: ImageSet) -> ImageSet:
            return super().rewrite(Overlay(train, torch.arange(len(train)), labels=torch.zeros(len(train), 10)))

    with refused("BadNets", "soft labels"):
        Soft(Digits(), PixelPattern()).setup("fit")


# --- digests ----------------------------------------------------------------------------------------------------------
def test_every_argument_that_changes_the_set_changes_its_digest() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"trigger": SinglePixel()},
        {"trigger": Square(2)},
        {"target_label": 1},
        {"target_label": "next"},
        {"source_label": 1, "poison_fraction": 0.05},
        {"poison_fraction": 0.11},
        {"mode": "replace"},
        {"placement": "after"},
        {"seed": 1},
        {"base": Digits(split_seed=1)},
    ]
    digests = [badnets(**variant).train_set.digest() for variant in variants]
    assert len(set(digests)) == len(digests)
    assert badnets(name="other").train_set.digest() == digests[0]  # a name is no change
    assert json.loads(str(badnets().facts()["trigger"]))["name"] == "PixelPattern"
