"""Suspects: what turns a weights file, a run or a served model into something that verification can ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.errors import InputError, bad

if TYPE_CHECKING:
    from watermark.derive import Images
    from watermark.verify import Ask

_BATCH = 512


@dataclass(frozen=True)
class Suspect:
    """A model to ask.

    Attributes:
        ask: uint8 (m, C, H, W) → m classes.
        name: The hash of its weights, or its address.
        classes: K.
        shape: (C, H, W).
        remote: Whether others see what it is asked.
        left: How many images it may still be asked about; None: any number.
    """

    ask: Ask
    name: str
    classes: int
    shape: tuple[int, int, int]
    remote: bool
    left: Callable[[], int | None]


def suspect(model: str) -> Suspect:
    """The suspect that a person means.

    Args:
        model: A weights file, the folder of a run, or the address of `lightning serve`, whose key is in the environment
            variable PHARMAKON_ORACLE_KEY.

    Raises:
        InputError: If there is no such thing, or it cannot be asked.
    """
    return _served(model) if "://" in model else _own(model)


def _own(model: str) -> Suspect:
    import torch

    from classifiers.classifier import load_classifier
    from classifiers.devices import accelerator
    from classifiers.weights import content_hash, find_weights, load_weights

    path = find_weights(model)
    tensors, _ = load_weights(path)
    classifier = load_classifier(path).to(accelerator())

    def ask(images: Images) -> list[int]:
        with torch.inference_mode():
            parts = torch.from_numpy(images).split(_BATCH)
            return torch.cat([classifier(part.to(classifier.device)).argmax(1) for part in parts]).tolist()

    return Suspect(ask, content_hash(tensors), classifier.num_classes, classifier.image_shape, False, lambda: None)


def _served(url: str) -> Suspect:
    import torch

    from extraction.answers import labels
    from extraction.http.remote import RemoteOracle
    from extraction.ledger import BudgetError
    from extraction.service import FlaggedError
    from watermark.transcript import REFUSED

    oracle, classes, shape = RemoteOracle.as_served(url)
    client = oracle.client("verification")

    def ask(images: Images) -> list[int]:
        try:
            return labels(client.query(torch.from_numpy(images.copy()))).tolist()
        except (BudgetError, FlaggedError):  # a suspect that refuses has not been shown to be unmarked
            return [REFUSED] * len(images)

    return Suspect(ask, f"{oracle.url} {oracle.identity()}", classes, shape, True, lambda: client.left)


def check_fit(model: Suspect, classes: int, shape: tuple[int, int, int]) -> None:
    """See that a key is for such a model.

    Raises:
        InputError: If not.
    """
    if (model.classes, tuple(model.shape)) != (classes, tuple(shape)):
        wanted = f"{classes} classes and images of {'×'.join(map(str, shape))}"
        raise bad("model", model.name, f"the key is for {wanted}; this model is not")


def check_budget(model: Suspect, count: int) -> None:
    """See that all can be asked, before any trigger is shown.

    Raises:
        InputError: If not.
    """
    left = model.left()
    if left is not None and left < count:
        raise InputError(f"model: {left} queries are left, and {count} are needed; nothing was asked")
