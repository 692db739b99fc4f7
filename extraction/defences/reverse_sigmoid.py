"""Reverse sigmoid: scores bent so that very different ones look alike.

Lee et al., "Defending Against Neural Network Model Stealing Attacks Using Deceptive Perturbations", 2019:
y − β (σ(γ σ⁻¹(y)) − ½), renormalised. Of two classes the likelier one stays so for β and γ below 1. Of more it may not
where the oracle is unsure: the map lifts scores near 0 by up to β/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.errors import bad
from extraction.defences.perturbation import Perturbation, renormalised

_EDGE = 1e-7


class ReverseSigmoid(Perturbation):
    """The deceptive perturbation.

    Args:
        beta: β, 0 or more: how much.
        gamma: γ, above 0: how steep.

    Raises:
        InputError: If a number is out of its range.
    """

    version = 1

    def __init__(self, beta: float = 0.7, gamma: float = 0.2) -> None:
        if not beta >= 0:
            raise bad("beta", beta, "it must be 0 or more")
        if not gamma > 0:
            raise bad("gamma", gamma, "it must be above 0")
        self.beta, self.gamma = beta, gamma

    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Bent scores."""
        inner = scores.double().clamp(_EDGE, 1 - _EDGE)
        bent = inner - self.beta * (torch.sigmoid(self.gamma * torch.logit(inner)) - 0.5)
        return renormalised(bent.clamp_min(0)).to(scores.dtype)
