"""Poison Frogs: a clean-label poison that collides with one target image in feature space.

Paper: Shafahi, Huang, Najibi, Suciu, Studer, Dumitras & Goldstein, "Poison Frogs! Targeted Clean-Label Poisoning
Attacks on Neural Networks", NeurIPS 2018, arXiv 1804.00792.

Threat model: the attacker knows the feature extractor and its weights. He adds a few images to the training set, each
with the label that its looks deserve, and controls neither labelling nor training. He wants one image that he cannot
change, the target, to get the label of the poisons; any other image is to be classified as before.

A poison is p = argmin ‖f(x) − f(t)‖² + β‖x − b‖² for the target t and a base b of the other class, which
`poisoning.collision` finds. As in the paper, target and bases are images of the test set; they stay in it and count in
the clean accuracy.

Deviations from the paper and from the authors' code (github.com/ashafahi/inceptionv3-transferLearn-poison):

* Pixels are in [0, 1], at the size that the data have, and β belongs to that scale. The paper names none; the code has
  0 … 255 and takes distances that are not squared, where the same β means something else.
* The published backward step is the proximal operator of β/2 · ‖x − b‖², not of β‖x − b‖². We keep the step; what is
  checked, and called the objective here, is what these steps minimise: ‖f(x) − f(t)‖² + β/2 · ‖x − b‖².
* By default poisons are crafted by Adam, not by the published step, which on features of a network that was really
  trained stops three quarters of the way from the target; ``rule: forward_backward`` is the published one. How each
  rule works, and where ours deviate, is told in `poisoning.descent`.
* Bases are drawn at random, or are the nearest ones in feature space, which is what the code falls back on; it tries
  bases of its authors' choice first.
* An optional bound ε on each pixel is not in the paper. It is a ball round the base *as blended* with the target, so
  that it does not undo the blend.
* Poisons are rounded to whole grey levels, as an image file holds them, and all distances are measured after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from classifiers.classifier import BackboneFactory, ImageClassifier
from classifiers.folding import folded_classifier
from classifiers.weights import find_weights
from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import ImageSet, Overlay, fingerprint
from datamodules.measures import Evaluation, Measure
from datamodules.random import generator
from datamodules.rewrite import Rewrite
from datamodules.store import Store, load_tensors, save_tensors
from poisoning.choosing import check_label
from poisoning.collision import CRAFTING, blend, check_numbers, collide, default_beta
from poisoning.descent import RuleName
from poisoning.extractor import extractor_hash, feature_size, features_in_parts, load_extractor, make_extractor
from poisoning.targets import check_epsilon

_FILE = "poisons.safetensors"


class Confidence(Metric):
    """The mean probability (softmax) of the wanted class."""

    total: Tensor
    cases: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K), target int64 (B,)."""
        self.total += logits.softmax(1).gather(1, target[:, None]).sum()
        self.cases += len(target)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.cases


