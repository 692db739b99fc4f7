"""Knockoff Nets: the victim's answers and nothing of the pool's own, each paid for once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from classifiers.backbones import MLP
from classifiers.classifier import load_classifier
from datamodules.sources.digits import Digits
from extraction import strategy
from extraction.countermeasures import AveragedOracle, PaddedOracle
from extraction.defences import GaussianNoise
from extraction.knockoff_nets import KnockoffNets
from extraction.ledger import BudgetError
from extraction.oracle import LocalClient, LocalOracle
from extraction.strategy import SIMILARITIES
from poisoning.label_flip import LabelFlip
from tests.helpers import mlp, refused


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


def ready(data: KnockoffNets) -> KnockoffNets:
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("mode", ["label", "label_score", "top_k", "scores", "logits"])
def test_labels_are_the_victims_and_no_others(victim: str, mode: str) -> None:
    data = ready(KnockoffNets(Digits(), LocalOracle(victim, mode, 3 if mode == "top_k" else None), 100, seed=1))
    everything = data.train_set.images_at(torch.arange(100))
    with torch.no_grad():
        expected = load_classifier(victim)(everything).softmax(1)
    labels = data.train_set.labels
    if mode == "label":
        assert torch.equal(labels, expected.argmax(1))
    else:
        assert torch.equal(labels.argmax(1), expected.argmax(1)) or mode == "label_score"
        torch.testing.assert_close(labels.sum(1), torch.ones(100))
    if mode in ("scores", "logits"):
        torch.testing.assert_close(labels, expected, atol=1e-5, rtol=1e-4)
    # the ground truth has no influence: with all of the pool's labels flipped, the same set
    oracle = LocalOracle(victim, mode, 3 if mode == "top_k" else None)
    flipped = ready(KnockoffNets(LabelFlip(Digits(), 0.9), oracle, 100, seed=1))
    assert torch.equal(flipped.train_set.labels, labels)


def test_the_budget_is_spent_without_replacement_and_counted(victim: str) -> None:
    data = ready(KnockoffNets(Digits(), LocalOracle(victim, price=2.0), 100))
    assert len(data.train_set.ids.unique()) == 100
    assert data.facts() == {"answer_mode": "scores", "queries": 100, "samples": 100, "cost": 0.2}
    pool = len(Digits_train())
    everything = ready(KnockoffNets(Digits(), LocalOracle(victim), 10**6))
    assert everything.facts()["queries"] == len(everything.train_set) == pool


def test_the_cost_is_at_the_price_of_now(victim: str) -> None:
    for price in (2.0, 5.0):  # the second time all answers are in the store
        data = ready(KnockoffNets(Digits(), LocalOracle(victim, price=price), 100))
        assert data.facts()["cost"] == pytest.approx(100 * price / 1000)
        data = ready(KnockoffNets(Digits(), AveragedOracle(LocalOracle(victim, price=price), 4), 100))
        assert data.facts()["cost"] == pytest.approx(100 * price / 1000)


def test_a_budget_in_samples_is_kept(victim: str) -> None:
    data = ready(KnockoffNets(Digits(), LocalOracle(victim), 100, samples_budget=30))
    assert (data.facts()["queries"], data.facts()["samples"]) == (30, 30)
    data = ready(KnockoffNets(Digits(), AveragedOracle(LocalOracle(victim), 4), 1000, samples_budget=30))
    assert (data.facts()["queries"], data.facts()["samples"]) == (120, 30)
    data = ready(KnockoffNets(Digits(), AveragedOracle(LocalOracle(victim), 4), 100, samples_budget=30))
    assert (data.facts()["queries"], data.facts()["samples"]) == (100, 25)
    hidden = PaddedOracle(LocalOracle(victim), Digits(split_seed=5), 0.5)
    data = ready(KnockoffNets(Digits(), hidden, 1000, samples_budget=30))
    assert len(data.train_set) == 15
    assert data.facts()["samples"] == 30
    with refused("samples_budget = 0", "1 or more"):
        KnockoffNets(Digits(), LocalOracle(victim), 100, samples_budget=0)
    with refused("samples_budget = 1", "2 or more"):
        KnockoffNets(Digits(), hidden, 100, samples_budget=1)


def test_beyond_the_budget_in_samples_the_model_does_not_run(victim: str) -> None:
    client = LocalOracle(victim).client("ann", samples=3)
    images = torch.arange(4 * 64, dtype=torch.uint8).reshape(4, 1, 8, 8)
    client.query(images[:3])
    calls = client.service.calls
    with pytest.raises(BudgetError, match="samples = 3: 3 samples are spent and 1 more"):
        client.query(images)
    client.query(images[:3].repeat(5, 1, 1, 1))  # the same again are queries, and no new samples
    assert client.service.calls == calls
    assert client.account[:2] == (18, 3)


def Digits_train() -> torch.Tensor:
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    return data.train_set.ids


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(victim: str) -> None:
    small, large = (ready(KnockoffNets(Digits(), LocalOracle(victim), n, seed=4)) for n in (50, 200))
    assert torch.equal(small.train_set.ids, large.train_set.ids[:50])
    other = ready(KnockoffNets(Digits(), LocalOracle(victim), 50, seed=5))
    assert set(other.train_set.ids.tolist()) != set(small.train_set.ids.tolist())


def test_another_pool_gets_new_ids_and_the_tasks_measures(victim: str) -> None:
    data = ready(KnockoffNets(Digits(), LocalOracle(victim), 60, pool=Digits(split_seed=9)))
    own = set(Digits_train().tolist())
    assert own.isdisjoint(data.train_set.ids.tolist())
    named = {measure.name for each in data.evaluations("test") for measure in each.measures}
    assert named == {
        "clean_accuracy",
        "holdout_accuracy",
        "fidelity",
        "fidelity_kl",
        "fidelity_boundary",
        "fidelity_boundary_kl",
    }
    assert data.facts()["queries"] == 60, "an evaluation is none of the attacker's queries"


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_fidelity_is_measured_on_named_sets_too(victim: str, similarity: str) -> None:
    other = Digits(split_seed=9)
    plain = ready(KnockoffNets(Digits(), LocalOracle(victim), 60, seed=1))
    data = ready(KnockoffNets(Digits(), LocalOracle(victim), 60, None, 1.0, similarity, {"other": other}, 1))
    data.setup("test")
    found = {measure.name: (each.images, measure) for each in data.evaluations("test") for measure in each.measures}
    assert {"fidelity_other", f"fidelity_other_{similarity}"} <= set(found)
    images, measure = found["fidelity_other"]
    assert torch.equal(images.ids, other.test_set.ids)
    with torch.no_grad():
        scores = load_classifier(victim)(images.images_at(torch.arange(len(images)))).softmax(1)
    assert torch.equal(measure.target, scores.argmax(1))
    best = {"kl": 0.0, "total_variation": 0.0, "top_k": 1.0}[similarity]
    metric = found[f"fidelity_other_{similarity}"][1].make()
    metric.update(scores.log(), scores)
    assert float(metric.compute()) == pytest.approx(best, abs=1e-5)
    assert data.train_set.digest() == plain.train_set.digest()
    assert data.facts()["queries"] == 60


def test_an_interrupted_run_goes_on_and_pays_for_nothing_twice(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "CHUNK", 40)
    asked: list[str] = []
    query = LocalClient.query

    def dying(self: object, images: torch.Tensor, request: str | None = None) -> object:
        asked.append(str(request))
        answers = query(self, images, request)  # type: ignore[arg-type]
        if len(asked) == 2:
            raise KeyboardInterrupt  # charged, and the answer lost
        return answers

    monkeypatch.setattr(LocalClient, "query", dying)
    data = KnockoffNets(Digits(), LocalOracle(victim, defence=GaussianNoise(0.1)), 100)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    again = ready(KnockoffNets(Digits(), LocalOracle(victim, defence=GaussianNoise(0.1)), 100))
    assert asked == ["pool 0", "pool 1", "pool 1", "pool 2"]
    assert again.facts()["queries"] == 100
    monkeypatch.setenv("PHARMAKON_CACHE", str(Path(victim).parent / "another"))
    undisturbed = ready(KnockoffNets(Digits(), LocalOracle(victim, defence=GaussianNoise(0.1)), 100))
    assert undisturbed.train_set.digest() == again.train_set.digest()


def test_what_is_refused(victim: str) -> None:
    with refused("budget = 0"):
        KnockoffNets(Digits(), LocalOracle(victim), 0)
    with refused("mode = 'score'", "scores"):
        LocalOracle(victim, "score")
    with refused("temperature = 0"):
        KnockoffNets(Digits(), LocalOracle(victim), temperature=0.0)
    with refused("defence", "logits"):
        LocalOracle(victim, "logits", defence=GaussianNoise())
    with refused("runs/victim_nobody", "lightning fit --config victim_nobody"):
        KnockoffNets(Digits(), LocalOracle("runs/victim_nobody")).prepare_data()
