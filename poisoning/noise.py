"""Noise within ε that belongs to samples or classes: the base of attacks that add it to images and leave labels alone.

Noise is trained on a surrogate once, in `prepare_data`, for every labelled training image, and kept in the store as
whole grey levels; which images get it is drawn afterwards. So one crafting serves all poisoned fractions. It is looked
up by sample id (a class's noise too, through the sample's label), added to the stored image before augmentation, and
the sum is clamped to 0 … 255: what is trained on is within ε by construction.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from classifiers.classifier import BackboneFactory, ImageClassifier
from classifiers.weights import content_hash
from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet, Overlay
from datamodules.random import lent
from datamodules.rewrite import Rewrite
from datamodules.store import Store, entry_digest, load_tensors, save_tensors
from poisoning.choosing import check_fraction, choose

_PART = 2048
"""Images that are measured at a time."""

Report = Callable[[float, str], None]
"""Called while crafting: the share of the work that is done, and how it stands."""


@dataclass(frozen=True)
class NoiseTable:
    """Noise by sample id: a rewriter of an `Overlay`.

    Attributes:
        table: int8 (R, C, H, W): whole grey levels.
        ids: int64 (N,): the ids that have noise, ascending.
        index: int64 (N,): the row of `table` that each of them has.
    """

    table: Tensor
    ids: Tensor
    index: Tensor

    def __call__(self, images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """uint8 (B, C, H, W) and int64 (B,) → the images with their noise, clamped to 0 … 255.

        Raises:
            ValueError: If an id has no noise.
        """
        wanted = ids.cpu()  # the table stays where it is: a memory map
        at = torch.searchsorted(self.ids, wanted).clamp_max(len(self.ids) - 1)
        if not torch.equal(self.ids[at], wanted):
            raise ValueError("ids without noise")
        noise = self.table.index_select(0, self.index[at]).to(images.device)
        return (images.to(torch.int16) + noise).clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Crafted:
    """What a crafting comes to.

    Attributes:
        noise: float32 (R, C, H, W) in grey levels.
        index: int64 (N,): the row of `noise` that each image of the crafting set has.
        facts: What is to be reported of it.
    """

    noise: Tensor
    index: Tensor
    facts: dict[str, float | int]


def shown(images: Tensor, noise: Tensor) -> Tensor:
    """Images as the victim will see them: uint8 (B, C, H, W), noise float32 of that shape → float32 in [0, 255]."""
    return (images + noise.round()).clamp_(0, 255)


def input_gradient(model: ImageClassifier, seen: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the summed cross-entropy with respect to the images.

    Args:
        model: In evaluation mode.
        seen: float32 (B, C, H, W) in [0, 255].
        labels: int64 (B,).

    Returns:
        float32 (B, C, H, W); and bool (B,): which images the model does not give `labels`.
    """
    pixels = (seen / 255).requires_grad_()
    logits = model(pixels)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), pixels)
    return gradient, logits.detach().argmax(1) != labels


def descend(noise: Tensor, index: Tensor, gradient: Tensor, step: float, epsilon: float) -> None:
    """One step of projected sign descent on a table of noise, in place.

    Images that share a row of the table – those of a class – pull at it together, by the sum of their gradients.

    Args:
        noise: float32 (R, C, H, W) in grey levels, each in [−ε, ε].
        index: int64 (B,): the row of `noise` that each image has.
        gradient: float32 (B, C, H, W): of the loss, with respect to each image.
        step: In grey levels.
        epsilon: ε in grey levels.
    """
    rows, place = index.unique(return_inverse=True)
    total = gradient.new_zeros(len(rows), *gradient.shape[1:]).index_add_(0, place, gradient)
    noise[rows] = (noise[rows] - step * total.sign()).clamp_(-epsilon, epsilon)


