"""Surrogates in bulk: what a strategy's variant, a budget and a number of steps come to, on the digits."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from classifiers.backbones import MLP
from classifiers.classifier import load_classifier
from datamodules.sources.digits import Digits
from experiments.bulk.extraction_budget import epochs_for, equivalent, surrogate
from experiments.bulk.fitting import fit, start_config
from extraction.strategy import Extraction, Similarity
from tests.helpers import mlp, refused

FAST: dict[str, Any] = {
    "overrides": {"model.backbone": {"class_path": "MLP", "init_args": {"hidden": [32]}}},
    "mode": "label",
}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = Digits()
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(data, backbone=partial(MLP, hidden=[16]))
    batch = data.train_set.__getitems__(torch.arange(len(data.train_set)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(model(batch.images), batch.labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("victim") / "weights.safetensors"
    model.save(path)
    return str(path)


def test_a_surrogate_is_measured_and_paid_for(tmp_path: Path, victim: str) -> None:
    variants: dict[str, Any] = {"own": {}, "half": {"data.pool": "data/digits_candidates.yaml"}}
    given = {**FAST, "configs": ["knockoff_digits"], "weights": victim, "variants": variants}
    (row,) = surrogate(tmp_path, 0, strategy="own", budget=640, steps=200, **given)
    assert (row["queries"], row["samples"], row["steps"]) == (640, 640, 200)
    assert row["fidelity"]["value"] > 0.8
    assert row["fidelity"]["n"] == row["accuracy"]["n"] == 10 * row["boundary_fidelity"]["n"] - 1
    assert row["boundary_fidelity"]["value"] < row["fidelity"]["value"]
    assert row["kl"] > 0
    assert surrogate(tmp_path, 0, strategy="own", budget=640, steps=200, **given) == [row]
    (half,) = surrogate(tmp_path, 0, strategy="half", budget=640, steps=1, **given)
    assert half["queries"] < 640, "a pool of fewer images than the budget"
    assert "far_fidelity" not in row
    (far,) = surrogate(tmp_path, 0, strategy="own", budget=640, steps=200, far="data/digits.yaml", **given)
    assert far == {**row, "far_fidelity": row["fidelity"]}, "the training is the same, and so are these test images"
    with refused("far", "1×28×28"):
        surrogate(tmp_path, 0, strategy="own", budget=640, steps=1, far="data/mnist.yaml", **given)
    with refused("strategy = 'ownn'", "own"):
        surrogate(tmp_path, 0, strategy="ownn", budget=640, **given)


def test_rounds_are_run_and_each_has_the_steps(tmp_path: Path, victim: str) -> None:
    given = {**FAST, "configs": ["jacobian_digits"], "weights": victim, "strategy": "JbDA"}
    (row,) = surrogate(tmp_path, 0, budget=320, steps=10, **given)
    assert row["queries"] == 320
    assert row["steps"] == 2 * (1 + 1 + 1 + 2 + 5), "two epochs a round, of 20, 40, 80, 160 and 320 images"
    given["overrides"] = {**FAST["overrides"], "data.rounds": 1}
    (alone,) = surrogate(tmp_path, 0, budget=20, steps=10, **given)
    assert (alone["queries"], alone["steps"]) == (20, 10)


@pytest.mark.parametrize(
    ("config", "budget", "epochs"),
    [("knockoff_digits", 640, 10), ("knockoff_digits", 50, 100), ("active_learning_digits", 200, 5 * 34)],
)
def test_steps_are_whole_epochs(victim: str, config: str, budget: int, epochs: int) -> None:
    asked = {"data.oracle.weights": victim, "data.budget": budget}
    data = start_config([config], asked, 0).datamodule
    assert isinstance(data, Extraction)
    assert epochs_for(100, data) == epochs
    with refused("steps = 0"):
        epochs_for(0, data)


def test_the_equivalent_network_is_a_surrogate_with_all_of_the_victims_labels(tmp_path: Path, victim: str) -> None:
    given = {"weights": victim, "source": "data/digits.yaml", "strategy": "functionally equivalent"}
    (row,) = equivalent(tmp_path, 0, mode="logits", **given)
    assert row["fidelity"]["value"] == 1
    assert row["accuracy"] == row["victim_accuracy"]
    assert 0 < row["queries"] < 2**14
    for mode in ("logits", "scores"):  # and it is left as a classifier like any other
        folder = tmp_path / mode
        folder.mkdir()
        equivalent(folder, 0, mode=mode, **given)
        found, truth = load_classifier(folder / "weights.safetensors"), load_classifier(victim)
        images = torch.randint(0, 256, (5000, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
        with torch.no_grad():
            mine, theirs = found(images), truth(images)
        assert (mine.argmax(1) == theirs.argmax(1)).float().mean() >= 0.9998, "but for ties within float32's precision"
        torch.testing.assert_close(mine.softmax(1), theirs.softmax(1), atol=1e-4, rtol=1e-4)
    folder = tmp_path / "rounded"
    folder.mkdir()
    (row,) = equivalent(folder, 0, mode="rounded_scores", **given)
    assert row["failure"]
    assert "fidelity" not in row
    assert not (folder / "weights.safetensors").exists()


def test_a_larger_budget_does_not_go_on_from_a_smaller_one(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**FAST, "configs": ["knockoff_digits"], "weights": victim, "strategy": "own", "steps": 40}

    def row(cache: str, budget: int) -> dict[str, Any]:
        monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / cache))
        (found,) = surrogate(tmp_path, 0, budget=budget, **given)
        return found

    row("one", 64)
    assert row("one", 256) == row("another", 256), "whatever was trained before it"


def test_what_is_measured_are_the_last_weights(tmp_path: Path, victim: str) -> None:
    given = {**FAST, "configs": ["knockoff_digits"], "weights": victim, "strategy": "own", "budget": 128, "steps": 20}
    (row,) = surrogate(tmp_path, 0, **given)
    epochs = {"trainer.max_epochs": 10, "data.budget": 128, "data.oracle.weights": victim, "data.oracle.mode": "label"}
    line = start_config(["knockoff_digits"], {**FAST["overrides"], **epochs}, 0)
    model = fit(line, line.datamodule).eval()
    line.datamodule.setup("test")
    test = line.datamodule.test_set
    with torch.no_grad():
        hits = int((model(test.images_at(torch.arange(len(test)))).argmax(1) == test.labels).sum())
    assert row["accuracy"]["value"] == hits / len(test)


def test_the_divergence_is_that_of_the_logits_and_takes_a_zero() -> None:
    logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.75, 0.25, 0.0]])
    measured = Similarity()
    measured.update(logits, target)
    log_q = logits.double() - logits.double().exp().sum().log()
    by_hand = 0.75 * (math.log(0.75) - log_q[0, 0]) + 0.25 * (math.log(0.25) - log_q[0, 1])
    torch.testing.assert_close(measured.compute(), by_hand)
