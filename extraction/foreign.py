"""Victims of someone else's: a network of torchvision, timm or any package, or any function that answers images.

`ForeignOracle` is to them what `LocalOracle` is to victims of this project: ledger, stored answers, defences, detectors
and fidelity are the same, and `lightning serve` serves it too.

A network's identity is the hash of its weights, read when it is built. Of a function nothing of the kind can be read:
its source names neither the weights that it loads nor the service that it asks. So whoever wraps one gives it a name,
and another name whenever it begins to answer otherwise; answers that are stored under a name are not asked for again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from classifiers.classifier import BackboneFactory, ImageClassifier
from classifiers.weights import content_hash
from datamodules.errors import InputError, bad, did_you_mean
from extraction.defences.detector import Detector
from extraction.defences.perturbation import Perturbation
from extraction.oracle import InProcessOracle
from extraction.service import Model

RETURNS = ("logits", "scores")
"""What a function may return."""


class ForeignVictim(ABC):
    """The base of all: what a `ForeignOracle` needs to know of a victim.

    Args:
        num_classes: K.
        image_shape: (C, H, W) of the uint8 images that it is asked about.
    """

    version = 1

    has_logits = True
    """Whether it knows logits, and not only scores."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        if num_classes < 2:
            raise bad("num_classes", num_classes, "a classifier has 2 or more")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise bad("image_shape", image_shape, "it must be (channels, height, width), each at least 1")
        self.num_classes, self.image_shape = num_classes, image_shape

    @abstractmethod
    def identity(self) -> tuple[str, ...]:
        """What tells it from all others: never the same for two that answer differently."""

    @abstractmethod
    def open(self) -> Model:
        """Itself: uint8 (N, C, H, W) → logits (N, K)."""


class ForeignNetwork(ForeignVictim):
    """A network with its own weights: torchvision's or timm's by name, or any other that is a module.

    It must have all its weights: one whose last layer starts anew, because the file's is for other classes, is no
    victim, and is refused.

    Args:
        backbone: Makes it: `TorchVision` or `Timm` with ``name`` and ``pretrained``, which is true or a file; or a
            module of another package that loads its weights itself.
        num_classes: K.
        image_shape: (C, H, W).
        mean: Of each channel, for pixels in [0, 1], that it was trained with.
        std: Its standard deviation.
    """

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(num_classes, image_shape)
        self.backbone, self.mean, self.std = backbone, tuple(mean), tuple(std)
        self._network: ImageClassifier | None = None
        self._identity: tuple[str, ...] = ()

    def identity(self) -> tuple[str, ...]:
        """Of its weights, wherever they lie, its class and arguments, and what it normalises with."""
        self.open()
        return self._identity

    def open(self) -> ImageClassifier:
        """The network, built once; twice indeed, to see that nothing of it is random."""
        if self._network is None:
            network, other = self._made(0), self._made(1).net.state_dict()
            for name, value in network.net.state_dict().items():
                if not torch.equal(value, other[name]):
                    raise bad("backbone", type(network.net).__name__, f"{name} starts at random: it needs weights")
            about = network.architecture
            plain = {key: value for key, value in about.init_args.items() if key != "pretrained"}
            # now: who serves it may move it to another device and number type
            self._identity = content_hash(network.net.state_dict()), repr(replace(about, init_args=plain))
            self._network = network.eval()
        return self._network

    def _made(self, seed: int) -> ImageClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return ImageClassifier(self.backbone, self.num_classes, self.image_shape, self.mean, self.std)


