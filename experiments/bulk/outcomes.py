"""What became of targets under triggerless attacks, and what that comes to: a table of trials, and a row."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.imageset import ImageSet
from datamodules.measures import clustered


@dataclass(frozen=True)
class Trials:
    """T targets and their bases.

    Attributes:
        targets: int64 (T,): rows of the test set.
        wanted: int64 (T,): the label that each is to get, which is not its own.
        bases: int64 (T, P): rows of the training set, of that label.
    """

    targets: Tensor
    wanted: Tensor
    bases: Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of one target.

    Attributes:
        victim: Number of the victim; targets of one victim are not independent.
        success: It got the class of its bases.
        right: It got its own.
        success_before: It gets the class of its bases from the victim's twin, trained with the same seed and no poison.
        right_before: It gets its own from that.
        confidence: The probability of the class of its bases.
        hits: Other test images that got their own class.
        cases: Of these.
    """

    victim: int
    success: bool
    right: bool
    success_before: bool
    right_before: bool
    confidence: float
    hits: int
    cases: int


def outcome(victim: int, answers: Tensor, before: Tensor, test: ImageSet, drawn: Trials, number: int) -> Outcome:
    """What became of target `number`.

    Args:
        victim: Number of the victim.
        answers: Its probabilities for all test images: real (M, K).
        before: Those of its twin without poisons: real (M, K).
        test: The test set.
        drawn: The trials.
        number: Of the target.
    """
    row, wanted = int(drawn.targets[number]), int(drawn.wanted[number])
    found = answers.argmax(1).cpu()
    right = found == test.labels
    own, earlier = int(test.labels[row]), int(before[row].argmax())
    return Outcome(
        victim=victim,
        success=int(found[row]) == wanted,
        right=bool(right[row]),
        success_before=earlier == wanted,
        right_before=earlier == own,
        confidence=float(answers[row, wanted]),
        hits=int(right.sum()) - int(right[row]),
        cases=len(right) - 1,
    )


def report(
    folder: Path,
    train: ImageSet,
    test: ImageSet,
    drawn: Trials,
    made: Tensor,
    left: Tensor,
    outcomes: Sequence[Outcome],
    seconds: tuple[float, float],
) -> dict[str, Any]:
    """Write ``trials.csv``, and sum up.

    Args:
        folder: Where the table goes.
        train: The clean training set.
        test: The test set.
        drawn: T trials.
        made: Their poisons: uint8 (T, P, C, H, W).
        left: What each attack's objective came to, as a share: real (T,).
        outcomes: T.
        seconds: Of crafting and of training.

    Returns:
        The row. Shares of targets have intervals over victims, see `clustered`. ``target_success_before`` is the floor:
        the same targets, the same victims without poisons. ``target_success_if_right``: among targets that these get
        right. ``poisoned_share``: of the set that a victim sees, with the poisons of all its targets (the most, if
        victims have different numbers of them); ``poisoned_share_per_target``: of each target's poisons alone.
    """
    bases = train.images_at(drawn.bases.flatten()).view_as(made)
    change = (made.to(torch.int16) - bases).abs()
    largest = change.flatten(1).amax(1).tolist()
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["target_id", "target_label", "base_label", "victim", "success", "right", "success_before", "right_before",
             "confidence", "accuracy", "epsilon_reached", "objective_left"]
        )  # fmt: skip
        for number, each in enumerate(outcomes):
            row = int(drawn.targets[number])
            writer.writerow(
                [int(test.ids[row]), int(test.labels[row]), int(drawn.wanted[number]), each.victim,
                 *(int(part) for part in (each.success, each.right, each.success_before, each.right_before)),
                 f"{each.confidence:.6g}", f"{each.hits / each.cases:.6g}", largest[number],
                 f"{float(left[number]):.6g}"]
            )  # fmt: skip
    confidence = torch.tensor([each.confidence for each in outcomes])
    victims = list(dict.fromkeys(each.victim for each in outcomes))
    most = max(sum(each.victim == victim for each in outcomes) for victim in victims)
    return {
        "target_success": _over_victims(outcomes, lambda each: each.success),
        "target_success_if_right": _over_victims(
            [each for each in outcomes if each.right_before], lambda each: each.success
        ),
        "target_success_before": _over_victims(outcomes, lambda each: each.success_before),
        "target_right": _over_victims(outcomes, lambda each: each.right),
        "target_right_before": _over_victims(outcomes, lambda each: each.right_before),
        "victims": len(victims),
        "confidence_median": float(confidence.median()),
        "confidence_mean": float(confidence.mean()),
        "clean_accuracy": sum(each.hits for each in outcomes) / sum(each.cases for each in outcomes),
        "poisons": made.shape[1],
        "poisoned_share": most * made.shape[1] / len(train),
        "poisoned_share_per_target": made.shape[1] / len(train),
        "epsilon_reached": int(change.max()),
        "objective_left": float(left.mean()),
        "crafting_seconds": round(seconds[0], 1),
        "training_seconds": round(seconds[1], 1),
    }


def _over_victims(outcomes: Sequence[Outcome], hit: Callable[[Outcome], bool]) -> dict[str, Any]:
    """The share of targets for which something holds."""
    groups: dict[int, list[bool]] = {}
    for each in outcomes:
        groups.setdefault(each.victim, []).append(hit(each))
    hits, cases = ([count(each) for each in groups.values()] for count in (sum, len))
    return asdict(clustered(hits, cases, "targets"))
