"""What all poisons of a cell of one-shot kills share: networks, features, the trials, and a judge of clean labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifiers.classifier import BackboneFactory, ImageClassifier
from classifiers.devices import accelerator
from classifiers.folding import folded_classifier
from classifiers.last_layers import LastLayers, scores
from datamodules.classes import Classes
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet
from datamodules.measures import SAME_TARGETS, Interval
from datamodules.random import draw
from datamodules.store import Store, load_tensors, save_tensors
from experiments.bulk.end_to_end import read_source
from experiments.complaints import input_error, one_line
from experiments.registry import import_all
from poisoning.extractor import extractor_hash, features_in_parts, load_extractor, make_extractor
from poisoning.feature_collision import unseen
from poisoning.one_shot import Outcome, Pairs, Recipe, Task, clean_layer, pair_up, share

Source = str | Mapping[str, Any]
"""Where a frozen network comes from: its weights file, or a backbone that has weights of its own, as in a config."""

LARGE = 3 * 64 * 64
"""Values of an image from which features are kept in the store: those of smaller ones are made as quickly as read."""

FEATURES = 1
"""The version of how features are made, for keys of the store."""

_VALUES = 2**20
"""Values of the images that are worked on at a time on a CPU: what a network makes of them stays in the cache."""

_VALUES_ELSEWHERE = 2**24
"""The same on an accelerator."""


class Network:
    """A frozen network, ready to be asked often.

    Args:
        given: Weights, or a backbone.
        data: The data whose images it is to see.
        field: What to call it in an error.

    Attributes:
        model: In evaluation mode, its BatchNorm folded; on the accelerator if there is one.
        identity: The hash of what determines its features.

    Raises:
        InputError: If there are no such weights, or they do not fit the images.
    """

    def __init__(self, given: Source, data: ImageDataModule, field: str) -> None:
        if isinstance(given, str):
            model = load_extractor(given, data.image_shape)
        else:
            try:
                model = make_extractor(_backbone(given, field), data)
            except TypeError as error:  # a class that does not take the shape of the images and a number of classes
                raise bad(field, given["class_path"], f"it makes no network of these images ({error})") from error
        self.identity = extractor_hash(model)
        self.model = folded_classifier(model.to(accelerator()))

    @property
    def together(self) -> int:
        """How many images to work on at a time."""
        channels, height, width = self.model.image_shape
        room = _VALUES if self.model.device.type == "cpu" else _VALUES_ELSEWHERE
        return max(8, min(256, room // (channels * height * width)))

    def features(self, images: Tensor) -> Tensor:
        """Of images uint8 (N, C, H, W): real (N, F), on the network's device."""
        return features_in_parts(
            lambda part: self.model.features(part.to(self.model.device)), images, batch_size=self.together
        )

    def features_of(self, images: ImageSet) -> Tensor:
        """The same of a whole set; of large images from the store if they are there."""

        def found() -> Tensor:
            parts = torch.arange(len(images)).split(1024)
            return torch.cat([self.features(images.images_at(part)) for part in parts])

        if torch.Size(images.image_shape).numel() < LARGE:
            return found()

        def make(folder: Path) -> None:
            save_tensors(folder / "features.safetensors", {"features": found().cpu()})

        key = {"version": FEATURES, "network": self.identity, "images": images.digest()}
        folder = Store().build("features", key, make)
        return load_tensors(folder / "features.safetensors")["features"].to(self.model.device)


@dataclass(frozen=True)
class Judge:
    """A classifier that had no part in crafting: is a poison still of its base's class?

    Attributes:
        answers: uint8 (N, C, H, W) → labels of the task, −1 for any other class: int64 (N,).
        accuracy: On the test images as they are.
    """

    answers: Callable[[Tensor], Tensor]
    accuracy: Interval


@dataclass(frozen=True)
class Scene:
    """What all poisons of a cell share.

    Attributes:
        extractor: The attacker's network, in whose features poisons collide.
        victim: The one on whose features last layers are trained: the same, unless the attacker knows another.
        judge: None: there is none.
        images: The test images: uint8 (N, C, H, W).
        ids: Theirs.
        names: Of the classes.
        task: The victim's features, and labels.
        pairs: The trials.
        apart: ‖f(b) − f(t)‖ of each pair in the extractor's features: real (T,).
        unit: What the targets are in an interval.
    """

    extractor: Network
    victim: Network
    judge: Judge | None
    images: Tensor
    ids: Tensor
    names: Sequence[str]
    task: Task
    pairs: Pairs
    apart: Tensor
    unit: str

    @property
    def goal(self) -> Tensor:
        """The labels of the bases: int64 (T,)."""
        return self.task.test_labels[self.pairs.bases]


@dataclass(frozen=True)
class Batch:
    """T poisons of one kind and what they did.

    Attributes:
        kind: ``crafted``, or the control: ``target`` (label noise) or ``base``.
        scale: β as a multiple of the default; None for a control.
        images: uint8 (T, C, H, W).
        features: The victim's, of these: real (T, F).
        distance: ‖f(p) − f(t)‖ in the extractor's: real (T,).
        l2: ‖p − b‖, pixels in [0, 1]: real (T,).
        linf: The largest |p − b| of a pixel: real (T,).
        iterations: int64 (T,).
        judged: The judge's labels of the poisons: int64 (T,); None: there is none.
        outcome: What they did.
    """

    kind: str
    scale: float | None
    images: Tensor
    features: Tensor
    distance: Tensor
    l2: Tensor
    linf: Tensor
    iterations: Tensor
    judged: Tensor | None
    outcome: Outcome


