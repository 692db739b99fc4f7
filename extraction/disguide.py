"""DisGUIDE: two surrogates, and a generator of what they disagree about; the victim is asked about nothing else.

Paper: Rosenthal, Enouen, Pham & Tan, "DisGUIDE: Disagreement-Guided Data-Free Model Extraction", AAAI 2023; code:
github.com/lin-tan/disguide.

Threat model: as of `extraction.dfme`; labels alone are enough.

Where the surrogates disagree at least one of them is wrong. Their disagreement has a gradient of its own, so that the
generator costs no query: a step costs B·d, against DFME's B·(g·(m + 1) + d). What was answered is kept, and trained on
again. Beside the disagreement the generator is to make all classes alike, by the entropy of the mean answer.

Deviations: the surrogate is the first of the two, not their mean. The generator is that of `DFME`. What is kept is
20 times less than the authors' million images, since a checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.classifier import BackboneFactory, OptimizerFactory
from datamodules.errors import bad
from datamodules.random import generator
from extraction.dfme import DataFreeSurrogate, distance


def disagreement(one: Tensor, other: Tensor) -> Tensor:
    """The mean standard deviation of two networks' scores, from logits (N, K) twice: a number, 0 where they agree."""
    # of two values it is |a − b| / √2, which has a gradient where they are equal, too
    return (one.softmax(1) - other.softmax(1)).abs().mean() / 2**0.5


def diversity(one: Tensor, other: Tensor) -> Tensor:
    """Entropy in nats of the mean score over a batch and both networks, from logits (N, K) twice: a number."""
    mean = torch.cat([one, other]).softmax(1).mean(0)
    return -(mean * mean.clamp_min(1e-6).log()).sum()


class Replay:
    """The newest images that were answered, with the answers.

    Args:
        most: How many; older ones give way.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.images: Tensor | None = None
        """uint8 (≤ most, C, H, W)."""
        self.answers: Tensor | None = None
        """Of each: float32 (…, K) or int64 (…,)."""
        self._next = 0

    def __len__(self) -> int:
        return 0 if self.images is None else len(self.images)

    def add(self, images: Tensor, answers: Tensor) -> None:
        """Keep a batch."""
        images, answers = images.cpu()[: self.most], answers.detach().cpu()[: self.most]
        if self.images is None or self.answers is None:
            self.images, self.answers = images.clone(), answers.clone()
            return
        room = min(len(images), self.most - len(self))
        self.images = torch.cat([self.images, images[:room]]) if room else self.images
        self.answers = torch.cat([self.answers, answers[:room]]) if room else self.answers
        rows = (self._next + torch.arange(len(images) - room)) % self.most
        self.images[rows], self.answers[rows] = images[room:], answers[room:]
        self._next = (self._next + len(rows)) % self.most

    def sample(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """So many at random, none twice; all, if there are fewer."""
        assert self.images is not None
        assert self.answers is not None
        rows = torch.randperm(len(self), generator=source)[:count]
        return self.images[rows], self.answers[rows]

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"images": self.images, "answers": self.answers, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with all of it."""
        self.images, self.answers, self._next = state["images"], state["answers"], state["next"]


class DisGUIDE(DataFreeSurrogate):
    """Two surrogates, the first of which is kept, and the generator of what they disagree about (Rosenthal 2023).

    Args:
        backbone: See `ImageClassifier`; of both.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        batch: Images of each update, B.
        generator_updates: In a step, g; they cost nothing.
        surrogate_updates: In a step, d, on new images.
        replays: In a step, on images that were answered before.
        replay: How many of these are kept, the newest.
        diversity: The weight of `diversity` beside `disagreement`.
        latent: See `DFME`.
        generator_width: See `DFME`.
        generator_lr: See `DFME`.
        optimizer: Of both surrogates.
        weights: See `ImageClassifier`; of the first.
        channels_last: See `ImageClassifier`.
        compile: See `ImageClassifier`.

    Raises:
        InputError: If a value is out of its range.
    """

    version = 1
    milestones = (0.4, 0.8)
    modes = ("label", "scores", "logits")

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        batch: int = 256,
        generator_updates: int = 1,
        surrogate_updates: int = 1,
        replays: int = 3,
        replay: int = 50_000,
        diversity: float = 0.2,
        latent: int = 100,
        generator_width: int = 32,
        generator_lr: float = 1e-4,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.SGD(
            parameters, lr=0.03, momentum=0.9, weight_decay=5e-4
        ),
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, batch, generator_updates, surrogate_updates, latent,
            generator_width, generator_lr, optimizer, weights, channels_last, compile,
        )  # fmt: skip
        if replays < 0:
            raise bad("replays", replays, "there must be 0 or more")
        if replay < 1:
            raise bad("replay", replay, "keep 1 image or more; without any, set replays to 0")
        if diversity < 0:
            raise bad("diversity", diversity, "the weight must be 0 or more")
        self.replays, self.diversity = replays, diversity
        self.kept = Replay(replay)
        self.other = backbone(image_shape, num_classes)
        if channels_last:
            self.other.to(memory_format=torch.channels_last)
        if compile:
            self.other.compile()

    @property
    def cost(self) -> int:
        """Images that a step asks about."""
        return self.batch * self.surrogate_updates

    def parts(self) -> list[nn.Module]:
        """Both surrogates."""
        return [self.net, self.other]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was answered."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["replay"] = self.kept.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what was answered."""
        super().on_load_checkpoint(checkpoint)
        self.kept.load_state_dict(checkpoint["replay"])

    def step(self, surrogate: Any, maker: Any, name: str) -> Tensor:
        """The generator by the disagreement, then both surrogates on new images, then on old ones."""
        for part in self.parts():  # the statistics of BatchNorm are those of images that they are trained on
            part.eval()
        for number in range(self.generator_updates):
            maker.zero_grad()
            images = (self.generator(self.drawn(f"{name} generator {number}")).tanh() + 1) / 2
            one, other = self._both(images)
            self.manual_backward(-disagreement(one, other) - self.diversity * diversity(one, other))
            maker.step()
        for part in self.parts():
            part.train()
        for number in range(self.surrogate_updates):
            images = self.made(f"{name} surrogate {number}")
            theirs = self.answers(images, f"{name} surrogate {number}")
            self.kept.add(images, theirs)
            loss = self._learn(surrogate, images, theirs)
        for number in range(self.replays):
            again = self.kept.sample(self.batch, generator(self._data.seed, f"replay {name} {number}"))
            loss = self._learn(surrogate, *(part.to(self.device) for part in again))
        return loss

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self(images), self.other(self.normalise(images))

    def _learn(self, surrogate: Any, images: Tensor, theirs: Tensor) -> Tensor:
        """Both agree more with the victim: by L1 of logits, or by cross-entropy where only labels are known."""
        surrogate.zero_grad()
        losses = [
            F.cross_entropy(logits, theirs) if theirs.ndim == 1 else distance(logits, theirs).mean()
            for logits in self._both(images)
        ]
        self.manual_backward(losses[0] + losses[1])
        surrogate.step()
        return losses[0].detach()
