"""Watermarked: what is trained with an owner's triggers.

It trains and measures as any classifier does; what is its own is to insist on a key, and to say how unlikely its
trigger accuracy would be for a model that never saw the triggers.
"""

from __future__ import annotations

import math

from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError
from datamodules.measures import Interval
from watermark.statistics import log2, tail


class Watermarked(ImageClassifier):
    """A classifier that is marked while it is trained: see `ImageClassifier` for its arguments.

    Beside what its datamodule measures, `log2_p`: log₂ of the probability that an unmarked model gives the key's labels
    to as many triggers. It is the owner's own look; `lightning verify` decides.

    Raises:
        InputError: When training begins, if the datamodule has no triggers.
    """

    def setup(self, stage: str) -> None:
        """Refuse data without triggers, which would leave the model unmarked."""
        super().setup(stage)
        evaluations = self._datamodule().evaluations("test") if stage == "fit" else []
        names = [measure.name for evaluation in evaluations for measure in evaluation.measures]
        if stage == "fit" and not any(name.startswith("trigger_accuracy") for name in names):
            raise InputError("data: a watermarked model needs a TriggerSet, and a key: lightning keygen --out DIR")

    def on_validation_epoch_end(self) -> None:
        """Log the measures, and log₂ of the p-value."""
        super().on_validation_epoch_end()
        self._say("val")

    def on_test_epoch_end(self) -> None:
        """Log the measures, and log₂ of the p-value."""
        super().on_test_epoch_end()
        self._say("test")

    def _say(self, stage: str) -> None:
        for name in [name for name in self.measured if name.startswith("trigger_accuracy")]:
            found = self.measured[name]
            chance = log2(tail(round(found.value * found.n), found.n, self.num_classes))
            called = "log2_p" + name.removeprefix("trigger_accuracy")
            self.measured[called] = Interval(chance, found.n, math.nan, math.nan, found.unit)
            self.log(f"{stage}/{called}", chance, rank_zero_only=True)
