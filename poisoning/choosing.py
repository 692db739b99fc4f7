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
        fraction: In [0, 1]; 0 is the control of a sweep, and draws none.
        field: Its name, for the error.
        seed: Of the draw; nothing else determines it.

    Returns:
        int64 (M,), ascending rows.

    Raises:
        InputError: If a fraction above 0 rounds to none, or asks for more than are eligible; it names the least or the
            largest fraction possible.
    """
    wanted, there = round(fraction * n_train), int(eligible.sum())
    if wanted < 1 and fraction > 0:
        least = _smallest(n_train)
        raise bad(field, fraction, f"rounds to no sample of {n_train}; the smallest that poisons one is {least:g}")
    if wanted > there:
        largest = math.floor(there / n_train * 1e6) / 1e6
        raise bad(field, fraction, f"asks for {wanted} of {there} eligible images; the largest here is {largest:g}")
    order = torch.randperm(there, generator=generator(seed, "poison"))
    return eligible.nonzero().squeeze(1)[order[:wanted]].sort().values


def _smallest(n: int) -> float:
    """The smallest number of two digits whose share of n rounds to one: the half of one is rounded to none."""
    digits = 1 - math.floor(math.log10(0.5 / n))
    found: float = math.ceil(0.5 / n * 10.0**digits) / 10.0**digits
    return found if round(found * n) >= 1 else found + 10.0**-digits


def check_label(field: str, label: int, num_classes: int) -> None:
    """Refuse a label outside the classes.

    Raises:
        InputError: If it is.
    """
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise bad(field, label, f"there are {num_classes} classes; give one from 0 to {num_classes - 1}")


def check_fraction(field: str, fraction: float) -> None:
    """Refuse a fraction outside [0, 1], NaN included.

    Raises:
        InputError: If it is.
    """
    if not 0 <= fraction <= 1:
        raise bad(field, fraction, "of the training set; it must be in (0, 1], or 0 for a run without poison")
