"""Gradient matching: the loss against references, augmentation with a gradient, restarts, and the datamodule."""

from __future__ import annotations

import math
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from classifiers.backbones import SmallCNN
from classifiers.classifier import ImageClassifier, load_classifier
from datamodules.augment import FlipCrop
from datamodules.imageset import ImageSet, Overlay
from datamodules.sources.digits import Digits
from poisoning.gradient_matching import GradientMatching, Matched, flip_crop, gradients, match, mismatch
from tests.helpers import global_randomness_untouched, mlp, refused, tiny_trainer


@cache
def digits() -> ImageSet:
    data = Digits()
    data.setup()
    return data.train_set


@cache
def trained() -> str:
    """Where the weights of a small CNN with BatchNorm lie that knows the digits fairly well."""
    model = mlp(Digits(), backbone=partial(SmallCNN, widths=[8, 16]))
    private = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=private) / weight[0].numel() ** 0.5
        elif "head" in name:
            weight.data.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        batch = digits().__getitems__(torch.randint(1132, (128,), generator=private))
        optimizer.zero_grad()
        model.loss(model(batch.images), batch.labels).backward()
        optimizer.step()
    path = Path(os.environ["PHARMAKON_CACHE"]) / "trained.safetensors"
    model.save(path)
    return str(path)


def cnn() -> ImageClassifier:
    """That network in evaluation mode."""
    return load_classifier(trained())


@pytest.fixture
def network() -> ImageClassifier:
    return cnn()


@pytest.fixture
def weights() -> str:
    return trained()


def task(targets: int = 3, poisons: int = 4) -> dict[str, Any]:
    """What `match` is about: digits 5, 1 and 8, which a 3, a 4 and a 6 are to be taken for."""
    images, labels = digits().images_at(torch.arange(1132)), digits().labels
    wanted = torch.tensor([5, 1, 8])[:targets]
    return {
        "targets": torch.stack([images[labels == label][0] for label in (3, 4, 6)[:targets]]),
        "labels": wanted,
        "bases": torch.stack([images[labels == label][:poisons] for label in wanted]),
        "ids": torch.arange(100, 100 + targets * poisons).view(targets, poisons),
        "epsilon": 16,
    }


def part_of(whole: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in whole.items()}


def of_poisons(network: nn.Module, images: Tensor, about: dict[str, Any]) -> Tensor:
    """The mismatch of poisons, written out: one target after the other, weights strung together."""
    found = []
    for each, target, label in zip(images, about["targets"], about["labels"], strict=True):
        strung = []
        for shown in (each, target[None]):
            loss = cross_entropy(network(shown), label.expand(len(shown)))
            strung.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
        found.append(1 - torch.cosine_similarity(strung[0], strung[1], dim=0))
    return torch.stack(found)


def of_poisons_differentiably(network: nn.Module, images: Tensor, about: dict[str, Any]) -> Tensor:
    """The mismatch of one target's poisons, with a gradient with respect to them."""
    weights, label = list(network.parameters()), about["labels"]
    wanted = torch.autograd.grad(cross_entropy(network(about["targets"]), label), weights)
    loss = cross_entropy(network(images[0]), label.expand(len(images[0])))
    strung = torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights, create_graph=True)])
    return 1 - torch.cosine_similarity(strung, torch.cat([each.flatten() for each in wanted]), dim=0)


# --- augmentation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_augmentation_shows_what_the_victims_does(padding: int, flip: bool, shape: tuple[int, int, int]) -> None:
    augment = FlipCrop(padding, flip)
    images, ids = torch.rand(40, *shape), torch.arange(7, 47)
    seen = set()
    for epoch in range(3):
        expected = augment(images, ids, 5, epoch)
        assert torch.equal(flip_crop(augment, images, ids, 5, epoch), expected)
        seen.add(tuple(expected.flatten().tolist()))
    assert len(seen) == (3 if padding or flip else 1)


def test_augmentation_hands_the_gradient_to_the_pixels_shown() -> None:
    augment = FlipCrop(2, True)
    images = torch.rand(6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6)
    assert torch.autograd.gradcheck(lambda x: flip_crop(augment, x, ids, 1, 0), images)
    (slope,) = torch.autograd.grad(flip_crop(augment, images, ids, 1, 0).sum(), images)
    assert set(slope.unique().tolist()) == {0.0, 1.0}  # a pixel is shown once, or cropped away
    shown = flip_crop(augment, torch.ones(6, 2, 4, 4), ids, 1, 0)
    assert float(slope.sum()) == float(shown.sum())


