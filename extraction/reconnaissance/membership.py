"""Membership inference: was this image in the training set? The loss threshold and LiRA, and how they are judged.

Papers: Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", CSF 2018, arXiv
1709.01604 (the loss threshold); Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, arXiv
2112.03570 (LiRA, and judging by the true-positive rate where false positives are rare); Jagielski et al., "Students
Parrot Their Teachers: Membership Inference on Model Distillation", NeurIPS 2023, arXiv 2303.03446 (through a copy).

Threat model: the attacker has candidates with their labels, some of which were training images, and scores of a network
on them. For LiRA he has images of the same kind too, and trains shadow models as the victim was trained, each on a
random half of them. Through a copy, he has no scores of the victim on the candidates: he has a surrogate's, and
imitates the whole – a shadow victim, and a shadow surrogate trained on its answers.

Deviations: each candidate is looked at once, not under several augmentations. The variance that all candidates share is
that round each one's own mean; the authors' code takes it over all confidences, the spread of the means with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.errors import InputError, bad
from datamodules.measures import Interval, wilson
from datamodules.random import generator

_TINY = 1e-45
"""Added to probabilities under a logarithm, as the authors' code does."""


# --- what an attacker looks at ---------------------------------------------------------------------------------------
def log_odds(scores: Tensor, labels: Tensor) -> Tensor:
    """LiRA's confidence φ = log(p / (1 − p)) of the true class, which is nearly normal over shadow models.

    1 − p is summed over the other classes: for the sure it would be 0 otherwise.

    Args:
        scores: Probabilities, real (…, N, K).
        labels: int64 (N,).

    Returns:
        float64 (…, N).
    """
    true, scores = _true(scores, labels), scores.double()
    others = scores.masked_fill(torch.nn.functional.one_hot(labels, scores.shape[-1]).bool(), 0).sum(-1)
    return (true + _TINY).log() - (others + _TINY).log()


