"""Victim: what is trained on poisoned data, and the user's acceptance gate.

Threat model (BadNets' outsourced training): the user accepts a returned model only if its accuracy on a holdout that
the trainer never saw reaches a*. The gate reads the holdout and nothing else: neither test data nor attack success. A
backdoor is what an *honest* model does not do: where an honest model's weights are given, the same measures of it
stand beside, and the share of images on which the two disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from classifiers.classifier import BackboneFactory, ImageClassifier, OptimizerFactory, ScheduleFactory
from datamodules.errors import InputError, bad
from datamodules.imageset import Batch
from datamodules.measures import Hits


class Victim(ImageClassifier):
    """A classifier trained on data that may be poisoned, judged by the user's acceptance gate.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        acceptance: a*: the accuracy on the holdout at which the user accepts the model, in (0, 1]; None: no gate.
        honest: Weights of an honest model of the same architecture, to stand beside; None: none.
        optimizer: See `ImageClassifier`.
        schedule: See `ImageClassifier`.
        label_smoothing: See `ImageClassifier`.
        ema: See `ImageClassifier`.
        weights: See `ImageClassifier`.
        channels_last: See `ImageClassifier`.
        compile: See `ImageClassifier`.
        new_head: See `ImageClassifier`.
        frozen: See `ImageClassifier`.

    Raises:
        InputError: If a* is outside (0, 1], or weights do not fit.
    """

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        acceptance: float | None = None,
        honest: str | None = None,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.SGD(
            parameters, lr=0.05, momentum=0.9, weight_decay=5e-4
        ),
        schedule: ScheduleFactory | None = None,
        label_smoothing: float = 0.0,
        ema: float | None = None,
        weights: str | None = None,
        channels_last: bool = True,
        compile: bool = False,
        new_head: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(
            backbone, num_classes, image_shape, mean, std, optimizer, schedule, label_smoothing, ema, weights,
            channels_last, compile, new_head, frozen,
        )  # fmt: skip
        if acceptance is not None and not 0 < acceptance <= 1:
            raise bad("acceptance", acceptance, "a*, the accuracy on the holdout, must be in (0, 1]")
        self.acceptance = acceptance
        self._honest: list[ImageClassifier] = []  # in a list: neither a submodule nor part of any checkpoint
        if honest is not None:
            other = ImageClassifier(backbone, num_classes, image_shape, mean, std, channels_last=channels_last)
            try:
                other.load(honest)
            except InputError as error:  # if they do not fit, that says nothing about the weights that are judged
                raise InputError(f"honest: {error}") from error
            self._honest = [other.eval().requires_grad_(False)]
        self._beside: dict[str, Metric] = {}

    @property
    def accepted(self) -> bool | None:
        """The gate's verdict on what was last measured; None without a gate, or before a test or validation."""
        if self.acceptance is None:
            return None
        holdout = self.measured.get("holdout_accuracy", self.measured.get("clean_accuracy"))
        return None if holdout is None else holdout.value >= self.acceptance

    def setup(self, stage: str) -> None:
        """Refuse a gate without a holdout before anything is trained or measured."""
        if self.acceptance is not None and stage != "predict" and not len(self._datamodule().val_set):
            raise InputError(f"acceptance = {self.acceptance}: the gate needs a holdout; set val_fraction above 0")

    def on_test_epoch_start(self) -> None:
        """Make the metrics, and those of the honest model."""
        super().on_test_epoch_start()
        self._begin_beside("test")

    def on_validation_epoch_start(self) -> None:
        """Make the metrics, and outside of training those of the honest model."""
        super().on_validation_epoch_start()
        self._beside = {}
        if self.trainer.state.fn != "fit":
            self._begin_beside("val")

    def _begin_beside(self, stage: str) -> None:
        self._beside = {}
        for other in self._honest:
            other.to(self.device)
            for evaluation, _ in self._stages[stage]:
                for measure in evaluation.measures:
                    if measure.metric is None:
                        self._beside[f"honest_{measure.name}"] = Hits().to(self.device)
                self._beside[f"disagreement_{evaluation.name}"] = Hits().to(self.device)

    def update_measures(self, stage: str, index: int, batch: Batch, logits: Tensor) -> None:
        """Update every measure, and the honest model's."""
        super().update_measures(stage, index, batch, logits)
        if not self._beside:
            return
        evaluation, _ = self._stages[stage][index]
        real, rows = batch.labels >= 0, batch.labels.clamp_min(0)
        honest = self._honest[0](batch.images)
        for measure in evaluation.measures:
            if measure.metric is None:
                target = self._target(measure.target)[rows].masked_fill(~real, -1)
                self._beside[f"honest_{measure.name}"].update(honest, target)
        differs = (honest.argmax(1) != logits.argmax(1)).long()
        # Hits counts arg max = target: a two-class score whose arg max says whether the two differ
        score = torch.nn.functional.one_hot(differs, 2)
        self._beside[f"disagreement_{evaluation.name}"].update(score, real.long() * 2 - 1)

    def extra_metrics(self, stage: str) -> dict[str, Metric]:
        """The honest model's measures, and the disagreement with it."""
        return self._beside