# --- the loss ---------------------------------------------------------------------------------------------------------
def test_the_mismatch_by_hand() -> None:
    poison = [torch.tensor([[3.0], [1.0]]), torch.tensor([[[0.0, 4.0]], [[0.0, 0.0]]])]  # two groups, two weights
    wanted = [torch.tensor([[4.0], [-2.0]]), torch.tensor([[[0.0, 3.0]], [[0.0, 0.0]]])]
    # (3, 0, 4)·(4, 0, 3) / 25 = 0.96 over all weights together, not layer by layer; and opposite directions
    assert torch.allclose(mismatch(poison, wanted), torch.tensor([0.04, 2.0]))
    scaled = [7 * each for each in poison]
    assert torch.allclose(mismatch(scaled, wanted), mismatch(poison, wanted))


def test_the_gradient_of_a_linear_network_by_hand() -> None:
    """Softmax regression on one pixel: dL/dW = (p − y) x, dL/db = p − y."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    network[1].weight.data, network[1].bias.data = torch.tensor([[0.0], [0.0]]), torch.tensor([0.0, math.log(3)])
    images = torch.tensor([0.2, 0.6]).view(1, 2, 1, 1, 1)  # p = (¼, ¾) for any x
    weight, bias = gradients(network, images, torch.tensor([[0, 1]]))
    # samples: (−¾, ¾)·0.2 and (¼, −¼)·0.6, averaged
    assert torch.allclose(weight.flatten(), torch.tensor([-0.15 + 0.15, 0.15 - 0.15]) / 2, atol=1e-7)
    assert torch.allclose(bias.flatten(), torch.tensor([-0.5, 0.5]) / 2)


def test_gradients_of_many_groups_are_those_of_each(network: ImageClassifier) -> None:
    about = task()
    images = about["bases"].float() / 255
    labels = about["labels"][:, None].expand(3, 4)
    together = gradients(network, images, labels)
    assert len(together) == len(list(network.parameters()))
    for number in range(3):
        reference = torch.autograd.grad(cross_entropy(network(images[number]), labels[number]), network.parameters())
        alone = gradients(network, images[number][None], labels[number][None])
        for group, one, expected in zip(together, alone, reference, strict=True):
            assert torch.allclose(one[0], expected)
            assert torch.allclose(group[number], expected, atol=1e-6)


def test_frozen_weights_do_not_count() -> None:
    model = cnn()
    model.requires_grad_(False)
    model.net.head.requires_grad_(True)
    about = task()
    for images in (about["bases"][:1], about["bases"]):
        found = gradients(model, images.float() / 255, about["labels"][: len(images), None].expand(-1, 4))
        assert [each.shape[1:] for each in found] == [(10, 16), (10,)]


@pytest.mark.parametrize("groups", [1, 3])
def test_the_slope_in_pixels_is_that_of_finite_differences(groups: int) -> None:
    """Through a gradient, a crop and a flip; a smooth network in double precision."""
    private = torch.Generator().manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=private, dtype=torch.float64)
    x, way = torch.rand(2, groups, 4, 1, 4, 4, generator=private, dtype=torch.float64)
    labels = torch.arange(groups)[:, None]
    target = torch.rand(groups, 1, 1, 4, 4, generator=private, dtype=torch.float64)
    wanted = [each.detach() for each in gradients(network, target, labels)]
    ids = torch.arange(groups * 4)

    def loss(images: Tensor) -> Tensor:
        seen = flip_crop(FlipCrop(1), images.flatten(0, 1), ids, 0, 0).view_as(images)
        return mismatch(gradients(network, seen, labels.expand(groups, 4)), wanted).sum()

    (slope,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    h = 1e-5
    up, down = (loss(x.detach() + sign * h * way).item() for sign in (1, -1))
    assert float((slope * way).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-6)


# --- crafting ---------------------------------------------------------------------------------------------------------
def test_poisons_of_one_pixel_by_hand() -> None:
    """Softmax regression with p = (½, ½): a poison of class 0 has the gradient (−x, x, −1, 1)/2, as has a target t."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    for weight in network.parameters():
        weight.data.zero_()
    # cosine 1 where the mean of the poisons is t: 120 and 140 move towards 100 in step, and ε = 8 is too little
    bases, ids = torch.tensor([120, 140], dtype=torch.uint8).view(1, 2, 1, 1, 1), torch.tensor([[1, 2]])
    target = torch.tensor([100], dtype=torch.uint8).view(1, 1, 1, 1)
    made = match([network], target, torch.tensor([0]), bases, ids, epsilon=8, iterations=40, restarts=2, step=0.01)
    assert made.images.flatten().tolist() == [112, 132]
    mean, t = 122 / 255, 100 / 255
    expected = 1 - (mean * t + 1) / (math.sqrt(mean**2 + 1) * math.sqrt(t**2 + 1))
    assert float(made.mismatch) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("augment", [None, FlipCrop(1)])
