"""Poison Frogs' one-shot kill: one poison for each target, a last layer trained anew for each poison, and its effect.

Paper: Shafahi, Huang, Najibi, Suciu, Studer, Dumitras & Goldstein, "Poison Frogs! Targeted Clean-Label Poisoning
Attacks on Neural Networks", NeurIPS 2018, arXiv 1804.00792, section 3.1.

Threat model: the attacker knows the frozen extractor, not the victim's training data, and adds one image to them, with
the label of its base. Target and base are both test images. The victim trains a last layer from a cold start.

Deviations: the base is the test image of another class that is nearest in feature space, which the authors' code falls
back on after up to ten others, or is drawn by seed. All victims begin at one initialisation and see one shuffled order,
which the victim without a poison shares: a seed stands for these, and trials differ in the poison alone. Clean accuracy
leaves the trial's own target out: what becomes of it is what success counts.

Here are the pure functions: tensors in, tensors out. What is trained together is in `classifiers.last_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from classifiers.last_layers import LastLayers, scores, train_last_layers
from datamodules.errors import InputError, bad
from datamodules.measures import TEST_IMAGES, Interval, wilson
from datamodules.random import draw

CHOICES = ("nearest", "random")
"""How a target's base is chosen."""


class Pairs(NamedTuple):
    """T trials: rows of the test set, int64 (T,) each; a target and its base differ in label."""

    targets: Tensor
    bases: Tensor


class Task(NamedTuple):
    """What all trials share: features in the frozen extractor, real (N, F), and labels int64 (N,) in 0 … K − 1."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Outcome(NamedTuple):
    """What T poisons did.

    Attributes:
        success: bool (T,): the victim gives the target the base's class.
        right_before: bool (T,): without the poison the target gets its own class.
        wrong_before: Real (T,): the probability of the base's class for the target, without the poison.
        wrong_after: The same with it.
        accuracy_before: Real (T,): on the test images other than the target, without the poison.
        accuracy_after: The same with it.
        right_clean: bool (N,): which test images are right without a poison.
        drop_of_image: float64 (N,): how much of its being right each test image loses in the mean over the trials whose
            target it is not, weighted so that the mean over images is the mean over trials of the drop in accuracy.
        turned: Real (T,): by how many degrees the poison turned the boundary between the target's and the base's class.
        layers: The victims' T last layers.
    """

    success: Tensor
    right_before: Tensor
    wrong_before: Tensor
    wrong_after: Tensor
    accuracy_before: Tensor
    accuracy_after: Tensor
    right_clean: Tensor
    drop_of_image: Tensor
    turned: Tensor
    layers: LastLayers


class Recipe(NamedTuple):
    """How a victim trains its last layer: the paper's by default. `seed` is that of initialisation and shuffling."""

    epochs: int = 100
    batch_size: int | None = 32
    learning_rate: float = 0.01
    seed: int = 0


# --- who is attacked -------------------------------------------------------------------------------------------------
def pair_up(
    features: Tensor, labels: Tensor, eligible: Tensor, ids: Tensor, choose: str = "nearest", seed: int = 0
) -> Pairs:
    """Every eligible image as a target, each with a base: an eligible image of another class.

    Args:
        features: Of the test images: real (N, F).
        labels: int64 (N,).
        eligible: bool (N,): those without a duplicate in the training set, see `poisoning.feature_collision.unseen`.
        ids: int64 (N,): a random base depends on the target's id.
        choose: ``nearest`` base to the target in feature space, or ``random``, each as likely as any other.
        seed: Of the draw.

    Raises:
        InputError: If `choose` is neither, or all eligible images have one label.
    """
    if choose not in CHOICES:
        raise bad("choose", choose, f"choose {' or '.join(CHOICES)} (bases)")
    targets = eligible.nonzero().squeeze(1)
    present = labels[targets].unique().tolist()
    if len(present) < 2:
        raise bad("classes", present, "targets and bases are of two classes or more")
    bases = torch.empty_like(targets)
    for label in present:
        here = (labels[targets] == label).nonzero().squeeze(1)
        others = targets[labels[targets] != label]
        if choose == "nearest":
            chosen = torch.cdist(features[targets[here]].double(), features[others].double()).argmin(1)
        else:
            chosen = draw(seed, "base", 0, ids[targets[here]])[:, 0] % len(others)
        bases[here] = others[chosen]
    return Pairs(targets, bases)


