"""What several tests share: a quiet trainer, small models and sets, and what an error for people must look like."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from classifiers.backbones import MLP, Backbone
from classifiers.classifier import ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError
from datamodules.imageset import ImageSet


def tiny_trainer(**kwargs: Any) -> Trainer:
    """A Trainer for one process on the CPU that prints nothing and writes nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(**{**quiet, **kwargs})


class NormDrop(Backbone):
    """Eight hidden units with BatchNorm and dropout: in training mode an answer is one to a batch, and by chance."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(image_shape, num_classes)
        inputs = image_shape[0] * image_shape[1] * image_shape[2]
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8, momentum=0.5), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What is left of the hidden units: (N, C, H, W) → (N, 8)."""
        found: Tensor = self.body(x)
        return found


class Watched(NormDrop):
    """The same, with a record of each forward pass of all of them: whether in training mode, and the input."""

    seen: ClassVar[list[tuple[bool, Tensor]]] = []

    def forward(self, x: Tensor) -> Tensor:
        """The logits: (N, C, H, W) → (N, K)."""
        self.seen.append((self.training, x.detach().clone()))
        return super().forward(x)


def mlp(data: ImageDataModule, kind: type[ImageClassifier] = ImageClassifier, **kwargs: Any) -> Any:
    """A classifier with one small hidden layer for the images of a datamodule."""
    kwargs.setdefault("backbone", partial(MLP, hidden=[16]))
    about = {"num_classes": data.num_classes, "image_shape": data.image_shape, "mean": data.mean, "std": data.std}
    return kind(**{**about, **kwargs})


def some_images(n: int, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4, seed: int = 0) -> ImageSet:
    """Noise with labels that run through the classes, ids from 100."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), generator=noise, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % classes, torch.arange(100, 100 + n))


@contextmanager
def refused(*words: object) -> Iterator[None]:
    """An `InputError` must be raised inside: one line, in which all of `words` occur."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message, "an empty message"
    assert "\n" not in message, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


@contextmanager
def global_randomness_untouched() -> Iterator[None]:
    """Neither torch's, nor numpy's, nor Python's global generator may advance inside."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    yield
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]), "torch's global generator was used"
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True)), "numpy's generator was used"
    assert before[2] == after[2], "Python's generator was used"


def uniformity(numbers: Tensor, cells: int) -> float:
    """The p-value of a chi-square test that whole numbers 0 … cells − 1 are equally frequent."""
    from scipy.stats import chisquare

    return float(chisquare(torch.bincount(numbers.flatten(), minlength=cells).numpy()).pvalue)
