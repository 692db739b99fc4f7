"""Adaptive misinformation: queries that the victim is unsure of are answered by a misleading second model.

Paper: Kariyappa & Qureshi, "Defending Against Model Stealing Attacks with Adaptive Misinformation", CVPR 2020:
(1 − α) f + α f′ with α = 1 / (1 + e^{ν (conf − τ)}), where conf is the victim's largest score.

Threat model: the attacker asks with images from elsewhere, of which the victim is less sure than of its users'.

The paper trains f′ to be wrong, by the loss −log(1 − f′(x)_y); `experiments.bulk.extraction_defences.misleading` does.
Deviation wherever f′ is any other trained model: it misleads no more than it errs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier, load_classifier
from classifiers.weights import content_hash, find_weights, load_weights
from datamodules.errors import bad
from datamodules.imageset import fingerprint
from extraction.defences.perturbation import Perturbation, in_padded_batches


class AdaptiveMisinformation(Perturbation):
    """The victim's scores, mixed with f′'s where the victim is unsure.

    Args:
        weights: Of f′, for the victim's images and classes: see `classifiers.weights.find_weights`.
        tau: τ: the confidence below which f′ answers, in [0, 1].
        nu: ν, above 0: how sharp the change is; the paper's value.

    Raises:
        InputError: If a number is out of its range.
    """

    version = 1

    def __init__(self, weights: str, tau: float = 0.5, nu: float = 1000.0) -> None:
        if not 0 <= tau <= 1:
            raise bad("tau", tau, "it is a probability, from 0 to 1")
        if not nu > 0:
            raise bad("nu", nu, "it must be above 0")
        self.weights, self.tau, self.nu = weights, tau, nu
        self._second: ImageClassifier | None = None

    def identity(self) -> str:
        """Of f′'s weights, wherever they lie, and the numbers."""
        tensors, architecture = load_weights(find_weights(self.weights))
        name = "adaptive misinformation"
        return fingerprint(name, self.version, content_hash(tensors), repr(architecture), self.tau, self.nu)

    @torch.no_grad()
    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Mixed scores.

        Raises:
            InputError: If f′ is for other images or classes.
        """
        second = self._model(scores.shape[1], tuple(images.shape[1:]))
        other = in_padded_batches(lambda part: second(part).softmax(1), images).to(scores)
        return mixed(scores, other, self.tau, self.nu)

    def _model(self, classes: int, shape: tuple[int, ...]) -> ImageClassifier:
        if self._second is None:
            with torch.random.fork_rng(devices=[]):  # a network is initialised before weights are put into it
                self._second = load_classifier(find_weights(self.weights)).eval().requires_grad_(False)
        if self._second.num_classes != classes or tuple(self._second.image_shape) != shape:
            raise bad("defence.weights", self.weights, "this model is for other images or classes than the victim's")
        return self._second


def mixed(scores: Tensor, other: Tensor, tau: float, nu: float) -> Tensor:
    """(1 − α) f + α f′.

    Args:
        scores: f: real (N, K).
        other: f′: real (N, K).
        tau: τ.
        nu: ν.
    """
    alpha = torch.sigmoid(-nu * (scores.double().amax(1, keepdim=True) - tau))
    return ((1 - alpha) * scores + alpha * other).to(scores.dtype)
