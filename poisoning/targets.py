"""What triggerless attacks share: a target, bases of another class, the room of ε round them, poisons in their place.

Threat model: the attacker wants one test image, the target, taken for another class. He slightly changes some training
images of that class, the bases, and leaves their labels as they are: an inspector sees nothing wrong with them. He
controls neither the other images nor the training nor the target, and has networks that are like the victim's.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from classifiers.classifier import BackboneFactory, ImageClassifier
from classifiers.weights import find_weights
from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet, Overlay, fingerprint
from datamodules.measures import Evaluation, Measure
from datamodules.random import generator
from datamodules.rewrite import Rewrite
from datamodules.store import Store, load_tensors, save_tensors
from poisoning.choosing import check_label
from poisoning.extractor import extractor_hash, load_extractor

CRAFTED = "poisons.safetensors"

Report = Callable[[float], None]
"""Called while crafting with the share of the work that is done."""


class Crafted(NamedTuple):
    """Finished poisons of one target.

    Attributes:
        images: uint8 (P, C, H, W).
        facts: What their crafting came to, by name.
    """

    images: Tensor
    facts: dict[str, float]


def box(bases: Tensor, epsilon: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest value that each pixel may take: within ε of the base, and within [0, 1].

    Both are whole grey levels, so that a poison between them is within ε after it was rounded to uint8, too.

    Args:
        bases: uint8, of any shape.
        epsilon: In grey levels.

    Returns:
        float32 in [0, 1], of the same shape.
    """
    values = bases.to(torch.int16)
    return (values - epsilon).clamp_min(0).float() / 255, (values + epsilon).clamp_max(255).float() / 255


def rounded(images: Tensor) -> Tensor:
    """Real pixels in [0, 1] as uint8."""
    return (images * 255).round().to(torch.uint8)


def check_epsilon(epsilon: int) -> None:
    """Refuse a bound that is no number of grey levels.

    Raises:
        InputError: If it is outside 1 … 255.
    """
    if not isinstance(epsilon, int) or not 1 <= epsilon <= 255:
        raise bad("epsilon", epsilon, "give a whole number of grey levels, 1 to 255 (8 is the usual 8/255)")


def target_row(labels: Tensor, label: int, number: int | None, seed: int) -> int:
    """The row of the target: number `number`, from 0, of the images of class `label`; None: one drawn by `seed`.

    Raises:
        InputError: If there are not so many.
    """
    rows = (labels == label).nonzero().squeeze(1)
    if not len(rows) or (number is not None and not 0 <= number < len(rows)):
        raise bad("target", number, f"there are {len(rows)} test images of class {label}, counted from 0")
    if number is None:
        number = int(torch.randint(len(rows), (), generator=generator(seed, "target")))
    return int(rows[number])


