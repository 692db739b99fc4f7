"""The base of defences that perturb scores, and what is common to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Perturbation(ABC):
    """Changes the scores of answers, each by itself."""

    @abstractmethod
    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Perturbed scores.

        Args:
            scores: Probabilities: real (N, K).
            images: uint8 (N, C, H, W): what was asked about.
            numbers: int64 (N,): which query of its client each is, from 0: what noise is drawn by.

        Returns:
            Real (N, K), at least 0. Rows sum to 1 unless the defence says otherwise.
        """


def renormalised(scores: Tensor) -> Tensor:
    """Rows that sum to 1; a row of zeros becomes uniform."""
    total = scores.sum(1, keepdim=True)
    uniform = torch.full_like(scores, 1 / scores.shape[1])
    return torch.where(total > 0, scores / total.clamp_min(torch.finfo(scores.dtype).tiny), uniform)


def in_padded_batches(model: Callable[[Tensor], Tensor], images: Tensor, size: int = 256) -> Tensor:
    """A model's answers in batches of one size, so that none depends on what else is in its batch.

    Args:
        model: Images (B, …) → (B, K).
        images: (N, …).
        size: B; the last batch is filled up with zeros.
    """
    found = []
    for part in images.split(size):
        batch = part.new_zeros(size, *part.shape[1:])
        batch[: len(part)] = part
        found.append(model(batch)[: len(part)])
    return torch.cat(found)