# --- what becomes of them --------------------------------------------------------------------------------------------
def clean_layer(task: Task, num_classes: int, recipe: Recipe) -> LastLayers:
    """The last layer of a victim without a poison."""
    nothing = task.train.new_empty(1, 0, task.train.shape[1])
    nobody = task.train_labels.new_empty(1, 0)
    return train_last_layers(task.train, task.train_labels, nothing, nobody, num_classes, *recipe)


def run_trials(
    task: Task,
    pairs: Pairs,
    poisons: Tensor,
    clean: LastLayers,
    recipe: Recipe,
    progress: Callable[[int], object] | None = None,
) -> Outcome:
    """Add each trial's poison under its base's label, train its victim, and see what became of the target.

    Args:
        task: What is shared.
        pairs: T trials.
        poisons: Features of the poisons: real (T, F).
        clean: The last layer without a poison (T = 1), by the same recipe.
        recipe: How victims train.
        progress: See `train_last_layers`.

    Raises:
        InputError: If the features are the same for every image: every last layer answers one class for all of them.
    """
    if len(task.test) > 1 and bool((task.test == task.test[:1]).all()):
        raise InputError("extractor: its features are the same for every image, and tell nothing apart; train it anew")
    own, goal = task.test_labels[pairs.targets], task.test_labels[pairs.bases]
    layers = train_last_layers(
        task.train,
        task.train_labels,
        poisons[:, None],
        goal[:, None],
        clean.biases.shape[1],
        *recipe,
        progress=progress,
    )
    targets = task.test[pairs.targets]
    before = scores(clean, targets)[0].softmax(1)
    after = scores(layers, targets[:, None])[:, 0].softmax(1)
    rows = torch.arange(len(goal), device=goal.device)
    right_before, right_after = (right_answers(each, task) for each in (clean, layers))
    return Outcome(
        success=after.argmax(1) == goal,
        right_before=before.argmax(1) == own,
        wrong_before=before[rows, goal],
        wrong_after=after[rows, goal],
        accuracy_before=accuracy_without(right_before, pairs.targets),
        accuracy_after=accuracy_without(right_after, pairs.targets),
        right_clean=right_before[0],
        drop_of_image=drops(right_before[0], right_after, pairs.targets),
        turned=angle(normal(clean, own, goal), normal(layers, own, goal)),
        layers=layers,
    )


def right_answers(layers: LastLayers, task: Task) -> Tensor:
    """Which test images each layer gets right: bool (T, N)."""
    found = []
    for weights, biases in zip(layers.weights.split(64), layers.biases.split(64), strict=True):
        found.append(scores(LastLayers(weights, biases), task.test).argmax(2) == task.test_labels)
    return torch.cat(found)


def accuracy_without(right: Tensor, targets: Tensor) -> Tensor:
    """Accuracy on the test images other than each trial's target: float64 (T,).

    Args:
        right: bool (T, N), or (1, N) where one layer serves all trials.
        targets: Rows of the test set: int64 (T,).
    """
    right = right.expand(len(targets), -1)
    hits = right.sum(1) - right.gather(1, targets[:, None])[:, 0].long()
    return hits.double() / (right.shape[1] - 1)


