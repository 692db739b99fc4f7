"""Active learning: the surrogate of each round says which images of the pool to ask the victim about next.

Paper: Pal et al., "ActiveThief: Model Extraction Using Active Learning and Unannotated Public Data", AAAI 2020; and the
selection strategies of `extraction.selection`.

Threat model: as of `KnockoffNets`; the pool may be of the task or not, its labels are not known.

Deviations: no answers are held out for validation, since the last epoch counts: all of the budget trains. DeepFool
looks at some thousand images of the pool, drawn at random in each round, since it needs a gradient for each class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad, did_you_mean
from datamodules.imageset import ImageSet
from datamodules.random import draw
from extraction.oracle import Oracle
from extraction.rounds import Asked, Rounds, predicted
from extraction.selection import deepfool, entropy, k_center, margin

STRATEGIES = ("random", "entropy", "margin", "k_center", "dfal", "dfal_k_center")
"""What is asked about: any image; the least certain; the least certain between two; one far from all others in the
surrogate's scores; one near a boundary; far ones among those near a boundary."""

_BATCH = 256


class ActiveLearning(Rounds):
    """Queries chosen by the surrogate in rounds (ActiveThief, Pal et al. 2020).

    Args:
        base: The victim's task: its holdout and test set measure the surrogate.
        oracle: See `Extraction`.
        budget: Queries, over all rounds.
        strategy: One of `STRATEGIES`.
        rounds: How many, the first – which is random – included.
        initial: The share of the budget that the first round spends, in (0, 1).
        pool: Data of images of the same shape, whose labels are not looked at; None: the base's training images.
        candidates: So many images of the pool, drawn in each round, are measured by DeepFool.
        temperature: See `Extraction`.
        similarity: See `Extraction`.
        fidelity_on: See `Extraction`.
        seed: Of the random choices.
        samples_budget: See `Extraction`.

    Raises:
        InputError: If a value is out of its range, or pool, victim and task do not fit together.
    """

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int,
        strategy: str = "entropy",
        rounds: int = 10,
        initial: float = 0.1,
        pool: ImageDataModule | None = None,
        candidates: int = 2000,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, rounds, pool, temperature, similarity, fidelity_on, seed, samples_budget)
        if strategy not in STRATEGIES:
            hint = did_you_mean(strategy, STRATEGIES)
            raise bad("strategy", strategy, f"choose one of {', '.join(STRATEGIES)}{hint}")
        if not 0 < initial < 1:
            raise bad("initial", initial, "the first round's share of the budget must be in (0, 1)")
        if candidates < 1:
            raise bad("candidates", candidates, "give their number, 1 or more")
        self.strategy, self.initial, self.candidates = strategy, initial, candidates

    def first(self, pool: ImageSet) -> tuple[Tensor, Tensor]:
        """A random share of the budget; all of it where there is one round."""
        count = self.affordable if self.rounds == 1 else max(1, round(self.initial * self.affordable))
        rows = self._shuffled(pool, 0)[:count]
        return pool.images_at(rows), pool.ids[rows]

    def choose(self, number: int, model: ImageClassifier, pool: ImageSet, asked: Asked) -> tuple[Tensor, Tensor]:
        """An equal part of what is left, of images that were not asked about."""
        left = self.affordable - len(asked.ids)
        count = -(-left // (self.rounds - number))
        shuffled = self._shuffled(pool, number)
        rows = shuffled[~torch.isin(pool.ids[shuffled], asked.ids)]
        rows = rows[self._best(number, model, pool, rows, asked, min(count, len(rows)))]
        return pool.images_at(rows), pool.ids[rows]

    def _best(
        self, number: int, model: ImageClassifier, pool: ImageSet, rows: Tensor, asked: Asked, count: int
    ) -> Tensor:
        """Which of these rows, shuffled ones, to ask about: int64 (count,)."""
        if self.strategy == "random":
            return torch.arange(count)
        if self.strategy.startswith("dfal"):
            some = rows[: max(self.candidates, count)]
            distances = [
                deepfool(model, pool.images_at(part).to(model.device).float() / 255).cpu()
                for part in some.split(_BATCH)
            ]
            near = torch.cat(distances).argsort(stable=True)
            if self.strategy == "dfal":
                return near[:count]
            near = near[: max(count, len(near) // 2)]  # of the nearer half, those far from each other
            return near[self._far(model, predicted(model, pool, rows[near]), asked, count)]
        scores = predicted(model, pool, rows)
        if self.strategy == "entropy":
            return entropy(scores).argsort(descending=True, stable=True)[:count]
        if self.strategy == "margin":
            return margin(scores).argsort(stable=True)[:count]
        return self._far(model, scores, asked, count)

    def _far(self, model: ImageClassifier, scores: Tensor, asked: Asked, count: int) -> Tensor:
        known = ImageSet(asked.images, asked.labels, asked.ids)
        return k_center(scores, predicted(model, known, torch.arange(len(known))), count)

    def _shuffled(self, pool: ImageSet, number: int) -> Tensor:
        return draw(self.seed, "active learning", number, pool.ids)[:, 0].argsort(stable=True)