def log_likelihood(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy loss, for the loss threshold: more of it, a likelier member.

    Args:
        scores: Probabilities, real (…, N, K).
        labels: int64 (N,).

    Returns:
        float64 (…, N).
    """
    return (_true(scores, labels) + _TINY).log()


def _true(scores: Tensor, labels: Tensor) -> Tensor:
    index = labels.expand(scores.shape[:-1])[..., None]
    return scores.double().gather(-1, index)[..., 0]


# --- LiRA ------------------------------------------------------------------------------------------------------------
def lira_online(observed: Tensor, shadows: Tensor, members: Tensor, own_variance: bool = False) -> Tensor:
    """Log N(φ; μ_in, σ_in²) − log N(φ; μ_out, σ_out²), with Gaussians fitted to shadow models for each candidate.

    Where membership moves φ little, as through a copy, and shadow models are few, μ_in − μ_out is mostly noise, even in
    its sign; `lira_offline`, which knows the sign, is better there.

    Args:
        observed: φ of the attacked network: real (N,).
        shadows: φ of each shadow model: real (S, N).
        members: bool (S, N): which candidates each shadow model was trained on.
        own_variance: Whether each candidate has variances of its own; else all share σ_in and σ_out, which is better
            with few shadow models (Carlini et al.: with fewer than 64).

    Returns:
        float64 (N,): more of it, a likelier member.

    Raises:
        InputError: If shapes do not fit, or a candidate has too few shadow models with or without it.
    """
    inside, outside = (_fit(shadows, part, own_variance) for part in (members, ~members))
    return _log_density(observed, *inside) - _log_density(observed, *outside)


def lira_offline(observed: Tensor, shadows: Tensor, members: Tensor, own_variance: bool = False) -> Tensor:
    """(φ − μ_out) / σ_out: how unusually sure the network is for one that was not trained on the candidate.

    It orders candidates as the paper's 1 − Pr[Z > φ] does, without its rounding to 1. No shadow model needs to have
    been trained on a candidate; those that were are left out.

    Args:
        observed: See `lira_online`.
        shadows: See `lira_online`.
        members: See `lira_online`.
        own_variance: See `lira_online`.

    Returns:
        float64 (N,): more of it, a likelier member.

    Raises:
        InputError: See `lira_online`.
    """
    mean, variance = _fit(shadows, ~members, own_variance)
    return (observed.double() - mean) / variance.sqrt()


def _fit(shadows: Tensor, chosen: Tensor, own_variance: bool) -> tuple[Tensor, Tensor]:
    """Mean (N,) and variance, (N,) or one for all, of the chosen shadow models' confidences."""
    if shadows.ndim != 2 or shadows.shape != chosen.shape:
        shapes = tuple(shadows.shape), tuple(chosen.shape)
        raise InputError(f"shadows {shapes[0]} and members {shapes[1]}: (S, N) is expected of both")
    values, counts = shadows.double(), chosen.sum(0)
    least = 2 if own_variance else 1
    if not bool((counts >= least).all()) or not bool((counts > 1).any()):
        raise bad("shadows", int(counts.min()), f"each candidate needs {least} with it and {least} without; train more")
    mean = torch.where(chosen, values, 0).sum(0) / counts
    squares = torch.where(chosen, values - mean, 0).square().sum(0)
    variance = squares / (counts - 1) if own_variance else squares.sum() / (counts - 1).sum()
    return mean, variance.clamp_min(1e-12)


def _log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -((x.double() - mean).square() / variance + variance.log() + math.log(2 * math.pi)) / 2


# --- how good an attack is -------------------------------------------------------------------------------------------
class Roc(NamedTuple):
    """The points of a ROC curve, from (0, 0) to (1, 1).

    Attributes:
        fpr: float64 (M,), ascending: the share of non-members that are taken for members.
        tpr: float64 (M,): the share of members that are.
    """

    fpr: Tensor
    tpr: Tensor


def roc(scores: Tensor, members: Tensor) -> Roc:
    """The ROC curve, with a point for each different score.

    Args:
        scores: Real (N,).
        members: bool (N,): the truth, of both kinds.

    Raises:
        InputError: If there are no members, or nothing else.
    """
    inside, outside = _sorted(scores, members)
    levels = scores.double().unique().flip(0)
    tpr, fpr = (1 - torch.searchsorted(part, levels) / len(part) for part in (inside, outside))
    zero = torch.zeros(1, dtype=torch.float64)
    return Roc(torch.cat([zero, fpr.double()]), torch.cat([zero, tpr.double()]))


def auroc(scores: Tensor, members: Tensor) -> float:
    """The area under it: how often a member has a higher score than a non-member; of ties, half.

    Args:
        scores: Real (N,).
        members: bool (N,).

    Raises:
        InputError: If there are no members, or nothing else.
    """
    return _auroc(*_sorted(scores, members))


def tpr_at(scores: Tensor, members: Tensor, fpr: float) -> float:
    """The largest share of members that a threshold finds with at most that share of false positives.

    Args:
        scores: Real (N,).
        members: bool (N,).
        fpr: In [0, 1).

    Raises:
        InputError: If there are no members, or nothing else, or `fpr` is out of its range.
    """
    if not 0 <= fpr < 1:
        raise bad("fpr", fpr, "it must be 0 or more and below 1")
    return _tpr_at(*_sorted(scores, members), fpr)


def bootstrapped(
    measure: Callable[[Tensor, Tensor], float], scores: Tensor, members: Tensor, seed: int = 0, resamples: int = 1000
) -> Interval:
    """A measure with the 95 % interval of its bootstrap: members and non-members are drawn again, each on their own.

    A threshold for a false-positive rate is itself estimated, from the few most suspicious non-members; Wilson's
    interval of the members found would leave that out. It covers the draw of candidates, for one victim and one set of
    shadow models: how much victims differ, it does not know.

    Args:
        measure: Of (scores, members), such as `auroc`.
        scores: Real (N,).
        members: bool (N,).
        seed: Of the draws.
        resamples: How many.
    """
    inside, outside = _sorted(scores, members)
    private = generator(seed, "bootstrap")
    truth = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).bool()
    found = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        drawn = [part[torch.randint(len(part), (len(part),), generator=private)] for part in (inside, outside)]
        found[number] = measure(torch.cat(drawn), truth)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = measure(scores, members)
    if low == high and 0 <= value <= 1:  # members and others apart in every draw: that is no certainty
        n = min(len(inside), len(outside))
        low, high = wilson(value * n, n).low, wilson(value * n, n).high
    return Interval(value, len(scores), low, high, "candidates")


def _sorted(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of members and of the others, ascending."""
    inside, outside = scores[members].double().sort().values, scores[~members].double().sort().values
    if not len(inside) or not len(outside):
        raise InputError(f"members: {len(inside)} members and {len(outside)} others; some of both are needed")
    if bool(scores.isnan().any()):
        raise InputError("scores: some are no numbers")
    return inside, outside


def _auroc(inside: Tensor, outside: Tensor) -> float:
    below, up_to = (torch.searchsorted(outside, inside, right=right) for right in (False, True))
    return float((below + up_to).sum()) / (2 * len(inside) * len(outside))


def _tpr_at(inside: Tensor, outside: Tensor, fpr: float) -> float:
    allowed = math.floor(fpr * len(outside) + 1e-9)  # so many others may be above the threshold
    threshold = outside[len(outside) - 1 - allowed]
    return float((inside > threshold).double().mean())
