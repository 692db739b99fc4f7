"""What is measured: intervals against other implementations, and counts that are exact however they are shared out."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from datamodules.imageset import PADDING
from datamodules.measures import (
    Evaluation,
    Hits,
    Interval,
    Measure,
    NoAnswerError,
    Numbered,
    Range,
    answered,
    clustered,
    over_seeds,
    wilson,
)
from tests.helpers import refused, some_images

CASES = [(0, 1), (1, 1), (0, 10), (10, 10), (1, 10), (5, 10), (81, 263), (9499, 10000), (1, 10**6), (999_999, 10**6)]


# --- intervals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("hits", "n"), CASES)
def test_wilson_is_scipys(hits: int, n: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    found = wilson(hits, n)
    assert (found.value, found.n) == (hits / n, n)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_is_as_published() -> None:
    """Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, n), (low, high) in published.items():
        assert (round(wilson(hits, n).low, 4), round(wilson(hits, n).high, 4)) == (low, high)


def test_wilson_contains_the_value_and_stays_between_0_and_1() -> None:
    for n in (1, 2, 3, 7, 64, 1797):
        for hits in range(n + 1):
            found = wilson(hits, n)
            assert 0 <= found.low <= found.value <= found.high <= 1
            assert found.low < found.high
            mirrored = wilson(n - hits, n)
            assert mirrored.low == pytest.approx(1 - found.high, abs=1e-12)


def test_nothing_measured_is_no_number() -> None:
    for found in (wilson(0, 0), over_seeds([])):
        assert found.n == 0
        assert all(math.isnan(number) for number in (found.value, found.low, found.high))


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.91, 0.93, 0.92], [1.0, 1.0, 1.0], [3.0, -1.0, 2.5, 100.0, 7.25]])
def test_the_interval_over_seeds_is_students(values: list[float]) -> None:
    import numpy as np
    from scipy.stats import sem, t

    found = over_seeds(values)
    assert (found.value, found.n) == (pytest.approx(np.mean(values)), len(values))
    if sem(values) == 0:
        assert found.low == found.high == found.value
        return
    low, high = t.interval(0.95, len(values) - 1, np.mean(values), sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_two_seeds_by_hand_and_one_alone() -> None:
    # t(0.975; 1) = 12.7062, s = 0.1·√2, s/√2 = 0.1
    found = over_seeds([0.8, 1.0])
    assert found.low == pytest.approx(0.9 - 1.27062, abs=1e-5)
    assert found.high == pytest.approx(0.9 + 1.27062, abs=1e-5)
    assert over_seeds([0.4]) == Interval(0.4, 1, -math.inf, math.inf)


def test_cases_of_one_victim_count_less_the_more_alike_they_are() -> None:
    alone = clustered([1, 0, 1, 1], [1, 1, 1, 1])
    assert alone == wilson(3, 4)  # one target each
    alike = clustered([5, 5, 0, 0], [5] * 4, "targets")  # all five targets of a victim fall, or none
    assert (alike.value, alike.n, alike.unit) == (0.5, 20, "targets")
    # apart = 4/3 · 4 · 2.5² over 20/4: a design effect of 6.67, so 3 cases; t(0.975; 3) = 3.1824
    expected = wilson(1.5, 3, 3.182446)
    assert (alike.low, alike.high) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))
    mixed = clustered([2, 3, 2, 3], [5] * 4)  # less alike than chance: still no more than 20 cases
    assert wilson(10, 20).high < mixed.high < alike.high
    assert clustered([1, 2], [2, 5]).value == pytest.approx(3 / 7)


def test_clusters_that_tell_nothing_of_their_likeness() -> None:
    none = clustered([0, 0, 0, 0], [5] * 4)
    assert (none.value, none.n, none.low, none.high) == (0, 20, 0, wilson(0, 4).high)
    every = clustered([5] * 4, [5] * 4)
    assert (every.low, every.high) == (wilson(4, 4).low, 1)
    one = clustered([3], [5])
    assert (one.value, one.n, one.low, one.high) == (0.6, 5, 0, 1)
    assert clustered([0, 2], [0, 4]).high == 1  # a cluster without cases is none
    assert math.isnan(clustered([], []).value)


# --- hits -------------------------------------------------------------------------------------------------------------
def logits_for(classes: list[int], k: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), k).float()


def test_hits_leaves_negative_targets_out() -> None:
    hits = Hits()
    hits.update(logits_for([0, 1, 2, 3, 0]), torch.tensor([0, 1, 0, -1, -1]))
    assert hits.compute().tolist() == [2, 3]
    hits.update(logits_for([0, 0]), torch.tensor([-1, -1]))
    assert hits.compute().tolist() == [2, 3]
    hits.update(logits_for([3]), torch.tensor([3]))
    assert hits.compute().tolist() == [3, 4]
    hits.reset()
    hits.update(logits_for([3]), torch.tensor([0]))
    assert hits.compute().tolist() == [0, 1]


def test_hits_takes_real_scores_and_whole_ones() -> None:
    hits = Hits()
    hits.update(torch.tensor([[0.1, -5.0], [-3.0, -2.0]], dtype=torch.bfloat16), torch.tensor([0, 1]))
    hits.update(torch.tensor([[0, 1]]), torch.tensor([1]))
    assert hits.compute().tolist() == [3, 3]
    assert hits.compute().dtype == torch.int64


