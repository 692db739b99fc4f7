"""DFME: a surrogate trained on images that a generator makes to part it from the victim; no data at all.

Paper: Truong, Maini, Walls & Papernot, "Data-Free Model Extraction", CVPR 2021, arXiv 2011.14779.

Threat model: the attacker may ask for scores or logits, very often, and has no image: he knows their shape and the
number of classes.

In each step the generator is trained to make the two networks differ – its gradient through the victim comes from
forward differences – then the surrogate to agree on fresh images. Both go by the L1 distance of logits; where scores
are answered, logits are recovered up to a constant. A step costs B·(g·(m + 1) + d) queries.

Deviations: the oracle takes bytes, on which the paper's step of 10⁻³ along a unit vector is invisible: directions are
of ±1 in each pixel, and ε is so large that most of them still change after rounding. A smaller generator, without a
last BatchNorm. One process: its steps depend on each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from classifiers.classifier import BackboneFactory, ImageClassifier, OptimizerFactory
from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import UNLABELLED, Batch, ImageSet, Overlay, fingerprint
from datamodules.random import draw, generator, uniform
from extraction.answers import Answers, labels
from extraction.oracle import Client, Oracle
from extraction.strategy import Extraction, Spent

DECAY = 0.3
"""By which both learning rates are multiplied at each of `MILESTONES`."""

MILESTONES = (0.1, 0.3, 0.5)
"""Shares of the steps."""

FLOOR = 1e-7
"""Scores below it count as this: the logarithm of a score that was rounded to 0 says nothing."""


def recovered_logits(scores: Tensor) -> Tensor:
    """Logits (N, K) with mean zero in each row, of which these are the scores (N, K)."""
    logs = scores.clamp_min(FLOOR).log()
    return logs - logs.mean(1, keepdim=True)


def distance(logits: Tensor, theirs: Tensor) -> Tensor:
    """The L1 distance of each row: real (N, K) twice → (N,)."""
    return (logits - theirs).abs().sum(1)


def forward_difference(here: Tensor, there: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    """The estimated gradient of a function of images.

    Args:
        here: Its values, real (N,).
        there: Its values at images + ε·direction, real (m, N).
        directions: ±1, real (m, N, C, H, W).
        epsilon: ε.

    Returns:
        The mean of slope·direction over the m directions: real (N, C, H, W). Unbiased up to O(ε).
    """
    slopes = (there - here) / epsilon
    return (slopes[:, :, None, None, None] * directions).mean(0)


def as_bytes(raw: Tensor) -> Tensor:
    """What the generator gives before its tanh, real, as images: uint8 of the same shape."""
    return ((raw.tanh() + 1) * 127.5).round().to(torch.uint8)


class Generator(nn.Module):
    """Latent vectors (N, D) → what a tanh makes images of: real (N, C, H, W). Our own, of two upsampling steps."""

    def __init__(self, latent: int, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        self.start = (2 * width, -(-self.height // 4), -(-self.width // 4))
        self.first = nn.Linear(latent, math.prod(self.start))
        self.rest = nn.Sequential(
            nn.BatchNorm2d(2 * width), nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        made: Tensor = self.rest(self.first(latent).view(-1, *self.start))
        return made[:, :, : self.height, : self.width]


class DataFree(Extraction):
    """An oracle to ask, and no images: `DFME` (Truong et al. 2021) and `DisGUIDE` make their own.

    The training set has as many rows as the base's, of noise and without labels: they only count steps.

    Args:
        base: The victim's task: its holdout and test set measure the surrogate.
        oracle: See `Extraction`; it must answer labels, scores or logits.
        budget: See `Extraction`; no step is begun that does not fit into it.
        similarity: See `Extraction`.
        fidelity_on: See `Extraction`.
        seed: Of all choices.
        samples_budget: See `Extraction`.

    Raises:
        InputError: If a value is out of its range, or victim and task do not fit together.
    """

    version = 1

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int = 2_000_000,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, 1.0, similarity, fidelity_on, seed, samples_budget)
        if oracle.mode not in ("label", "scores", "logits"):
            raise bad("oracle.mode", oracle.mode, "some scores make no logits: choose label, scores or logits")
        self._run = ""
        self._asking: Client | None = None

    def rewrite(self, train: ImageSet) -> ImageSet:
        """Noise without labels."""
        size = math.prod(train.image_shape)

        def noise(images: Tensor, ids: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
            return (uniform(self.seed, "data-free rows", 0, ids, size) * 256).to(torch.uint8).view(images.shape)

        none = torch.full_like(train.ids, UNLABELLED)
        before = train.labels if train.labels.ndim == 1 else none
        self.record(Changes("DataFree", train.ids, train.ids, before, none))
        key = fingerprint("data-free rows", self.version, self.seed)
        return Overlay(train, torch.arange(len(train)), labels=none, rewriter=noise, key=key)

    def logits(self, images: Tensor, request: str) -> Tensor:
        """What the victim says of uint8 (N, C, H, W), charged once for each request.

        Returns:
            Logits with mean zero, float32 (N, K); where labels are answered, these, int64 (N,).
        """
        answers: Answers = self._client_of_run.query(images, request)
        if self.oracle.mode == "label":
            return labels(answers)
        values = answers.values.float()
        return values - values.mean(1, keepdim=True) if self.oracle.mode == "logits" else recovered_logits(values)

    def facts(self) -> Facts:
        """What was spent."""
        if self._asking is not None:
            account = self._asking.account
            self.spent = Spent(account.queries, account.samples)
        return super().facts()

    def state_dict(self) -> dict[str, Any]:
        """Whose answers these are."""
        return {**super().state_dict(), "data_free": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the same client."""
        inner = dict(state_dict)
        self._run = inner.pop("data_free", "")
        self._asking = None
        super().load_state_dict(inner)

    @property
    def _client_of_run(self) -> Client:
        if self._asking is None:
            if not self._run:  # another run asks about other images, and pays for itself
                self._run = fingerprint("data-free", self.version, self.oracle.identity(), self.seed, uuid4().hex)
            self._asking = self.oracle.client(self._run, self.budget, self.samples_budget)
        return self._asking


