"""Bullseye Polytope: poisons whose mean feature is the target's.

Paper: Aghakhani, Meng, Wang, Kruegel & Vigna, "Bullseye Polytope: A Scalable Clean-Label Poisoning Attack with Improved
Transferability", Euro S&P 2021, arXiv 2005.00191. Code: github.com/ucsb-seclab/BullseyePoison, and as a part of
github.com/aks2203/poisoning-benchmark, whose protocol is followed here: the bases are training images and the poisons
take their place.

Threat model: the victim trains a last layer on the features of a network that the attacker has, or that is like his. A
linear layer that gives all poisons their label gives it to their mean as well, and so to a target that lies there; with
the target in the middle of the polytope, and not somewhere inside as in Convex Polytope, it stays there in networks
that the attacker does not have.

Deviations: the authors optimise normalised pixels with Adam at 0.04; ours are in [0, 1], where a step of 0.008 is the
same for their standard deviation of 0.2. Poisons are bounded by whole grey levels, so that rounding cannot break ε (the
benchmark allows 9/255 instead). Only features are matched: their variant for victims that train all layers, which
matches several layers, is left out, and so are repeated passes through networks with dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from classifiers.classifier import BackboneFactory, ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from poisoning.choosing import choose
from poisoning.targets import Crafted, Report, TargetedPoisons, box, check_epsilon, rounded

Features = Callable[[Tensor], Tensor]
"""Images (M, C, H, W) in [0, 1] → (M, F), each row by itself."""


class Centred(NamedTuple):
    """Finished poisons of T targets.

    Attributes:
        images: uint8 (T, P, C, H, W).
        distance: float32 (T,): `off_centre` of the rounded poisons.
        before: float32 (T,): that of the bases.
    """

    images: Tensor
    distance: Tensor
    before: Tensor


def off_centre(extractors: Sequence[Features], poisons: Tensor, aims: Sequence[Tensor]) -> Tensor:
    """How far the mean feature of the poisons is from the target's: ‖mean f(p) − f(t)‖ / ‖f(t)‖, over all extractors.

    Args:
        extractors: m of them.
        poisons: float32 (T, P, C, H, W) in [0, 1].
        aims: m tensors (T, F): the targets' features.

    Returns:
        (T,), the mean over the extractors.
    """
    count, each = poisons.shape[:2]
    total = torch.zeros(count, device=poisons.device)
    for features, aim in zip(extractors, aims, strict=True):
        centre = features(poisons.flatten(0, 1)).unflatten(0, (count, each)).mean(1)
        total = total + (centre - aim).norm(dim=1) / aim.norm(dim=1)
    return total / len(extractors)


def centre(
    extractors: Sequence[Features],
    targets: Tensor,
    bases: Tensor,
    *,
    epsilon: int,
    iterations: int = 1200,
    step: float = 0.008,
    together: int = 16,
    progress: Callable[[float], None] | None = None,
) -> Centred:
    """Craft the poisons of all targets: their mean feature at the target's, each pixel within ε of its base.

    Args:
        extractors: Features of the attacker's networks, in evaluation mode.
        targets: uint8 (T, C, H, W).
        bases: uint8 (T, P, C, H, W): where the poisons start, and what they stay near.
        epsilon: In whole grey levels of 255.
        iterations: Steps of Adam; 1,200 are the benchmark's, the paper took 4,000.
        step: Its learning rate, for pixels in [0, 1].
        together: Targets whose poisons go through the networks in one batch; it is a matter of memory alone.
        progress: Called with the share of the steps that are done.

    Returns:
        The finished poisons: those of the last step, as the authors have it.

    Raises:
        InputError: If a number is out of its range.
        ValueError: If shapes do not fit.
    """
    _check(targets, bases, epsilon, iterations, step, together)
    low, high = box(bases, epsilon)
    found: list[Centred] = []
    for part in torch.arange(len(targets)).split(together):
        first, last = int(part[0]), int(part[-1]) + 1
        aims = [_features(features, targets[first:last].float() / 255) for features in extractors]
        start = bases[first:last].float() / 255
        x = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=step)
        for iteration in range(iterations):
            # a sum, not a mean: each target's poisons move as they would alone
            (x.grad,) = torch.autograd.grad(off_centre(extractors, x, aims).sum(), x)
            optimizer.step()
            x.data.clamp_(low[first:last], high[first:last])
            if progress is not None:
                progress((first + (last - first) * (iteration + 1) / iterations) / len(targets))
        images = rounded(x.detach())
        with torch.no_grad():
            after = off_centre(extractors, images.float() / 255, aims)
            found.append(Centred(images, after, off_centre(extractors, start, aims)))
    return Centred(*(torch.cat(each) for each in zip(*found, strict=True)))


def _features(features: Features, images: Tensor) -> Tensor:
    with torch.no_grad():
        return features(images)


def _check(targets: Tensor, bases: Tensor, epsilon: int, iterations: int, step: float, together: int) -> None:
    fits = targets.ndim == 4 and bases.ndim == 5 and len(targets) == len(bases) > 0 and bases.shape[1] > 0
    if not fits or bases.shape[2:] != targets.shape[1:] or bases.dtype != torch.uint8 or targets.dtype != torch.uint8:
        raise ValueError(
            f"targets {targets.dtype} {tuple(targets.shape)} and bases {bases.dtype} {tuple(bases.shape)}: "
            "uint8 (T, C, H, W) and (T, P, C, H, W) expected"
        )
    check_epsilon(epsilon)
    for field, number in (("iterations", iterations), ("together", together)):
        if number < 1:
            raise bad(field, number, "it must be 1 or more")
    if not step > 0:
        raise bad("step", step, "the learning rate of the crafting must be above 0")


class BullseyePolytope(TargetedPoisons):
    """Bullseye Polytope: poisons round the target in feature space, their mean on it (Aghakhani et al. 2021).

    Args:
        base: See `TargetedPoisons`.
        weights: See `TargetedPoisons`; the networks' features are used, whatever their classes.
        target_label: See `TargetedPoisons`.
        base_label: See `TargetedPoisons`.
        target: See `TargetedPoisons`.
        poisons: How many; 25 are the benchmark's, 0 a control without poison.
        epsilon: See `TargetedPoisons`; 8 is the benchmark's, the paper took 25.5.
        iterations: Steps of Adam.
        step: Its learning rate, for pixels in [0, 1].
        seed: See `TargetedPoisons`.
        backbone: See `TargetedPoisons`.
        name: See `TargetedPoisons`.

    Raises:
        InputError: If a value is out of its range, there are fewer bases than poisons, or weights do not fit.
    """

    def __init__(
        self,
        base: ImageDataModule,
        weights: str | list[str],
        target_label: int,
        base_label: int,
        target: int | None = None,
        poisons: int = 25,
        epsilon: int = 8,
        iterations: int = 1200,
        step: float = 0.008,
        seed: int = 0,
        backbone: BackboneFactory | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(base, weights, target_label, base_label, target, epsilon, seed, backbone, name)
        if poisons < 0:
            raise bad("poisons", poisons, "it must be 1 or more, or 0 for a run without poison")
        if iterations < 1:
            raise bad("iterations", iterations, "it must be 1 or more")
        if not step > 0:
            raise bad("step", step, "the learning rate of the crafting must be above 0")
        self.poisons = poisons
        self.iterations = iterations
        self.step = step

    def bases(self, train: ImageSet) -> Tensor:
        """Training images of the base class, drawn by the seed."""
        eligible = train.labels == self.base_label
        there = int(eligible.sum())
        if self.poisons > there:
            raise bad("poisons", self.poisons, f"there are {there} training images of class {self.base_label}")
        return choose(eligible, len(train), self.poisons / len(train), "poisons", self.seed)

    def craft(
        self, networks: Sequence[ImageClassifier], target: Tensor, bases: Tensor, ids: Tensor, progress: Report
    ) -> Crafted:
        """See `centre`."""
        made = centre(
            [network.features for network in networks],
            target[None],
            bases[None],
            epsilon=self.epsilon,
            iterations=self.iterations,
            step=self.step,
            progress=progress,
        )
        facts = {"off_centre": float(made.distance), "off_centre_before": float(made.before)}
        return Crafted(made.images[0], facts)

    def describe(self) -> dict[str, object]:
        """Steps and their size."""
        return {"iterations": self.iterations, "step": self.step}
