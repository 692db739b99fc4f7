"""Adaptive Knockoff: rewards and the bandit by hand, and what is asked."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from classifiers.backbones import MLP
from datamodules.sources.digits import Digits
from extraction.adaptive_knockoff import (
    REWARDS,
    AdaptiveKnockoff,
    certainty,
    diversity,
    loss,
    preferences,
    sampled,
    scaled,
)
from extraction.oracle import LocalOracle
from extraction.rounds import Asked
from extraction.surrogate import Surrogate
from tests.helpers import mlp, refused, tiny_trainer


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


def test_rewards_by_hand() -> None:
    answers = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    torch.testing.assert_close(certainty(answers), torch.tensor([1.0, 0.0, 0.5]))
    # means before: –, (1, 0, 0), (.75, .25, 0); what goes beyond them: –, .5, .75
    torch.testing.assert_close(diversity(answers), torch.tensor([0.0, 0.5, 0.75]))
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(loss(answers, scores), torch.tensor([math.log(2)] * 3))
    torch.testing.assert_close(scaled(torch.tensor([3.0, 5.0, 4.0])), torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(scaled(torch.tensor([3.0, 3.0])), torch.zeros(2))


def test_the_bandit_by_hand() -> None:
    # the first reward is its own baseline: nothing changes. The second, 0 of group 1, is 1/2 below the mean of 1/2
    expected = torch.tensor([0.25, -0.25], dtype=torch.float64)
    torch.testing.assert_close(preferences(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), 2), expected)
    # the third, 1 of group 0 for the second time, is 1/3 above the mean of 2/3: a step of 1/6
    policy = expected.softmax(0)
    expected = expected + torch.tensor([1 / 6 * (1 - policy[0]), -1 / 6 * policy[1]], dtype=torch.float64)
    found = preferences(torch.tensor([0, 1, 0]), torch.tensor([1.0, 0.0, 1.0]), 2)
    torch.testing.assert_close(found, expected)


def test_what_is_worth_more_is_preferred() -> None:
    groups = torch.arange(300) % 3
    found = preferences(groups, (groups == 1).float(), 3)
    assert int(found.argmax()) == 1
    assert found[1] > found[0] + 1


def test_draws_follow_the_policy_until_a_group_is_used_up() -> None:
    policy, stock = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([2, 9, 9])
    assert sampled(policy, stock, torch.tensor([0.0, 0.49, 0.1, 0.99])).tolist() == [0, 0, 1, 1]
    # nothing of what is preferred is left: any other will do
    assert sampled(policy, torch.tensor([1, 0, 5]), torch.tensor([0.9, 0.9, 0.9])).tolist() == [0, 2, 2]
    assert sampled(policy, torch.tensor([1, 0, 1]), torch.zeros(5)).tolist() == [0, 2]
    drawn = sampled(torch.tensor([0.2, 0.8]), torch.tensor([10**6] * 2), torch.rand(10**4))
    assert float(drawn.float().mean()) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_budget_is_spent_on_different_images(victim: str, reward: str) -> None:
    data = AdaptiveKnockoff(Digits(batch_size=20), LocalOracle(victim), 100, reward, 3)
    trainer = tiny_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, limit_val_batches=0)
    trainer.fit(mlp(data, Surrogate), data)
    assert len(set(data.train_set.ids.tolist())) == len(data.train_set) == data.facts()["queries"] == 100


def test_what_the_bandit_prefers_is_asked_about(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = AdaptiveKnockoff(Digits(), LocalOracle(victim), 90, rounds=2)
    data.prepare_data()
    data.setup("fit")
    pool, given = data.base.train_set, []

    def prefer(groups: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
        given.append((groups, rewards, n))
        return 50.0 * torch.nn.functional.one_hot(torch.tensor(3), n).double()

    monkeypatch.setattr("extraction.adaptive_knockoff.preferences", prefer)
    images, ids = data.first(pool)
    assert len(pool.labels[torch.isin(pool.ids, ids)].unique()) > 5, "the first round draws from all classes"
    scores = torch.rand(len(ids), 10, generator=torch.Generator().manual_seed(0)).softmax(1)
    model = mlp(data, Surrogate).eval()
    chosen = data.choose(1, model, pool, Asked(images, ids, scores.argmax(1), scores))[1]
    assert len(chosen) == 45
    assert pool.labels[torch.isin(pool.ids, chosen)].unique().tolist() == [3]
    [(groups, rewards, n)] = given
    assert n == 10
    assert torch.equal(groups, pool.labels[torch.searchsorted(pool.ids, ids)]), "each reward is of its image's class"
    with torch.no_grad():
        guessed = model(images).softmax(1)
    expected = torch.stack([scaled(certainty(scores)), scaled(diversity(scores)), scaled(loss(scores, guessed))])
    torch.testing.assert_close(rewards, expected.mean(0))


def test_all_of_a_pool_is_asked_about_in_the_end(victim: str) -> None:
    data = AdaptiveKnockoff(Digits(batch_size=500), LocalOracle(victim, "label"), 10**5, "loss", 2)
    trainer = tiny_trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1, limit_val_batches=0)
    trainer.fit(mlp(data, Surrogate), data)
    assert sorted(data.train_set.ids.tolist()) == sorted(data.base.train_set.ids.tolist())


def test_bad_values(victim: str) -> None:
    with refused("reward = 'certainly'", "did you mean 'certainty'?"):
        AdaptiveKnockoff(Digits(), LocalOracle(victim), 100, "certainly")
    with refused("reward = 'certainty'", "labels alone"):
        AdaptiveKnockoff(Digits(), LocalOracle(victim, "label"), 100, "certainty")
