"""Extraction: what all strategies share – asking, storing what was answered, measuring fidelity.

A strategy is a datamodule whose training set carries a victim's answers for labels. Its oracle is the only door to the
victim. What was answered is stored, chunk by chunk, as it comes: a run that was interrupted goes on with the next chunk
and pays for none twice. The victim's answers on holdout and test images, which fidelity is measured against, are an
evaluation: they come from an account of their own, undefended, and train nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from datamodules.datamodule import Facts, ImageDataModule
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.imageset import ImageSet, fingerprint
from datamodules.measures import Evaluation, Measure
from datamodules.rewrite import Rewrite
from datamodules.store import Store, load_tensors, save_tensors
from extraction.answers import Answers, labels, soft_labels
from extraction.ledger import Account
from extraction.oracle import Client, Oracle

CHUNK = 4096
"""Images of one request."""

NEAR_BOUNDARY = 0.1
"""The share of the test images that counts as near the victim's boundary: those with the smallest margins."""


class Similarity(Metric):
    """The mean similarity S of surrogate and victim over images, from logits (B, K) and the victim's scores (B, K).

    Args:
        kind: ``kl``: Kullback and Leibler's divergence of the surrogate from the victim, in nats, 0 for equal scores;
            ``total_variation``: half the L1 distance, in [0, 1]; ``top_k``: the share of the victim's k likeliest
            classes among the surrogate's.
        k: Of ``top_k``.
    """

    total: Tensor
    cases: Tensor
    full_state_update = False

    def __init__(self, kind: str = "kl", k: int = 3) -> None:
        super().__init__()
        self.kind, self.k = kind, k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch."""
        if self.kind == "kl":
            each = F.kl_div(logits.double().log_softmax(1), target.double(), reduction="none").sum(1)
        elif self.kind == "total_variation":
            each = (logits.double().softmax(1) - target.double()).abs().sum(1) / 2
        else:
            best, theirs = logits.topk(self.k, dim=1).indices, target.topk(self.k, dim=1).indices
            each = (best[:, :, None] == theirs[:, None]).any(2).double().mean(1)
        self.total += each.sum()
        self.cases += len(logits)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.cases


SIMILARITIES = ("kl", "total_variation", "top_k")
"""What may be measured beside the share of equal labels, which `fidelity` is."""


class Spent(NamedTuple):
    """What a strategy has asked: queries, and different images."""

    queries: int
    samples: int


class Extraction(Rewrite):
    """The base of all strategies.

    Args:
        base: The victim's task: its holdout and test set measure the surrogate.
        oracle: The door to the victim.
        budget: Queries, at most.
        temperature: Of the soft labels; see `extraction.answers.soft_labels`.
        similarity: What is measured of the surrogate's scores beside equal labels: one of `SIMILARITIES`.
        fidelity_on: More sets on whose test images fidelity is measured, by name; their labels are not looked at.
        seed: Of all choices.
        samples_budget: Different images that the victim is asked about, at most; None: any number. Where it is less
            than the budget pays for, so many fewer are asked about.

    Raises:
        InputError: If a value is out of its range, or victim and task do not fit together.
    """

    version = 1

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base)
        if budget < 1:
            raise bad("budget", budget, "give the number of queries, 1 or more")
        if budget < oracle.per_image - 1e-9:
            raise bad("budget", budget, f"an image costs {oracle.per_image:g} queries; give so many or more")
        if samples_budget is not None and samples_budget < oracle.samples_per_image - 1e-9:
            least = f"{oracle.samples_per_image:g} or more"
            raise bad("samples_budget", samples_budget, f"give the number of different images, {least}")
        if not temperature > 0:
            raise bad("temperature", temperature, "it must be above 0")
        if similarity not in SIMILARITIES:
            hint = did_you_mean(similarity, SIMILARITIES)
            raise bad("similarity", similarity, f"choose one of {', '.join(SIMILARITIES)}{hint}")
        self.oracle, self.budget, self.temperature, self.seed = oracle, budget, temperature, seed
        self.samples_budget = samples_budget
        self.similarity = similarity
        self.others = dict(fidelity_on or {})
        for name, other in self.others.items():
            self.check_pool(other, f"fidelity_on.{name}")
        self.spent: Spent | None = None
        """What the answers so far have cost; None before the first."""
        self._client: tuple[str, Client] | None = None
        self._evaluated: dict[str, list[Evaluation]] = {}

    # --- for the subclass --------------------------------------------------------------------------------------------
    @property
    def affordable(self) -> int:
        """Images that both budgets allow; see `Oracle.per_image`."""
        paid = int(self.budget / self.oracle.per_image + 1e-9)  # 1 / (1 − 0.8) is a bit more than 5
        if self.samples_budget is None:
            return paid
        return min(paid, int(self.samples_budget / self.oracle.samples_per_image + 1e-9))

    def check_pool(self, pool: ImageDataModule, field: str = "pool") -> None:
        """Refuse images that the victim does not take.

        Raises:
            InputError: If their shape is another one.
        """
        if tuple(pool.image_shape) != tuple(self.base.image_shape):
            shapes = ["×".join(map(str, part.image_shape)) for part in (pool, self.base)]
            square = len(set(self.base.image_shape[1:])) == 1 and pool.image_shape[0] == self.base.image_shape[0]
            remedy = f"wrap it in Resized(size: {self.base.image_shape[1]})" if square else "choose another"
            raise InputError(f"{field}: its images are {shapes[0]} and the victim takes {shapes[1]}; {remedy}")

    def ask(self, images: ImageSet, client: str, name: str) -> Answers:
        """The oracle's answers to all images, from the store as far as they are there.

        Args:
            images: What to ask about.
            client: Who asks: a hash of what makes this run's queries what they are.
            name: Of these queries among the client's, such as ``round 3``.
        """
        store = Store()
        parts: list[Answers] = []
        for number, rows in enumerate(torch.arange(len(images)).split(CHUNK)):
            key = {"client": client, "name": name, "chunk": number}
            made = store.build("answers", key, partial(self._query, images, rows, client, f"{name} {number}"))
            found = load_tensors(made / "answers.safetensors")
            self.spent = Spent(*found.pop("account").long().tolist()[:2])  # older files have a cost besides
            parts.append(Answers(**found))
        return Answers(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def targets(self, answers: Answers) -> Tensor:
        """What a surrogate trains on: int64 (N,) where labels were answered, else float32 (N, K)."""
        if self.oracle.mode == "label":
            return labels(answers)
        return soft_labels(answers, self.oracle.mode, self.num_classes, self.temperature)

    @abstractmethod
    def rewrite(self, train: ImageSet) -> ImageSet:
        """What the surrogate trains on: images with the oracle's answers for labels."""

    # --- the datamodule ----------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        """Prepare the base and what else fidelity is measured on, and see that the victim fits."""
        super().prepare_data()
        self.oracle.check(self.num_classes, self.image_shape)
        for other in self.others.values():
            other.prepare_data()

    def setup(self, stage: str = "fit") -> None:
        """Set up base and others."""
        for other in self.others.values():
            other.setup(stage)
        super().setup(stage)

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and fidelity: agreement with the victim's own answers."""
        if split not in self._evaluated:
            self._evaluated[split] = self._fidelity(split)
        return [*self.base.evaluations(split), *self._evaluated[split]]

    def facts(self) -> Facts:
        """What was spent, at the price of now: answers of the store were perhaps got at another."""
        spent: Facts = {}
        if self.spent is not None:
            spent = {**self.spent._asdict(), "cost": self.oracle.cost(self.spent.queries)}
        return {**self.base.facts(), "answer_mode": self.oracle.mode, **spent}

    def _query(self, images: ImageSet, rows: Tensor, client: str, request: str, folder: Path) -> None:
        if self._client is None or self._client[0] != client:
            self._client = (client, self.oracle.client(client, self.budget, self.samples_budget))
        asked = self._client[1]
        answers = asked.query(images.images_at(rows), request)
        account: Account = asked.account
        counts = torch.tensor([account.queries, account.samples])
        tensors = {name: part.contiguous() for name, part in answers._asdict().items()}
        save_tensors(folder / "answers.safetensors", {**tensors, "account": counts})

    def _fidelity(self, split: str) -> list[Evaluation]:
        images = {"val": self.val_set, "test": self.test_set}[split]
        evaluator = self.oracle.evaluator()
        if evaluator is None or not len(images):
            return []
        scores = _scores(evaluator, images)
        measures = [Measure("fidelity", scores.argmax(1)), self._similar("fidelity", scores)]
        found = [Evaluation("fidelity", images, tuple(measures))]
        if split == "val":
            return found
        best = scores.topk(2, dim=1).values
        near = (best[:, 0] - best[:, 1]).argsort(stable=True)[: max(1, round(NEAR_BOUNDARY * len(images)))]
        sets: dict[str, tuple[ImageSet, Tensor]] = {"boundary": (images.select(near), scores[near])}
        for name, other in self.others.items():
            if len(other.test_set):
                sets[name] = (other.test_set, _scores(evaluator, other.test_set))
        for name, (some, theirs) in sets.items():
            field = f"fidelity_{name}"
            found.append(Evaluation(field, some, (Measure(field, theirs.argmax(1)), self._similar(field, theirs))))
        return found

    def _similar(self, name: str, scores: Tensor) -> Measure:
        k = min(3, self.num_classes)
        return Measure(f"{name}_{self.similarity}", scores, partial(Similarity, self.similarity, k))


def chosen(images: ImageSet, rows: Tensor) -> ImageSet:
    """Some rows as a set of their own, in memory."""
    return ImageSet(images.images_at(rows), images.labels[rows], images.ids[rows])


def _scores(evaluator: Client, images: ImageSet) -> Tensor:
    key = fingerprint(images.digest())
    parts = torch.arange(len(images)).split(CHUNK)
    return torch.cat([evaluator.query(images.images_at(part), f"{key} {n}").values for n, part in enumerate(parts)])
