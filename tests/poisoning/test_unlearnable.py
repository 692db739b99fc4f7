"""Unlearnable examples: the step by hand, noise by id, ε on uint8, one crafting for all, the acceptance gate."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.augment import FlipCrop
from datamodules.datamodule import ImageDataModule
from datamodules.imageset import ImageSet, Overlay
from datamodules.sources.digits import Digits
from poisoning.adversarial_poison import AdversarialPoison
from poisoning.label_flip import LabelFlip
from poisoning.noise import Crafted, NoiseTable, descend, input_gradient, shown
from poisoning.unlearnable import Unlearnable
from poisoning.victim import Victim
from tests.helpers import Watched, global_randomness_untouched, mlp, refused, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*the surrogate still errs.*")

SMALL = partial(MLP, hidden=[16])
QUICK: dict[str, Any] = {
    "backbone": SMALL, "rounds": 2, "surrogate_steps": 3, "noise_steps": 2, "step_size": 3.0, "epsilon": 8,
}  # fmt: skip


def unlearnable(base: ImageDataModule | None = None, **kwargs: Any) -> Unlearnable:
    """Set up, with a small surrogate and little training."""
    data = Unlearnable(base or Digits(), **{**QUICK, **kwargs})
    data.prepare_data()
    data.setup()
    return data


def all_images(images: ImageSet) -> Tensor:
    return images.images_at(torch.arange(len(images)))


def change(data: Unlearnable) -> Tensor:
    """int16 (N, C, H, W): what was added to each image, in the end."""
    return all_images(data.train_set).to(torch.int16) - all_images(data.base.train_set)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that nothing is in."""
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def craftings(monkeypatch: pytest.MonkeyPatch) -> list[ImageSet]:
    """The sets that noise was crafted for, as it happens."""
    seen: list[ImageSet] = []
    craft = Unlearnable.craft

    def watched(self: Unlearnable, surrogate: ImageClassifier, train: ImageSet, report: Any) -> Any:
        seen.append(train)
        return craft(self, surrogate, train, report)

    monkeypatch.setattr(Unlearnable, "craft", watched)
    return seen


# --- by hand ----------------------------------------------------------------------------------------------------------
def linear(weight: list[list[float]]) -> ImageClassifier:
    """Logits W·p of two pixels p in [0, 1]."""

    class Two(nn.Module):
        def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
            super().__init__()
            self.flat, self.last = nn.Flatten(), nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.flat(x))
            return out

    model = ImageClassifier(Two, 2, (1, 1, 2), [0.0], [1.0], channels_last=False).eval()
    with torch.no_grad():
        model.net.last.weight.copy_(torch.tensor(weight))  # type: ignore[union-attr, operator]
    return model


def test_the_gradient_is_that_of_cross_entropy() -> None:
    # pixels 0.2 and 0.4, logits 0.2 and 0.8 of W = [[1, 0], [0, 2]]; q = softmax; d loss/d p = Wᵀ(q − e_y)
    model = linear([[1, 0], [0, 2]])
    seen = torch.tensor([51.0, 102.0]).view(1, 1, 1, 2)
    gradient, missed = input_gradient(model, seen, torch.tensor([0]))
    q = torch.tensor([0.2, 0.8]).softmax(0)
    assert torch.allclose(gradient.flatten(), torch.tensor([q[0] - 1, 2 * q[1]]), atol=1e-6)
    assert missed.tolist() == [True]
    assert not input_gradient(model, seen, torch.tensor([1]))[1].any()
    twice, _ = input_gradient(model, seen.repeat(2, 1, 1, 1), torch.tensor([0, 0]))
    assert torch.allclose(twice, gradient.repeat(2, 1, 1, 1))  # of the sum: other images of a batch do not matter


