"""Choosing what to poison: the checks and the draw that all attacks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from datamodules.errors import bad
from datamodules.random import generator


def choose(eligible: Tensor, n_train: int, fraction: float, field: str, seed: int) -> Tensor:
    """Draw round(`fraction` · `n_train`) of the eligible rows without replacement.

    Args:
        eligible: bool (N,).
        n_train: The number that the fraction is of, |D_train|.
        fraction: In (0, 1].
        field: Its name, for the error.
        seed: Of the draw; nothing else determines it.

    Returns:
        int64 (M,), ascending rows.

    Raises:
        InputError: If that is none, or more than are eligible; it names the largest fraction possible.
    """
    wanted, there = round(fraction * n_train), int(eligible.sum())
    if wanted < 1:
        raise bad(
            field, fraction, f"rounds to no sample of {n_train}; the smallest that poisons one is {1 / n_train:.2g}"
        )
    if wanted > there:
        largest = math.floor(there / n_train * 1e6) / 1e6
        raise bad(field, fraction, f"asks for {wanted} of {there} eligible images; the largest here is {largest:g}")
    order = torch.randperm(there, generator=generator(seed, "poison"))
    return eligible.nonzero().squeeze(1)[order[:wanted]].sort().values


def check_label(field: str, label: int, num_classes: int) -> None:
    """Refuse a label outside the classes.

    Raises:
        InputError: If it is.
    """
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise bad(field, label, f"there are {num_classes} classes; give one from 0 to {num_classes - 1}")


def check_fraction(field: str, fraction: float) -> None:
    """Refuse a fraction outside (0, 1], NaN included.

    Raises:
        InputError: If it is.
    """
    if not 0 < fraction <= 1:
        raise bad(field, fraction, "the poisoned fraction of the training set must be in (0, 1]")
