"""PRADA: a client's queries look like an attack if their distances from each other are not normally distributed.

Paper: Juuti, Szyller, Marchal & Asokan, "PRADA: Protecting Against DNN Model Stealing Attacks", EuroS&P 2019, arXiv
1805.02628, algorithm 3. Natural images of one class lie at distances that are about normal; images that were made from
each other by steps of one length do not.

Deviation: a client that was flagged stays flagged. The published rule judges all queries so far at each new one, and
may take its verdict back after the attack has gone on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.errors import bad


class PRADA:
    """The detector of one client; each client has its own.

    Args:
        delta: δ: Shapiro and Wilk's W below which a client is flagged, in (0, 1).
        least: So many distances are needed for a verdict.

    Raises:
        InputError: If a number is out of its range.
    """

    version = 1

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
        self._kept: dict[int, Tensor] = {}
        self._own: dict[int, list[float]] = {}
        self._threshold: dict[int, float] = {}
        self._distances: list[float] = []

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
        flat = images.flatten(1).double() / 255
        between = torch.cdist(flat, flat)
        kept = dict(self._kept)
        old = {label: torch.cdist(flat, kept[label]).amin(1) for label in kept if len(kept[label])}
        new: dict[int, list[int]] = {}
        for row, label in enumerate(scores.argmax(1).tolist()):
            self.queries += 1
            mine = new.setdefault(label, [])
            known = [float(old[label][row])] if label in old else []
            known += [float(between[row, mine].min())] if mine else []
            if not known:
                mine.append(row)
                self._own[label], self._threshold[label] = [], 0.0
                continue
            distance = min(known)
            self._distances.append(distance)
            own = self._own[label]
            own.append(distance)
            if distance > self._threshold[label]:
                mine.append(row)
                values = torch.tensor(own, dtype=torch.float64)
                self._threshold[label] = max(self._threshold[label], float(values.mean() - values.std(correction=0)))
            self._judge()
        for label, rows in new.items():
            parts = [kept[label]] if label in kept else []
            self._kept[label] = torch.cat([*parts, flat[rows]])
        return self.flagged

    def _judge(self) -> None:
        if len(self._distances) <= self.least:
            return
        from scipy.stats import shapiro

        values = torch.tensor(self._distances, dtype=torch.float64)
        centre, spread = values.mean(), values.std(correction=0)
        inner = values[(values - centre).abs() <= 3 * spread]
        if len(inner) < 3 or float(inner.max() - inner.min()) == 0:
            found = 0.0  # all the same distance: as far from normal as can be
        else:
            found = float(shapiro(inner.numpy()).statistic)
        self.smallest = min(self.smallest, found)
        if found < self.delta and self.flagged_at is None:
            self.flagged_at = self.queries
