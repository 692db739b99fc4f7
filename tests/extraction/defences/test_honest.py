"""The cost to honest users: by hand."""

from __future__ import annotations

import pytest
import torch

from extraction.defences.honest import honest_cost


def test_by_hand() -> None:
    before = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    after = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    found = honest_cost(before, after, torch.tensor([0, 0, 0, 1]))
    assert found[:4] == (4, 0.75, 0.5, 0.25)
    assert found.l1 == pytest.approx((0.4 + 0.2) / 4)
    assert found.l1_most == pytest.approx(0.4)
    with pytest.raises(ValueError, match="labelled"):
        honest_cost(before[:0], after[:0], torch.zeros(0, dtype=torch.int64))