class DataFreeSurrogate(ImageClassifier, ABC):
    """A surrogate and the generator that makes its training images, for `DataFree`; a subclass says how they train.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        batch: Images of each update, B.
        generator_updates: In a step, g.
        surrogate_updates: In a step, d.
        latent: Width of the generator's input.
        generator_width: Channels of its last hidden layer.
        generator_lr: Its learning rate, of Adam.
        optimizer: Of the surrogate.
        weights: See `ImageClassifier`.
        channels_last: See `ImageClassifier`.
        compile: See `ImageClassifier`.

    Raises:
        InputError: If a value is out of its range.
    """

    milestones: Sequence[float] = MILESTONES
    modes: Sequence[str] = ("scores", "logits")
    """Which answers it can learn from."""

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        batch: int = 256,
        generator_updates: int = 1,
        surrogate_updates: int = 5,
        latent: int = 100,
        generator_width: int = 32,
        generator_lr: float = 1e-4,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, weight_decay=5e-4
        ),
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, optimizer, weights=weights, channels_last=channels_last,
            compile=compile,
        )  # fmt: skip
        counts = {
            "batch": batch, "generator_updates": generator_updates, "surrogate_updates": surrogate_updates,
            "latent": latent, "generator_width": generator_width,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise bad(name, value, "there must be 1 or more")
        self.batch, self.generator_updates, self.surrogate_updates = batch, generator_updates, surrogate_updates
        self.latent, self.generator_lr = latent, generator_lr
        self.generator = Generator(latent, image_shape, generator_width)
        self.automatic_optimization = False
        self.steps_done = 0

    @property
    @abstractmethod
    def cost(self) -> int:
        """Images that a step asks about."""

    @abstractmethod
    def step(self, surrogate: Any, maker: Any, name: str) -> Tensor:
        """Update the generator by one optimizer and the surrogate by the other; the last loss of the surrogate.

        Args:
            surrogate: The surrogate's optimizer.
            maker: The generator's.
            name: Of the step: what it asks and draws is named by it.
        """

    def configure_optimizers(self) -> list[Optimizer]:
        """The surrogate's, and Adam for the generator."""
        return [self.make_optimizer(), torch.optim.Adam(self.generator.parameters(), lr=self.generator_lr)]

    def on_fit_start(self) -> None:
        """See that there is an oracle to ask, a budget for a step, and one process.

        Raises:
            InputError: If not.
        """
        super().on_fit_start()
        data = self._data
        if data.oracle.mode not in self.modes:
            remedy = f"{type(self).__name__} needs more of an answer: choose {' or '.join(self.modes)}"
            raise bad("oracle.mode", data.oracle.mode, remedy)
        if self.trainer.world_size > 1:
            raise bad("trainer.devices", self.trainer.world_size, "a step depends on the one before: use 1 process")
        if data.affordable < self.cost:
            queries = math.ceil(self.cost * data.oracle.per_image - 1e-9)
            raise bad("budget", data.budget, f"a step costs {queries} queries; give more, or a smaller batch")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of steps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["dfme_steps"] = self.steps_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the number of steps."""
        super().on_load_checkpoint(checkpoint)
        self.steps_done = checkpoint["dfme_steps"]

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override] # it steps by itself
        """A step of both networks; the last one that the budget allows ends the training."""
        steps = self._data.affordable // self.cost
        optimizers: Any = self.optimizers()
        surrogate, maker = optimizers
        for made in (surrogate, maker):
            for group in made.param_groups:
                group["lr"] = made.optimizer.defaults["lr"] * decay(self.steps_done / steps, self.milestones)
        loss = self.step(surrogate, maker, f"step {self.steps_done}")
        self._losses.add(loss.detach())
        self.steps_done += 1
        if self.steps_done >= steps:
            self.trainer.should_stop = True

    def drawn(self, name: str) -> Tensor:
        """The generator's inputs (B, D), by seed and name."""
        source = generator(self._data.seed, f"latent {name}")
        return torch.randn(self.batch, self.latent, generator=source).to(self.device)

    @torch.no_grad()
    def made(self, name: str) -> Tensor:
        """Images for the surrogate: uint8 (B, C, H, W), by seed and name."""
        return as_bytes(self.generator(self.drawn(name)))

    def answers(self, images: Tensor, request: str) -> Tensor:
        """What the victim says of them, see `DataFree.logits`; here."""
        return self._data.logits(images.cpu(), request).to(self.device)

    @property
    def _data(self) -> DataFree:
        data = self._datamodule()
        if not isinstance(data, DataFree):
            raise InputError(
                f"data: {type(self).__name__} makes its own images and needs DataFree, not {type(data).__name__}"
            )
        return data


class DFME(DataFreeSurrogate):
    """A surrogate and the generator that makes its training images (Truong et al. 2021), for `DataFree`.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        batch: Images of each update, B.
        generator_updates: In a step, g.
        directions: Of the forward differences, m.
        surrogate_updates: In a step, d.
        epsilon: ε, before the tanh.
        latent: Width of the generator's input.
        generator_width: Channels of its last hidden layer.
        generator_lr: Its learning rate, of Adam.
        optimizer: Of the surrogate.
        weights: See `ImageClassifier`.
        channels_last: See `ImageClassifier`.
        compile: See `ImageClassifier`.

    Raises:
        InputError: If a value is out of its range.
    """

    version = 1

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        batch: int = 256,
        generator_updates: int = 1,
        directions: int = 1,
        surrogate_updates: int = 5,
        epsilon: float = 0.1,
        latent: int = 100,
        generator_width: int = 32,
        generator_lr: float = 1e-4,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, weight_decay=5e-4
        ),
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, batch, generator_updates, surrogate_updates, latent,
            generator_width, generator_lr, optimizer, weights, channels_last, compile,
        )  # fmt: skip
        if directions < 1:
            raise bad("directions", directions, "there must be 1 or more")
        if not epsilon > 0:
            raise bad("epsilon", epsilon, "it must be above 0")
        self.directions, self.epsilon = directions, epsilon

    @property
    def cost(self) -> int:
        """Images that a step asks about."""
        return self.batch * (self.generator_updates * (self.directions + 1) + self.surrogate_updates)

    def step(self, surrogate: Any, maker: Any, name: str) -> Tensor:
        """The generator by forward differences, then the surrogate by L1."""
        for number in range(self.generator_updates):
            maker.zero_grad()
            raw = self.generator(self.drawn(f"{name} generator {number}"))
            self.manual_backward(raw, gradient=-self._slope(raw.detach(), f"{name} generator {number}"))
            maker.step()
        for number in range(self.surrogate_updates):
            images = self.made(f"{name} surrogate {number}")
            theirs = self.answers(images, f"{name} surrogate {number}")
            surrogate.zero_grad()
            loss = distance(self(images), theirs).mean()
            self.manual_backward(loss)
            surrogate.step()
        return loss

    def _slope(self, raw: Tensor, name: str) -> Tensor:
        """The gradient of the mean distance, by forward differences."""
        ids = torch.arange(len(raw), device=raw.device)
        signs = torch.stack([
            (draw(self._data.seed, f"{name} direction {number}", 0, ids, math.prod(self.image_shape)) & 1)
            .view(raw.shape).to(raw.dtype) * 2 - 1
            for number in range(self.directions)
        ])  # fmt: skip
        with torch.no_grad():
            images = as_bytes(torch.cat([raw[None], raw + self.epsilon * signs]).flatten(0, 1))
            theirs = self.answers(images, name)
            # the statistics of BatchNorm are those of images that the surrogate is trained on
            self.net.eval()
            apart = distance(self(images), theirs).view(self.directions + 1, -1)
            self.net.train()
        return forward_difference(apart[0], apart[1:], signs, self.epsilon) / len(raw)


def decay(share: float, milestones: Sequence[float] = MILESTONES) -> float:
    """What both learning rates are multiplied by after this share of the steps."""
    return float(DECAY ** sum(share >= milestone for milestone in milestones))
