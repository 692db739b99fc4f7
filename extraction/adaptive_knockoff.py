"""Adaptive Knockoff Nets: a bandit that learns from a victim's answers which classes of a pool to ask about.

Paper: Orekondy, Schiele & Fritz, "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019, its adaptive
strategy: a gradient bandit (Sutton & Barto, §2.8) over the pool's classes, with rewards for certain answers, for
diverse ones, and for those that the surrogate does not foresee.

Threat model: as of `KnockoffNets`; and the pool – natural images, not the victim's – has labels. They group it, and
say nothing of the victim's classes.

Deviations: the authors published no code of this strategy. They take one image after the other and train on; here a
round asks about many, by the policy that all answers so far lead to, and the surrogate is trained from scratch between.
So the reward for what is not foreseen is the loss of the newest surrogate for every answer, which it was trained on
unless it is of the newest round. The step is 1 ÷ how often a class was drawn, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.imageset import ImageSet
from datamodules.random import draw, uniform
from extraction.oracle import Oracle
from extraction.rounds import Asked, Rounds, predicted

REWARDS = ("certainty", "diversity", "loss", "all")
"""What an answer is worth: its margin; what it has beyond the mean answer before it; the surrogate's loss; or the mean
of the three, each scaled to [0, 1]. Certainty says nothing of answers that are labels alone."""


def certainty(answers: Tensor) -> Tensor:
    """The likeliest class's score above the second's: real (N, K) → (N,)."""
    best = answers.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def diversity(answers: Tensor) -> Tensor:
    """How far each answer exceeds the mean of those before it, over all classes: real (N, K) → (N,); the first: 0."""
    before = answers.cumsum(0) - answers
    count = torch.arange(len(answers), dtype=answers.dtype)[:, None]
    beyond: Tensor = (answers - before / count.clamp_min(1)).clamp_min(0).sum(1)
    beyond[:1] = 0
    return beyond


def loss(answers: Tensor, scores: Tensor) -> Tensor:
    """Cross entropy of the surrogate's scores against the answers: real (N, K), (N, K) → (N,), in nats."""
    return -(answers * scores.clamp_min(1e-12).log()).sum(1)


def scaled(rewards: Tensor) -> Tensor:
    """Moved and stretched to [0, 1]; all the same: 0."""
    least, most = rewards.min(), rewards.max()
    return (rewards - least) / (most - least).clamp_min(1e-12)


def preferences(groups: Tensor, rewards: Tensor, n: int) -> Tensor:
    """What a gradient bandit comes to prefer, one answer after the other.

    Args:
        groups: int64 (N,) in [0, n): what was drawn, in order.
        rewards: Real (N,).
        n: How many groups there are.

    Returns:
        float64 (n,): H, whose softmax is the policy; all 0 before the first answer.
    """
    prefer, drawn = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    mean = 0.0
    for number, (group, reward) in enumerate(zip(groups.tolist(), rewards.double().tolist(), strict=True)):
        mean += (reward - mean) / (number + 1)  # the baseline includes this reward
        drawn[group] += 1
        step = (reward - mean) / drawn[group]
        policy = prefer.softmax(0)
        prefer -= step * policy
        prefer[group] += step
    return prefer


def sampled(policy: Tensor, stock: Tensor, numbers: Tensor) -> Tensor:
    """Groups drawn from a policy, none more often than there is left of it.

    Args:
        policy: Real (n,): its shares; need not sum to 1.
        stock: int64 (n,): how many images of each are left.
        numbers: Real (N,) in [0, 1): one for each draw.

    Returns:
        int64 (at most N,): the group of each draw; fewer where nothing is left.
    """
    share, left = policy.double().clone(), stock.clone()
    share[left == 0] = 0
    found = []
    for number in numbers.double().tolist():
        if not bool((left > 0).any()):
            break
        if float(share.sum()) == 0:  # all that is preferred is used up
            share = (left > 0).double()
        ends = share.cumsum(0)
        group = int(torch.searchsorted(ends, number * float(ends[-1]), right=True).clamp_max(len(share) - 1))
        found.append(group)
        left[group] -= 1
        if left[group] == 0:
            share[group] = 0
    return torch.tensor(found, dtype=torch.int64)


