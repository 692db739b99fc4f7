"""Adversarial poisons: training images turned into adversarial examples of another class, labels unchanged.

Paper: Fowl, Goldblum, Chiang, Geiping, Czaja & Goldstein, "Adversarial Examples Make Strong Poisons", NeurIPS 2021,
arXiv 2106.10807; the class-targeted attack.

Threat model: whoever releases the images changes them within ε before others train on them. He trains a surrogate of
his own on the clean images, and moves each image until the surrogate sees class y + 1 in it; the label stays y. The
victim learns the other class's non-robust features under this label, and is wrong on clean images.

Deviations from the authors' code (lhfowl/adversarial_poisons). It starts from random noise, restarts eight times and
keeps the set of least loss, with random crops and flips inside the attack; ours starts from the image itself, once, and
augments only the surrogate's training. Noise is seen by the surrogate in whole grey levels, as the victim will see it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from classifiers.classifier import BackboneFactory, ImageClassifier
from classifiers.schedules import OneCycle
from datamodules.augment import Augmentation
from datamodules.datamodule import ImageDataModule
from datamodules.imageset import ImageSet
from datamodules.loading import TrainBatches
from datamodules.random import derive
from poisoning.noise import Crafted, NoisePoison, Report, check_positive, descend, input_gradient, shown


class AdversarialPoison(NoisePoison):
    """Adversarial poisons: images moved towards the next class within ε, labels left, to spoil training (Fowl 2021).

    Defaults are the paper's for CIFAR-10: 250 steps of ε/20, a surrogate trained for 40 epochs.

    Args:
        base: The datamodule to rewrite.
        backbone: Makes the surrogate.
        epsilon: ε: the most that any pixel of any channel may change, in whole grey levels of 255.
        poison_fraction: The share of the training set that is changed, in [0, 1].
        seed: Of the surrogate, of the order of its batches and of the draw of the images; nothing else determines them.
        surrogate_epochs: Of the surrogate's training on the clean images: SGD with momentum 0.9 and weight decay
            0.0005, the rate rising for a fifth of it and then falling to zero.
        iterations: Steps of descent on each image.
        step_size: Of those steps, in grey levels.
        batch_size: Images in a step of either.
        learning_rate: The surrogate's highest.
        augment: Changes the surrogate's training batches; None: nothing does. The base's is not used: it has the
            training's seed.

    Raises:
        InputError: If a value is out of its range.
    """

    def __init__(
        self,
        base: ImageDataModule,
        backbone: BackboneFactory,
        epsilon: int = 8,
        poison_fraction: float = 1.0,
        seed: int = 0,
        surrogate_epochs: int = 40,
        iterations: int = 250,
        step_size: float = 0.4,
        batch_size: int = 128,
        learning_rate: float = 0.1,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__(base, backbone, epsilon, poison_fraction, seed)
        check_positive(
            surrogate_epochs=surrogate_epochs, iterations=iterations, step_size=step_size, batch_size=batch_size,
            learning_rate=learning_rate,
        )  # fmt: skip
        self.surrogate_epochs, self.iterations, self.step_size = surrogate_epochs, iterations, step_size
        self.batch_size, self.learning_rate, self.augmentation = batch_size, learning_rate, augment

    def settings(self) -> dict[str, object]:
        """All arguments of the crafting."""
        names = ("surrogate_epochs", "iterations", "step_size", "batch_size", "learning_rate")
        augmentation = self.augmentation
        described = None if augmentation is None else [type(augmentation).__qualname__, vars(augmentation)]
        return {**{name: getattr(self, name) for name in names}, "augment": described}

    def craft(self, surrogate: ImageClassifier, train: ImageSet, report: Report) -> Crafted:
        """Train the surrogate, then move each image towards the class after its own."""
        device = surrogate.device
        labels = train.labels.to(device)
        self._train(surrogate, train, report)
        surrogate.eval().requires_grad_(False)
        noise = torch.zeros(len(train), *train.image_shape, device=device)
        index, correct, fooled = torch.arange(len(train), device=device), 0, 0
        for batch in torch.arange(len(train)).split(self.batch_size):
            images, at = train.images_at(batch).to(device), batch.to(device)
            correct += int((surrogate(images).argmax(1) == labels[at]).sum())
            wanted = (labels[at] + 1) % self.num_classes
            for _ in range(self.iterations):
                gradient, _ = input_gradient(surrogate, shown(images, noise[at]), wanted)
                descend(noise, at, gradient, self.step_size, self.epsilon)
            fooled += int((surrogate(shown(images, noise[at]) / 255).argmax(1) == wanted).sum())
            done = (int(batch[-1]) + 1) / len(train)
            report(0.5 + 0.5 * done, f"images moved, {fooled / (int(batch[-1]) + 1):.1%} seen as the next class")
        facts = {"surrogate_error": 1 - correct / len(train), "surrogate_fooled": fooled / len(train)}
        return Crafted(noise, index, facts)

    def _train(self, surrogate: ImageClassifier, train: ImageSet, report: Report) -> None:
        device, seed = surrogate.device, derive(self.seed, "adversarial poison")
        batches = TrainBatches(len(train), self.batch_size, seed)
        optimizer = torch.optim.SGD(
            surrogate.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        schedule = OneCycle(optimizer, self.surrogate_epochs * len(batches))
        surrogate.train()
        for epoch in range(self.surrogate_epochs):
            batches.set_epoch(epoch)
            for step, rows in enumerate(batches):
                batch = train.__getitems__(rows)
                images = batch.images.to(device)
                if self.augmentation is not None:
                    images = self.augmentation(images, batch.ids.to(device), seed, epoch)
                loss = cross_entropy(surrogate(images), batch.labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                done = (epoch + (step + 1) / len(batches)) / self.surrogate_epochs
                report(0.5 * done, f"the surrogate's epoch {epoch + 1} of {self.surrogate_epochs}")
