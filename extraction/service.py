"""The service behind an oracle: it owns the victim, the answer mode, the defences, the budgets and the ledger.

Many clients may ask, each under a name. In one process this is an interface and not a security boundary: whoever shares
the process can read its memory. What it guarantees is that every query is counted, and that nothing but the answers
comes out. Over HTTP (`lightning serve`) the same service is behind a network.

Model calls have one fixed batch size, padded, so that an answer does not depend on what else was asked for with it.
What the model said is kept by content: asked again, an image costs the client a query and the service no computation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError, bad, did_you_mean
from extraction.answers import Answers, check_mode, pack, reveal, unpack
from extraction.defences.detector import Detector
from extraction.defences.perturbation import Perturbation
from extraction.ledger import Entry, Ledger, Refused, State

Model = Callable[[Tensor], Tensor]
"""Images of the domain (N, …) → logits (N, K)."""

RESPONSES = ("watch", "refuse", "degrade")
"""What happens to a flagged client's requests: they are answered, refused, or answered with the two likeliest classes
exchanged."""

_KEPT = 2**26
"""Bytes of what the model said that are kept."""


class Domain(NamedTuple):
    """The inputs that a service takes.

    Attributes:
        shape: Of one input: (C, H, W), or (D,) for vectors.
        dtype: torch.uint8 for images as they are stored; torch.float64 for real-valued inputs of numerical attacks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8


class FlaggedError(Refused):
    """A request of a client whom a detector has flagged."""