def test_a_step_goes_down_the_loss_within_epsilon() -> None:
    noise = torch.tensor([[0.0, 7.5, -7.5, 1.0], [5.0, 5.0, 5.0, 5.0]]).view(2, 1, 2, 2)
    gradient = torch.tensor([[0.3, -1e-9, 2.0, 0.0]]).view(1, 1, 2, 2)
    descend(noise, torch.tensor([0]), gradient, step=0.8, epsilon=8)
    assert torch.allclose(noise[0].flatten(), torch.tensor([-0.8, 8.0, -8.0, 1.0]))
    assert (noise[1] == 5).all(), "a row that no image of the batch has"


def test_images_of_a_class_pull_together() -> None:
    noise = torch.zeros(3, 1, 1, 2)
    gradient = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [-1.0, -3.0], [5.0, -5.0]]).view(4, 1, 1, 2)
    descend(noise, torch.tensor([2, 2, 2, 0]), gradient, step=1.0, epsilon=8)
    # class 2: the sums are +1 and −1, though two of three images go the other way in the first pixel
    assert noise.flatten(1).tolist() == [[-1.0, 1.0], [0.0, 0.0], [-1.0, 1.0]]


def test_descent_lowers_the_loss_of_a_linear_model() -> None:
    model = linear([[1, -1], [-1, 1]])
    images, labels = torch.tensor([100, 120], dtype=torch.uint8).view(1, 1, 1, 2), torch.tensor([0])
    noise, index = torch.zeros(1, 1, 1, 2), torch.tensor([0])
    for _ in range(10):
        gradient, _ = input_gradient(model, shown(images, noise), labels)
        descend(noise, index, gradient, step=1.0, epsilon=8)
    assert noise.flatten().tolist() == [8.0, -8.0]  # towards class 0, to the bound
    assert shown(images, noise).flatten().tolist() == [108.0, 112.0]


def test_noise_is_added_by_id_and_clamped() -> None:
    table = torch.tensor([[8, -8], [-8, 127]], dtype=torch.int8).view(2, 1, 1, 2)
    noise = NoiseTable(table, ids=torch.tensor([3, 10, 11]), index=torch.tensor([1, 0, 0]))
    images = torch.tensor([[250, 3], [5, 200], [100, 100]], dtype=torch.uint8).view(3, 1, 1, 2)
    found = noise(images, torch.tensor([11, 3, 10]), {})
    assert found.dtype == torch.uint8
    assert found.flatten(1).tolist() == [[255, 0], [0, 255], [108, 92]]
    for unknown in (4, 12):
        with pytest.raises(ValueError, match="without noise"):
            noise(images[:1], torch.tensor([unknown]), {})


# --- trap 9: whose noise it is ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sample_wise", "class_wise"])
def test_noise_belongs_to_the_id_whatever_the_rows(kind: str) -> None:
    data = unlearnable(kind=kind)
    overlay = data.train_set
    assert isinstance(overlay, Overlay)
    assert isinstance(overlay.rewriter, NoiseTable)
    rows = torch.randperm(len(overlay), generator=torch.Generator().manual_seed(1))
    # another set with the same samples in another order, through the same rewriter
    other = Overlay(data.base.train_set, rows, rewriter=overlay.rewriter, key="same")
    assert torch.equal(all_images(other), all_images(overlay)[rows])
    # and a single image, fetched alone
    assert torch.equal(overlay[17].images, all_images(overlay)[17])


def test_sample_wise_noise_differs_within_a_class() -> None:
    data = unlearnable(kind="sample_wise")
    added, labels = change(data), data.train_set.labels
    for label in range(10):
        assert len(added[labels == label].flatten(1).unique(dim=0)) > 20
    table = data.train_set.rewriter.table  # type: ignore[attr-defined]
    assert table.shape == (len(labels), 1, 8, 8)


def test_class_wise_noise_is_one_for_a_label() -> None:
    data = unlearnable(kind="class_wise")
    before, after = all_images(data.base.train_set).to(torch.int16), all_images(data.train_set)
    table = data.train_set.rewriter.table  # type: ignore[attr-defined]
    assert table.shape == (10, 1, 8, 8)
    assert len(table.flatten(1).unique(dim=0)) == 10
    labels = data.train_set.labels
    assert torch.equal(after.to(torch.int16), (before + table[labels]).clamp(0, 255))


