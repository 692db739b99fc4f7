"""What an attack or a defence achieved is accuracy against some labels on some images.

An `Evaluation` is a set of images that one forward pass goes over; its `Measure`s say what counts as a hit on them. One
rule in the model evaluates them all. A measure may be any torchmetric; the default counts hits and their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.errors import InputError
from datamodules.imageset import PADDING, Batch, ImageSet

TEST_IMAGES = "test images"
"""What an interval's cases are unless it says otherwise."""

SAME_TARGETS = "targets, the same for all seeds"
"""Cases that are a choice of test images which no seed changes."""

SAME = (TEST_IMAGES, "candidates", SAME_TARGETS)
"""Cases that are the same whatever the seed: those of several runs cannot be counted together."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval.

    Attributes:
        value: The share, or the mean.
        n: Cases (or runs) behind it.
        low: The interval's lower end.
        high: Its upper end.
        unit: What the cases are; those that are not in `SAME`, such as targets, are drawn anew by each seed.
    """

    value: float
    n: int
    low: float
    high: float
    unit: str = TEST_IMAGES


def wilson(hits: float, n: float, z: float = 1.959963984540054, unit: str = TEST_IMAGES) -> Interval:
    """The share `hits` / `n` with Wilson's score interval (1927): it stays inside [0, 1] and is not empty at 0 or 1.

    The cases are taken to be independent; for those that share a victim or a target there is `clustered`.

    Args:
        hits: Successes, 0 ≤ hits ≤ n.
        n: Cases. With none, value and bounds are NaN.
        z: The normal quantile; the default is the one for 95 %.
        unit: What the cases are.
    """
    if n == 0:
        return Interval(math.nan, 0, math.nan, math.nan, unit)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, round(n), min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), unit)


def clustered(hits: Sequence[float], cases: Sequence[float], unit: str = TEST_IMAGES) -> Interval:
    """A share of cases that are alike within clusters: targets of one victim, poisons of one target.

    Wilson's interval with as many cases as they are worth: their number divided by the design effect – how much more
    clusters differ than independent cases would, at least 1 – and Student's quantile for the number of clusters (Korn
    and Graubard 1998). Where all or none hit, nothing tells how alike the cases of a cluster are, and each cluster
    counts as one case. One cluster alone of several cases says nothing of others: its interval is [0, 1]. Where each
    cluster has one case this is `wilson`.

    Args:
        hits: Of each cluster.
        cases: Of each cluster; one without cases is left out.
        unit: What the cases are.
    """
    pairs = [(hit, case) for hit, case in zip(hits, cases, strict=True) if case]
    found, n, clusters = math.fsum(h for h, _ in pairs), math.fsum(c for _, c in pairs), len(pairs)
    if n == clusters:  # or none at all
        return wilson(found, n, unit=unit)
    p = found / n
    if clusters == 1:
        return Interval(p, round(n), 0.0, 1.0, unit)
    if not 0 < p < 1:
        return replace(wilson(p * clusters, clusters, unit=unit), n=round(n))
    from scipy.stats import t

    apart = clusters / (clusters - 1) * math.fsum((h - p * c) ** 2 for h, c in pairs)
    worth = n / max(1.0, apart / (n * p * (1 - p)))
    return replace(wilson(p * worth, worth, float(t.ppf(0.975, clusters - 1)), unit), value=p, n=round(n))


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of repeated runs with Student's t interval (95 %); one run alone has no interval (infinite)."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, 0, math.nan, math.nan)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, 1, -math.inf, math.inf)
    from scipy.stats import t

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, n, mean - half, mean + half)


class NoAnswerError(InputError):
    """A network answered with what is no number, so that it says nothing of any image."""


