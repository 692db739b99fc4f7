"""Gradient matching (Witches' Brew): poisons on which training pulls the network as the target's wrong label would.

Paper: Geiping, Fowl, Huang, Czaja, Taylor, Moeller & Goldstein, "Witches' Brew: Industrial Scale Data Poisoning via
Gradient Matching", ICLR 2021, arXiv 2009.02276. Code: github.com/JonasGeiping/poisoning-gradient-matching.

Threat model: the victim trains a new network from scratch. The attacker knows its architecture and augmentation but not
its weights; he has a network that he trained himself on clean data. Where the mean gradient of the poisons points as
the gradient of the target with the label wanted does, a step that lowers the loss of the first lowers that of the
second – at the attacker's network, and as it turns out along the victim's training, too.

As the authors have it: the sign of the gradient goes into Adam; its rate falls tenfold at 3/8, 5/8 and 7/8 of the
steps; the start is normal noise of deviation ε, cut at ±ε; BatchNorm in evaluation mode; all of a target's poisons in
one gradient; several restarts, of which the one with the lowest matching loss is kept – success is never looked at.

Deviations: the authors optimise normalised pixels at a rate of 0.1; ours are in [0, 1], where 0.025 is the same for
their standard deviation of 0.25. Their augmentation shifts by fractions of a pixel and blurs; ours is crop and flip as
the victim does it. They compare restarts by the loss of the last step's batch, before the last projection; we by that
of the finished, rounded poisons under one and the same augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, pad

from classifiers.classifier import BackboneFactory, ImageClassifier
from datamodules.augment import FlipCrop
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.random import draw, generator
from poisoning.choosing import check_fraction, choose
from poisoning.targets import Crafted, Report, TargetedPoisons, box, check_epsilon, rounded

MILESTONES = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the steps after which the rate falls tenfold."""


class Matched(NamedTuple):
    """Finished poisons of T targets.

    Attributes:
        images: uint8 (T, P, C, H, W).
        mismatch: float32 (T,): 1 − cosine, of the rounded poisons.
        before: float32 (T,): that of the bases.
        restarts: float32 (T, R): that of each restart.
    """

    images: Tensor
    mismatch: Tensor
    before: Tensor
    restarts: Tensor


# --- augmentation ----------------------------------------------------------------------------------------------------
def flip_crop(augment: FlipCrop, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """What `augment` does, with a gradient: `FlipCrop` itself cuts windows in a way that has none worth the name.

    Args:
        augment: Padding, and whether to flip.
        images: float32 (M, C, H, W).
        ids: int64 (M,).
        seed: Of the draw.
        epoch: Of the draw.

    Returns:
        (M, C, H, W), the values that ``augment(images, ids, seed, epoch)`` gives.
    """
    height, width = images.shape[2:]
    numbers = draw(seed, "flip-crop", epoch, ids, columns=3)
    offset = (numbers[:, 1:] * (2 * augment.padding + 1)) >> 31
    rows = torch.arange(height, device=images.device) + offset[:, :1]  # (M, H), in the padded image
    columns = torch.arange(width, device=images.device) + offset[:, 1:]
    if augment.flip:
        columns = torch.where(numbers[:, :1] < 2**30, columns.flip(1), columns)
    padded = pad(images, (augment.padding,) * 4)
    at = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    at = at.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, at).view_as(images)