def test_hits_of_several_ranks_sum_exactly() -> None:
    noise = torch.Generator().manual_seed(0)
    logits, target = torch.randn(1001, 10, generator=noise), torch.randint(-1, 10, (1001,), generator=noise)
    alone = Hits()
    alone.update(logits, target)
    merged = Hits()
    for rows in torch.arange(1001).split([400, 1, 600]):
        rank = Hits()
        for part in rows.split(64):
            rank.update(logits[part], target[part])
        merged.merge_state(rank)
    assert merged.compute().tolist() == alone.compute().tolist()
    counted = target >= 0
    assert alone.compute().tolist() == [
        int((logits.argmax(1)[counted] == target[counted]).sum()),
        int(counted.sum()),
    ]
    # what DDP does: the states of all ranks are stacked and reduced by sum
    assert {reduce(torch.tensor([2, 3])).item() for reduce in alone._reductions.values()} == {5}  # type: ignore[operator, misc]


def test_hits_does_not_lose_counts_that_float32_cannot_hold() -> None:
    hits = Hits()
    hits.hits += 2**24
    hits.cases += 2**24
    hits.update(logits_for([1]), torch.tensor([1]))
    assert hits.compute().tolist() == [2**24 + 1, 2**24 + 1]


def test_what_is_no_number_hits_nothing() -> None:
    hits = Hits()
    nan, inf = float("nan"), float("inf")
    hits.update(torch.tensor([[nan, nan], [inf, 0.0], [0.0, -inf], [1.0, 0.0]]), torch.tensor([0, 0, 0, 0]))
    assert hits.compute().tolist() == [1, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_answers_that_are_no_numbers_are_refused(value: float) -> None:
    good = torch.tensor([[0.5, 2.0]])
    assert answered(good) is good
    with pytest.raises(NoAnswerError, match=r"^the victim: its answers are NaN or infinite"):
        answered(torch.tensor([[0.5, value]]), "the victim")


def test_the_range_of_classes_of_several_ranks() -> None:
    merged = Range()
    for said, real in (([3, 1], [True, False]), ([], []), ([4, 3], [True, True])):
        rank = Range()
        rank.update(torch.tensor(said, dtype=torch.int64), torch.tensor(real, dtype=torch.bool))
        merged.merge_state(rank)
    assert merged.compute().tolist() == [3, 4]


# --- measures and evaluations -----------------------------------------------------------------------------------------
def test_a_measure_makes_a_fresh_metric() -> None:
    measure = Measure("accuracy", torch.zeros(3, dtype=torch.int64))
    first = measure.make()
    assert isinstance(first, Hits)
    first.update(logits_for([0]), torch.tensor([0]))
    assert measure.make().compute().tolist() == [0, 0]
    made: Metric = Measure("other", measure.target, lambda: MulticlassAccuracy(4)).make()
    assert isinstance(made, MulticlassAccuracy)


def test_an_evaluation_needs_a_target_for_each_image() -> None:
    images = some_images(5)
    good = Measure("good", torch.zeros(5, dtype=torch.int64))
    Evaluation("clean", images, (good,))
    Evaluation("clean", images, (good, Measure("soft", torch.rand(5, 4))))
    with refused("measure 'short'", "4 targets", "5 images"):
        Evaluation("clean", images, (good, Measure("short", torch.zeros(4, dtype=torch.int64))))
    with refused("'long'", "6 targets for 5 images"):
        Evaluation("clean", images, (good, Measure("long", torch.zeros(6, dtype=torch.int64))))


def test_numbered_rows_and_padding() -> None:
    images = some_images(6, (3, 4, 4))
    overlay = images.select(torch.tensor([5, 4, 3, 2, 1, 0]))
    numbered = Numbered(overlay)
    assert (len(numbered), numbered.image_shape) == (6, (3, 4, 4))
    batch = numbered.__getitems__(torch.tensor([4, PADDING, 0, PADDING]))
    assert batch.labels.tolist() == [4, PADDING, 0, PADDING]
    assert batch.ids.tolist() == [int(images.ids[1]), PADDING, int(images.ids[5]), PADDING]
    assert torch.equal(batch.images[[0, 2]], images.images[[1, 5]])
    assert batch.images.shape == (4, 3, 4, 4)
    assert overlay.ids.tolist() == images.ids.flip(0).tolist()  # padding was not written into the set's ids


def test_numbered_moves_to_a_device_as_a_resident_set_does() -> None:
    images = some_images(6)
    numbered = Numbered(images.select(torch.tensor([2, 0])))
    moved = numbered.to("cpu")
    assert isinstance(moved, Numbered)
    rows = torch.tensor([1, PADDING])
    assert all(torch.equal(x, y) for x, y in zip(moved.__getitems__(rows), numbered.__getitems__(rows), strict=True))
    assert moved.digest() == images.select(torch.tensor([2, 0])).digest()
    assert torch.equal(numbered.images_at(torch.tensor([1])), images.images[[0]])
    elsewhere = numbered.to("meta")  # a device that holds no numbers
    assert {elsewhere.ids.device.type, elsewhere.labels.device.type, elsewhere.inner.ids.device.type} == {"meta"}
    assert numbered.ids.device.type == "cpu"
