"""Gaussian noise on scores: the plain perturbation that others are compared with.

The noise is new for each query: an attacker who asks n times and takes the mean has 1/√n of it – and pays n times.
"""

from __future__ import annotations

import math

from torch import Tensor

from datamodules.errors import bad
from datamodules.random import uniform
from extraction.defences.perturbation import Perturbation, renormalised


class GaussianNoise(Perturbation):
    """Scores + N(0, σ²), negative ones cut off, renormalised.

    Args:
        sigma: σ, 0 or more, in units of probability.
        seed: Of the noise, with the number of the query.

    Raises:
        InputError: If `sigma` is below 0.
    """

    version = 1

    def __init__(self, sigma: float = 0.1, seed: int = 0) -> None:
        if not sigma >= 0:
            raise bad("sigma", sigma, "it must be 0 or more")
        self.sigma, self.seed = sigma, seed

    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Noisy scores."""
        classes = scores.shape[1]
        # Box and Muller: two uniform numbers make one normal one
        drawn = uniform(self.seed, "gaussian noise", 0, numbers, 2 * classes).to(scores)
        radius = (-2 * (1 - drawn[:, :classes]).log()).sqrt()
        noise = radius * (2 * math.pi * drawn[:, classes:]).cos()
        return renormalised((scores + self.sigma * noise).clamp_min(0))
