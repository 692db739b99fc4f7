"""Knockoff Nets: a pool of images labelled by the victim's answers, drawn at random without replacement.

Paper: Orekondy, Schiele & Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019, arXiv
1812.02766; code: github.com/tribhuvanesh/knockoffnets. This is its random strategy.

Threat model: the attacker may ask a classifier for answers, up to a budget, and has images of any kind: another data
set of the same size, or training images of the task. He knows the classes and neither the victim's network nor its
data.

The datamodule asks in `prepare_data`, chunk by chunk, and stores what was answered: a run that was interrupted goes on
with the next chunk and pays for none twice. The victim's answers on the holdout and the test set, which fidelity is
measured against, are an evaluation, on an account of its own.

Deviation: the attacker's holdout is none of the victim's answers; nothing is chosen on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from classifiers.classifier import load_classifier
from classifiers.weights import content_hash, find_weights, load_weights
from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import UNLABELLED, ImageSet, fingerprint
from datamodules.measures import Evaluation, Measure
from datamodules.random import draw
from datamodules.rewrite import Rewrite
from datamodules.store import Store, load_tensors, save_tensors
from extraction.answers import Answers, check_mode, labels, soft_labels
from extraction.defences.perturbation import Perturbation
from extraction.ledger import Ledger
from extraction.oracle import Oracle

CHUNK = 4096
"""Images of one request."""


class _Asked(NamedTuple):
    answers: Answers
    queries: int
    cost: float


class KnockoffNets(Rewrite):
    """A surrogate's training set: a pool, labelled by the victim's answers (Orekondy et al. 2019, random).

    Args:
        base: The victim's task: its holdout and test set measure the surrogate; its training set is the pool if no
            other is given.
        weights: Of the victim: a weights file, a run's folder, or a config's folder of runs.
        budget: Queries, at most; the pool may be smaller.
        pool: Data of images of the same shape, whose labels are not looked at; None: the base's training images.
        mode: What an answer shows: ``label``, ``label_score``, ``top_k``, ``scores`` or ``logits``.
        k: How many classes ``top_k`` names.
        defence: What the victim does to its scores; None: nothing.
        temperature: Of the soft labels.
        price: Of a thousand queries.
        seed: Of the choice from the pool.

    Raises:
        InputError: If a value is out of its range, or pool, victim and task do not fit together.
    """

    version = 1

    def __init__(
        self,
        base: ImageDataModule,
        weights: str,
        budget: int = 60_000,
        pool: ImageDataModule | None = None,
        mode: str = "scores",
        k: int | None = None,
        defence: Perturbation | None = None,
        temperature: float = 1.0,
        price: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        check_mode(mode, k, base.num_classes)
        if budget < 1:
            raise bad("budget", budget, "give the number of queries, 1 or more")
        if not temperature > 0:
            raise bad("temperature", temperature, "it must be above 0")
        if mode == "logits" and defence is not None:
            raise InputError("defence: it perturbs scores, and mode logits shows what is behind them; leave one out")
        if pool is not None and tuple(pool.image_shape) != tuple(base.image_shape):
            shapes = ["×".join(map(str, part.image_shape)) for part in (pool, base)]
            raise InputError(f"pool: its images are {shapes[0]} and the victim takes {shapes[1]}; choose another pool")
        self.weights, self.budget, self.pool, self.mode, self.k = weights, budget, pool, mode, k
        self.defence, self.temperature, self.price, self.seed = defence, temperature, price, seed
        self._asked: _Asked | None = None
        self._evaluated: dict[str, list[Evaluation]] = {}

    def prepare_data(self) -> None:
        """Ask the victim, unless its answers are in the store."""
        super().prepare_data()
        if self.pool is not None:
            self.pool.prepare_data()
            self.pool.setup("fit")
        self.base.setup("fit")
        self._ask(self._chosen())

    def setup(self, stage: str = "fit") -> None:
        """Set base and pool up, and relabel."""
        if self.pool is not None:
            self.pool.setup("fit")
        super().setup(stage)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """What was asked about, with the victim's answers for labels; nothing of the pool's own."""
        images = self._chosen()
        self._asked = self._ask(images)
        soft = soft_labels(self._asked.answers, self.mode, self.num_classes, self.temperature)
        found = labels(self._asked.answers) if self.mode == "label" else soft
        ids = images.ids if self.pool is None else self.fresh_ids(len(images))
        named = labels(self._asked.answers)
        origins = ids if self.pool is None else torch.full_like(ids, -1)
        before = images.labels if self.pool is None and images.labels.ndim == 1 else torch.full_like(ids, UNLABELLED)
        self.record(Changes("KnockoffNets", ids, origins, before, named))
        return ImageSet(images.images_at(torch.arange(len(images))), found, ids)

    def evaluations(self, split: str) -> list[Evaluation]:
        """The base's, and fidelity: agreement with the victim's own labels on the clean images."""
        if split not in self._evaluated:
            images = {"val": self.val_set, "test": self.test_set}[split]
            self._evaluated[split] = self._fidelity(images) if len(images) else []
        return [*self.base.evaluations(split), *self._evaluated[split]]

    def facts(self) -> Facts:
        """What was spent."""
        spent = {} if self._asked is None else {"queries": self._asked.queries, "cost": self._asked.cost}
        return {**self.base.facts(), "answer_mode": self.mode, **spent}

    def _chosen(self) -> ImageSet:
        """The pool's images that are asked about, in order of their draw."""
        whole = self.base.train_set if self.pool is None else self.pool.train_set
        order = draw(self.seed, "knockoff pool", 0, whole.ids)[:, 0].argsort(stable=True)[: self.budget]
        return ImageSet(whole.images_at(order), whole.labels[order], whole.ids[order])

    def _ask(self, images: ImageSet) -> _Asked:
        tensors, architecture = load_weights(find_weights(self.weights))
        defence = (
            None if self.defence is None else (type(self.defence).__qualname__, sorted(vars(self.defence).items()))
        )
        client = fingerprint(
            "knockoff", self.version, content_hash(tensors), repr(architecture), self.mode, self.k, repr(defence),
            images.digest(),
        )  # fmt: skip
        store = Store()
        oracle: Oracle | None = None
        ledger = Ledger(_folder(store) / f"{client}.sqlite", budget=self.budget, price=self.price)
        parts: list[Answers] = []
        for number, rows in enumerate(torch.arange(len(images)).split(CHUNK)):

            def make(folder: Path, number: int = number, rows: Tensor = rows) -> None:
                nonlocal oracle
                if oracle is None:
                    oracle = self._oracle(ledger, client)
                answers = oracle.query(images.images_at(rows), f"chunk {number}")
                save_tensors(folder / "answers.safetensors", {k: v.contiguous() for k, v in answers._asdict().items()})

            built = store.build("answers", {"client": client, "chunk": number}, make)
            parts.append(Answers(**load_tensors(built / "answers.safetensors")))
        account = ledger.account(client)
        whole = Answers(*(torch.cat(part) for part in zip(*parts, strict=True)))
        return _Asked(whole, account.queries, account.cost)

    def _oracle(self, ledger: Ledger, client: str, for_evaluation: bool = False) -> Oracle:
        with torch.random.fork_rng(devices=[]):  # a network is initialised before weights are put into it
            model = load_classifier(find_weights(self.weights))
        if (model.num_classes, *model.image_shape) != (self.num_classes, *self.image_shape):
            made = f"{model.num_classes} classes and images of {'×'.join(map(str, model.image_shape))}"
            raise bad("weights", self.weights, f"this victim is for {made}; choose one for these data")
        if for_evaluation:
            return Oracle(model, ledger, "label", client=client)
        return Oracle(model, ledger, self.mode, self.k, self.defence, client)

    def _fidelity(self, images: ImageSet) -> list[Evaluation]:
        ledger = Ledger(_folder(Store()) / "evaluation.sqlite")
        oracle = self._oracle(ledger, "evaluation", for_evaluation=True)
        rows = torch.arange(len(images))
        key = fingerprint(images.digest())
        named = [
            labels(oracle.query(images.images_at(part), f"{key} {number}"))
            for number, part in enumerate(rows.split(CHUNK))
        ]
        return [Evaluation("fidelity", images, (Measure("fidelity", torch.cat(named)),))]


def _folder(store: Store) -> Path:
    folder = store.root / "ledgers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
