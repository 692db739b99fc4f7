"""The stages of `triggerless`: three attacks without a trigger under one protocol, in transfer and from scratch.

The protocol is that of Schwarzschild et al., "Just How Toxic is Data Poisoning?", ICML 2021, arXiv 2006.12557 (code:
github.com/aks2203/poisoning-benchmark): targets and base classes at random, bases from the training set, poisons within
ε in their place, success if the target gets the class of its bases.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.classifier import ImageClassifier
from classifiers.devices import accelerator
from classifiers.last_layers import scores, train_last_layers
from datamodules.augment import FlipCrop
from datamodules.classes import Classes
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.random import derive, generator
from datamodules.rewrite import Rewrite
from datamodules.store import Store, load_tensors, save_tensors
from experiments.bulk.end_to_end import read_source
from experiments.bulk.fitting import fit as _fit
from experiments.bulk.fitting import options_of
from experiments.bulk.fitting import start_config as _start
from experiments.bulk.outcomes import Outcome, Trials, outcome, report
from experiments.pictures import source_of
from experiments.registry import find_config
from experiments.studies.resolve import resolve
from poisoning.bullseye_polytope import centre
from poisoning.collision import collide
from poisoning.extractor import features_in_parts, load_extractor
from poisoning.gradient_matching import match
from poisoning.targets import in_place

ATTACKS = ("none", "feature_collision", "bullseye_polytope", "gradient_matching")
"""``none`` leaves the bases as they are: how often a target gets the class without an attack."""


# --- who is attacked -------------------------------------------------------------------------------------------------
def draw_trials(
    train_labels: Tensor,
    test_labels: Tensor,
    num_classes: int,
    trials: int,
    poisons: int,
    seed: int,
    targets_per_victim: int = 1,
) -> Trials:
    """Targets without replacement, for each another class, and bases of that class.

    Args:
        train_labels: int64 (N,).
        test_labels: int64 (M,).
        num_classes: K.
        trials: T.
        poisons: P.
        seed: Of all draws.
        targets_per_victim: So many targets in a row have no base in common: one victim gets all their poisons.

    Raises:
        InputError: If there are fewer targets or bases than that.
    """
    for field, number in (("trials", trials), ("poisons", poisons), ("targets_per_victim", targets_per_victim)):
        if number < 1:
            raise bad(field, number, "it must be 1 or more")
    private = generator(seed, "triggerless trials")
    if trials > len(test_labels):
        raise bad("trials", trials, f"there are {len(test_labels)} test images")
    targets = torch.randperm(len(test_labels), generator=private)[:trials]
    steps = torch.randint(1, num_classes, (trials,), generator=private)
    wanted = (test_labels[targets] + steps) % num_classes
    bases = torch.empty(trials, poisons, dtype=torch.int64)
    free = torch.ones_like(train_labels, dtype=torch.bool)
    for number, label in enumerate(wanted.tolist()):
        if number % targets_per_victim == 0:
            free.fill_(True)
        rows = ((train_labels == label) & free).nonzero().squeeze(1)
        if len(rows) < poisons:
            raise bad(
                "poisons", poisons, f"there are {len(rows)} training images of class {label} left to make them of"
            )
        bases[number] = rows[torch.randperm(len(rows), generator=private)[:poisons]]
        free[bases[number]] = False
    return Trials(targets, wanted, bases)


# --- crafting --------------------------------------------------------------------------------------------------------
def craft(
    attack: str,
    extractor: ImageClassifier,
    network: nn.Module,
    targets: Tensor,
    wanted: Tensor,
    bases: Tensor,
    ids: Tensor,
    epsilon: int,
    seed: int,
    augment: FlipCrop | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """The poisons of all targets by one attack.

    Args:
        attack: One of `ATTACKS`.
        extractor: Whose features feature collision and Bullseye Polytope work on.
        network: Whose gradients are matched.
        targets: uint8 (T, C, H, W).
        wanted: int64 (T,).
        bases: uint8 (T, P, C, H, W).
        ids: int64 (T, P).
        epsilon: In grey levels.
        seed: Of what is random in gradient matching.
        augment: What gradient matching expects the victim to do.
        options: The attack's own: iterations, step, restarts, …

    Returns:
        uint8 (T, P, C, H, W); and (T,): what the attack lowers, as a share of what it was for the bases.

    Raises:
        InputError: If there is no such attack.
    """
    if attack == "none":
        return bases, torch.ones(len(targets))
    if attack == "feature_collision":
        count, each = bases.shape[:2]
        start, repeated = bases.flatten(0, 1).float() / 255, targets.float().repeat_interleave(each, 0) / 255
        made = collide(extractor.features, repeated, start, beta=0.0, epsilon=epsilon / 255, **options)
        before = features_in_parts(extractor.features, start) - features_in_parts(extractor.features, repeated)
        left = made.feature_distance / before.norm(dim=1)
        return made.images.view_as(bases), left.view(count, each).mean(1)
    if attack == "bullseye_polytope":
        centred = centre([extractor.features], targets, bases, epsilon=epsilon, **options)
        return centred.images, centred.distance / centred.before
    if attack == "gradient_matching":
        matched = match([network], targets, wanted, bases, ids, epsilon=epsilon, seed=seed, augment=augment, **options)
        return matched.images, matched.mismatch / matched.before
    raise bad("attack", attack, f"choose one of {', '.join(ATTACKS)}")


# --- transfer --------------------------------------------------------------------------------------------------------
class Headed(nn.Module):
    """A frozen extractor with a last layer: images in [0, 1] → logits. Only the layer's weights count as the network's.

    Args:
        extractor: Frozen, in evaluation mode.
        weights: (K, F).
        biases: (K,).
    """

    def __init__(self, extractor: ImageClassifier, weights: Tensor, biases: Tensor) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = nn.Linear(weights.shape[1], weights.shape[0], device="meta")
        self.head.weight, self.head.bias = nn.Parameter(weights), nn.Parameter(biases)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        logits: Tensor = self.head(self.extractor.features(images))
        return logits


def transfer(
    folder: Path,
    seed: int,
    *,
    attack: str,
    extractor: str,
    source: str,
    classes: Sequence[int],
    per_class: int = 250,
    poisons: int = 25,
    epsilon: int = 8,
    trials: int = 100,
    epochs: int = 40,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """White-box transfer: the victim trains a last layer on a frozen extractor that the attacker has as well.

    All targets' poisons are crafted together. Each trial has a victim of its own, trained from a cold start on the
    features of the clean images and of its poisons; there is no augmentation. Gradient matching knows a last layer
    trained on the clean set from another start.

    Args:
        folder: Of the cell; ``trials.csv`` goes there.
        seed: Of the training images, the trials and the victims.
        attack: One of `ATTACKS`.
        extractor: Its weights.
        source: A YAML of data, such as ``data/cifar10.yaml``.
        classes: Of the source: what the victim tells apart.
        per_class: Training images of each class, the bases among them.
        poisons: Of each target.
        epsilon: In grey levels.
        trials: Targets.
        epochs: Of the victim.
        batch_size: Of the victim.
        learning_rate: Of the victim's Adam.
        options: Attack → its own: iterations, step, restarts, ….

    Returns:
        One row, see `outcomes.report`; each target has a victim of its own, and they all have the extractor, the clean
        images and the seed in common: intervals are of targets, for these.

    Raises:
        InputError: If a value is out of its range, or weights or classes do not fit.
    """
    _check_attack(attack)
    data = Classes(read_source(source), classes, per_class, seed)
    data.prepare_data()
    data.setup("fit")
    train, test = _all(data.train_set), _all(data.test_set)
    drawn = draw_trials(train.labels, test.labels, len(classes), trials, poisons, seed)
    model = load_extractor(extractor, data.image_shape).to(accelerator())
    known, seen = _embed(model, train.images), _embed(model, test.images)
    recipe: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    nothing = known.new_empty(1, 0, known.shape[1]), train.labels.new_empty(1, 0)
    clean = train_last_layers(known, train.labels, *nothing, len(classes), **recipe, seed=derive(seed, "surrogate"))
    began = time.perf_counter()
    made, left = _craft(
        attack,
        model,
        Headed(model, clean.weights[0], clean.biases[0]),
        train,
        test,
        drawn,
        epsilon,
        seed,
        None,
        options,
    )
    crafted = time.perf_counter()
    twin = scores(train_last_layers(known, train.labels, *nothing, len(classes), **recipe, seed=seed), seen)[0]
    rows: list[Outcome] = []
    for number in range(trials):
        keep = torch.ones(len(train), dtype=torch.bool)
        keep[drawn.bases[number]] = False
        layer = train_last_layers(
            known[keep],
            train.labels[keep],
            _embed(model, made[number])[None],
            drawn.wanted[number].expand(1, poisons),
            len(classes),
            **recipe,
            seed=seed,
        )
        rows.append(outcome(number, scores(layer, seen)[0].softmax(1), twin, test, drawn, number))
    finished = time.perf_counter()
    return [report(folder, train, test, drawn, made, left, rows, (crafted - began, finished - crafted))]


# --- from scratch ----------------------------------------------------------------------------------------------------
class Poisoned(Rewrite):
    """A training set with given poisons in the place of some images.

    Args:
        base: The clean data.
        rows: int64 (P,): of the training set.
        images: uint8 (P, C, H, W).
    """

    def __init__(self, base: ImageDataModule, rows: Tensor, images: Tensor) -> None:
        super().__init__(base)
        self.rows, self.images = rows, images

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The set with the poisons in it."""
        return in_place(train, self.rows, self.images)


