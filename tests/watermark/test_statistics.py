"""The null distribution: exact, and the table of what is significant."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from scipy.stats import binom

from datamodules.errors import InputError
from watermark.statistics import Betting, least_matches, log2, log2_ceiling, p_value, rank, tail


def test_by_hand() -> None:
    assert tail(0, 5, 10) == 1
    assert tail(2, 2, 4) == Fraction(1, 9)
    assert tail(1, 2, 4) == 1 - Fraction(4, 9)
    assert tail(3, 3, 2) == 1  # of two classes one is wrong: matching it says nothing
    assert p_value(2, 2, 4, 2) == Fraction(4, 9)
    assert p_value(2, 2, 4, 20) == 1
    assert rank(0.9, [0.1, 0.9, 0.95]) == Fraction(3, 4)
    assert rank(2.0, [0.0] * 9999) == Fraction(1, 10_000)


@pytest.mark.parametrize("matches", [0, 1, 11, 30, 48, 99, 100])
def test_against_scipy(matches: int) -> None:
    assert float(tail(matches, 100, 10)) == pytest.approx(binom.sf(matches - 1, 100, 1 / 9), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "classes", "log2_alpha", "needed"),
    [
        (100, 10, 64, 48), (100, 10, 128, 67), (100, 100, 64, 20), (100, 100, 128, 33), (50, 10, 64, 33),
        (50, 10, 128, 46),        (10, 10, 64, None),
    ],
)  # fmt: skip
def test_matches_that_are_significant(n: int, classes: int, log2_alpha: int, needed: int | None) -> None:
    assert least_matches(n, classes, log2_alpha) == needed
    if needed is not None:
        bound = Fraction(1, 2**log2_alpha)
        assert tail(needed, n, classes) <= bound < tail(needed - 1, n, classes)
        assert least_matches(n, classes, log2_alpha - 9, 9) == needed


def test_two_classes_decide_nothing() -> None:
    assert least_matches(1000, 2, 1) is None


def test_logarithms() -> None:
    assert log2(Fraction(1, 2**2000)) == -2000
    for p, k in (
        (Fraction(1), 0),
        (Fraction(1, 2), -1),
        (Fraction(3, 4), 0),
        (Fraction(1, 3), -1),
        (Fraction(1, 2**70), -70),
    ):
        assert log2_ceiling(p) == k
    assert log2_ceiling(tail(100, 100, 10)) == math.ceil(-100 * math.log2(9))


def test_bad_values() -> None:
    for call in (lambda: tail(3, 2, 10), lambda: tail(1, 2, 1), lambda: rank(1.0, []), lambda: Betting(2)):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="shares"):
        Betting(3, (0.4,))


def test_a_bettor_stops_soon_and_is_seldom_wrong() -> None:
    marked = Betting(10)
    count = 0
    while marked.log2_wealth < 64:
        count += 1
        marked.bet(True)
    assert count <= 22  # 64 bits, 3.17 of them an answer, and what several shares cost
    import random

    draw, alpha_log2, wrong = random.Random(0), 5, 0
    for _ in range(2000):  # at each step a look, which would ruin a p-value
        bettor = Betting(10)
        wrong += any(bettor.bet(draw.randrange(9) == 0) >= alpha_log2 for _ in range(100))
    assert wrong / 2000 <= 2**-5 * 1.3
