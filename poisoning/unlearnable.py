"""Unlearnable examples: error-minimising noise that makes images useless for training, labels unchanged.

Paper: Huang, Ma, Erfani, Bailey & Wang, "Unlearnable Examples: Making Personal Data Unexploitable", ICLR 2021,
arXiv 2101.04898.

Threat model: whoever releases the images changes them, within ε, before others train on them; he knows the labels they
will get, and neither the network nor the training. The victim trains on what he finds. His model then answers badly on
clean images: noise that makes the training loss small at once leaves nothing to be learnt from the images.

    min_θ (1/N) Σ_i  min_{‖δ_i‖∞ ≤ ε}  loss(f_θ(x_i + δ_i), y_i)

In rounds: M steps of training the surrogate θ on images with the noise of that moment, then T steps of sign descent on
the noise of each image; until the surrogate errs on less than λ of the images. Noise is one a sample (indexed by its
id) or one a class (by its label).

Deviations from the authors' code (HanxunH/Unlearnable-Examples). The surrogate sees noise rounded to whole grey levels,
as the victim will. A class's noise takes a step along the sign of the *sum* of its images' gradients; the authors
average the steps of single images, so that ours is the steeper descent on the same objective. Errors are counted in the
last forward pass over an image's noise, and not in one more over all images. The number of rounds has a limit. Noise is
crafted for the images that are not held out – they have all 50,000 – and, as there, for all of them even where only a
share gets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.functional import cross_entropy

from classifiers.classifier import BackboneFactory, ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.loading import TrainBatches
from datamodules.random import derive, generator
from poisoning.noise import Crafted, NoisePoison, Report, check_positive, descend, input_gradient, shown


class Unlearnable(NoisePoison):
    """Unlearnable examples: error-minimising noise, for each sample or class, and no label touched (Huang et al. 2021).

    Defaults are those of the authors' sample-wise experiments on CIFAR-10; their class-wise ones have `noise_steps` 1,
    `stop_error` 0.1 and `share` 0.2. While it is crafted, sample-wise noise takes four times the memory of the images.

    Args:
        base: The datamodule to rewrite.
        backbone: Makes the surrogate that the noise is trained on.
        kind: ``sample_wise``: noise of its own for each image; ``class_wise``: one for all images of a label.
        epsilon: ε: the most that any pixel of any channel may change, in whole grey levels of 255.
        poison_fraction: The share of the training set that is protected, in [0, 1].
        seed: Of the surrogate, of the order of its batches and of the draw of the images; nothing else determines them.
        surrogate_steps: M: training steps of the surrogate in a round.
        noise_steps: T: steps of descent on the noise of each image in a round.
        step_size: Of those steps, in grey levels.
        stop_error: λ: crafting ends when the surrogate errs on less than this share of the images, each as it was when
            its noise was last trained, in [0, 1).
        rounds: The most rounds there may be.
        share: The share of the images whose noise is trained in a round, in (0, 1]; all have their turn.
        batch_size: Images in a step.
        learning_rate: Of the surrogate: SGD with momentum 0.9 and weight decay 0.0005.

    Raises:
        InputError: If a value is out of its range.
    """

    def __init__(
        self,
        base: ImageDataModule,
        backbone: BackboneFactory,
        kind: Literal["sample_wise", "class_wise"] = "sample_wise",
        epsilon: int = 8,
        poison_fraction: float = 1.0,
        seed: int = 0,
        surrogate_steps: int = 10,
        noise_steps: int = 20,
        step_size: float = 0.8,
        stop_error: float = 0.01,
        rounds: int = 100,
        share: float = 1.0,
        batch_size: int = 512,
        learning_rate: float = 0.1,
    ) -> None:
        super().__init__(base, backbone, epsilon, poison_fraction, seed)
        if kind not in ("sample_wise", "class_wise"):
            raise bad("kind", kind, "choose sample_wise or class_wise")
        check_positive(
            surrogate_steps=surrogate_steps, noise_steps=noise_steps, step_size=step_size, rounds=rounds,
            batch_size=batch_size, learning_rate=learning_rate,
        )  # fmt: skip
        if not 0 <= stop_error < 1:
            raise bad("stop_error", stop_error, "λ, the surrogate's error at which crafting ends, must be in [0, 1)")
        if not 0 < share <= 1:
            raise bad("share", share, "the share of the images in a round must be in (0, 1]")
        self.kind, self.surrogate_steps, self.noise_steps = kind, surrogate_steps, noise_steps
        self.step_size, self.stop_error, self.rounds, self.share = step_size, stop_error, rounds, share
        self.batch_size, self.learning_rate = batch_size, learning_rate

    def settings(self) -> dict[str, object]:
        """All arguments of the crafting."""
        names = ("kind", "surrogate_steps", "noise_steps", "step_size", "stop_error", "rounds", "share", "batch_size")
        return {name: getattr(self, name) for name in (*names, "learning_rate")}

    def craft(self, surrogate: ImageClassifier, train: ImageSet, report: Report) -> Crafted:
        """Train noise and surrogate in turns."""
        device = surrogate.device
        labels = train.labels.to(device)
        index = labels if self.kind == "class_wise" else torch.arange(len(train), device=device)
        rows = self.num_classes if self.kind == "class_wise" else len(train)
        noise = torch.zeros(rows, *train.image_shape, device=device)
        optimizer = torch.optim.SGD(surrogate.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=5e-4)
        batches, parts = self._batches(len(train)), self._parts(len(train))
        missed = torch.ones(len(train), dtype=torch.bool, device=device)  # when each image was last looked at
        error, number = 1.0, 0
        for number in range(1, self.rounds + 1):
            surrogate.train().requires_grad_(True)
            for _ in range(self.surrogate_steps):
                batch = next(batches)
                seen = shown(train.images_at(batch).to(device), noise[index[batch.to(device)]])
                optimizer.zero_grad()
                cross_entropy(surrogate(seen / 255), labels[batch.to(device)]).backward()
                optimizer.step()
            surrogate.eval().requires_grad_(False)
            part = next(parts)
            for done, batch in enumerate(part.split(self.batch_size)):
                images, at = train.images_at(batch).to(device), batch.to(device)
                for _ in range(self.noise_steps):
                    gradient, missed[at] = input_gradient(surrogate, shown(images, noise[index[at]]), labels[at])
                    descend(noise, index[at], gradient, self.step_size, self.epsilon)
                share = min(1.0, (done + 1) * self.batch_size / len(part))
                report((number - 1 + share) / self.rounds, f"round {number}, the surrogate's error {error:.1%}")
            error = float(missed.float().mean())
            if error < self.stop_error:
                break
        else:
            rank_zero_warn(
                f"Unlearnable: after {self.rounds} rounds the surrogate still errs on {error:.1%} of the images; "
                f"λ = {self.stop_error:.1%} was asked for (data.rounds, data.stop_error)"
            )
        return Crafted(noise, index, {"surrogate_error": error, "crafting_rounds": number})

    def _batches(self, n: int) -> Iterator[Tensor]:
        """Shuffled batches of rows without end."""
        batches, epoch = TrainBatches(n, self.batch_size, derive(self.seed, "unlearnable")), 0
        while True:
            batches.set_epoch(epoch)
            yield from batches
            epoch += 1

    def _parts(self, n: int) -> Iterator[Tensor]:
        """The rows whose noise is trained in each round: all of them in turn, in an order that is drawn anew."""
        cycle = 0
        while True:
            order = torch.randperm(n, generator=generator(self.seed, "unlearnable parts", cycle))
            yield from order.split(max(1, round(self.share * n)))
            cycle += 1
