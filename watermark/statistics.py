"""How often a model that knows nothing of a key gives its labels, exactly.

Labels are drawn independently of the model, uniformly from the K − 1 wrong classes (or from all K). Whatever an
unmarked model answers, its matches are then at most Bin(n, 1/(K − 1)). That is worth nothing where labels were
*chosen* – for adversarial examples, or a fixed target: such a key is ranked against others, on the suspect itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from datamodules.errors import bad


def tail(matches: int, n: int, classes: int) -> Fraction:
    """P[Bin(n, 1/(classes − 1)) ≥ matches], exactly.

    Args:
        matches: Triggers that got the key's label.
        n: Triggers that were scored.
        classes: K.
    """
    if not 0 <= matches <= n:
        raise bad("matches", matches, f"from 0 to {n}")
    if classes < 2:
        raise bad("classes", classes, "a classifier has 2 or more")
    ways = sum(math.comb(n, hits) * (classes - 2) ** (n - hits) for hits in range(matches, n + 1))
    return Fraction(ways, (classes - 1) ** n)


def p_value(matches: int, n: int, classes: int, grinding_log2: int = 0) -> Fraction:
    """The same for an owner who may have tried 2^g keys, and shows the best: at most 1."""
    return min(Fraction(1), tail(matches, n, classes) * int(1 << grinding_log2))


def least_matches(n: int, classes: int, alpha_log2: int, grinding_log2: int = 0) -> int | None:
    """The smallest number of matches whose p-value is 2^−alpha_log2 or less; None if all n are too few."""
    power = alpha_log2 + grinding_log2
    total, ways = (classes - 1) ** n, 0
    least = None
    for hits in range(n, -1, -1):
        ways += math.comb(n, hits) * (classes - 2) ** (n - hits)
        if ways << power > total:
            break
        least = hits
    return least


def log2(p: Fraction) -> float:
    """Of a p-value that may be too small for a float."""
    return math.log2(p.numerator) - math.log2(p.denominator)


def log2_ceiling(p: Fraction) -> int:
    """The smallest whole k with p ≤ 2^k: exact on every machine."""
    k = p.numerator.bit_length() - p.denominator.bit_length()
    while p <= Fraction(2) ** (k - 1):
        k -= 1
    while p > Fraction(2) ** k:
        k += 1
    return k


def rank(score: float, decoys: Sequence[float]) -> Fraction:
    """The p-value of a key among decoys drawn as it was: (1 + how many do as well) / (1 + how many there are)."""
    if not len(decoys):
        raise bad("decoys", 0, "there must be some to rank a key among")
    return Fraction(1 + sum(decoy >= score for decoy in decoys), len(decoys) + 1)


class Betting:
    """A test that may be looked at after every answer, and stopped at any (Ville's inequality, 1939).

    Wealth is bet on matches at the odds of the null hypothesis, for several assumed shares of matches at once; under
    it, the chance that wealth ever reaches 1/α is at most α. A p-value that is looked at until it is small has no such
    bound.

    Args:
        classes: K, 3 or more.
        shares: Assumed shares of matches; each must exceed 1/(K − 1) to be a bet, and those that do not are left out.
    """

    def __init__(self, classes: int, shares: Iterable[float] = (0.25, 0.5, 0.75, 0.9, 0.99)) -> None:
        if classes < 3:
            raise bad("classes", classes, "with two classes every wrong label is the same, and nothing can be tested")
        self._null = 1 / (classes - 1)
        self._shares = [share for share in shares if self._null < share < 1]
        if not self._shares:
            raise bad("shares", list(shares), f"one at least must lie between {self._null:.3g} and 1")
        self._log2 = [0.0] * len(self._shares)

    def bet(self, match: bool) -> float:
        """Take an answer in; log₂ of the wealth so far."""
        for at, share in enumerate(self._shares):
            odds = share / self._null if match else (1 - share) / (1 - self._null)
            self._log2[at] += math.log2(odds)
        return self.log2_wealth

    @property
    def log2_wealth(self) -> float:
        """Log₂ of the mean over the assumed shares."""
        top = max(self._log2)
        return top + math.log2(sum(2 ** (each - top) for each in self._log2) / len(self._log2))