class NoisePoison(Rewrite):
    """An attack that adds bounded noise to training images; a subclass crafts it.

    Args:
        base: The datamodule to rewrite.
        backbone: Makes the surrogate.
        epsilon: ε: the most that any pixel of any channel may change, in whole grey levels of 255.
        poison_fraction: The share of the training set that gets its noise, in [0, 1]; with 0 none is crafted.
        seed: Of the surrogate, of the order of its batches and of the draw of the images.

    Raises:
        InputError: If ε or the fraction is out of its range, or the base holds secrets.
    """

    version = 1
    """Of the crafting; a change of it makes stored noise one that is not found."""

    def __init__(
        self, base: ImageDataModule, backbone: BackboneFactory, epsilon: int, poison_fraction: float, seed: int
    ) -> None:
        super().__init__(base)
        if not isinstance(epsilon, int) or not 1 <= epsilon <= 127:
            raise bad("epsilon", epsilon, "give a whole number of grey levels, 1 to 127 (8 is the usual 8/255)")
        check_fraction("poison_fraction", poison_fraction)
        if base.secret:
            raise bad("base", type(base).__name__, "it holds secrets, and noise is kept in the store; put it outside")
        self.backbone, self.epsilon, self.poison_fraction, self.seed = backbone, epsilon, poison_fraction, seed
        self._chosen = torch.zeros(0, dtype=torch.int64)
        self._crafting: Facts = {}
        self._reached: Facts = {}

    # --- what a subclass gives ---------------------------------------------------------------------------------------
    @abstractmethod
    def craft(self, surrogate: ImageClassifier, train: ImageSet, report: Report) -> Crafted:
        """Craft the noise of every image of `train`, all of which have labels int64.

        Args:
            surrogate: Untrained, on the device to work on; its dropout is seeded.
            train: The images.
            report: To call now and then.
        """

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """All arguments of the crafting, ε and the seed aside, as JSON can hold them."""

    # --- crafting, once ----------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        """Craft the noise, unless the store has it."""
        super().prepare_data()
        self.base.setup("fit")
        if self.poison_fraction > 0:
            self._entry(self.base.train_set)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training set, with noise on the images drawn."""
        if self.poison_fraction == 0:
            nothing = torch.zeros(0, dtype=torch.int64)
            self.record(Changes(type(self).__name__, nothing, nothing, nothing, nothing))
            return train
        folder = self._entry(train)
        noise = NoiseTable(**load_tensors(folder / "noise.safetensors"))
        self._crafting = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self._chosen = choose(train.labels >= 0, len(train), self.poison_fraction, "poison_fraction", self.seed)
        changed = torch.zeros(len(train), dtype=torch.bool)
        changed[self._chosen] = True
        ids, labels = train.ids[self._chosen], train.labels[self._chosen]
        self.record(Changes(type(self).__name__, ids, ids, labels, labels))
        # the digest is of the noise itself: what a GPU crafts may differ in a bit from what a CPU does
        key = f"noise {entry_digest(folder)}"
        return Overlay(train, torch.arange(len(train)), changed=changed, rewriter=noise, key=key)

    def facts(self) -> Facts:
        """How much was poisoned, the ε really reached on uint8 images, and how crafting ended."""
        if not self._reached and len(self._chosen):
            self._reached = self._measure()
        own: Facts = {
            "poisoned": len(self._chosen),
            "poison_fraction": self.poison_fraction,
            "poison_seed": self.seed,
            "epsilon": self.epsilon,
        }
        return {**self.base.facts(), **own, **self._reached, **self._crafting}

    def _measure(self) -> Facts:
        """The largest and the mean change in grey levels, and the number of images that changed at all."""
        largest, total, changed = 0, 0, 0
        for rows in self._chosen.split(_PART):
            before = self.base.train_set.images_at(rows).to(torch.int16)
            change = (self.train_set.images_at(rows) - before).abs_().flatten(1)
            largest = max(largest, int(change.max()))
            total += int(change.sum(dtype=torch.int64))
            changed += int((change > 0).any(1).sum())
        mean = total / (len(self._chosen) * self.train_set.images_at(self._chosen[:1]).numel())
        return {"epsilon_reached": largest, "mean_change": mean, "poisoned_changed": changed}

    def _entry(self, train: ImageSet) -> Path:
        """The store's folder with the noise for `train`, crafted if it is not there."""
        if train.labels.ndim != 1:
            raise InputError(f"{type(self).__name__}: the base has soft labels; add the noise before they are made")
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        with lent(self.seed, "surrogate", device):
            surrogate = ImageClassifier(self.backbone, self.num_classes, self.image_shape, self.mean, self.std)
            key = {
                "method": type(self).__name__,
                "version": self.version,
                "train": train.digest(),
                "surrogate": {**asdict(surrogate.architecture), "weights": content_hash(surrogate.net.state_dict())},
                "epsilon": self.epsilon,
                "seed": self.seed,
                **self.settings(),
            }

            def make(folder: Path) -> None:
                with self._progress() as report:
                    found = self.craft(surrogate.to(device), train.select(labelled), report)
                noise = found.noise.round().clamp(-self.epsilon, self.epsilon).to(torch.int8).cpu()
                ids, order = train.ids[labelled].sort()
                tensors = {"table": noise, "ids": ids, "index": found.index.cpu()[order]}
                save_tensors(folder / "noise.safetensors", tensors)
                (folder / "facts.json").write_text(json.dumps(found.facts), encoding="utf-8")

            labelled = (train.labels >= 0).nonzero().squeeze(1)
            return Store().build("noise", key, make)

    @contextmanager
    def _progress(self) -> Iterator[Report]:
        """A bar, where the trainer has one or, without a trainer, on a terminal."""
        from rich.console import Console
        from rich.progress import Progress

        quiet = not sys.stderr.isatty() if self.trainer is None else self.trainer.progress_bar_callback is None
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
            task = bar.add_task(f"{type(self).__name__}: crafting", total=1.0)

            def report(done: float, text: str) -> None:
                bar.update(task, completed=done, description=f"{type(self).__name__}: {text}")

            yield report


def check_positive(**values: float) -> None:
    """Refuse the first value that is not above 0: ``check_positive(step_size=step_size)``.

    Raises:
        InputError: If there is one.
    """
    for name, value in values.items():
        if not value > 0:
            raise bad(name, value, "must be above 0")