def test_a_label_is_the_one_that_the_base_gives() -> None:
    data = unlearnable(LabelFlip(Digits(), 0.5, kind="pairwise"), kind="class_wise")
    before, labels = all_images(data.base.train_set).to(torch.int16), data.base.train_set.labels
    table = data.train_set.rewriter.table  # type: ignore[attr-defined]
    assert torch.equal(all_images(data.train_set).to(torch.int16), (before + table[labels]).clamp(0, 255))


# --- ε ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sample_wise", "class_wise"])
@pytest.mark.parametrize("epsilon", [1, 8, 127])
def test_epsilon_holds_on_uint8_and_is_reported(kind: str, epsilon: int) -> None:
    data = unlearnable(kind=kind, epsilon=epsilon, step_size=0.7 * epsilon)
    added, before = change(data), all_images(data.base.train_set)
    facts = data.facts()
    assert int(added.abs().max()) == facts["epsilon_reached"] == epsilon
    assert facts["poisoned"] == len(added) == 1132
    assert facts["poisoned_changed"] == int((added != 0).flatten(1).any(1).sum()) > 1000
    assert facts["mean_change"] == pytest.approx(float(added.abs().float().mean()))
    # black pixels cannot go down, nor white ones up: the clamp is not a wrap
    assert int(added[before == 0].min()) >= 0
    assert int(added[before == 255].max()) <= 0
    assert (added[before == 0] > 0).any()


def test_what_is_reported_is_of_all_parts(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def falling(self: Unlearnable, surrogate: ImageClassifier, train: ImageSet, report: Any) -> Crafted:
        noise = torch.tensor([8.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        return Crafted(noise, (torch.arange(len(train)) > 20).long(), {})  # the last images change least

    monkeypatch.setattr(Unlearnable, "craft", falling)
    monkeypatch.setattr("poisoning.noise._PART", 100)
    data = unlearnable()
    added = change(data)
    assert data.facts()["epsilon_reached"] == int(added.max()) == 8
    assert data.facts()["mean_change"] == pytest.approx(float(added.float().mean()))
    assert data.facts()["poisoned_changed"] == int((added != 0).flatten(1).any(1).sum())


def test_labels_ids_and_the_other_sets_are_untouched() -> None:
    data, plain = unlearnable(), Digits()
    plain.setup()
    assert torch.equal(data.train_set.ids, plain.train_set.ids)
    assert torch.equal(data.train_set.labels, plain.train_set.labels)
    for found, expected in ((data.val_set, plain.val_set), (data.test_set, plain.test_set)):
        assert found.digest() == expected.digest()
    (changes,) = data.changes()
    assert torch.equal(changes.ids, changes.origins)
    assert torch.equal(changes.labels, changes.original_labels)


def test_unlabelled_images_have_no_noise() -> None:
    class Half(Digits):
        def setup(self, stage: str = "fit") -> None:
            super().setup(stage)
            train = self._sets["train"]
            labels = train.labels.clone()
            labels[::2] = -1
            self._sets["train"] = ImageSet(all_images(train), labels, train.ids)

    data = unlearnable(Half(), poison_fraction=0.5)
    assert (change(data)[::2] == 0).all()
    assert (change(data)[1::2] != 0).flatten(1).any(1).all()
    with refused("poison_fraction = 0.6", "of 566 eligible"):
        unlearnable(Half(), poison_fraction=0.6)


# --- crafting: once, by the seed alone --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sample_wise", "class_wise"])
def test_the_seed_alone_determines_the_noise(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for number, seed in enumerate((5, 5, 6)):
        monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / str(number)))  # each crafts for itself
        torch.manual_seed(number)
        with global_randomness_untouched():
            data = unlearnable(Digits(batch_size=16 + number, seed=number, augment=FlipCrop(1)), kind=kind, seed=seed)
            all_images(data.train_set)
            data.facts()
        contents.append((data.train_set.digest(), all_images(data.train_set).tolist()))
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_a_second_time_nothing_is_trained(own_cache: Path, craftings: list[ImageSet]) -> None:
    first = unlearnable(seed=1)
    assert len(craftings) == 1
    files = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
    again = unlearnable(seed=1)
    assert again.train_set.digest() == first.train_set.digest()
    assert again.facts() == first.facts()
    alone = Unlearnable(Digits(), **QUICK, seed=1)
    alone.setup()  # on another rank
    assert alone.train_set.digest() == first.train_set.digest()
    assert len(craftings) == 1
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == files


def test_one_crafting_serves_all_fractions(own_cache: Path, craftings: list[ImageSet]) -> None:
    whole = unlearnable()
    added = change(whole)
    last: set[int] = set()
    for fraction in (0.2, 0.5, 0.9):
        data = unlearnable(poison_fraction=fraction)
        (changes,) = data.changes()
        assert data.facts()["poisoned"] == len(changes.ids) == round(fraction * 1132)
        hit = torch.isin(data.train_set.ids, changes.ids)
        assert torch.equal(change(data)[hit], added[hit])
        assert (change(data)[~hit] == 0).all()
        assert last < set(changes.ids.tolist()), "the larger share holds the smaller"
        last = set(changes.ids.tolist())
    assert len(craftings) == 1
    assert len(craftings[0]) == 1132


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"epsilon": 9}, {"kind": "class_wise"}, {"rounds": 1}, {"noise_steps": 1}, {"surrogate_steps": 2},
     {"step_size": 1.0}, {"share": 0.5}, {"batch_size": 100}, {"learning_rate": 0.05}, {"stop_error": 0.5},
     {"backbone": partial(MLP, hidden=[8])}, {"base": Digits(split_seed=1)}, {"base": LabelFlip(Digits(), 0.1)}],
    ids=lambda change: "-".join(f"{key}-{type(value).__name__}" for key, value in change.items()),
)  # fmt: skip
def test_all_that_determines_the_noise_is_in_its_key(
    other: dict[str, Any], own_cache: Path, craftings: list[ImageSet]
) -> None:
    unlearnable()
    unlearnable(**other)
    assert len(craftings) == 2