def answered(scores: Tensor, who: str = "the model") -> Tensor:
    """Scores or logits (…, K) of a network that was asked, as they came.

    The arg max of NaN is class 0 and the arg max of infinities any class: either would count as an answer.

    Args:
        scores: What it said.
        who: What the network is called where it is refused.

    Raises:
        NoAnswerError: If one of them is NaN or infinite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise NoAnswerError(
            f"{who}: its answers are NaN or infinite, and mean nothing: the training that made its weights failed "
            "(lower the learning rate), or they were damaged, or they overflow in this precision"
        )
    return scores


class Hits(Metric):
    """Counts rows whose arg max equals the target; targets below zero are left out, and NaN and infinity hit nothing.

    `compute` gives int64 (2,): hits and cases, exact and summed over all ranks.
    """

    hits: Tensor
    cases: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: logits (B, K), target int64 (B,)."""
        counted = target >= 0
        self.hits += ((logits.argmax(1) == target) & counted & logits.isfinite().all(1)).sum()
        self.cases += counted.sum()

    def compute(self) -> Tensor:
        """Hits and cases so far."""
        return torch.stack([self.hits, self.cases])


class Range(Metric):
    """The lowest and the highest of some classes: where they are the same, it is one class all through.

    `compute` gives int64 (2,), over all ranks; the lowest is above the highest where there was none.
    """

    lowest: Tensor
    highest: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("lowest", torch.tensor(torch.iinfo(torch.int64).max), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-1), dist_reduce_fx="max")

    def update(self, classes: Tensor, real: Tensor) -> None:
        """See a batch: int64 (B,), and bool (B,): which of the rows count."""
        if len(classes):
            self.lowest = torch.minimum(self.lowest, classes.masked_fill(~real, torch.iinfo(torch.int64).max).min())
            self.highest = torch.maximum(self.highest, classes.masked_fill(~real, -1).max())

    def compute(self) -> Tensor:
        """The lowest and the highest class so far."""
        return torch.stack([self.lowest, self.highest])


@dataclass(frozen=True)
class Measure:
    """One number to measure on an evaluation's images.

    Attributes:
        name: As it appears in logs and in metrics.json, such as ``attack_success_rate``.
        target: int64 (N,): the label that counts as a hit on each row, `UNLABELLED` to leave the row out; or float32
            (N, K) for a metric that compares scores.
        metric: Makes the torchmetric; it is updated with (logits, target). None: the share of hits.
        unit: What the rows are, see `Interval`.
    """

    name: str
    target: Tensor
    metric: Callable[[], Metric] | None = None
    unit: str = TEST_IMAGES

    def make(self) -> Metric:
        """A fresh metric object."""
        return Hits() if self.metric is None else self.metric()


@dataclass(frozen=True)
class Evaluation:
    """A set of images, gone over once, with all that is measured on it.

    Attributes:
        name: ``clean``, ``triggered``, ``holdout`` …
        images: The set.
        measures: Each with as many targets as there are images.
    """

    name: str
    images: ImageSet
    measures: tuple[Measure, ...]

    def __post_init__(self) -> None:
        for measure in self.measures:
            if len(measure.target) != len(self.images):
                raise InputError(
                    f"measure {measure.name!r}: {len(measure.target)} targets for {len(self.images)} images"
                )


class Numbered(ImageSet):
    """An evaluation's images as a loader wants them: a row of −1 is padding, and labels are row numbers."""

    def __init__(self, images: ImageSet) -> None:
        self.inner = images
        self.labels = images.labels
        self.ids = images.ids

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.inner.image_shape

    def __getitems__(self, rows: Sequence[int] | Tensor) -> Batch:
        """A batch whose labels are row numbers, and whose padding rows show row 0 under the id and label −1."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        seen = index.clamp_min(0)
        ids = self.ids.index_select(0, seen).masked_fill_(index < 0, PADDING)
        return Batch(self.inner.images_at(seen), index, ids)

    def images_at(self, rows: Tensor) -> Tensor:
        """The images of some rows."""
        return self.inner.images_at(rows)

    def extras_at(self, rows: Tensor) -> dict[str, Tensor]:
        """The extras of some rows."""
        return self.inner.extras_at(rows)

    def to(self, device: torch.device | str) -> Numbered:
        """The same on `device`."""
        return Numbered(self.inner.to(device))

    def digest(self) -> str:
        """That of the images."""
        return self.inner.digest()