# --- matching --------------------------------------------------------------------------------------------------------
def gradients(network: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the mean cross-entropy of each group of images, with respect to all weights not frozen.

    Args:
        network: In evaluation mode.
        images: float32 (T, P, C, H, W) in [0, 1]; gradients can be taken of the result with respect to them.
        labels: int64 (T, P).

    Returns:
        For each weight a tensor (T, …).
    """
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    if len(images) == 1:  # a group alone is up to twice as fast without vmap
        loss = cross_entropy(network(images[0]), labels[0])
        return [each[None] for each in torch.autograd.grad(loss, list(weights.values()), create_graph=True)]

    def loss_of(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, weights, (images,)), labels)

    detached = {name: weight.detach() for name, weight in weights.items()}
    return list(vmap(grad(loss_of), in_dims=(None, 0, 0))(detached, images, labels).values())


def mismatch(poison: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """1 − the cosine between two gradients over all weights: (T,), in [0, 2].

    Args:
        poison: For each weight a tensor (T, …).
        wanted: The same.
    """
    product, one, other = (
        torch.stack([(left * right).flatten(1).sum(1) for left, right in zip(first, second, strict=True)]).sum(0)
        for first, second in ((poison, wanted), (poison, poison), (wanted, wanted))
    )
    return 1 - product / (one.sqrt() * other.sqrt())


def match(
    networks: Sequence[nn.Module],
    targets: Tensor,
    labels: Tensor,
    bases: Tensor,
    ids: Tensor,
    *,
    epsilon: int,
    iterations: int = 250,
    step: float = 0.025,
    restarts: int = 8,
    augment: FlipCrop | None = None,
    seed: int = 0,
    together: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Matched:
    """Craft the poisons of all targets.

    Args:
        networks: The attacker's, in evaluation mode: images in [0, 1] → logits. Weights that are frozen do not count:
            with all but the last layer frozen, the attack is one on transfer learning.
        targets: uint8 (T, C, H, W).
        labels: int64 (T,): what each target is to be taken for; its poisons have that label.
        bases: uint8 (T, P, C, H, W): what the poisons stay near.
        ids: int64 (T, P): by which noise and augmentation are drawn.
        epsilon: In whole grey levels of 255.
        iterations: Steps of each restart.
        step: The rate at first, for pixels in [0, 1].
        restarts: How often to begin anew.
        augment: What the victim is expected to do to its training images; None: nothing.
        seed: Of noise and augmentation.
        together: Targets whose gradients are taken in one batched computation. That pays on a GPU, where the poisons
            of one are not enough to do; on a CPU one at a time is up to twice as fast. It changes nothing else.
        progress: Called with the share of the steps that are done.

    Returns:
        The finished poisons: for each target those of its best restart, by the loss.

    Raises:
        InputError: If a number is out of its range.
        ValueError: If shapes do not fit, or a network is in training mode.
    """
    _check(networks, targets, labels, bases, ids, epsilon)
    check_numbers(iterations, step, restarts, together)
    found: list[Matched] = []
    for part in torch.arange(len(targets)).split(together):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        recipe = _Recipe(networks, targets[rows], labels[rows], bases[rows], ids[rows], epsilon, augment, seed)

        def done(steps: int, rows: slice = rows) -> None:
            if progress is not None:
                share = steps / (iterations * restarts)
                progress((rows.start + (rows.stop - rows.start) * share) / len(targets))

        made = [recipe.brew(number, iterations, step, done) for number in range(restarts)]
        last = iterations * restarts  # an augmentation that no step has seen, the same for all
        losses = torch.stack([recipe.loss(each, last).detach() for each in made], dim=1)
        best = losses.argmin(1)
        images = torch.stack(made, dim=1)[torch.arange(len(best), device=best.device), best]
        before = recipe.loss(bases[rows].float() / 255, last).detach()
        chosen = losses.gather(1, best[:, None]).squeeze(1)
        found.append(Matched(rounded(images), chosen, before, losses))
    return Matched(*(torch.cat(each) for each in zip(*found, strict=True)))


class _Recipe:
    """The targets of one computation: their poisons' loss, and one restart."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        targets: Tensor,
        labels: Tensor,
        bases: Tensor,
        ids: Tensor,
        epsilon: int,
        augment: FlipCrop | None,
        seed: int,
    ) -> None:
        self.networks, self.ids, self.augment, self.seed = networks, ids, augment, seed
        self.epsilon, self.bases = epsilon, bases
        self.low, self.high = box(bases, epsilon)
        self.labels = labels[:, None].expand(ids.shape)
        aims = [gradients(network, targets[:, None].float() / 255, labels[:, None]) for network in networks]
        self.aims = [[each.detach() for each in aim] for aim in aims]

    def loss(self, images: Tensor, epoch: int) -> Tensor:
        """The mismatch of poisons (T, P, C, H, W) under the augmentation of an epoch, the mean over networks: (T,)."""
        if self.augment is not None:
            seen = flip_crop(self.augment, images.flatten(0, 1), self.ids.flatten(), self.seed, epoch)
            images = seen.view_as(images)
        losses = [
            mismatch(gradients(network, images, self.labels), aim)
            for network, aim in zip(self.networks, self.aims, strict=True)
        ]
        return torch.stack(losses).mean(0)

    def brew(self, number: int, iterations: int, step: float, done: Callable[[int], None]) -> Tensor:
        """The poisons of restart `number`, in whole grey levels: float32 (T, P, C, H, W)."""
        noise = [
            torch.randn(each.shape, generator=generator(self.seed, f"gradient matching {int(ids[0])}", number))
            for each, ids in zip(self.bases, self.ids, strict=True)
        ]
        start = self.bases.float() / 255 + torch.stack(noise).to(self.bases.device) * (self.epsilon / 255)
        x = start.clamp(self.low, self.high).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=step)
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = step * 0.1 ** sum(iteration >= int(m * iterations) for m in MILESTONES)
            # a sum, not a mean: each target's poisons move as they would alone
            (slope,) = torch.autograd.grad(self.loss(x, number * iterations + iteration).sum(), x)
            x.grad = slope.sign()
            optimizer.step()
            x.data.clamp_(self.low, self.high)
            done(number * iterations + iteration + 1)
        return rounded(x.detach()).float() / 255