class ForeignFunction(ForeignVictim):
    """A function that answers images, whatever is behind it.

    Args:
        function: Images → (N, K) as a tensor, an array or lists. In YAML its dotted path, or a class that is callable,
            with arguments.
        name: What tells it from any other, its version included, such as ``cats 2024-05``; see the module.
        num_classes: K.
        image_shape: (C, H, W).
        returns: ``logits``, or ``scores``: probabilities.
        mean: None: the function gets uint8 images as they are. Else float32, normalised: of each channel, for pixels
            in [0, 1].
        std: Its standard deviation; None with `mean`.

    Raises:
        InputError: If a value is wrong.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        name: str,
        num_classes: int,
        image_shape: tuple[int, int, int],
        returns: str = "logits",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_classes, image_shape)
        if not name:
            raise bad("name", name, "say what tells this function from any other, its version included")
        if returns not in RETURNS:
            raise bad("returns", returns, f"choose one of {', '.join(RETURNS)}{did_you_mean(returns, RETURNS)}")
        if (mean is None) != (std is None):
            raise bad("mean, std", (mean, std), "give both, or neither")
        if mean is not None and std is not None and not (len(mean) == len(std) == image_shape[0] and min(std) > 0):
            raise bad("mean, std", (mean, std), f"one number for each of {image_shape[0]} channels, std above 0")
        self.function, self.name, self.returns = function, name, returns
        self.mean, self.std = (None if part is None else tuple(part) for part in (mean, std))
        self.has_logits = returns == "logits"

    def identity(self) -> tuple[str, ...]:
        """Of its name, and how it is asked."""
        function = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        path = f"{function.__module__}.{function.__qualname__}"
        return path, self.name, repr((self.num_classes, self.image_shape, self.returns, self.mean, self.std))

    def open(self) -> Model:
        """The function behind a look at what it returns."""
        return self._answer

    def _answer(self, images: Tensor) -> Tensor:
        if self.mean is not None:
            mean, std = (torch.tensor(part)[:, None, None] for part in (self.mean, self.std))
            images = (images.float() / 255 - mean) / std
        found = torch.as_tensor(self.function(images))
        expected = (len(images), self.num_classes)
        if found.shape != expected:
            remedy = ""
            if found.ndim in (1, 2) and len(found) == len(images):
                remedy = "; of labels alone or of the likeliest classes, return rows that are 0 for all other classes"
            raise InputError(
                f"{self.name}: the function returned {tuple(found.shape)} for {len(images)} images; {self.returns} "
                f"{expected} are expected{remedy}"
            )
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"{self.name}: the function returned what is no number; {self.returns} are finite")
        if self.returns == "logits":
            return found
        return probabilities(found.double(), self.name).log()  # the softmax of which gives them back


def probabilities(scores: Tensor, name: str) -> Tensor:
    """Scores as probabilities that sum to 1, as they do to 1e-3, or to what rounding each of them leaves.

    Args:
        scores: float64 (N, K).
        name: Of what returned them, for the error.

    Raises:
        InputError: If they are none.
    """
    sums = scores.sum(1)
    if float(scores.min()) < 0:
        what = "rows that are no probabilities: some are below 0; set returns: logits?"
        raise InputError(f"{name}: the function returned {what}")
    off = float((sums - 1).abs().max())
    if off <= 1e-3:
        return scores
    for digits in (1, 2, 3):  # as many as the interface shows
        rounded = bool(((scores - scores.round(decimals=digits)).abs() < 1e-6).all())
        if rounded and off <= 0.5 * 10**-digits * scores.shape[1] and float(sums.min()) > 0:
            return scores / sums[:, None]
    at = int((sums - 1).abs().argmax())
    raise InputError(
        f"{name}: the function returned rows that are no probabilities: one sums to {float(sums[at]):.4g}; return all "
        f"{scores.shape[1]} of them, divided by their sum"
    )


class ForeignOracle(InProcessOracle):
    """A victim of someone else's in this process.

    Args:
        victim: A `ForeignNetwork` or `ForeignFunction`.
        mode: See `extraction.oracle.Oracle`; ``logits`` only of a victim that knows them.
        k: See `extraction.oracle.Oracle`.
        defence: See `InProcessOracle`.
        detector: See `InProcessOracle`.
        response: See `InProcessOracle`.
        price: See `InProcessOracle`.
        batch_size: See `InProcessOracle`.
        device: See `InProcessOracle`; a function decides itself where it works.
        precision: See `InProcessOracle`; of a network.

    Raises:
        InputError: If a value is wrong.
    """

    def __init__(
        self,
        victim: ForeignVictim,
        mode: str = "scores",
        k: int | None = None,
        defence: Perturbation | None = None,
        detector: Detector | None = None,
        response: str = "watch",
        price: float = 1.0,
        batch_size: int = 256,
        device: str | None = None,
        precision: str = "float32",
    ) -> None:
        super().__init__(mode, k, defence, detector, response, price, batch_size, device, precision)
        if mode == "logits" and not victim.has_logits:
            raise bad("mode", mode, "this victim returns scores, and has no logits to show; choose scores")
        if isinstance(victim, ForeignFunction) and (device is not None or precision != "float32"):
            raise bad("device, precision", (device, precision), "a function decides on them itself; leave them out")
        self.victim = victim

    @property
    def named(self) -> tuple[str, str]:
        """Its victim's class, or a function's name."""
        return "victim", getattr(self.victim, "name", type(self.victim).__name__)

    def made_for(self) -> tuple[int, tuple[int, int, int]]:
        """As its description says."""
        return self.victim.num_classes, self.victim.image_shape

    def victim_identity(self) -> tuple[str, ...]:
        """See `ForeignVictim`."""
        return "foreign", str(self.victim.version), *self.victim.identity()

    def open(self) -> Model:
        """See `ForeignVictim`."""
        return self.victim.open()