def test_poisons_are_within_epsilon_and_match_better(network: ImageClassifier, augment: FlipCrop | None) -> None:
    about = task()
    made = match([network], **about, iterations=30, restarts=1, augment=augment)
    assert made.images.dtype == torch.uint8
    assert int((made.images.int() - about["bases"].int()).abs().max()) == 16
    assert (made.mismatch < made.before - 0.02).all()


def test_what_is_reported_is_the_loss_of_the_rounded_poisons(network: ImageClassifier) -> None:
    about = task()
    made = match([network], **about, iterations=6, restarts=2)
    assert torch.allclose(made.mismatch, of_poisons(network, made.images.float() / 255, about), atol=1e-6)
    assert torch.allclose(made.before, of_poisons(network, about["bases"].float() / 255, about), atol=1e-6)
    # of two networks, the mean
    other = cnn()
    other.net.head.weight.data.mul_(-1)
    both = match([network, other], **about, iterations=6, restarts=1)
    images = both.images.float() / 255
    expected = (of_poisons(network, images, about) + of_poisons(other, images, about)) / 2
    assert torch.allclose(both.mismatch, expected, atol=1e-6)


def test_the_restart_with_the_lowest_loss_is_kept(network: ImageClassifier) -> None:
    about = task()
    made = match([network], **about, iterations=3, restarts=4)
    assert made.restarts.shape == (3, 4)
    assert all(len(row.unique()) == 4 for row in made.restarts)  # each began elsewhere
    assert torch.equal(made.mismatch, made.restarts.min(1).values)
    assert len(made.restarts.argmin(1).unique()) > 1  # it is not always the first, and each target has its own
    assert torch.allclose(made.mismatch, of_poisons(network, made.images.float() / 255, about), atol=1e-6)
    fewer = match([network], **about, iterations=3, restarts=2)
    assert torch.equal(fewer.restarts, made.restarts[:, :2])  # unaugmented, the first are the same


def test_one_target_at_a_time_or_all_together(network: ImageClassifier) -> None:
    about, options = task(), {"iterations": 12, "restarts": 2, "augment": FlipCrop(1)}
    one_by_one = match([network], **about, **options)
    for number in range(3):
        alone = match([network], **part_of(about, slice(number, number + 1)), **options)
        assert torch.equal(alone.images[0], one_by_one.images[number])  # to the bit: the others do not matter
        assert torch.equal(alone.restarts[0], one_by_one.restarts[number])
    together = match([network], **about, **options, together=3)
    # the sign of a slope near 0 may differ: few pixels may, the loss may not
    assert (together.images != one_by_one.images).float().mean() < 0.05
    assert torch.allclose(together.restarts, one_by_one.restarts, rtol=0.02)


def test_the_seed_determines_the_poisons_and_nothing_else_does(network: ImageClassifier) -> None:
    about, options = task(1), {"iterations": 3, "restarts": 2, "augment": FlipCrop(1)}
    made: list[Matched] = []
    for seed, outer in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(outer)
        with global_randomness_untouched():
            made.append(match([network], **about, **options, seed=seed))
    assert torch.equal(made[0].images, made[1].images)
    assert not torch.equal(made[0].images, made[2].images)
    assert all(weight.grad is None for weight in network.parameters())


def test_the_rate_falls_tenfold_three_times(network: ImageClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[-1]
    )
    match([network], **task(1), iterations=16, restarts=1, step=0.1)
    expected = [0.1] * 6 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2  # from 3/8, 5/8 and 7/8 of 16
    assert rates == pytest.approx(expected)


