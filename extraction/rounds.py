"""Rounds: strategies that ask, train a surrogate, choose by it what to ask next, and train anew.

The rounds are Lightning's own loop: each has an equal share of the trainer's epochs, and its training set comes with
the next reloaded dataloader. `Surrogate` starts anew with each. What was chosen is stored before it is asked about, so
that a resumed run neither chooses nor pays twice; on several devices one process chooses and the others read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from datamodules.datamodule import Changes, Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.imageset import UNLABELLED, ImageSet, fingerprint
from datamodules.loading import Loader
from datamodules.store import Store, load_tensors, save_tensors
from extraction.answers import labels
from extraction.oracle import Oracle
from extraction.strategy import Extraction


class Asked(NamedTuple):
    """What was asked so far.

    Attributes:
        images: uint8 (N, C, H, W).
        ids: int64 (N,): the pool's ids; below 0 for images that the attacker made.
        labels: int64 (N,): the victim's likeliest classes.
        targets: What the surrogate trains on: int64 (N,) or float32 (N, K).
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    targets: Tensor


class Rounds(Extraction):
    """The base of strategies that choose by the surrogate.

    Args:
        base: The victim's task.
        oracle: See `Extraction`.
        budget: Queries, at most, over all rounds.
        rounds: How many; the trainer's epochs are shared out among them.
        pool: Data of images of the same shape, whose labels are not looked at; None: the base's training images.
        temperature: See `Extraction`.
        similarity: See `Extraction`.
        fidelity_on: See `Extraction`.
        seed: Of all choices.
        samples_budget: See `Extraction`.

    Raises:
        InputError: If a value is out of its range, or pool, victim and task do not fit together.
    """

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int,
        rounds: int = 10,
        pool: ImageDataModule | None = None,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, temperature, similarity, fidelity_on, seed, samples_budget)
        if rounds < 1:
            raise bad("rounds", rounds, "give their number, 1 or more")
        if pool is not None:
            self.check_pool(pool)
        self.rounds, self.pool = rounds, pool
        self._run = ""
        self._reached = 0
        self._asked: list[Asked] = []
        self._known: tuple[int, ImageSet] | None = None
        self._loader_of: tuple[int, Loader] | None = None

    # --- what a strategy gives ---------------------------------------------------------------------------------------
    @abstractmethod
    def first(self, pool: ImageSet) -> tuple[Tensor, Tensor]:
        """Round 0's queries, by the seed alone: images uint8 (N, C, H, W), ids int64 (N,)."""

    @abstractmethod
    def choose(self, number: int, model: ImageClassifier, pool: ImageSet, asked: Asked) -> tuple[Tensor, Tensor]:
        """The queries of a later round: images and ids, −1 for images that are not of the pool; at most what is left.

        Called in one process, with the surrogate of the round before in evaluation mode.
        """

    # --- for `Surrogate` ---------------------------------------------------------------------------------------------
    @property
    def epochs(self) -> int:
        """Epochs of each round.

        Raises:
            InputError: If the trainer has too few for all rounds, or does not reload its dataloaders.
        """
        trainer = self.trainer
        assert trainer is not None
        reloaded: int = getattr(trainer, "reload_dataloaders_every_n_epochs")  # noqa: B009 – Lightning gives it no type
        if reloaded != 1:
            remedy = "each round brings new training data; set it to 1"
            raise bad("trainer.reload_dataloaders_every_n_epochs", reloaded, remedy)
        most = trainer.max_epochs or 0
        if most < self.rounds or most % self.rounds:
            raise bad(
                "trainer.max_epochs", most, f"it is shared out among {self.rounds} rounds; give a multiple of them"
            )
        return most // self.rounds

    def begins(self, epoch: int) -> bool:
        """Whether a round after the first begins with this epoch."""
        return epoch > 0 and epoch % self.epochs == 0

    # --- the datamodule ----------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        """Prepare base and pool."""
        super().prepare_data()
        if self.pool is not None:
            self.pool.prepare_data()

    def setup(self, stage: str = "fit") -> None:
        """Set base, pool and others up; what is asked comes with the first dataloader."""
        if self.pool is not None:
            self.pool.setup("fit")
        for other in self.others.values():
            other.setup(stage)
        self.base.setup(stage)

    def rewrite(self, train: ImageSet) -> ImageSet:
        """Not used: see `train_set`."""
        return self.train_set

    @property
    def train_set(self) -> ImageSet:
        """All that was asked up to the round that the trainer is in."""
        number = self._round()
        if self._known is None or self._known[0] != number:
            while len(self._asked) <= number:
                self._asked.append(self._next(len(self._asked)))
            self._reached = number
            whole = self._so_far()
            own = whole.ids >= 0 if self.pool is None else torch.zeros(len(whole.ids), dtype=torch.bool)
            first = self.base.next_id
            ids = torch.where(own, whole.ids, first + torch.arange(len(whole.ids)))
            self._added = len(ids)
            kept = Changes(
                type(self).__name__, ids, torch.where(own, ids, -1), self._own_labels(ids, own), whole.labels
            )
            self._changes = [kept]
            self._known = (number, ImageSet(whole.images, whole.targets, ids))
        return self._known[1]

    def train_dataloader(self) -> Loader:
        """Shuffled batches of this round's set; the same loader throughout a round."""
        number = self._round()
        if self._loader_of is None or self._loader_of[0] != number:
            self._loader_of = (number, super().train_dataloader())
        return self._loader_of[1]

    def facts(self) -> Facts:
        """What was spent, and in how many rounds."""
        return {**super().facts(), "rounds": len(self._asked)}

    def state_dict(self) -> dict[str, Any]:
        """Whose answers these are, and how far the rounds have come."""
        return {**super().state_dict(), "rounds": {"run": self._run, "reached": self._reached}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the rounds were."""
        inner = dict(state_dict)
        if "rounds" in inner:
            mine = inner.pop("rounds")
            self._run, self._reached = mine["run"], mine["reached"]
        super().load_state_dict(inner)

    def _round(self) -> int:
        trainer = self.trainer
        if trainer is None or not trainer.max_epochs or trainer.max_epochs < 1:
            return self._reached
        by_epoch = trainer.current_epoch // max(1, trainer.max_epochs // self.rounds)
        # a trainer that resumes starts from epoch 0 before it knows better
        return max(self._reached, min(by_epoch, self.rounds - 1))

    def _images(self) -> ImageSet:
        return self.base.train_set if self.pool is None else self.pool.train_set

    def _own_labels(self, ids: Tensor, own: Tensor) -> Tensor:
        """What the base labels its own images with, for the record alone: nothing else looks at it."""
        known, before = self.base.train_set, torch.full_like(ids, UNLABELLED)
        if known.labels.ndim == 1:
            ordered, rows = known.ids.sort()
            before[own] = known.labels[rows[torch.searchsorted(ordered, ids[own])]]
        return before

    def _so_far(self) -> Asked:
        return Asked(*(torch.cat(part) for part in zip(*self._asked, strict=True)))

    def _next(self, number: int) -> Asked:
        if self.trainer is not None and self.trainer.state.fn == "fit":
            _ = self.epochs  # refuses what does not fit, before anything is asked
        if not self._run:  # another run of the same config chooses by another surrogate, and pays for itself
            own = "" if self.trainer is None else str(self.trainer.strategy.broadcast(uuid4().hex))
            self._run = fingerprint(type(self).__name__, self.version, self.oracle.identity(), self._images().digest(),
                                    self.budget, self.samples_budget, self.rounds, self.seed, own)  # fmt: skip
        key = {"client": self._run, "round": number}
        made = load_tensors(Store().build("queries", key, partial(self._choose, number)) / "queries.safetensors")
        images, ids = made["images"], made["ids"]
        answers = self.ask(ImageSet(images, torch.full((len(images),), UNLABELLED), ids), self._run, f"round {number}")
        return Asked(images, ids, labels(answers), self.targets(answers))

    def _choose(self, number: int, folder: Path) -> None:
        if number == 0:
            images, ids = self.first(self._images())
        else:
            model = None if self.trainer is None else self.trainer.lightning_module
            if not isinstance(model, ImageClassifier):
                raise InputError(f"round {number} of {type(self).__name__} is chosen by the surrogate: only a fit can")
            training = model.training
            model.eval()
            images, ids = self.choose(number, model, self._images(), self._so_far())
            model.train(training)
        spent = sum(len(part.ids) for part in self._asked)
        room = self.affordable - spent
        save_tensors(
            folder / "queries.safetensors", {"images": images[:room].contiguous(), "ids": ids[:room].contiguous()}
        )


@torch.inference_mode()
def predicted(model: ImageClassifier, images: ImageSet, rows: Tensor, batch_size: int = 1024) -> Tensor:
    """The surrogate's scores on some rows: real (len(rows), K), on the CPU."""
    parts = [model(images.images_at(part).to(model.device)).softmax(1).float().cpu() for part in rows.split(batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, model.num_classes)