def test_crafting_ends_when_the_error_is_small_and_says_so(own_cache: Path) -> None:
    with pytest.warns(UserWarning, match="after 2 rounds the surrogate still errs"):
        assert unlearnable(stop_error=0.0).facts()["crafting_rounds"] == 2
    whole = unlearnable(kind="class_wise", epsilon=127, step_size=32.0, rounds=12, stop_error=0.0).facts()
    assert whole["surrogate_error"] == 0.0
    assert whole["crafting_rounds"] == 12  # an error of 0 is not less than 0
    easy = unlearnable(kind="class_wise", epsilon=64, step_size=8.0, rounds=40, stop_error=0.3)
    facts = easy.facts()
    assert 1 < facts["crafting_rounds"] < 40  # type: ignore[operator]
    assert facts["surrogate_error"] < 0.3  # type: ignore[operator]
    json.dumps(facts, allow_nan=False)


def test_in_a_round_a_share_has_its_turn_and_in_the_end_all_have(own_cache: Path) -> None:
    for rounds, turns in ((1, 283), (3, 849), (4, 1132)):
        table = unlearnable(share=0.25, rounds=rounds, stop_error=0.0).train_set.rewriter.table  # type: ignore[attr-defined]
        assert int((table != 0).flatten(1).any(1).sum()) == turns
    # what has not been looked at counts as an error: crafting cannot end before all but a tenth have had their turn
    facts = unlearnable(share=0.25, rounds=40, stop_error=0.1, epsilon=64, step_size=16.0, noise_steps=8).facts()
    assert 4 <= facts["crafting_rounds"] < 40  # type: ignore[operator]


