"""Jacobian augmentation: few images of the task, and new ones along the directions that the surrogate is sensitive to.

Paper: Papernot et al., "Practical Black-Box Attacks against Machine Learning", ASIA CCS 2017, arXiv 1602.02697, with
its periodic step and reservoir sampling.

Threat model: the attacker has a hundred images or so of the task and may ask for labels.

Each round makes x + λ sign(∂F_ŷ(x)/∂x) of images that were asked about, ŷ being the victim's label and F the surrogate;
only the new ones are asked about. The sign of λ changes every τ rounds; after σ rounds, κ images instead of all are
stepped from, drawn at random. What it gains must be seen beside the same surrogate trained on the first images alone:
`rounds: 1` with a budget of `seeds`.

Deviation: images are bytes, as an oracle takes them, so that the step is rounded to a whole number of 255ths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.random import draw
from extraction.oracle import Oracle
from extraction.rounds import Asked, Rounds

_BATCH = 512


def stepped(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, step: float) -> Tensor:
    """Images moved by one step along the sign of the gradient of their label's logit.

    Args:
        model: Real images (N, C, H, W) in [0, 1] → logits (N, K), each row by itself.
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        step: λ, in units of the whole range of a pixel; below 0: against the gradient.

    Returns:
        uint8 (N, C, H, W).
    """
    made = []
    for part, named in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
        point = (part.float() / 255).requires_grad_()
        own = model(point).gather(1, named[:, None]).sum()
        (slope,) = torch.autograd.grad(own, point)
        made.append((part + round(step * 255) * slope.sign()).clamp(0, 255).to(torch.uint8))
    return torch.cat(made) if made else images


class JacobianAugmentation(Rounds):
    """Few images and what is made from them along the surrogate's gradient (Papernot et al. 2017).

    Args:
        base: The victim's task: its holdout and test set measure the surrogate.
        oracle: See `Extraction`.
        budget: Queries, over all rounds.
        seeds: Images of the pool that are asked about first.
        rounds: How many, the first included; each at most doubles the images, the last ones until the budget is spent.
        step: λ, of the whole range of a pixel, in (0, 1].
        period: τ: after so many rounds the step changes its sign; 0: never.
        reservoir_after: σ: after so many rounds, `reservoir` images are stepped from and not all.
        reservoir: κ.
        pool: Data of images of the same shape, whose labels are not looked at; None: the base's training images.
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
        budget: int = 6400,
        seeds: int = 150,
        rounds: int = 10,
        step: float = 0.1,
        period: int = 3,
        reservoir_after: int = 5,
        reservoir: int = 400,
        pool: ImageDataModule | None = None,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, rounds, pool, temperature, similarity, fidelity_on, seed, samples_budget)
        if not 0 < step <= 1:
            raise bad("step", step, "the step must be in (0, 1] of a pixel's range")
        for field, value in (("seeds", seeds), ("reservoir", reservoir)):
            if value < 1:
                raise bad(field, value, "give their number, 1 or more")
        for field, value in (("period", period), ("reservoir_after", reservoir_after)):
            if value < 0:
                raise bad(field, value, "give a number of rounds, 0 or more")
        self.seeds, self.step, self.period = seeds, step, period
        self.reservoir_after, self.reservoir = reservoir_after, reservoir

    def first(self, pool: ImageSet) -> tuple[Tensor, Tensor]:
        """The seeds, drawn at random."""
        rows = draw(self.seed, "jacobian seeds", 0, pool.ids)[:, 0].argsort(stable=True)[: self.seeds]
        return pool.images_at(rows), pool.ids[rows]

    def choose(self, number: int, model: ImageClassifier, pool: ImageSet, asked: Asked) -> tuple[Tensor, Tensor]:
        """One step from each image that was asked about, or from the reservoir."""
        left = self.affordable - len(asked.ids)
        rows = draw(self.seed, "jacobian reservoir", number, torch.arange(len(asked.ids)))[:, 0].argsort(stable=True)
        late = number > self.reservoir_after
        rows = rows[: min(left, self.reservoir if late else len(rows))]
        sign = -1 if self.period and (number - 1) // self.period % 2 else 1
        parameter = next(model.parameters())
        images = stepped(
            lambda x: model(x.to(parameter.device)).cpu(), asked.images[rows], asked.labels[rows], sign * self.step
        )
        return images, torch.full((len(images),), -1)
