"""The out-of-distribution share: by hand, in any batches, flags that stay, false alarms within α."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from extraction.defences.out_of_distribution import OutOfDistributionShare, calibrated
from tests.helpers import refused


def answers(unsure: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.where(unsure[:, None], torch.tensor([[0.6, 0.4]]), torch.tensor([[0.95, 0.05]]))
    return torch.zeros(len(unsure), 1, 2, 2, dtype=torch.uint8), scores


def sent(n: int, share: float, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def test_by_hand() -> None:
    detector = OutOfDistributionShare(0.9, 0.5, alpha=0.01, first=2)
    # all of 4, 8: p is 1/16 · 2, 1/256 · 6, both above 0.01; all of 16: 2^-16 · 12
    for n, smallest in ((4, 2 / 16), (4, 6 / 256), (8, 12 / 2**16)):
        detector.observe(*answers(torch.ones(n, dtype=torch.bool)))
        assert detector.smallest == pytest.approx(smallest)
    assert detector.flagged_at == 16


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_same_in_any_batches_as_the_definition(size: int) -> None:
    unsure = sent(1000, 0.12, 0)
    detector = OutOfDistributionShare(0.9, 0.05, alpha=0.05)
    for part in unsure.split(size):
        detector.observe(*answers(part))
    p = {2**j: float(binom.sf(int(unsure[: 2**j].sum()) - 1, 2**j, 0.05)) * (j - 4) * (j - 3) for j in range(5, 10)}
    assert detector.smallest == pytest.approx(min(p.values()))
    assert detector.flagged_at == next((n for n, value in p.items() if value < 0.05), None) is not None
    assert detector.state()["unsure"] == int(unsure.sum())


def test_a_flag_stays_and_fresh_is_fresh() -> None:
    detector = OutOfDistributionShare(0.9, 0.05)
    assert detector.observe(*answers(sent(64, 1, 0)))
    at = detector.flagged_at
    assert detector.observe(*answers(sent(5000, 0, 0)))
    assert detector.flagged_at == at == 32
    assert not detector.fresh().flagged
    assert detector.fresh().queries == 0


def test_false_alarms_are_within_alpha_at_the_limit_itself() -> None:
    alarms = 0
    for seed in range(300):
        alarms += OutOfDistributionShare(0.9, 0.05, alpha=0.05).observe(*answers(sent(4096, 0.05, seed)))
    assert alarms <= binom.ppf(0.999, 300, 0.05)


def test_calibrated() -> None:
    first = torch.linspace(0.5, 1, 1001, dtype=torch.float64)
    found = calibrated(torch.stack([first, 1 - first], 1), 0.1)
    assert found == pytest.approx(0.55)
    assert float((first < found).double().mean()) == pytest.approx(0.1, abs=0.002)


def test_what_is_refused() -> None:
    for wrong in ({"confidence": 0}, {"benign_share": 1}, {"alpha": 0}, {"first": -1}):
        with refused(f"{next(iter(wrong))} = "):
            OutOfDistributionShare(**{"confidence": 0.9, "benign_share": 0.05, **wrong})