def drops(before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    """How much each test image loses, see `Outcome.drop_of_image`: float64 (N,).

    Args:
        before: bool (N,): right without a poison.
        after: bool (T, N): right with each trial's.
        targets: Rows of the test set: int64 (T,). A trial's own target does not count in it.
    """
    trials, images = after.shape
    lost = trials * before.double() - after.sum(0)
    own = before[targets].double() - after.gather(1, targets[:, None])[:, 0].double()
    lost = lost.index_add(0, targets, -own)
    return lost * images / (trials * (images - 1))


# --- how the boundary moved ------------------------------------------------------------------------------------------
def normal(layers: LastLayers, own: Tensor, goal: Tensor) -> Tensor:
    """The normal of the boundary between two classes, towards `goal`: real (T, F); one layer may serve all trials."""
    rows = torch.arange(len(own), device=own.device) if len(layers.weights) > 1 else torch.zeros_like(own)
    return layers.weights[rows, goal] - layers.weights[rows, own]


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Degrees between vectors, row by row: real (T, F) twice → float64 (T,) in [0, 180]."""
    a, b = (torch.nn.functional.normalize(part.double(), dim=1) for part in (one, other))
    # not by acos, which loses half its digits where the two are nearly parallel
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)))


class Plane(NamedTuple):
    """The plane through the centroids of two classes and one more point.

    Attributes:
        centre: Half-way between the centroids: real (F,).
        along: Unit vector from the first centroid to the second: (F,).
        across: Unit vector orthogonal to it, towards the point: (F,).
    """

    centre: Tensor
    along: Tensor
    across: Tensor

    def project(self, features: Tensor) -> Tensor:
        """Coordinates in the plane of the nearest points there: (N, F) → (N, 2), along and across."""
        moved = features - self.centre
        return torch.stack([moved @ self.along, moved @ self.across], -1)

    def boundary(self, layers: LastLayers, own: int, goal: int) -> tuple[float, float, float]:
        """Where a layer (T = 1) is undecided, in the plane: (a, b, c) of a · along + b · across + c = 0."""
        vector = layers.weights[0, goal] - layers.weights[0, own]
        offset = layers.biases[0, goal] - layers.biases[0, own]
        return float(vector @ self.along), float(vector @ self.across), float(vector @ self.centre + offset)


def plane(first: Tensor, second: Tensor, point: Tensor) -> Plane:
    """The plane of Fig. 6b: through the centroids of two classes and a target.

    The paper names the line between the centroids and an orthogonal axis. Ours is the one that has the target in the
    plane: it is seen on the side of each boundary where it really is, while other points are projected.

    Args:
        first: Features of a class: real (N, F).
        second: Of the other: real (M, F).
        point: Features of the target: real (F,).
    """
    start, end = first.mean(0), second.mean(0)
    along = torch.nn.functional.normalize(end - start, dim=0)
    centre = (start + end) / 2
    off = point - centre
    return Plane(centre, along, torch.nn.functional.normalize(off - (off @ along) * along, dim=0))


# --- in numbers ------------------------------------------------------------------------------------------------------
def share(hits: Tensor, unit: str = TEST_IMAGES) -> Interval:
    """The share of true values, with Wilson's interval: bool (N,); `unit` is what they are, see `Interval`."""
    return wilson(int(hits.sum()), len(hits), unit=unit)


def paired_drop(losses: Tensor) -> Interval:
    """The mean of what each test image loses, in percentage points, with its 95 % interval over the images.

    Agresti and Min's interval for paired proportions (2005): two images more are counted, of which one loses and one
    gains half; so it is not empty where no image changed. It covers other test images. It does not cover other training
    images, initialisations or choices of poisons: all trials share them, so that their number narrows nothing.

    Args:
        losses: float64 (N,), each in [−1, 1]: see `Outcome.drop_of_image`.
    """
    n = len(losses) + 2
    middle = float(losses.sum()) / n
    spread = (float(losses.square().sum()) + 1) / n - middle**2
    half = 1.959963984540054 * (spread / n) ** 0.5
    value = float(losses.mean())
    return Interval(100 * value, len(losses), 100 * min(value, middle - half), 100 * max(value, middle + half))


def summary(outcome: Outcome, unit: str = "targets") -> dict[str, Interval | float]:
    """What T trials come to.

    Args:
        outcome: Of the trials.
        unit: What the targets are, see `Interval`.

    Returns:
        ``target_success``: the share of targets that got the base's class. ``target_success_if_right``: the same among
        targets that the victim without a poison gets right. ``target_wrong_before``: the share that it gets wrong.
        Their intervals are Wilson's for the number of targets, and cover other targets: extractor, training images and
        initialisation are the same in all trials.
        ``confidence_before`` and ``confidence_after``: medians of the probability of the base's class.
        ``clean_accuracy_before``: of the one victim without a poison, on all test images, with Wilson's interval.
        ``clean_accuracy``: the mean over the victims, each on the test images that are not its target; no interval, for
        they are nearly copies of the former. What a poison costs is ``clean_drop``: the mean of the paired differences
        in percentage points, see `paired_drop`; and ``worst_clean_drop``, the largest of T, an extreme that has none.
        ``angle``: the median number of degrees by which the boundary turned.
    """
    drop = 100 * (outcome.accuracy_before - outcome.accuracy_after)
    return {
        "target_success": share(outcome.success, unit),
        "target_success_if_right": share(outcome.success[outcome.right_before], unit),
        "target_wrong_before": share(~outcome.right_before, unit),
        "confidence_before": float(outcome.wrong_before.median()),
        "confidence_after": float(outcome.wrong_after.median()),
        "clean_accuracy_before": share(outcome.right_clean),
        "clean_accuracy": float(outcome.accuracy_after.mean()),
        "clean_drop": paired_drop(outcome.drop_of_image),
        "worst_clean_drop": float(drop.max()),
        "angle": float(outcome.turned.median()),
    }
