"""LiRA and the ROC's numbers, against hand-computed cases, scipy, scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from extraction.reconnaissance.membership import (
    auroc,
    bootstrapped,
    lira_offline,
    lira_online,
    log_likelihood,
    log_odds,
    roc,
    tpr_at,
)
from tests.helpers import global_randomness_untouched, refused

PHI = torch.tensor([[1.0, 5.0], [3.0, 7.0], [0.0, 2.0], [2.0, 6.0]])
IN = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
"""Candidate 0: with it 1 and 3, without it 0 and 2. Candidate 1: with it 2 and 6, without it 5 and 7."""


def drawn(n: int = 400, ties: bool = False) -> tuple[Tensor, Tensor]:
    private = torch.Generator().manual_seed(1)
    members = torch.rand(n, generator=private) < 0.4
    scores = torch.randn(n, generator=private, dtype=torch.float64) + members
    return (scores * 2).round() if ties else scores, members


# --- what is looked at ------------------------------------------------------------------------------------------------
def test_log_odds_by_hand() -> None:
    scores = torch.tensor([[0.8, 0.1, 0.1], [0.25, 0.5, 0.25]])
    assert log_odds(scores, torch.tensor([0, 0])).tolist() == pytest.approx([math.log(4), math.log(1 / 3)], rel=1e-6)
    assert log_likelihood(scores, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(0.8), math.log(0.5)])
    stacked = log_odds(torch.stack([scores, scores.flip(1)]), torch.tensor([0, 0]))
    assert stacked.shape == (2, 2)
    assert stacked[1].tolist() == pytest.approx([math.log(1 / 9), math.log(1 / 3)], rel=1e-6)


def test_the_sure_stay_apart() -> None:
    logits = torch.tensor([[40.0, 0, 0], [60.0, 0, 0], [200.0, 0, 0], [0.0, 200, 0]])
    scores = logits.softmax(1)
    assert (scores[:3, 0] == 1).all(), "1 − p would be 0 for all three"
    found = log_odds(scores, torch.zeros(4, dtype=torch.int64))
    assert found[:2].tolist() == pytest.approx([40 - math.log(2), 60 - math.log(2)], rel=1e-5)
    assert found[2] > found[1]
    assert torch.isfinite(found).all()
    assert torch.isfinite(log_likelihood(scores, torch.zeros(4, dtype=torch.int64))).all()


# --- LiRA -------------------------------------------------------------------------------------------------------------
def test_lira_with_own_variances_is_a_ratio_of_gaussians() -> None:
    observed = torch.tensor([2.5, 3.0])
    inside = norm(2, math.sqrt(2)), norm(4, math.sqrt(8))  # unbiased variances of (1, 3) and (2, 6)
    outside = norm(1, math.sqrt(2)), norm(6, math.sqrt(2))
    expected = [i.logpdf(x) - o.logpdf(x) for i, o, x in zip(inside, outside, observed.tolist(), strict=True)]
    assert lira_online(observed, PHI, IN, own_variance=True).tolist() == pytest.approx(expected)
    z = [(2.5 - 1) / math.sqrt(2), (3 - 6) / math.sqrt(2)]
    assert lira_offline(observed, PHI, IN, own_variance=True).tolist() == pytest.approx(z)


def test_a_common_variance_is_that_round_each_mean() -> None:
    observed = torch.tensor([2.5, 3.0])
    inside, outside = math.sqrt((2 + 8) / 2), math.sqrt((2 + 2) / 2)
    means = ((2, 1), (4, 6))
    expected = [
        norm(i, inside).logpdf(x) - norm(o, outside).logpdf(x) for (i, o), x in zip(means, (2.5, 3.0), strict=True)
    ]
    assert lira_online(observed, PHI, IN).tolist() == pytest.approx(expected)
    assert lira_offline(observed, PHI, IN).tolist() == pytest.approx([1.5 / outside, -3 / outside])


def test_offline_leaves_out_the_models_that_knew_the_candidate() -> None:
    other = torch.where(IN, 1e6, PHI)
    observed = torch.tensor([2.5, 3.0])
    assert torch.equal(lira_offline(observed, other, IN), lira_offline(observed, PHI, IN))


def test_lira_finds_what_a_threshold_cannot() -> None:
    """Candidates differ in difficulty far more than membership moves them: only what is their own tells."""
    private = torch.Generator().manual_seed(0)
    hard = 10 * torch.randn(1000, generator=private)
    inside = torch.rand(32, 1000, generator=private) < 0.5
    members = torch.rand(1000, generator=private) < 0.5
    shadows = hard + 2 * inside + torch.randn(32, 1000, generator=private)
    observed = hard + 2 * members + torch.randn(1000, generator=private)
    assert auroc(observed, members) < 0.6
    ideal = norm.cdf(2 / math.sqrt(2))  # of two normals of unit variance, 2 apart
    for attack in (lira_online, lira_offline):
        assert auroc(attack(observed, shadows, inside), members) == pytest.approx(ideal, abs=0.03)
    absent = torch.rand(1000, generator=private) < 0.5  # and nothing is found where nothing is
    assert auroc(lira_online(observed, shadows, inside), absent) == pytest.approx(0.5, abs=0.05)


def test_too_few_shadow_models_are_refused() -> None:
    observed = torch.tensor([2.5, 3.0])
    with refused("shadows = 0", "train more"):
        lira_online(observed, PHI, torch.ones_like(IN))
    with refused("shadows = 1", "2 with it"):
        lira_online(observed, PHI[1:], IN[1:], own_variance=True)
    assert torch.isfinite(lira_online(observed, PHI[1:], IN[1:])).all()
    with refused("(4, 2)", "(3, 2)"):
        lira_online(observed, PHI, IN[1:])


# --- how good an attack is --------------------------------------------------------------------------------------------
def test_numbers_by_hand() -> None:
    scores = torch.tensor([5.0, 3.0, 3.0, 1.0, 4.0, 3.0, 2.0, 0.0])
    members = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    # 5 is above all four; each 3 above two and level with one; 1 above one
    assert auroc(scores, members) == (4 + 2.5 + 2.5 + 1) / 16
    assert tpr_at(scores, members, 0) == 0.25
    assert tpr_at(scores, members, 0.249) == 0.25
    assert tpr_at(scores, members, 0.25) == 0.25  # above 3, the second of the others: both members at 3 are level
    assert tpr_at(scores, members, 0.5) == 0.75
    curve = roc(scores, members)
    assert curve.fpr.tolist() == [0, 0, 0.25, 0.5, 0.75, 0.75, 1]
    assert curve.tpr.tolist() == [0, 0.25, 0.25, 0.75, 0.75, 1, 1]


@pytest.mark.parametrize("ties", [False, True])
def test_numbers_as_scikit_learn_and_torchmetrics_have_them(ties: bool) -> None:
    scores, members = drawn(ties=ties)
    assert auroc(scores, members) == pytest.approx(roc_auc_score(members.numpy(), scores.numpy()))
    assert auroc(scores, members) == pytest.approx(
        float(binary_auroc(scores.sigmoid(), members.long(), validate_args=False))
    )
    fpr, tpr, _ = roc_curve(members.numpy(), scores.numpy(), drop_intermediate=False)
    curve = roc(scores, members)
    assert np.allclose(curve.fpr, fpr)
    assert np.allclose(curve.tpr, tpr)
    for level in (0.0, 0.001, 0.01, 0.1, 0.37):
        assert tpr_at(scores, members, level) == pytest.approx(tpr[fpr <= level].max())


def test_chance_and_certainty() -> None:
    members = torch.arange(2000) % 2 == 0
    assert auroc(torch.zeros(2000), members) == 0.5
    assert tpr_at(torch.zeros(2000), members, 0.01) == 0, "one score for all names nobody"
    assert auroc(members.double(), members) == 1
    assert tpr_at(members.double(), members, 0) == 1
    assert auroc(-members.double(), members) == 0


def test_the_bootstrap_is_about_as_wide_as_theory_says() -> None:
    scores, members = drawn(2000)
    with global_randomness_untouched():
        found = bootstrapped(auroc, scores, members, seed=3, resamples=400)
    area, n1, n0 = found.value, int(members.sum()), int((~members).sum())
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)  # Hanley & McNeil 1982
    spread = math.sqrt((area * (1 - area) + (n1 - 1) * (q1 - area**2) + (n0 - 1) * (q2 - area**2)) / (n1 * n0))
    assert found.value == auroc(scores, members)
    assert found.n == 2000
    assert found.low < area < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    assert found == bootstrapped(auroc, scores, members, seed=3, resamples=400)
    assert found != bootstrapped(auroc, scores, members, seed=4, resamples=400)


def test_what_cannot_be_judged_is_refused() -> None:
    scores, members = drawn(10)
    for measure in (auroc, roc):
        with refused("0 members"):
            measure(scores, torch.zeros(10, dtype=torch.bool))
    with refused("0 others"):
        auroc(scores, torch.ones(10, dtype=torch.bool))
    with refused("no numbers"):
        auroc(scores.masked_fill(members, math.nan), members)
    with refused("fpr = 1"):
        tpr_at(scores, members, 1)
