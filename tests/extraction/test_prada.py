"""PRADA: by hand, in any batches, flags that stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import shapiro
from torch import Tensor
from torch.nn import functional as F

from extraction.defences.prada import PRADA
from tests.helpers import refused


def natural(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images with independent pixels: distances are about normal."""
    private = torch.Generator().manual_seed(seed)
    images = (128 + 40 * torch.randn(n, 1, 8, 8, generator=private)).clamp(0, 255).byte()
    return images, torch.randint(0, 3, (n,), generator=private)


def scored(stream: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return stream[0], F.one_hot(stream[1], 3)


def stepped(n: int) -> tuple[Tensor, Tensor]:
    """Each of a few images, again and again a step of one length away: as Jacobian augmentation makes them."""
    private = torch.Generator().manual_seed(1)
    seeds, labels = natural(10, 2)
    signs = torch.randint(0, 2, (n, 1, 8, 8), generator=private) * 2 - 1
    rows = torch.arange(n) % 10
    return torch.cat([seeds, (seeds[rows].int() + 25 * signs).clamp(0, 255).byte()]), torch.cat([labels, labels[rows]])


def plain(images: Tensor, labels: Tensor, delta: float) -> tuple[list[float], int | None]:
    """The published algorithm, query by query."""
    kept: dict[int, list[np.ndarray]] = {}
    own: dict[int, list[float]] = {}
    threshold: dict[int, float] = {}
    distances: list[float] = []
    for number, (image, label) in enumerate(
        zip(images.flatten(1).double().numpy() / 255, labels.tolist(), strict=True)
    ):
        if label not in kept:
            kept[label], own[label], threshold[label] = [image], [], 0.0
            continue
        nearest = min(float(np.linalg.norm(image - other)) for other in kept[label])
        distances.append(nearest)
        own[label].append(nearest)
        if nearest > threshold[label]:
            kept[label].append(image)
            threshold[label] = max(threshold[label], float(np.mean(own[label]) - np.std(own[label])))
        if len(distances) > 100:
            values = np.array(distances)
            inner = values[np.abs(values - values.mean()) <= 3 * values.std()]
            if shapiro(inner).statistic < delta:
                return distances, number + 1
    return distances, None


@pytest.mark.parametrize("stream", [natural(220), stepped(220)], ids=["natural", "stepped"])
@pytest.mark.parametrize("size", [1, 7, 500])
def test_as_published_in_any_batches(stream: tuple[Tensor, Tensor], size: int) -> None:
    detector = PRADA(0.95)
    for images, labels in zip(stream[0].split(size), stream[1].split(size), strict=True):
        detector.observe(images, F.one_hot(labels, 3))
    distances, flagged_at = plain(*stream, 0.95)
    assert detector.flagged_at == flagged_at
    assert detector._distances[: len(distances)] == pytest.approx(distances, abs=1e-6)


def test_steps_are_flagged_and_natural_images_are_not() -> None:
    calm, attacked = PRADA(0.9), PRADA(0.9)
    assert not calm.observe(*scored(natural(400)))
    assert attacked.observe(*scored(stepped(400)))
    assert attacked.smallest < 0.9 < calm.smallest


def test_a_flag_stays() -> None:
    detector = PRADA(0.9)
    detector.observe(*scored(stepped(400)))
    first = detector.flagged_at
    assert first is not None
    for seed in range(3, 9):
        assert detector.observe(*scored(natural(200, seed)))
    assert detector.flagged_at == first


def test_no_verdict_before_there_are_enough_and_equal_distances_are_an_attack() -> None:
    detector = PRADA(0.9, least=50)
    one = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert not detector.observe(one.expand(51, -1, -1, -1), torch.ones(51, 3))
    assert detector.observe(one, torch.ones(1, 3))
    assert detector.flagged_at == 52


def test_what_is_refused() -> None:
    with refused("delta = 1"):
        PRADA(1)
    with refused("least = 2"):
        PRADA(least=2)


@pytest.mark.parametrize("size", [64, 5000])
def test_a_long_stream_is_judged_more_rarely_and_never_later_than_a_hundredth(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = natural(1500)
    more = stepped(2000)
    stream = torch.cat([images, more[0]]), torch.cat([labels, more[1]])
    rarely, often = PRADA(0.95), PRADA(0.95)
    for each, every in ((rarely, 1000), (often, 10**9)):
        monkeypatch.setattr("extraction.defences.prada._EVERY", every)
        for part, shown in zip(stream[0].split(size), stream[1].split(size), strict=True):
            each.observe(part, F.one_hot(shown, 3))
    assert often.flagged_at is not None
    assert rarely.flagged_at is not None
    assert 1000 < often.flagged_at <= rarely.flagged_at <= often.flagged_at * 1.011
    assert rarely._distances == often._distances