class AdaptiveKnockoff(Rounds):
    """Knockoff Nets whose queries a bandit chooses among the pool's classes (Orekondy et al. 2019, adaptive).

    Args:
        base: The victim's task: its holdout and test set measure the surrogate.
        oracle: See `Extraction`.
        budget: Queries, over all rounds.
        reward: One of `REWARDS`.
        rounds: How many; the first draws from all of the pool alike.
        pool: Data of images of the same shape, with labels; None: the base's training images.
        temperature: See `Extraction`.
        similarity: See `Extraction`.
        fidelity_on: See `Extraction`.
        seed: Of the draws.
        samples_budget: See `Extraction`.

    Raises:
        InputError: If a value is out of its range, or pool, victim and task do not fit together.
    """

    def __init__(
        self,
        base: ImageDataModule,
        oracle: Oracle,
        budget: int,
        reward: str = "all",
        rounds: int = 10,
        pool: ImageDataModule | None = None,
        temperature: float = 1.0,
        similarity: str = "kl",
        fidelity_on: Mapping[str, ImageDataModule] | None = None,
        seed: int = 0,
        samples_budget: int | None = None,
    ) -> None:
        super().__init__(base, oracle, budget, rounds, pool, temperature, similarity, fidelity_on, seed, samples_budget)
        if reward not in REWARDS:
            raise bad("reward", reward, f"choose one of {', '.join(REWARDS)}{did_you_mean(reward, REWARDS)}")
        if reward == "certainty" and oracle.mode == "label":
            raise bad("reward", reward, "answers that are labels alone are all as certain; choose diversity or loss")
        self.reward = reward

    def first(self, pool: ImageSet) -> tuple[Tensor, Tensor]:
        """An equal part of the budget, of all classes alike."""
        return self._drawn(
            0, pool, torch.ones(self._groups(pool)[1]), torch.empty(0, dtype=torch.int64), self.affordable
        )

    def choose(self, number: int, model: ImageClassifier, pool: ImageSet, asked: Asked) -> tuple[Tensor, Tensor]:
        """An equal part of what is left, by what the bandit prefers."""
        groups, n = self._groups(pool)
        order, rows = pool.ids.sort()
        of = groups[rows[torch.searchsorted(order, asked.ids)]]
        policy = preferences(of, self._rewards(model, asked), n).softmax(0)
        return self._drawn(number, pool, policy, asked.ids, self.affordable - len(asked.ids))

    def _rewards(self, model: ImageClassifier, asked: Asked) -> Tensor:
        answers = asked.targets
        if answers.ndim == 1:
            answers = torch.nn.functional.one_hot(answers, self.num_classes)
        answers = answers.float()
        known = ImageSet(asked.images, asked.labels, asked.ids)
        scores = predicted(model, known, torch.arange(len(known)))
        rewards = {"certainty": certainty(answers), "diversity": diversity(answers), "loss": loss(answers, scores)}
        if self.reward != "all":
            return scaled(rewards[self.reward])
        return torch.stack([scaled(each) for each in rewards.values()]).mean(0)

    def _groups(self, pool: ImageSet) -> tuple[Tensor, int]:
        if pool.labels.ndim > 1:
            raise InputError("pool: its labels are soft; the bandit draws among classes")
        _, groups = pool.labels.unique(return_inverse=True)
        return groups, int(groups.max()) + 1

    def _drawn(self, number: int, pool: ImageSet, policy: Tensor, asked: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """Images of the classes that are drawn, at random within each."""
        count = -(-left // (self.rounds - number))
        groups, n = self._groups(pool)
        shuffled = draw(self.seed, "adaptive knockoff", 0, pool.ids)[:, 0].argsort(stable=True)
        shuffled = shuffled[~torch.isin(pool.ids[shuffled], asked)]
        mine = groups[shuffled]
        numbers = uniform(self.seed, "adaptive knockoff classes", number, torch.arange(min(count, len(shuffled))))[:, 0]
        wanted = sampled(policy, torch.bincount(mine, minlength=n), numbers)
        rows = torch.empty_like(wanted)
        for group in range(n):
            places = (wanted == group).nonzero()[:, 0]
            rows[places] = shuffled[mine == group][: len(places)]
        return pool.images_at(rows), pool.ids[rows]