class Service:
    """Answers queries of any number of clients, counted.

    Args:
        model: A classifier of this project; or a function from inputs (N, …) to logits (N, K), which may be a module.
        ledger: Where queries are charged and answers kept.
        mode: What an answer shows: ``label``, ``label_score``, ``top_k``, ``scores`` or ``logits``.
        k: How many classes ``top_k`` names.
        defence: What perturbs scores; None: nothing. There is none for ``logits``, which would undo it.
        detector: What watches clients; None: nothing does.
        response: What a flagged client gets: one of `RESPONSES`.
        batch_size: Of each model call.
        domain: Known of a classifier, needed for a function.
        device: Where a classifier or module works; None: where it is.
        precision: Its number type: ``float32``, ``float64`` or ``bfloat16``; None: as it is. Where it is another than
            the module's own, a copy answers.

    Raises:
        InputError: If a value is wrong.
    """

    def __init__(
        self,
        model: Model,
        ledger: Ledger,
        mode: str = "scores",
        k: int | None = None,
        defence: Perturbation | None = None,
        detector: Detector | None = None,
        response: str = "watch",
        batch_size: int = 256,
        domain: Domain | None = None,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        check_service(mode, k, defence, response, batch_size)
        if isinstance(model, nn.Module):
            types = {None: None, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
            if precision not in types:
                raise bad("precision", precision, "choose float32, float64 or bfloat16")
            kind = types[precision]
            if any(part.is_floating_point() and part.dtype != kind for part in model.state_dict().values() if kind):
                model = deepcopy(model)  # others ask the same module, in its own precision
            model.eval().requires_grad_(False).to(device=device, dtype=kind)
        if isinstance(model, ImageClassifier):
            domain = domain or Domain(model.image_shape)
        if domain is None:
            raise bad("domain", None, "a function does not tell what it takes; give Domain((C, H, W))")
        self.domain, self.mode, self.k, self.batch_size = domain, mode, k, batch_size
        self.ledger, self.response = ledger, response
        self.calls = 0
        """Batches that the model has worked on."""
        self.__model, self.__defence, self.__detector = model, defence, detector
        self.__device = (
            next((part.device for part in model.parameters()), None) if isinstance(model, nn.Module) else None
        )
        self.__watching: dict[str, tuple[Detector, int]] = {}
        self.__kept: dict[bytes, Tensor] = {}
        self.__room = _KEPT

    def answer(self, client: str, images: Tensor, request: str) -> Answers:
        """Answer a request, once: sent again, it gets the same answer and costs nothing.

        Args:
            client: Who asks.
            images: Of the domain: (N, …); real ones are finite.
            request: The request's id.

        Returns:
            Answers for all images, on the CPU.

        Raises:
            BudgetError: If they do not fit into the budget; the model has not run, and nothing is charged.
            FlaggedError: If the client is flagged, now or before, and such clients are refused; nothing is charged.
            InputError: If they are not inputs of this domain.
        """
        if images.dtype != self.domain.dtype or tuple(images.shape[1:]) != self.domain.shape or images.ndim < 2:
            shape, kind = "×".join(map(str, self.domain.shape)), str(self.domain.dtype).removeprefix("torch.")
            raise InputError(
                f"images: {kind} (N, {shape}) are this oracle's domain, not {images.dtype} {tuple(images.shape)}"
            )
        if images.dtype.is_floating_point and not bool(images.isfinite().all()):
            raise InputError("images: NaN or infinite values are in them; send finite ones")
        contents = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu().contiguous()]
        watching: list[Detector] = []
        with self.ledger.request(client, request, contents) as entry:
            shown = f"{self.mode} {self.k}\n".encode()
            if entry.answer is None:
                self.__refuse(client, entry)
                entry.answer = shown + pack(**self.__work(client, images, contents, entry, watching)._asdict())
            if not entry.answer.startswith(shown):  # a service of more modest a mode shows no more than that
                raise bad("request", request, "it was answered in another mode; give a new id")
            answers = Answers(**unpack(entry.answer[len(shown) :]))
        for detector in watching:  # what it saw is in the ledger
            self.__watching[client] = (detector, entry.number)
        return answers

    def state(self, client: str) -> State:
        """What detectors have to say of a client, in whichever process; empty where none has seen it."""
        return self.ledger.state(client)

    def __work(
        self, client: str, images: Tensor, contents: list[bytes], entry: Entry, watching: list[Detector]
    ) -> Answers:
        logits = self.__logits(images, contents)
        scores = logits.softmax(1)
        if self.__detector is not None and not entry.flagged:
            watching.append(self.__watch(client, images, scores, entry))
            self.__refuse(client, entry)
        numbers = torch.arange(entry.first, entry.first + len(images))
        if entry.flagged and self.response == "degrade":
            best = logits.topk(min(2, logits.shape[1]), dim=1).indices
            logits = logits.scatter(1, best, logits.gather(1, best.flip(1)))
            scores = logits.softmax(1)
        if self.__defence is not None:
            scores = self.__defence(scores, images.cpu(), numbers)
        return reveal(scores, self.mode, self.k, logits)

    def __refuse(self, client: str, entry: Entry) -> None:
        if entry.flagged and self.response == "refuse":
            raise FlaggedError(f"client {client!r}: its queries look like an attack, and no more are answered")

    def __watch(self, client: str, images: Tensor, scores: Tensor, entry: Entry) -> Detector:
        """Bring the client's detector up to what the ledger has, whichever process answered it, and show it these.

        It is taken out while it looks: if the request is undone, the next one starts again from the ledger. Requests
        that are refused before – too large, of a wrong shape – leave it where it is.
        """
        assert self.__detector is not None
        detector, last = self.__watching.pop(client, (self.__detector.fresh(), 0))
        for seen in entry.watched(last):
            detector.observe(**unpack(seen.content))
        entry.flagged = detector.observe(images.cpu(), scores)
        entry.seen = pack(images=images.cpu(), scores=scores)
        entry.state = detector.state()
        return detector

    @torch.inference_mode()
    def __logits(self, images: Tensor, contents: list[bytes]) -> Tensor:
        """Logits of all images; the model sees each different one once."""
        rows = {content: row for row, content in reversed(list(enumerate(contents)))}
        new = [content for content in dict.fromkeys(contents) if content not in self.__kept]
        fresh: dict[bytes, Tensor] = {}
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            batch = images.new_zeros(self.batch_size, *self.domain.shape)
            batch[: len(part)] = images[[rows[content] for content in part]]
            fresh.update(zip(part, self.__call(batch)[: len(part)], strict=True))
        if not contents:
            return self.__call(images.new_zeros(self.batch_size, *self.domain.shape))[:0]
        found = torch.stack([fresh[c] if c in fresh else self.__kept[c] for c in contents])
        for content, value in fresh.items():
            self.__room -= value.nbytes
            if self.__room < 0:
                break
            self.__kept[content] = value.clone()
        return found

    def __call(self, batch: Tensor) -> Tensor:
        self.calls += 1
        logits = self.__model(batch if self.__device is None else batch.to(self.__device)).cpu()
        return logits if logits.dtype == torch.float64 else logits.float()


def check_service(mode: str, k: int | None, defence: Perturbation | None, response: str, batch_size: int) -> None:
    """Refuse what no service can be.

    Raises:
        InputError: If a value is wrong.
    """
    check_mode(mode, k)
    if response not in RESPONSES:
        raise bad("response", response, f"choose one of {', '.join(RESPONSES)}{did_you_mean(response, RESPONSES)}")
    if batch_size < 1:
        raise bad("batch_size", batch_size, "it must be 1 or more")
    if mode == "logits" and defence is not None:
        raise InputError("defence: it perturbs scores, and mode logits shows what is behind them; leave one out")