def make_scene(
    extractor: Source,
    victim: Source | None,
    judge: Source | None,
    source: str,
    classes: Sequence[int],
    per_class: int | None,
    choose: str,
    limit: int | None,
    seed: int,
    target_seed: int | None,
) -> Scene:
    """Read the data, ask the networks, and pair targets with bases; the arguments are those of `one_shot`."""
    unit = "targets" if target_seed is None else SAME_TARGETS
    target_seed = seed if target_seed is None else target_seed
    if limit is not None and limit < 1:
        raise bad("limit", limit, "it must be 1 or more, or null for all test images")
    everything = read_source(source)
    data, pool = Classes(everything, classes, per_class, seed), Classes(everything, classes)
    for each in (data, pool):
        each.prepare_data()
        each.setup("fit")
    attacker = Network(extractor, data, "extractor")
    attacked = attacker if victim is None else Network(victim, data, "victim")
    test = data.test_set
    images = test.images_at(torch.arange(len(test)))
    known = attacker.features_of(test)
    # of all training images, whatever the draw of them: targets stay the same, and features are made once
    eligible = _unseen(images, test, pool.train_set)
    pairs = pair_up(known.cpu(), test.labels, eligible, test.ids, choose, target_seed)
    order = draw(target_seed, "limit", 0, test.ids[pairs.targets])[:, 0].argsort(stable=True)[:limit]
    pairs = Pairs(*(part[order].to(known.device) for part in pairs))
    rows = _rows_of(pool.train_set.ids, data.train_set.ids)
    task = Task(
        attacked.features_of(pool.train_set)[rows.to(known.device)],
        data.train_set.labels.to(known.device),
        known if victim is None else attacked.features_of(test),
        test.labels.to(known.device),
    )
    apart = (known[pairs.bases] - known[pairs.targets]).norm(dim=1)
    found = None if judge is None else _judge(judge, data, pool, everything.num_classes)
    return Scene(attacker, attacked, found, images, test.ids, data.class_names, task, pairs, apart, unit)


def _unseen(images: Tensor, test: ImageSet, train: ImageSet) -> Tensor:
    """Which test images have no duplicate in training, see `unseen`; of large images from the store if it is there."""
    if images[0].numel() < LARGE:
        return unseen(images, train)

    def make(folder: Path) -> None:
        save_tensors(folder / "unseen.safetensors", {"unseen": unseen(images, train)})

    folder = Store().build("unseen", {"test": test.digest(), "train": train.digest()}, make)
    return load_tensors(folder / "unseen.safetensors")["unseen"]


def _backbone(given: Mapping[str, Any], field: str) -> BackboneFactory:
    """A backbone as a config has it: class_path and init_args."""
    from experiments.cli import Parser

    import_all()
    parser = Parser()
    parser.add_argument(f"--{field}", type=BackboneFactory)
    try:
        found: BackboneFactory = parser.instantiate(parser.parse_object({field: dict(given)}))[field]
    except Exception as error:  # the parser's errors have no common base
        raise input_error(error) or InputError(one_line(error, [field])) from error
    return found


def _rows_of(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where the `wanted` ids stand among `ids`: int64."""
    order = ids.argsort()
    return order[torch.searchsorted(ids[order], wanted)]


def _judge(given: Source, data: Classes, pool: Classes, known: int) -> Judge:
    """A classifier with its own last layer, or a new one on the features of a backbone that knows other classes."""
    network, test = Network(given, data, "judge"), data.test_set
    if isinstance(given, str):
        answers = _classifier(network.model, given, data, known)
        found = torch.cat([answers(test.images_at(part)) for part in torch.arange(len(test)).split(1024)])
        return Judge(answers, share(found == test.labels))
    layer = _trained(network, pool)

    def by_features(features: Tensor) -> Tensor:
        return scores(layer, features)[0].argmax(1).cpu()

    accuracy = share(by_features(network.features_of(test)) == test.labels)
    return Judge(lambda images: by_features(network.features(images)), accuracy)


def _classifier(model: ImageClassifier, path: str, data: Classes, known: int) -> Callable[[Tensor], Tensor]:
    classes = data.classes
    if model.num_classes not in (known, len(classes)):
        raise bad("judge", path, f"it knows {model.num_classes} classes; {known} or {len(classes)} are expected")
    number = torch.full((model.num_classes,), -1)
    number[classes if model.num_classes == known else list(range(len(classes)))] = torch.arange(len(classes))

    def answers(images: Tensor) -> Tensor:
        with torch.no_grad():
            return number[torch.cat([model(part.to(model.device)).argmax(1).cpu() for part in images.split(256)])]

    return answers


def _trained(network: Network, pool: Classes) -> LastLayers:
    """A last layer on the features of all training images of the classes, by the victims' recipe."""
    features, labels = network.features_of(pool.train_set), pool.train_set.labels
    labels = labels.to(features.device)
    return clean_layer(Task(features, labels, features[:0], labels[:0]), pool.num_classes, Recipe())
