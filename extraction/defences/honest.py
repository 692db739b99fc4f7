"""What a defence costs honest users: accuracy, and how far from the victim's own answers theirs are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from datamodules.imageset import UNLABELLED


class HonestCost(NamedTuple):
    """What users lose, over n images.

    Attributes:
        n: Images.
        accuracy_before: Share that the victim has right.
        accuracy: Share that what is shown has right.
        labels_changed: Share whose label is another one than the victim's.
        l1: The mean L1 distance of the scores shown from the victim's.
        l1_most: The largest.
    """

    n: int
    accuracy_before: float
    accuracy: float
    labels_changed: float
    l1: float
    l1_most: float


def honest_cost(scores: Tensor, shown: Tensor, labels: Tensor) -> HonestCost:
    """Compare what is shown with the victim's own scores.

    Args:
        scores: Before the defence: real (N, K), N above 0.
        shown: After it: real (N, K).
        labels: The true ones: int64 (N,), all known.

    Raises:
        ValueError: If there are no images, or a label is not known.
    """
    if not len(scores) or bool((labels == UNLABELLED).any()):
        raise ValueError("the cost to honest users is measured on labelled images")
    before, after = scores.argmax(1), shown.argmax(1)
    apart = (shown.double() - scores.double()).abs().sum(1)
    return HonestCost(
        len(scores), float((before == labels).double().mean()), float((after == labels).double().mean()),
        float((before != after).double().mean()), float(apart.mean()), float(apart.max()),
    )  # fmt: skip
