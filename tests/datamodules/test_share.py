"""Share: what is drawn, what is left, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from datamodules.share import Share
from datamodules.sources.digits import Digits
from tests.helpers import refused


def ids(data: Share) -> set[int]:
    data.setup()
    return set(data.train_set.ids.tolist())


def test_a_share_and_its_rest_make_up_the_whole() -> None:
    whole = Digits()
    whole.setup()
    drawn, left = ids(Share(Digits(), 0.3, 5)), ids(Share(Digits(), 0.3, 5, rest=True))
    assert len(drawn) == round(0.3 * len(whole.train_set))
    assert not drawn & left
    assert drawn | left == set(whole.train_set.ids.tolist())
    assert drawn == ids(Share(Digits(seed=9, batch_size=7), 0.3, 5))
    assert drawn != ids(Share(Digits(), 0.3, 6))
    assert drawn < ids(Share(Digits(), 0.5, 5)), "a larger share of the same seed holds the smaller"


def test_images_keep_their_labels_and_the_order_of_the_source() -> None:
    whole, data = Digits(), Share(Digits(), 0.4)
    whole.setup()
    data.setup()
    there = torch.isin(whole.train_set.ids, data.train_set.ids)
    rows = torch.arange(len(data.train_set))
    assert torch.equal(data.train_set.ids, whole.train_set.ids[there])
    assert torch.equal(data.train_set.labels, whole.train_set.labels[there])
    assert torch.equal(data.train_set.images_at(rows), whole.train_set.images_at(there.nonzero().squeeze(1)))
    assert torch.equal(data.test_set.ids, whole.test_set.ids)
    assert torch.equal(data.val_set.ids, whole.val_set.ids)


def test_members_are_half_of_the_candidates() -> None:
    candidates = Share(Digits(), 0.5, 0)
    for seed in range(3):
        members, others = (Share(Share(Digits(), 0.5, 0), 0.5, seed, rest) for rest in (False, True))
        assert ids(members) | ids(others) == ids(candidates)
        assert abs(len(ids(members)) - len(ids(others))) <= 1


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with refused(f"share = {share}", "above 0 and below 1"):
        Share(Digits(), share)


def test_nothing_left_is_refused() -> None:
    data = Share(Digits(), 1e-4)
    with refused("share = 0.0001", "none of"):
        data.setup()