def test_each_step_has_its_own_augmentation_and_restarts_are_judged_by_another(
    network: ImageClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []

    def noted(augment: FlipCrop, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        epochs.append(epoch)
        return flip_crop(augment, images, ids, seed, epoch)

    monkeypatch.setattr("poisoning.gradient_matching.flip_crop", noted)
    match([network], **task(1), iterations=3, restarts=2, augment=FlipCrop(1))
    assert epochs == [*range(6), 6, 6, 6]  # the steps of both restarts; then each of them, and the bases


def test_adam_gets_the_sign_of_a_slope_at_poisons_within_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    slopes: list[Tensor] = []
    points: list[Tensor] = []
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam) -> Any:
        [x] = self.param_groups[0]["params"]
        slopes.append(x.grad.clone())
        points.append(x.detach().clone())
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    about = task(2)
    model = load_classifier(trained())
    match([model], **about, iterations=4, restarts=1, step=0.5)  # far beyond ε
    assert len(slopes) == 2 * 4
    for slope, x, bases in zip(slopes, points, about["bases"].float().repeat_interleave(4, 0), strict=True):
        assert set(slope.unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert float((x[0] * 255 - bases).abs().max()) < 16.001  # ε, the start included
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
    # the slope is that of the loss, not its negative: at the start, where Adam has no memory yet
    here = points[0].requires_grad_()
    (expected,) = torch.autograd.grad(of_poisons_differentiably(model, here, part_of(about, slice(0, 1))), here)
    assert torch.equal(slopes[0], expected.sign())


def test_each_target_starts_from_noise_of_its_own(network: ImageClassifier) -> None:
    one = task(1)
    alike = {key: value.repeat(2, *[1] * (value.ndim - 1)) if key != "epsilon" else value for key, value in one.items()}
    alike["ids"] = torch.stack([one["ids"][0], one["ids"][0] + 50])
    made = match([network], **alike, iterations=1, restarts=1)
    assert not torch.equal(made.images[0], made.images[1])


def test_progress_goes_up_to_one(network: ImageClassifier) -> None:
    shares: list[float] = []
    match([network], **task(2), iterations=2, restarts=2, progress=shares.append)
    assert shares == pytest.approx([number / 8 for number in range(1, 9)])


def test_a_network_in_training_mode_is_refused(network: ImageClassifier) -> None:
    model = cnn().train()
    with pytest.raises(ValueError, match="evaluation mode"):
        match([model], **task())


def test_what_cannot_be_crafted_is_refused(network: ImageClassifier) -> None:
    for change in ({"iterations": 0}, {"restarts": 0}, {"together": 0}, {"step": 0.0}, {"epsilon": 0}):
        [(field, value)] = change.items()
        with refused(f"{field} = {value!r}"):
            match([network], **{**task(), **change})
    for wrong in ({"labels": torch.tensor([5, 1])}, {"ids": torch.zeros(3, 3)}, {"targets": torch.rand(3, 1, 8, 8)}):
        with pytest.raises(ValueError, match="expected"):
            match([network], **{**task(), **wrong})


# --- the datamodule ---------------------------------------------------------------------------------------------------
def matching(weights: str, **kwargs: Any) -> GradientMatching:
    options: dict[str, Any] = {"target_label": 3, "base_label": 5, "target": 0, "iterations": 8, "restarts": 2}
    return GradientMatching(**{"base": Digits(), "weights": weights, **options, **kwargs})


def ready(weights: str, **kwargs: Any) -> GradientMatching:
    data = matching(weights, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def test_one_per_cent_of_the_training_set_and_only_of_the_base_class(weights: str, network: ImageClassifier) -> None:
    data = ready(weights)
    train, plain = data.train_set, data.base.train_set
    [changes] = data.changes()
    assert len(changes.ids) == data.facts()["poisoned"] == round(0.01 * len(plain)) == 11
    own = torch.isin(plain.ids, changes.ids).nonzero().squeeze(1)
    assert (plain.labels[own] == 5).all()
    assert torch.equal(train.labels, plain.labels)
    change = (train.images_at(own).int() - plain.images_at(own).int()).abs()
    facts = data.facts()
    assert facts["epsilon_reached"] == int(change.max()) == 16
    assert facts["poison_l2"] == pytest.approx(float((change / 255).flatten(1).norm(dim=1).mean()))
    others = (~torch.isin(plain.ids, changes.ids)).nonzero().squeeze(1)
    assert torch.equal(train.images_at(others), plain.images_at(others))
    target = data.test_set.images_at((data.test_set.labels == 3).nonzero().squeeze(1)[:1])
    about = {"targets": target, "labels": torch.tensor([5])}
    measured = of_poisons(network, train.images_at(own)[None].float() / 255, about)
    assert facts["gradient_mismatch"] == pytest.approx(float(measured), abs=1e-5)
    assert float(facts["gradient_mismatch"]) < float(facts["gradient_mismatch_before"])  # type: ignore[arg-type]


def test_each_setting_is_another_crafting(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    craft = GradientMatching.craft

    def counted(self: GradientMatching, *args: Any) -> Any:
        calls.append(1)
        return craft(self, *args)

    monkeypatch.setattr(GradientMatching, "craft", counted)
    few = {"iterations": 2, "restarts": 1}
    one, again = ready(weights, **few), ready(weights, **few)
    assert len(calls) == 1
    assert one.train_set.digest() == again.train_set.digest()
    assert one.facts() == again.facts()
    settings: list[dict[str, Any]] = [
        {"epsilon": 15}, {"iterations": 3}, {"step": 0.02}, {"restarts": 2}, {"augment": FlipCrop(1)},
        {"augment": FlipCrop(1, flip=False)}, {"seed": 1}, {"target": 1}, {"poison_fraction": 0.02},
        {"target_label": 4}, {"base_label": 6},
    ]  # fmt: skip
    for number, setting in enumerate(settings, start=2):
        ready(weights, **{**few, **setting})
        assert len(calls) == number, setting

    class Renamed(Digits):
        @property
        def train_set(self) -> ImageSet:
            whole = super().train_set
            return Overlay(whole, torch.arange(len(whole)), ids=whole.ids + 10_000)

    class Swapped(Digits):
        @property
        def train_set(self) -> ImageSet:
            whole = super().train_set
            swap = torch.tensor([0, 1, 2, 3, 4, 6, 5, 7, 8, 9])
            return Overlay(whole, torch.arange(len(whole)), labels=swap[whole.labels])

    class Few(Digits):
        @property
        def train_set(self) -> ImageSet:
            return super().train_set.select(torch.arange(50))

    all_of_it = int((digits().labels[:50] == 5).sum()) / 50  # whatever the seed, the bases are the same

    class Another(GradientMatching):
        pass

    known = len(calls)
    for number, (kind, changed) in enumerate(
        (
            (GradientMatching, {"base": Renamed()}),  # noise and augmentation are drawn by ids
            (GradientMatching, {"base": Swapped(), "base_label": 6}),  # the same images under another label
            (Another, {}),
            (GradientMatching, {"base": Few(), "poison_fraction": all_of_it}),
            (GradientMatching, {"base": Few(), "poison_fraction": all_of_it, "seed": 1}),
        ),
        start=1,
    ):
        options = {"base": Digits(), "target_label": 3, "base_label": 5, "target": 0, "weights": weights, **few}
        kind(**{**options, **changed}).prepare_data()
        assert len(calls) == known + number, changed


def test_it_can_be_trained_and_measured(weights: str) -> None:
    data = matching(weights, target=2)
    model = mlp(data)
    trainer = tiny_trainer(max_steps=1)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.measured["target_success"].n == 1
    assert 0 < model.measured["target_confidence"].value < 1


def test_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    wrong = ImageClassifier(partial(SmallCNN, widths=[4]), 8, (1, 8, 8), (0.5,), (0.2,))
    wrong.save(tmp_path / "wrong.safetensors")
    with refused("weights", "8 classes", "there are 10"):
        ready(str(tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"poison_fraction": -0.1}, ["poison_fraction = -0.1"]),
        ({"poison_fraction": 1.5}, ["poison_fraction = 1.5"]),
        ({"restarts": 0}, ["restarts = 0"]),
        ({"iterations": -1}, ["iterations = -1"]),
        ({"step": 0}, ["step = 0"]),
        ({"epsilon": 256}, ["epsilon = 256"]),
    ],
)
def test_what_cannot_be_is_refused_at_once(weights: str, kwargs: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        matching(weights, **kwargs)


def test_more_poisons_than_bases_are_refused(weights: str) -> None:
    with refused("poison_fraction = 0.5", "eligible", "largest"):
        ready(weights, poison_fraction=0.5)
