"""The oracle: the only door to a victim. It owns the model, the answer mode, the defence, the budget and the ledger.

An attacker asks with images and gets answers, never the module. In one process this is an interface and not a security
boundary: whoever shares the process can read its memory. What the interface guarantees is that an honest experiment
counts every query, and that nothing but the answers reaches the attack.

Model calls have one fixed batch size, padded, so that an answer does not depend on what else was asked for with it.
What the model said is kept by content: asked again, an image costs the client a query and the oracle no computation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier, load_classifier
from datamodules.errors import InputError, bad
from extraction.answers import Answers, check_mode, reveal
from extraction.defences.perturbation import Perturbation
from extraction.ledger import Account, Ledger

Model = Callable[[Tensor], Tensor]
"""uint8 (N, C, H, W) → logits (N, K)."""

_KEPT = 2**26
"""Bytes of what the model said that are kept."""


class Oracle:
    """Answers one client's queries, counted.

    Args:
        model: Weights of a classifier (a path that `load_classifier` takes), the classifier, or a function from uint8
            images (N, C, H, W) to logits (N, K).
        ledger: Where queries are charged.
        mode: What an answer shows: ``label``, ``label_score``, ``top_k``, ``scores`` or ``logits``.
        k: How many classes ``top_k`` names.
        defence: What perturbs scores; None: nothing. There is none for ``logits``, which would undo it.
        client: Who asks, in the ledger.
        batch_size: Of each model call.
        image_shape: (C, H, W); known of a classifier, needed for a function.

    Raises:
        InputError: If a value is wrong, or the weights cannot be read.
    """

    def __init__(
        self,
        model: str | Path | ImageClassifier | Model,
        ledger: Ledger,
        mode: str = "scores",
        k: int | None = None,
        defence: Perturbation | None = None,
        client: str = "attacker",
        batch_size: int = 256,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        check_mode(mode, k)
        if batch_size < 1:
            raise bad("batch_size", batch_size, "it must be 1 or more")
        if mode == "logits" and defence is not None:
            raise InputError("defence: it perturbs scores, and mode logits shows what is behind them; leave one out")
        if isinstance(model, str | Path):
            model = load_classifier(model)
        if isinstance(model, ImageClassifier):
            model.eval().requires_grad_(False)
            image_shape = model.image_shape
        if image_shape is None:
            raise bad("image_shape", None, "a function does not tell what images it takes; give (C, H, W)")
        self.image_shape = tuple(image_shape)
        self.mode, self.k, self.client, self.batch_size = mode, k, client, batch_size
        self.calls = 0
        """Batches that the model has worked on."""
        self.__model, self.__ledger, self.__defence = model, ledger, defence
        self.__kept: dict[bytes, Tensor] = {}

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask.

        Args:
            images: uint8 (N, C, H, W).
            request: An id that makes asking again free: the request that was sent before is answered again, to the
                byte. None: each call is a new request.

        Returns:
            Answers for all images, on the CPU.

        Raises:
            BudgetError: If they do not fit into the budget; the model has not run, and nothing is charged.
            InputError: If they are not images of this oracle's domain.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            shape = "×".join(map(str, self.image_shape))
            raise InputError(
                f"images: uint8 (N, {shape}) are this oracle's domain, not {images.dtype} {tuple(images.shape)}"
            )
        contents = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu().contiguous()]
        if request is None:
            request = uuid4().hex
        first = self.__ledger.charge(self.client, request, contents)
        logits = self.__answer(images, contents)
        scores = logits.softmax(1)
        if self.__defence is not None:
            scores = self.__defence(scores, torch.arange(first, first + len(images)))
        return reveal(scores, self.mode, self.k, logits)

    @property
    def account(self) -> Account:
        """How its client stands."""
        return self.__ledger.account(self.client)

    @property
    def left(self) -> int | None:
        """Queries left in the budget; None: any number."""
        return self.__ledger.left(self.client)

    @torch.inference_mode()
    def __answer(self, images: Tensor, contents: list[bytes]) -> Tensor:
        """Logits of all images; the model sees each different one once."""
        new = dict.fromkeys(content for content in contents if content not in self.__kept)
        rows = {content: row for row, content in reversed(list(enumerate(contents)))}
        fresh: dict[bytes, Tensor] = {}
        for start in range(0, len(new), self.batch_size):
            part = list(new)[start : start + self.batch_size]
            batch = images.new_zeros(self.batch_size, *self.image_shape)
            batch[: len(part)] = images[[rows[content] for content in part]]
            fresh.update(zip(part, self.__call(batch)[: len(part)], strict=True))
        found = torch.stack([fresh[c] if c in fresh else self.__kept[c] for c in contents]) if contents else None
        room = _KEPT - sum(value.nbytes for value in self.__kept.values())
        for content, value in fresh.items():
            room -= value.nbytes
            if room < 0:
                break
            self.__kept[content] = value.clone()
        return self.__call(images.new_zeros(self.batch_size, *self.image_shape))[:0] if found is None else found

    def __call(self, batch: Tensor) -> Tensor:
        self.calls += 1
        model = self.__model
        if isinstance(model, ImageClassifier):
            logits: Tensor = model(batch.to(model.device))
            return logits.float().cpu()
        assert callable(model)
        return model(batch).cpu()
