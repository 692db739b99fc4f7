"""Rounding: scores with few decimals (Tramèr et al., "Stealing Machine Learning Models via Prediction APIs", 2016).

Honest users lose at most half a unit of the last decimal; the label can change only between scores that become equal,
where the lower class is named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.errors import bad
from extraction.defences.perturbation import Perturbation


class Rounding(Perturbation):
    """Scores rounded to some decimals, as an interface prints them: they need not sum to 1.

    Args:
        decimals: From 0 to 15.

    Raises:
        InputError: If `decimals` is out of that range.
    """

    version = 1

    def __init__(self, decimals: int = 2) -> None:
        if not 0 <= decimals <= 15:
            raise bad("decimals", decimals, "give a whole number from 0 to 15")
        self.decimals = decimals

    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Rounded scores, on the device and in the type of `scores`."""
        return torch.round(scores, decimals=self.decimals)
