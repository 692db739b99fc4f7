"""PRADA: a client's queries look like an attack if their distances from each other are not normally distributed.

Paper: Juuti, Szyller, Marchal & Asokan, "PRADA: Protecting Against DNN Model Stealing Attacks", EuroS&P 2019, arXiv
1805.02628, algorithm 3. Natural images of one class lie at distances that are about normal; images that were made from
each other by steps of one length do not.

Deviations: a client that was flagged stays flagged. The published rule judges all queries so far at each new one, and
may take its verdict back after the attack has gone on. Here each of the first 1,000 distances is followed by a verdict,
and then one is made each time that their number has grown by 1 %: a flag comes at most so much later, and a long stream
costs hundreds of tests, not one for each query.

What is kept of a client: the images that the rule keeps, a byte for each value, and 8 bytes for each query.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from datamodules.errors import bad
from extraction.defences.detector import Detector

_EVERY = 1000
"""After so many distances, a verdict no longer follows each."""

_GROWTH = 0.01
"""By which share they grow between verdicts from then on."""

_PART = 512
"""Queries that are compared with those kept in one go."""


class PRADA(Detector):
    """The detector of one client; each client has its own.

    Args:
        delta: δ: Shapiro and Wilk's W below which a client is flagged, in (0, 1).
        least: So many distances are needed for a verdict.

    Raises:
        InputError: If a number is out of its range.
    """

    version = 2

    def __init__(self, delta: float = 0.9, least: int = 100) -> None:
        if not 0 < delta < 1:
            raise bad("delta", delta, "it lies between 0 and 1; the paper's range is 0.9 to 0.96")
        if least < 3:
            raise bad("least", least, "Shapiro and Wilk's test needs 3 values or more")
        self.delta, self.least = delta, least
        self.queries = 0
        self.flagged_at: int | None = None
        """Which query, from 1, had it flagged; None: none."""
        self.smallest = 1.0
        """The smallest W so far."""
        self._kept: dict[int, list[Tensor]] = {}
        self._own: dict[int, _Moments] = {}
        self._threshold: dict[int, float] = {}
        self._distances: list[float] = []
        self._next = least + 1

    @property
    def flagged(self) -> bool:
        """Whether this client is taken for an attacker; for good."""
        return self.flagged_at is not None

    def fresh(self) -> PRADA:
        """One with the same settings that has seen nothing."""
        return PRADA(self.delta, self.least)

    def state(self) -> dict[str, float | int | str | None]:
        """Queries, the smallest W, and the query that had the client flagged."""
        return {"queries": self.queries, "smallest_w": self.smallest, "flagged_at": self.flagged_at}

    def observe(self, images: Tensor, scores: Tensor) -> bool:
        """Look at queries, in order; the same verdict however they are cut into batches.

        Args:
            images: uint8 (N, C, H, W); distances are taken with pixels in [0, 1].
            scores: Real (N, K), whose likeliest classes count.

        Returns:
            Whether the client is flagged.
        """
        for part, shown in zip(images.split(_PART), scores.split(_PART), strict=True):
            self._observe(part.flatten(1), shown.argmax(1))
        return self.flagged

    def _observe(self, flat: Tensor, labels: Tensor) -> None:
        nearest = torch.full((len(flat),), math.inf, dtype=torch.float64)
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:, 0]
            for kept in self._kept.get(label, []):
                nearest[rows] = torch.minimum(nearest[rows], _between(flat[rows], kept).amin(1))
        between = _between(flat, flat)
        new: dict[int, list[int]] = {}
        for row, (label, old) in enumerate(zip(labels.tolist(), nearest.tolist(), strict=True)):
            self.queries += 1
            mine = new.setdefault(label, [])
            distance = min(old, float(between[row, mine].min())) if mine else old
            if distance == math.inf:
                mine.append(row)
                self._own[label], self._threshold[label] = _Moments(), 0.0
                continue
            self._distances.append(distance)
            own = self._own[label]
            own.add(distance)
            if distance > self._threshold[label]:
                mine.append(row)
                self._threshold[label] = max(self._threshold[label], own.mean - own.spread)
            if len(self._distances) >= self._next:
                self._judge()
                known = len(self._distances)
                self._next = known + 1 if known < _EVERY else math.ceil(known * (1 + _GROWTH))
        for label, chosen in new.items():
            if chosen:
                self._kept.setdefault(label, []).append(flat[chosen])
                self._join(label)

    def _join(self, label: int) -> None:
        """Few large blocks, not many small ones: one is joined to the one before if it has grown as large."""
        blocks = self._kept[label]
        while len(blocks) > 1 and len(blocks[-1]) >= len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] = torch.cat([blocks[-1], last])

    def _judge(self) -> None:
        from scipy.stats import shapiro

        values = torch.tensor(self._distances, dtype=torch.float64)
        centre, spread = values.mean(), values.std(correction=0)
        inner = values[(values - centre).abs() <= 3 * spread]
        if len(inner) < 3 or float(inner.max() - inner.min()) == 0:
            found = 0.0  # all the same distance: as far from normal as can be
        else:
            with warnings.catch_warnings():  # of more than 5,000 values its p-value is rough; W is not
                warnings.simplefilter("ignore", UserWarning)
                found = float(shapiro(inner.numpy()).statistic)
        self.smallest = min(self.smallest, found)
        if found < self.delta and self.flagged_at is None:
            self.flagged_at = self.queries


class _Moments:
    """Mean and standard deviation of numbers that come one by one (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)

    @property
    def spread(self) -> float:
        """The standard deviation, of the population."""
        return math.sqrt(self._squares / self.count)


def _between(one: Tensor, other: Tensor) -> Tensor:
    """Distances (N, M) of uint8 (N, D) and (M, D), pixels in [0, 1]; whole numbers until the root, so none is lost."""
    a, b = one.double(), other.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squares.clamp_min_(0).sqrt_().div_(255)
