"""The base of detectors: what watches one client's queries and says, once and for good, that they are an attack."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Detector(ABC):
    """Watches clients, each with a detector of its own, made by `fresh`."""

    @abstractmethod
    def fresh(self) -> Detector:
        """A detector with the same settings that has seen nothing."""

    @abstractmethod
    def observe(self, images: Tensor, scores: Tensor) -> bool:
        """Look at queries, in order; the verdict is the same however they are cut into batches.

        Args:
            images: uint8 (N, C, H, W).
            scores: What the victim gives them, before any defence: real (N, K).

        Returns:
            Whether the client is flagged: once it is, it stays so.
        """

    @property
    @abstractmethod
    def flagged(self) -> bool:
        """Whether the client is taken for an attacker."""

    @abstractmethod
    def state(self) -> dict[str, float | int | str | None]:
        """What a person wants to see of it: numbers by name."""