def from_scratch(
    folder: Path,
    seed: int,
    *,
    attack: str,
    weights: str,
    configs: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    poison_fraction: float = 0.01,
    epsilon: int = 8,
    trials: int = 100,
    targets_per_victim: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Training from scratch: the attacker has a clean network of the victim's architecture, the victim starts anew.

    Args:
        folder: Of the cell; ``trials.csv`` goes there.
        seed: Of the trials and the victims; the victims of all attacks have the same seeds.
        attack: One of `ATTACKS`.
        weights: The attacker's network, trained on the clean data.
        configs: The victim's: model, data and trainer.
        overrides: Keys that differ from them.
        poison_fraction: The poisons of each target, as a share of the training set.
        epsilon: In grey levels.
        trials: Targets.
        targets_per_victim: 1 as published; with more, a victim is trained on the poisons of so many targets at once, to
            have more trials in the same time: they are not independent, and it sees so many times the poisons.
        options: Attack → its own: iterations, step, restarts, ….

    Returns:
        One row, see `outcomes.report`. All have the attacker's network in common.

    Raises:
        InputError: If a value is out of its range, or weights or configs do not fit.
    """
    _check_attack(attack)
    data = _start(configs, overrides, seed).datamodule
    data.prepare_data()
    data.setup("fit")
    train, test = data.train_set, data.test_set
    poisons = round(poison_fraction * len(train))
    drawn = draw_trials(train.labels, test.labels, data.num_classes, trials, poisons, seed, targets_per_victim)
    model = load_extractor(weights, data.image_shape).to(accelerator())
    if model.num_classes != data.num_classes:
        raise bad("weights", weights, f"made for {model.num_classes} classes, and there are {data.num_classes}")
    augment = getattr(source_of(data), "augmentation", None)
    expected = augment if isinstance(augment, FlipCrop) else None
    began = time.perf_counter()
    network = load_extractor(weights, data.image_shape).to(accelerator()).requires_grad_(True)
    made, left = _craft(attack, model, network, train, test, drawn, epsilon, seed, expected, options)
    crafted = time.perf_counter()
    rows: list[Outcome] = []
    for first in range(0, trials, targets_per_victim):
        group = slice(first, min(trials, first + targets_per_victim))
        own = derive(seed, "victim", first) % 2**31
        answers = before = _clean_answers(configs, overrides, own, data)
        poisoned = Poisoned(data, drawn.bases[group].flatten(), made[group].flatten(0, 1))
        if not torch.equal(train.images_at(poisoned.rows), poisoned.images):
            answers = _probabilities(_fit(_start(configs, overrides, own), poisoned), test)
        rows += [outcome(first, answers, before, test, drawn, number) for number in range(group.start, group.stop)]
    finished = time.perf_counter()
    return [report(folder, train, test, drawn, made, left, rows, (crafted - began, finished - crafted))]


def _clean_answers(
    configs: Sequence[str], overrides: Mapping[str, Any] | None, seed: int, data: ImageDataModule
) -> Tensor:
    """What a victim without poisons says of all test images; from the store, for all attacks have the same victims."""
    resolved = resolve(tuple(find_config(config) for config in configs), tuple(options_of(overrides, seed)))
    key = {"kind": "clean victim", "config": resolved.text, "data": resolved.data, "versions": dict(resolved.versions)}

    def make(folder: Path) -> None:
        victim = _fit(_start(configs, overrides, seed), data)
        save_tensors(folder / "answers.safetensors", {"answers": _probabilities(victim, data.test_set)})

    return load_tensors(Store().build("victims", key, make) / "answers.safetensors")["answers"]


@torch.no_grad()
def _probabilities(model: ImageClassifier, test: ImageSet) -> Tensor:
    parts = torch.arange(len(test)).split(512)
    return torch.cat([model(test.images_at(part).to(model.device)).softmax(1).cpu() for part in parts])


# --- what they share ------------------------------------------------------------------------------------------------
def _craft(
    attack: str,
    extractor: ImageClassifier,
    network: nn.Module,
    train: ImageSet,
    test: ImageSet,
    drawn: Trials,
    epsilon: int,
    seed: int,
    augment: FlipCrop | None,
    options: Mapping[str, Mapping[str, Any]] | None,
) -> tuple[Tensor, Tensor]:
    device = extractor.device
    bases = train.images_at(drawn.bases.flatten()).unflatten(0, drawn.bases.shape)
    made, left = craft(
        attack,
        extractor,
        network,
        test.images_at(drawn.targets).to(device),
        drawn.wanted.to(device),
        bases.to(device),
        train.ids[drawn.bases].to(device),
        epsilon,
        seed,
        augment,
        (options or {}).get(attack, {}),
    )
    return made.cpu(), left.cpu()


def _check_attack(attack: str) -> None:
    if attack not in ATTACKS:
        raise bad("attack", attack, f"choose one of {', '.join(ATTACKS)}")


def _all(images: ImageSet) -> ImageSet:
    whole = images.__getitems__(torch.arange(len(images)))
    return ImageSet(whole.images, whole.labels, whole.ids)


def _embed(model: ImageClassifier, images: Tensor) -> Tensor:
    return features_in_parts(lambda part: model.features(part.to(model.device)).cpu(), images)