class FeatureCollision(Rewrite):
    """Poison Frogs: clean-label poisons that have one target image misclassified (Shafahi et al. 2018).

    Measures in the test, beside the base's: `target_success` – whether the target gets the label of the poisons, an
    image of one – and `target_confidence`, the probability that the model gives that label there.

    Args:
        base: The clean datamodule, or any other rewrite.
        weights: The extractor's weights: a file, or the folder of its runs, such as ``runs/extractor_mnist``. None:
            those that `backbone` comes with.
        target_label: The true class of the target.
        base_label: The class of the bases and of the poisons, which the target is to get.
        target_index: Which test image of that class is the target, from 0; None: one is drawn by `seed`. Images with an
            exact duplicate in the training set are neither counted nor used, as bases either.
        poisons: How many, each from a base of its own; 0 is a control without poison.
        choose: ``random`` bases, drawn by `seed`, or the ``nearest`` ones to the target in feature space.
        beta: β, for pixels in [0, 1]; None: `default_beta`.
        iterations: The most evaluations of each poison.
        rule: How poisons are crafted, see `poisoning.descent`; ``forward_backward`` is the published way.
        step: The first step, in the units of the rule; None: its own.
        tolerance: See `collide`.
        opacity: Of the target, blended into the bases before crafting, in [0, 1); the paper's end-to-end attack has 0.2
            and 0.3.
        epsilon: ε: the most that any value may differ from the blended base, in whole grey levels of 255; None, as in
            the paper: there is no bound.
        seed: Of the draw of target and bases.
        backbone: What makes the extractor's network, if it has weights of its own (``InceptionV3``, pretrained) or is a
            class from outside this project; else the weights file tells.
        name: Appended to the measures' and facts' names, for two targets in one set.

    Raises:
        InputError: If a label is not a class, both are the same, a number is out of its range, there are no weights, or
            they do not fit the images.
    """

    def __init__(
        self,
        base: ImageDataModule,
        weights: str | None,
        target_label: int,
        base_label: int,
        target_index: int | None = None,
        poisons: int = 1,
        choose: Literal["random", "nearest"] = "random",
        beta: float | None = None,
        iterations: int = 1000,
        rule: RuleName = "adam",
        step: float | None = None,
        tolerance: float = 1e-3,
        opacity: float = 0.0,
        epsilon: int | None = None,
        seed: int = 0,
        backbone: BackboneFactory | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(base)
        check_label("target_label", target_label, base.num_classes)
        check_label("base_label", base_label, base.num_classes)
        if base_label == target_label:
            raise bad("base_label", base_label, "it is the target_label; choose another class")
        if base.secret:
            raise bad(
                "base", type(base).__name__, "it holds secrets, and poisons are kept in the store; put it outside"
            )
        if poisons < 0:
            raise bad("poisons", poisons, "it must be 1 or more, or 0 for a run without poison")
        if choose not in ("random", "nearest"):
            raise bad("choose", choose, "choose random or nearest (bases)")
        if beta is not None and not 0 <= beta < float("inf"):
            raise bad("beta", beta, "it must be 0 or more, or null for 0.25 · width² / values²")
        if not 0 <= opacity < 1:
            raise bad("opacity", opacity, "the target's share in the base must be in [0, 1)")
        if epsilon is not None:
            check_epsilon(epsilon)
        check_numbers(iterations=iterations, tolerance=tolerance, step=step, rule=rule)
        if weights is None and backbone is None:
            raise bad("weights", weights, "name the extractor's file, or a backbone that has weights of its own")
        self.weights = None if weights is None else find_weights(weights)
        self.target_label, self.base_label, self.target_index = target_label, base_label, target_index
        self.poisons, self.choose, self.opacity = poisons, choose, opacity
        self.beta, self.iterations, self.tolerance, self.epsilon = beta, iterations, tolerance, epsilon
        self.rule, self.step = rule, step
        self.seed = seed
        self.backbone = backbone
        self.suffix = f"_{name}" if name else ""
        self._crafted: _Crafted | None = None

    def prepare_data(self) -> None:
        """Prepare the base, and craft the poisons unless the store has them."""
        super().prepare_data()
        self.base.setup("fit")
        self._craft(self.base.train_set)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """The training set with the poisons added to it."""
        crafted = self._crafted = self._craft(train)
        n, m = len(train), len(crafted.rows)
        if not m:
            nothing = torch.zeros(0, dtype=torch.int64)
            self.record(Changes("FeatureCollision", nothing, nothing, nothing, nothing))
            return train
        ids = self.fresh_ids(m)
        labels = torch.full((m,), self.base_label)
        self.record(Changes("FeatureCollision", ids, self.test_set.ids[crafted.rows], labels, labels))
        poisons, first = crafted.images, int(ids[0])

        def show(images: Tensor, ids_shown: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
            return poisons.to(images.device).index_select(0, ids_shown - first)

        return Overlay(
            train,
            torch.cat([torch.arange(n), torch.zeros(m, dtype=torch.int64)]),  # an added row needs one to hide
            labels=torch.cat([train.labels, labels]),
            ids=torch.cat([train.ids, ids]),
            changed=torch.arange(n + m) >= n,
            rewriter=show,
            key=fingerprint(poisons),
        )

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and in the test the target."""
        found = self.base.evaluations(split)
        if split != "test" or self._crafted is None:
            return found
        images = self.test_set.select(torch.tensor([self._crafted.target]))
        wanted = torch.tensor([self.base_label])
        success = Measure("target_success" + self.suffix, wanted, unit="targets")
        confidence = Measure("target_confidence" + self.suffix, wanted, Confidence, "targets")
        return [*found, Evaluation("target" + self.suffix, images, (success, confidence))]

    def facts(self) -> Facts:
        """What was crafted from what, and how near it came: pixels in [0, 1], against the bases as they were.

        Means over the poisons, but for `epsilon_reached`, in grey levels, and `iterations`, which are the largest.
        """
        found: Facts = {"poisoned": self.poisons, "poison_seed": self.seed, "opacity": self.opacity}
        if self._crafted is not None:
            found |= {
                "target_id": int(self.test_set.ids[self._crafted.target]),
                "base_ids": self.test_set.ids[self._crafted.rows].tolist(),
                "poisoned_share_of_set": self.poisons / len(self.train_set),
                **self._crafted.facts,
            }
        return {**self.base.facts(), **{key + self.suffix: value for key, value in found.items()}}

    def _craft(self, train: ImageSet) -> _Crafted:
        """The poisons, from the store if it has them."""
        test = self.test_set
        if train.labels.ndim != 1 or test.labels.ndim != 1:
            raise InputError("FeatureCollision: the base has soft labels; poison it before they are made")
        targets, bases = (
            self._eligible(train, label, field)
            for label, field in ((self.target_label, "target_label"), (self.base_label, "base_label"))
        )
        at = self.target_index
        if at is None:
            at = int(torch.randint(len(targets), (), generator=generator(self.seed, "feature-collision target")))
        if not 0 <= at < len(targets):
            raise bad("target_index", at, f"there are {len(targets)} such test images, counted from 0")
        if self.poisons > len(bases):
            raise bad("poisons", self.poisons, f"there are {len(bases)} test images to make them from")
        if not self.poisons:
            return _Crafted(test.images_at(bases[:0]), bases[:0], int(targets[at]), {"epsilon_reached": 0})
        target, candidates = test.images_at(targets[at : at + 1]), test.images_at(bases)
        extractor = extractor_hash(self._extractor() if self.weights is None else self.weights)
        key = {
            "crafting": CRAFTING,
            "extractor": extractor,
            "target": fingerprint(target),
            "candidates": fingerprint(candidates),
            "choose": self.choose,
            "seed": self.seed if self.choose == "random" else None,
            "poisons": self.poisons,
            "beta": self.beta,
            "iterations": self.iterations,
            "rule": self.rule,
            "step": self.step,
            "tolerance": self.tolerance,
            "opacity": self.opacity,
            "epsilon": self.epsilon,
        }

        def make(folder: Path) -> None:
            save_tensors(folder / _FILE, self._make(target, candidates))

        found = load_tensors(Store().build("feature-collision", key, make) / _FILE)
        images, chosen = found.pop("images"), bases[found.pop("chosen")]
        change = (images.to(torch.int16) - test.images_at(chosen).to(torch.int16)).abs()
        facts: Facts = {
            "extractor": extractor,
            "beta": float(found["beta"]),
            "feature_distance": float(found["feature_distance"].mean()),
            "feature_distance_of_base": float(found["feature_distance_of_base"].mean()),
            "poison_l2": float((change.float() / 255).flatten(1).norm(dim=1).mean()),
            "epsilon_reached": int(change.max()),
            "iterations": int(found["iterations"].max()),
        }
        return _Crafted(images, chosen, int(targets[at]), facts)

    def _eligible(self, train: ImageSet, label: int, field: str) -> Tensor:
        """The rows of the test set that have a label and no duplicate in the training set."""
        rows = (self.test_set.labels == label).nonzero().squeeze(1)
        rows = rows[unseen(self.test_set.images_at(rows), train)]
        if not len(rows):
            raise bad(field, label, "no test image of that class is without a duplicate in the training set")
        return rows

    def _extractor(self) -> ImageClassifier:
        if self.weights is not None:
            return load_extractor(self.weights, self.image_shape, self.backbone)
        assert self.backbone is not None  # as the constructor saw to it
        return make_extractor(self.backbone, self.base)

    def _make(self, target: Tensor, candidates: Tensor) -> dict[str, Tensor]:
        """Choose the bases and craft; what the store keeps."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        extractor = folded_classifier(self._extractor().to(device))
        aim = target.to(device).float() / 255
        if self.choose == "nearest":
            apart = (
                (features_in_parts(extractor.features, candidates.to(device)) - extractor.features(aim)).square().sum(1)
            )
            order = apart.argsort(stable=True).cpu()
        else:
            order = torch.randperm(len(candidates), generator=generator(self.seed, "feature-collision bases"))
        chosen = order[: self.poisons]
        bases = candidates[chosen].to(device).float() / 255
        targets = aim.expand_as(bases)
        beta = default_beta(feature_size(extractor), aim.numel()) if self.beta is None else self.beta
        found = collide(
            extractor.features,
            targets,
            blend(bases, targets, self.opacity),
            beta=beta,
            iterations=self.iterations,
            rule=self.rule,
            step=self.step,
            tolerance=self.tolerance,
            epsilon=None if self.epsilon is None else self.epsilon / 255,
        )
        before = features_in_parts(extractor.features, bases) - extractor.features(aim)
        return {
            "images": found.images,
            "chosen": chosen,
            "beta": torch.tensor(beta, dtype=torch.float64),
            "feature_distance": found.feature_distance,
            "feature_distance_of_base": before.norm(dim=1),
            "iterations": found.iterations,
        }


class _Crafted(NamedTuple):
    images: Tensor  # uint8 (P, C, H, W)
    rows: Tensor  # of the bases in the test set
    target: int  # its row there
    facts: Facts


def unseen(images: Tensor, train: ImageSet) -> Tensor:
    """Which images have no exact duplicate in the training set: bool (N,).

    Args:
        images: uint8 (N, C, H, W).
        train: The training set; it is gone through a part at a time.
    """
    rows: dict[bytes, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.numpy().tobytes(), []).append(row)
    found = torch.ones(len(images), dtype=torch.bool)
    for part in torch.arange(len(train)).split(1024):
        for image in train.images_at(part):
            found[rows.get(image.numpy().tobytes(), [])] = False
    return found