def test_every_cycle_of_parts_has_an_order_of_its_own() -> None:
    parts = Unlearnable(Digits(), **QUICK, share=0.25)._parts(101)
    cycles = [[next(parts) for _ in range(5)] for _ in range(3)]  # of 25, and the one that is left over
    for cycle in cycles:
        assert torch.equal(torch.cat(cycle).sort().values, torch.arange(101))
    assert len({tuple(cycle[0].tolist()) for cycle in cycles}) == 3


def test_dropout_of_the_surrogate_is_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(nn.Module):
        def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    digests = set()
    for number in range(2):
        monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / str(number)))
        torch.manual_seed(number)
        with global_randomness_untouched():
            digests.add(unlearnable(backbone=Dropping).train_set.digest())
    assert len(digests) == 1


# --- the surrogate ----------------------------------------------------------------------------------------------------
def levels(x: Tensor, data: ImageDataModule) -> list[list[int]]:
    """What a network was shown, in whole grey levels, an image a row, in ascending order."""
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (data.mean, data.std))
    real = (x * std + mean) * 255
    assert torch.allclose(real, real.round(), atol=1e-3)
    return sorted(real.round().int().flatten(1).tolist())


def test_the_surrogate_learns_from_the_noise_of_that_moment_and_noise_from_a_surrogate_at_rest(own_cache: Path) -> None:
    whole: dict[str, Any] = {"backbone": Watched, "stop_error": 0.0, "step_size": 2.6, "batch_size": 2000}  # all images
    after_one = all_images(unlearnable(**whole, rounds=1).train_set)
    Watched.seen.clear()
    data = unlearnable(**whole, rounds=2)
    seen, Watched.seen[:] = list(Watched.seen), []
    assert [training for training, _ in seen] == [*[True] * 3, *[False] * 2] * 2  # dropout and BatchNorm at rest
    assert len(seen[0][1]) == 1132
    clean, noisy = (sorted(each.flatten(1).int().tolist()) for each in (all_images(data.base.train_set), after_one))
    assert all(levels(x, data) == clean for _, x in seen[:3])
    assert all(levels(x, data) == noisy for _, x in seen[5:8])  # and not from clean images again
    # the second step on the noise starts from where the first one led
    assert levels(seen[3][1], data) == clean != levels(seen[4][1], data)
    assert not torch.equal(seen[0][1], seen[1][1])  # every pass has an order of its own


