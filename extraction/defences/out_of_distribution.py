"""The out-of-distribution share: a client is flagged if the victim is unsure of too many of his queries.

The victim's largest score (Hendrycks & Gimpel, ICLR 2017) tells queries that it is unsure of; the owner knows from a
holdout how many of those his users send. A client who sends more, beyond chance, is flagged, for good.

Threat model: the attacker's images are not of the victim's task: noise, another data set, steps across its boundary.
Queries of his that the victim is sure of are missed, and so is an attacker with few queries.

The test is one-sided and binomial. It is made when 2^j queries have been seen, j = `first`, `first` + 1, …, each at
α / (i (i + 1)), i = 1, 2, …: these sum to α, so that an honest client is flagged with probability α at most, however
long he stays – if he sends no more unsure queries than `benign_share`, one by one. Users differ: choose it above what
the holdout has, and count false alarms.
"""

from __future__ import annotations

from torch import Tensor

from datamodules.errors import bad
from extraction.defences.detector import Detector


class OutOfDistributionShare(Detector):
    """The detector of one client.

    Args:
        confidence: A query with a largest score below this counts; in (0, 1]; see `calibrated`.
        benign_share: The most of them among benign queries, in (0, 1).
        alpha: α: an honest client is flagged with this probability at most.
        first: The first test is made after 2^first queries.

    Raises:
        InputError: If a number is out of its range.
    """

    version = 1

    def __init__(self, confidence: float, benign_share: float, alpha: float = 0.01, first: int = 5) -> None:
        if not 0 < confidence <= 1:
            raise bad("confidence", confidence, "it is a probability above 0; calibrate it on a holdout")
        if not 0 < benign_share < 1:
            raise bad("benign_share", benign_share, "it lies between 0 and 1")
        if not 0 < alpha < 1:
            raise bad("alpha", alpha, "it lies between 0 and 1")
        if first < 0:
            raise bad("first", first, "give a whole number, 0 or more")
        self.confidence, self.benign_share, self.alpha, self.first = confidence, benign_share, alpha, first
        self.queries = self.unsure = 0
        self.flagged_at: int | None = None
        """Which query, from 1, had it flagged; None: none."""
        self.smallest = 1.0
        """The smallest p-value so far, times what its test is corrected by: below α is flagged."""

    @property
    def flagged(self) -> bool:
        """Whether this client is taken for an attacker; for good."""
        return self.flagged_at is not None

    def fresh(self) -> OutOfDistributionShare:
        """One with the same settings that has seen nothing."""
        return OutOfDistributionShare(self.confidence, self.benign_share, self.alpha, self.first)

    def state(self) -> dict[str, float | int | str | None]:
        """Queries, those that count, the smallest corrected p-value, and the query that had the client flagged."""
        return {
            "queries": self.queries, "unsure": self.unsure, "smallest_p": self.smallest, "flagged_at": self.flagged_at,
        }  # fmt: skip

    def observe(self, images: Tensor, scores: Tensor) -> bool:
        """Look at queries, in order; see `Detector`."""
        counts = self.unsure + (scores.amax(1) < self.confidence).cumsum(0).cpu()
        before, self.queries = self.queries, self.queries + len(scores)
        step = self.first
        while 2**step <= self.queries:
            if 2**step > before:
                self._test(2**step, int(counts[2**step - before - 1]), step - self.first + 1)
            step += 1
        if len(scores):
            self.unsure = int(counts[-1])
        return self.flagged

    def _test(self, n: int, unsure: int, number: int) -> None:
        from scipy.stats import binom

        p = float(binom.sf(unsure - 1, n, self.benign_share)) * number * (number + 1)
        self.smallest = min(self.smallest, p)
        if p < self.alpha and self.flagged_at is None:
            self.flagged_at = n


def calibrated(scores: Tensor, share: float) -> float:
    """The confidence that a share of benign queries lies below.

    Args:
        scores: The victim's, on images it was not trained on: real (N, K).
        share: In (0, 1).
    """
    return float(scores.amax(1).double().quantile(share))