def check_numbers(iterations: int, step: float, restarts: int, together: int = 1) -> None:
    """Refuse numbers with which nothing can be crafted.

    Raises:
        InputError: If one is out of its range.
    """
    for field, number in (("iterations", iterations), ("restarts", restarts), ("together", together)):
        if number < 1:
            raise bad(field, number, "it must be 1 or more")
    if not step > 0:
        raise bad("step", step, "the rate of the crafting must be above 0")


def _check(
    networks: Sequence[nn.Module], targets: Tensor, labels: Tensor, bases: Tensor, ids: Tensor, epsilon: int
) -> None:
    fits = targets.ndim == 4 and bases.ndim == 5 and len(targets) == len(bases) > 0 and bases.shape[1] > 0
    fits = fits and bases.shape[2:] == targets.shape[1:] and targets.dtype == bases.dtype == torch.uint8
    if not fits or labels.shape != targets.shape[:1] or ids.shape != bases.shape[:2]:
        raise ValueError(
            f"targets {targets.dtype} {tuple(targets.shape)}, labels {tuple(labels.shape)}, bases {bases.dtype} "
            f"{tuple(bases.shape)} and ids {tuple(ids.shape)}: uint8 (T, C, H, W), (T,), uint8 (T, P, C, H, W) and "
            "(T, P) expected"
        )
    check_epsilon(epsilon)
    for network in networks:
        if network.training:
            raise ValueError(
                f"{type(network).__name__}: crafting needs evaluation mode; BatchNorm would mix the poisons"
            )


class GradientMatching(TargetedPoisons):
    """Gradient matching (Witches' Brew): poisons that train the network as a mislabelled target would (Geiping 2021).

    Args:
        base: See `TargetedPoisons`.
        weights: See `TargetedPoisons`: networks of the victim's architecture and classes, trained on clean data.
        target_label: See `TargetedPoisons`.
        base_label: See `TargetedPoisons`.
        target: See `TargetedPoisons`.
        poison_fraction: The share of the training set that is poisoned, all of it from the base class; 0.01 is the
            paper's, 0 a control without poison.
        epsilon: See `TargetedPoisons`; 16 is the paper's, 8 the benchmark's.
        iterations: Steps of each restart.
        step: The rate at first, for pixels in [0, 1].
        restarts: How often to begin anew; the one that matches best is kept.
        augment: What the victim is expected to do to its training images; None: nothing.
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
        poison_fraction: float = 0.01,
        epsilon: int = 16,
        iterations: int = 250,
        step: float = 0.025,
        restarts: int = 8,
        augment: FlipCrop | None = None,
        seed: int = 0,
        backbone: BackboneFactory | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(base, weights, target_label, base_label, target, epsilon, seed, backbone, name)
        check_fraction("poison_fraction", poison_fraction)
        check_numbers(iterations, step, restarts)
        self.poison_fraction = poison_fraction
        self.iterations = iterations
        self.step = step
        self.restarts = restarts
        self.augmentation = augment

    def bases(self, train: ImageSet) -> Tensor:
        """Training images of the base class, drawn by the seed."""
        return choose(train.labels == self.base_label, len(train), self.poison_fraction, "poison_fraction", self.seed)

    def craft(
        self, networks: Sequence[ImageClassifier], target: Tensor, bases: Tensor, ids: Tensor, progress: Report
    ) -> Crafted:
        """See `match`."""
        for network, path in zip(networks, self.weights, strict=True):
            if network.num_classes != self.num_classes:
                raise bad(
                    "weights", str(path), f"made for {network.num_classes} classes, and there are {self.num_classes}"
                )
        made = match(
            [network.requires_grad_(True) for network in networks],
            target[None],
            torch.tensor([self.base_label], device=target.device),
            bases[None],
            ids[None],
            epsilon=self.epsilon,
            iterations=self.iterations,
            step=self.step,
            restarts=self.restarts,
            augment=self.augmentation,
            seed=self.seed,
            progress=progress,
        )
        facts = {"gradient_mismatch": float(made.mismatch), "gradient_mismatch_before": float(made.before)}
        facts |= {"gradient_mismatch_worst_restart": float(made.restarts.max())}
        return Crafted(made.images[0], facts)

    def describe(self) -> dict[str, object]:
        """Steps, their size, restarts and the augmentation expected."""
        expected = self.augmentation and [self.augmentation.padding, self.augmentation.flip]
        return {"iterations": self.iterations, "step": self.step, "restarts": self.restarts, "augment": expected}