def test_what_is_crafted_is_held_to_epsilon_and_rounded(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wild(self: Unlearnable, surrogate: ImageClassifier, train: ImageSet, report: Any) -> Crafted:
        noise = torch.tensor([-9.0, -7.6, 2.5001, 7.6, 300.0]).repeat(13)[:64].view(1, 1, 8, 8)
        return Crafted(noise, torch.zeros(len(train), dtype=torch.int64), {})

    monkeypatch.setattr(Unlearnable, "craft", wild)
    table = unlearnable().train_set.rewriter.table  # type: ignore[attr-defined]
    assert table.flatten()[:5].tolist() == [-8, -8, 3, 8, 8]


def test_noise_finds_its_image_in_a_set_in_any_order(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(Digits):
        @property
        def train_set(self) -> ImageSet:
            return super().train_set.select(torch.arange(1131, -1, -1))

    def by_id(self: Unlearnable, surrogate: ImageClassifier, train: ImageSet, report: Any) -> Crafted:
        return Crafted((train.ids % 8).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(len(train)), {})

    monkeypatch.setattr(Unlearnable, "craft", by_id)
    data = unlearnable(Backwards())
    assert (data.train_set.ids.diff() < 0).all()
    assert torch.equal(change(data).flatten(1).amax(1).long(), data.train_set.ids % 8)


def test_what_another_attack_or_version_crafted_is_not_taken(
    own_cache: Path, craftings: list[ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Another(Unlearnable):
        pass

    for kind, count in ((Unlearnable, 1), (Another, 2), (Unlearnable, 2)):
        kind(Digits(), **QUICK).prepare_data()
        assert len(craftings) == count
    monkeypatch.setattr(Unlearnable, "version", 2)
    unlearnable()
    assert len(craftings) == 3


def test_noise_of_other_initial_weights_is_not_taken(own_cache: Path, craftings: list[ImageSet]) -> None:
    class Started(MLP):
        start = 0.0

        def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
            super().__init__(image_shape, num_classes, [8])
            self.head.bias.data.fill_(self.start)  # as weights from a file that has changed

    unlearnable(backbone=Started)
    Started.start = 0.5
    unlearnable(backbone=Started)
    assert len(craftings) == 2


# --- what it does -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sample_wise", "class_wise"])
def test_the_noise_makes_the_images_easy_for_the_surrogate(kind: str) -> None:
    """A fresh network learns images with noise sooner than without: that is what the noise is trained for."""
    data = unlearnable(kind=kind, epsilon=64, step_size=8.0, noise_steps=5, rounds=8, stop_error=0.05)
    losses = {}
    for name, images in (("clean", data.base.train_set), ("noisy", data.train_set)):
        torch.manual_seed(0)
        model = mlp(data)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pixels = all_images(images)
        for _ in range(15):
            loss = model.loss(model(pixels), images.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["noisy"] < 0.5 * losses["clean"]


def test_the_gate_on_a_trusted_holdout_rejects_what_was_trained_on_it() -> None:
    verdicts = {}
    for name, data in (
        ("clean", Digits(batch_size=32)),
        ("protected", unlearnable(
            Digits(batch_size=32), kind="class_wise", epsilon=127, step_size=16.0, rounds=8, stop_error=0.0
        )),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = mlp(data, Victim, acceptance=0.85, backbone=partial(MLP, hidden=[32]))
        trainer = tiny_trainer(max_epochs=6)
        trainer.fit(model, data)
        trainer.test(model, data, verbose=False)
        verdicts[name] = model.accepted
        if name == "protected":
            trained_on = model.eval()(all_images(data.train_set)).argmax(1) == data.train_set.labels
            assert float(trained_on.float().mean()) > 0.95
    assert verdicts == {"clean": True, "protected": False}


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"kind": "samplewise"}, ["kind = 'samplewise'", "sample_wise or class_wise"]),
        ({"epsilon": 0}, ["epsilon = 0", "grey levels"]),
        ({"epsilon": 8 / 255}, ["epsilon = 0.03", "whole number of grey levels"]),
        ({"epsilon": 128}, ["epsilon = 128", "127"]),
        ({"poison_fraction": -0.1}, ["poison_fraction = -0.1"]),
        ({"rounds": 0}, ["rounds = 0"]),
        ({"surrogate_steps": 0}, ["surrogate_steps = 0"]),
        ({"noise_steps": -1}, ["noise_steps = -1"]),
        ({"step_size": 0.0}, ["step_size = 0.0"]),
        ({"stop_error": 1.0}, ["stop_error = 1.0", "[0, 1)"]),
        ({"share": 0.0}, ["share = 0.0"]),
        ({"batch_size": 0}, ["batch_size = 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate = nan"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        Unlearnable(Digits(), **{**QUICK, **kwargs})


@pytest.mark.parametrize("kind", [Unlearnable, AdversarialPoison])
def test_secrets_do_not_reach_the_store(kind: Any) -> None:
    """Noise over a trigger set would be made of the triggers, and lie there for all to read."""

    class Secret(Digits):
        secret = True

    with refused("base", "secrets"):
        kind(Secret(), backbone=SMALL)


def test_soft_labels_are_refused() -> None:
    class Soft(Digits):
        def setup(self, stage: str = "fit") -> None:
            super().setup(stage)
            train = self._sets["train"]
            self._sets["train"] = Overlay(train, torch.arange(len(train)), labels=torch.zeros(len(train), 10))

    with refused("Unlearnable", "soft labels"):
        unlearnable(Soft())