def in_place(train: ImageSet, rows: Tensor, images: Tensor) -> Overlay:
    """The training set with poisons in the place of some images; labels and ids stay.

    Args:
        train: The set.
        rows: int64 (P,).
        images: uint8 (P, C, H, W).
    """
    changed = torch.zeros(len(train), dtype=torch.bool)
    changed[rows] = True
    order = train.ids[rows].argsort()
    ids, poisons = train.ids[rows][order], images[order]

    def show(images: Tensor, ids_shown: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        at = torch.searchsorted(ids.to(ids_shown.device), ids_shown)
        return poisons.to(images.device).index_select(0, at)

    return Overlay(train, torch.arange(len(train)), changed=changed, rewriter=show, key=fingerprint(ids, poisons))


class Confidence(Metric):
    """The mean probability (softmax) of the wanted class; targets below zero are left out."""

    total: Tensor
    cases: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K), target int64 (B,)."""
        counted = target >= 0
        self.total += logits[counted].float().softmax(1).gather(1, target[counted, None]).sum()
        self.cases += counted.sum()

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.cases


class TargetedPoisons(Rewrite, ABC):
    """Training images of one class, changed within ε so that one test image is taken for that class.

    The poisons are crafted once, in `prepare_data`, and kept in the store under the hash of all that determines them.
    Measures in the test, beside the base's: `target_success` – whether the target gets the label of the bases, an image
    of one – and `target_confidence`, the probability that the model gives that label there.

    Args:
        base: The clean datamodule, or any other rewrite.
        weights: Weights of the attacker's networks, one or more: files, or folders of runs, ``runs/victim_digits``.
        target_label: The true class of the target.
        base_label: The class of the bases, which the target is to get.
        target: Which test image of its class is the target, counted from 0; None: one is drawn by `seed`.
        epsilon: ε: the most that any pixel of any channel may change, in whole grey levels of 255.
        seed: Of the draw of the target and the bases, and of all that is random in the crafting.
        backbone: What makes the attacker's networks, for classes from outside this project.
        name: Appended to the measures' and facts' names, for two targets in one set.

    Raises:
        InputError: If a value is out of its range, both classes are the same, or there are no such weights.
    """

    def __init__(
        self,
        base: ImageDataModule,
        weights: str | Sequence[str],
        target_label: int,
        base_label: int,
        target: int | None,
        epsilon: int,
        seed: int,
        backbone: BackboneFactory | None,
        name: str | None,
    ) -> None:
        super().__init__(base)
        check_label("target_label", target_label, base.num_classes)
        check_label("base_label", base_label, base.num_classes)
        if target_label == base_label:
            raise bad("base_label", base_label, "it is the target_label; the target has that class already")
        check_epsilon(epsilon)
        if base.secret:
            raise bad(
                "base", type(base).__name__, "it holds secrets, and poisons are kept in the store; put it outside"
            )
        if not weights:
            raise bad("weights", weights, "the attacker needs one network or more")
        self.weights = [find_weights(path) for path in ([weights] if isinstance(weights, str) else weights)]
        self.target_label, self.base_label, self.target = target_label, base_label, target
        self.epsilon = epsilon
        self.seed = seed
        self.backbone = backbone
        self.suffix = f"_{name}" if name else ""
        self._facts: Facts = {}

    # --- what a subclass gives ---------------------------------------------------------------------------------------
    @abstractmethod
    def bases(self, train: ImageSet) -> Tensor:
        """The rows of the bases: int64 (P,), ascending."""

    @abstractmethod
    def craft(
        self, networks: Sequence[ImageClassifier], target: Tensor, bases: Tensor, ids: Tensor, progress: Report
    ) -> Crafted:
        """The poisons.

        Args:
            networks: The attacker's, in evaluation mode and frozen.
            target: uint8 (C, H, W).
            bases: uint8 (P, C, H, W).
            ids: int64 (P,): theirs.
            progress: To call with the share of the work that is done.
        """

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What determines the crafting beside networks, images, ids, ε and seed; JSON."""

    # --- what follows from it ----------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        """Craft the poisons, unless the store has them."""
        super().prepare_data()
        self.base.setup("fit")
        if len(self.bases(self.base.train_set)):
            self._crafted(self.base.train_set)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training set with the poisons in the place of their bases."""
        if not len(self.bases(train)):
            return self._control(train)
        rows, poisons, facts = self._crafted(train)
        change = (poisons.to(torch.int16) - train.images_at(rows).to(torch.int16)).abs()
        ids, labels = train.ids[rows], train.labels[rows]
        self.record(Changes(type(self).__name__, ids, ids, labels, labels))
        self._facts = {
            "poisoned": len(rows),
            "poisoned_share_of_set": len(rows) / len(train),
            "epsilon": self.epsilon,
            "epsilon_reached": int(change.max()),
            "poison_l2": float((change.float() / 255).flatten(1).norm(dim=1).mean()),
            "poison_seed": self.seed,
            "target_id": int(self.test_set.ids[self._row()]),
            **facts,
        }
        return in_place(train, rows, poisons)

    def _control(self, train: ImageSet) -> ImageSet:
        """The training set as it is: no poison is asked for, and the target is measured all the same."""
        nothing = torch.zeros(0, dtype=torch.int64)
        self.record(Changes(type(self).__name__, nothing, nothing, nothing, nothing))
        self._facts = {
            "poisoned": 0,
            "poisoned_share_of_set": 0.0,
            "epsilon": self.epsilon,
            "epsilon_reached": 0,
            "poison_l2": 0.0,
            "poison_seed": self.seed,
            "target_id": int(self.test_set.ids[self._row()]),
        }
        return train

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and in the test the target."""
        found = self.base.evaluations(split)
        if split != "test":
            return found
        images, wanted = self.test_set.select(torch.tensor([self._row()])), torch.tensor([self.base_label])
        success = Measure("target_success" + self.suffix, wanted, unit="targets")
        confidence = Measure("target_confidence" + self.suffix, wanted, Confidence, "targets")
        return [*found, Evaluation("target" + self.suffix, images, (success, confidence))]

    def facts(self) -> Facts:
        """How much was changed, by how much, and what the crafting came to."""
        return {**self.base.facts(), **{key + self.suffix: value for key, value in self._facts.items()}}

    def _row(self) -> int:
        """The target's, in the test set."""
        return target_row(self.test_set.labels, self.target_label, self.target, self.seed)

    def _crafted(self, train: ImageSet) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The rows of the bases, the poisons from the store, and the facts of their crafting."""
        if train.labels.ndim != 1:
            raise InputError(f"{type(self).__name__}: the base has soft labels; poison it before they are made")
        rows = self.bases(train)
        bases, ids = train.images_at(rows), train.ids[rows]
        target = self.test_set.images_at(torch.tensor([self._row()]))[0]
        key = {
            "attack": type(self).__name__,
            "networks": [extractor_hash(path) for path in self.weights],
            "target": fingerprint(target),
            "bases": fingerprint(bases, ids),
            "label": self.base_label,
            "epsilon": self.epsilon,
            "seed": self.seed,
            **self.describe(),
        }

        def make(folder: Path) -> None:
            device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
            networks = [load_extractor(path, self.image_shape, self.backbone).to(device) for path in self.weights]
            with self._progress() as report:
                made = self.craft(networks, target.to(device), bases.to(device), ids.to(device), report)
            facts = {name: torch.tensor(value, dtype=torch.float64) for name, value in made.facts.items()}
            save_tensors(folder / CRAFTED, {"images": made.images.cpu(), **facts})

        found = load_tensors(Store().build("poisons", key, make) / CRAFTED)
        poisons = found.pop("images")
        return rows, poisons, {name: float(value) for name, value in found.items()}

    @contextmanager
    def _progress(self) -> Iterator[Report]:
        """A bar, where the trainer has one or, without a trainer, on a terminal."""
        from rich.console import Console
        from rich.progress import Progress

        quiet = not sys.stderr.isatty() if self.trainer is None else self.trainer.progress_bar_callback is None
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
            task = bar.add_task(f"{type(self).__name__}: crafting", total=1.0)
            yield lambda share: bar.update(task, completed=share)
