"""Surrogate: what an attacker trains on a victim's answers.

It is a classifier like any other – soft and hard labels, every measure – that starts from scratch at each round of a
strategy that has rounds: with the weights it began with, a new optimizer and the schedule's beginning. A surrogate that
went on from the round before would have been trained for longer than one that gets all answers at once.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from classifiers.classifier import ImageClassifier
from extraction.rounds import Rounds


class Surrogate(ImageClassifier):
    """A classifier trained on a victim's answers, anew in each round; its arguments are those of `ImageClassifier`."""

    _initial: dict[str, Tensor] | None = None

    def setup(self, stage: str) -> None:
        """Remember the weights that every round starts from: a copy, and from before a checkpoint is restored."""
        if stage == "fit" and self._rounds is not None:
            self._initial = {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def on_train_epoch_start(self) -> None:
        """Start from scratch where a round begins."""
        rounds = self._rounds
        if rounds is None or not rounds.begins(self.current_epoch):
            return
        assert self._initial is not None
        self.net.load_state_dict(self._initial)
        self.trainer.strategy.setup_optimizers(self.trainer)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # Lightning gives it no type
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                callback._average_model.n_averaged.zero_()  # the next update copies instead of averaging

    def total_steps(self) -> float:
        """Steps of the schedule: those of one round."""
        steps = super().total_steps()
        if self._rounds is None:
            return steps
        batches = self.trainer.num_training_batches
        return batches // self.trainer.accumulate_grad_batches * self._rounds.epochs

    @property
    def _rounds(self) -> Rounds | None:
        data: Any = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, Rounds) else None
