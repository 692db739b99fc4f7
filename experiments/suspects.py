"""Suspects: what turns a weights file, a run, an oracle or a served model into something that verification can ask."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from datamodules.errors import InputError, bad

if TYPE_CHECKING:
    from extraction.oracle import Client, InProcessOracle
    from watermark.derive import Images
    from watermark.verify import Ask

_BATCH = 512

_PART = 20
"""Images in one request: what a suspect answered before it refused, or was lost, is kept in such parts."""


@dataclass(frozen=True)
class Suspect:
    """A model to ask.

    Attributes:
        ask: uint8 (m, C, H, W) → m classes; each call asks anew.
        under: The same for a verification that may be cut off, by its name: asked again, it is answered again for free.
        name: The hash of its weights, or its address.
        classes: K.
        shape: (C, H, W).
        remote: Whether others see what it is asked.
        left: How many images it may still be asked about; None: any number.
    """

    ask: Ask
    under: Callable[[str], Ask]
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

    name = content_hash(tensors)
    return Suspect(ask, lambda _: ask, name, classifier.num_classes, classifier.image_shape, False, lambda: None)


def _served(url: str) -> Suspect:
    from extraction.http.remote import RemoteOracle

    oracle, classes, shape = RemoteOracle.as_served(url)
    client = oracle.client("verification")
    return of_client(client, f"{oracle.url} {oracle.identity()}", classes, shape, remote=True)


def of_oracle(oracle: InProcessOracle, budget: int | None = None) -> Suspect:
    """An oracle in this process, with its defences and its detector, as a suspect.

    Args:
        oracle: Such as a `LocalOracle`.
        budget: How many images it may be asked about; None: any number.
    """
    classes, shape = oracle.made_for()
    name = oracle.identity()
    return of_client(oracle.client(f"verification-{name}", budget), name, classes, shape)


def of_client(client: Client, name: str, classes: int, shape: tuple[int, int, int], remote: bool = False) -> Suspect:
    """Whatever an oracle's client asks, as a suspect.

    Args:
        client: It.
        name: What tells the oracle from others.
        classes: K.
        shape: (C, H, W).
        remote: Whether others see what it is asked.
    """
    import torch

    from extraction.answers import labels
    from extraction.ledger import BudgetError
    from extraction.service import FlaggedError
    from watermark.transcript import REFUSED

    def under(run: str) -> Ask:
        def ask(images: Images) -> list[int]:
            found: list[int] = []
            for part in (images[start : start + _PART] for start in range(0, len(images), _PART)):
                # the run names key and nonce, the pixels the triggers; so the id is the same after a lost connection
                request = hashlib.sha256(run.encode() + b"\x00" + part.tobytes()).hexdigest()
                try:
                    found += labels(client.query(torch.from_numpy(part.copy()), request)).tolist()
                except (BudgetError, FlaggedError):  # who refuses has not been shown to be unmarked
                    break
            return found + [REFUSED] * (len(images) - len(found))

        return ask

    def anew(images: Images) -> Sequence[int]:
        return under(uuid4().hex)(images)

    return Suspect(anew, under, name, classes, shape, remote, lambda: client.left)


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
