"""Prediction poisoning: scores that turn the gradient of whoever trains on them as far as may be (MAD).

Paper: Orekondy, Schiele & Fritz, "Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks", ICLR
2020, arXiv 1906.10908. Of all answers ỹ it seeks the one with most ‖Gᵀỹ / ‖Gᵀỹ‖ − Gᵀy / ‖Gᵀy‖‖², G the Jacobian of
a surrogate's log scores; it looks at the extremes of the feasible answers, takes the best, and goes from y towards it
as far as a budget ε in L1 allows. `keep_label` is its argmax-preserving variant.

Threat model: the attacker trains a network on the scores; its weights are not known, so a random network stands for it.

Deviations: the surrogate is a `SmallCNN` as it is initialised, and G is taken with respect to its last layer alone.
There G's row of class k is (e_k − p) ⊗ (h, 1), p its scores and h its features, so that Gᵀỹ = (ỹ − p) ⊗ (h, 1): the
length of h cancels and the angle is that of ỹ − p and y − p. No gradient is computed at all. Where there are more than
12 classes, `keep_label` looks at sets of one and two classes only, not at all 2^(K−1).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from classifiers.backbones import SmallCNN
from datamodules.errors import bad
from datamodules.random import generator
from extraction.defences.perturbation import Perturbation, in_padded_batches

_ALL_SETS = 12
_PART = 256


class PredictionPoisoning(Perturbation):
    """MAD: the answer that most misdirects a surrogate's gradient.

    Args:
        epsilon: ε: how far an answer may be from the scores, in L1: in [0, 2].
        keep_label: Whether the likeliest class stays so (equal scores count as that, see `poisoned`).
        seed: Of the surrogate.

    Raises:
        InputError: If `epsilon` is out of its range.
    """

    version = 1

    def __init__(self, epsilon: float = 0.5, keep_label: bool = False, seed: int = 0) -> None:
        if not 0 <= epsilon <= 2:
            raise bad("epsilon", epsilon, "two answers are from 0 to 2 apart in L1")
        self.epsilon, self.keep_label, self.seed = epsilon, keep_label, seed
        self._surrogate: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Poisoned scores."""
        if self._surrogate is None:
            self._surrogate = random_network(scores.shape[1], tuple(images.shape[1:]), self.seed)
        surrogate = self._surrogate
        guessed = in_padded_batches(lambda part: surrogate(part.float() / 127.5 - 1).softmax(1), images)
        return poisoned(scores, guessed.to(scores), self.epsilon, self.keep_label)


def poisoned(scores: Tensor, guessed: Tensor, epsilon: float, keep_label: bool = False) -> Tensor:
    """The answers that turn ỹ − p furthest from y − p, as far as ε allows.

    Args:
        scores: y: real (N, K).
        guessed: p, the surrogate's scores: real (N, K).
        epsilon: ε.
        keep_label: Whether only extremes among which y's likeliest class has the largest share, or shares it, count:
            1 / |S| for each class of a set S that it is in. As long as ε stops short of them, it stays likelier than
            the others; at the extreme itself they are equal, and then it gets a trifle more.

    Returns:
        Real (N, K), rows that sum to 1 as those of `scores` do.
    """
    classes = scores.shape[1]
    y, p = scores.double(), guessed.double()
    best = y.argmax(1)
    wanted = _sets(classes) if keep_label else torch.eye(classes, dtype=torch.float64)
    rows = []
    for part in torch.arange(len(y)).split(_PART):
        extremes = wanted.to(y).expand(len(part), -1, -1)
        if keep_label:  # the sets are of class 0: exchange it with the likeliest
            order = torch.arange(classes, device=y.device).repeat(len(part), 1)
            order[torch.arange(len(part)), best[part]] = 0
            order[:, 0] = best[part]
            extremes = torch.zeros_like(extremes).scatter(2, order[:, None].expand_as(extremes), extremes)
        turned = _deviation(extremes - p[part, None], (y - p)[part, None])
        rows.append(extremes[torch.arange(len(part)), turned.argmax(1)])
    extreme = torch.cat(rows) if rows else y
    if keep_label:
        extreme = extreme.lerp(nn.functional.one_hot(best, classes).to(y), 1e-4)
    far = (extreme - y).abs().sum(1, keepdim=True)
    share = (epsilon / far.clamp_min(1e-12)).clamp_max(1)
    return y.lerp(extreme, share).to(scores.dtype)


def _deviation(one: Tensor, other: Tensor) -> Tensor:
    """‖a / ‖a‖ − b / ‖b‖‖² over the last dimension."""
    return (nn.functional.normalize(one, dim=-1) - nn.functional.normalize(other, dim=-1)).square().sum(-1)


def _sets(classes: int) -> Tensor:
    """Equal shares over sets of classes that class 0 is in: (M, K)."""
    most = classes - 1 if classes <= _ALL_SETS else 1
    chosen = [some for size in range(most + 1) for some in itertools.combinations(range(1, classes), size)]
    found = torch.zeros(len(chosen), classes, dtype=torch.float64)
    for row, some in enumerate(chosen):
        found[row, [0, *some]] = 1 / (1 + len(some))
    return found


def random_network(classes: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    """A SmallCNN as PyTorch would initialise it (He's uniform, a = √5), from a generator of its own."""
    with torch.random.fork_rng(devices=[]):
        network = SmallCNN(image_shape=(shape[0], shape[1], shape[2]), num_classes=classes)
    private = generator(seed, "prediction poisoning")
    for part in network.parameters():
        if part.ndim > 1:
            bound = part[0].numel() ** -0.5
            nn.init.uniform_(part, -bound, bound, generator=private)
    return network.eval().requires_grad_(False)
