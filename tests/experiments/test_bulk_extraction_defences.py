"""Extraction defences in bulk: streams, and what detectors say of them, on the digits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.measures import wilson
from datamodules.sources.digits import Digits
from experiments.bulk import extraction_defences
from experiments.bulk.extraction_defences import defended, detection, jacobian_stream
from extraction.defences import PRADA
from extraction.jacobian_augmentation import JacobianAugmentation, stepped
from extraction.ledger import Ledger
from extraction.oracle import LocalClient, LocalOracle
from tests.helpers import refused


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    ImageClassifier(partial(MLP, hidden=[16]), 10, (1, 8, 8), [0.5], [0.5]).save(tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def test_jacobian_augmentation_is_the_strategys_and_its_oracle_is_asked(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    steps: list[tuple[int, float]] = []

    def record(model: Any, images: Tensor, labels: Tensor, step: float) -> Tensor:
        steps.append((len(images), step))
        return stepped(model, images, labels, step)

    monkeypatch.setattr("extraction.jacobian_augmentation.stepped", record)
    oracle = LocalOracle(weights, "label", detector=PRADA(0.01, least=20))
    attack = JacobianAugmentation(data, oracle, 135, 10, 8, 0.1, period=2, reservoir_after=3, reservoir=30, seed=4)

    def stream(name: str) -> tuple[Tensor, LocalClient]:
        client = LocalClient(oracle.service(Ledger(tmp_path / name)))
        return jacobian_stream(attack, client, data.test_set, classes=10, seed=0), client

    found, client = stream("one")
    # ten seeds and three rounds of doubling, then a reservoir of 30 until the budget is spent
    assert steps == [(10, 0.1), (20, 0.1), (40, -0.1), (30, -0.1), (25, 0.1)]
    assert client.account.queries == len(found) == 135
    assert torch.equal(found[:10], attack.first(data.test_set)[0])
    moved = (found[10:20, None].int() - found[None, :10].int()).abs().flatten(2).amax(2).amin(1)
    assert int(moved.max()) <= 26, "λ = 0.1 is 25.5 grey levels, rounded"
    assert client.service.state("attacker")["queries"] == 135
    assert torch.equal(stream("other")[0], found)


def test_every_stream_has_a_row_and_says_whether_it_was_judged(tmp_path: Path, weights: str) -> None:
    settings = {"weights": weights, "source": "data/digits.yaml", "length": 130, "users": 2, "trials": 1, "seeds": 40}
    rows = {row["stream"]: row for row in detection(tmp_path, 0, detector="prada", **settings)}
    assert rows["benign"]["flagged"]["n"] == 2
    assert rows["JbDA, 4 Sybils"]["flagged"]["n"] == 4
    assert rows["JbDA"]["queries"] == 130
    assert rows["JbDA"]["judged"] == 1
    assert rows["JbDA, 50% benign"]["queries"] == 260
    assert not list(tmp_path.glob("jacobian*"))
    assert rows["JbDA, 4 Sybils"]["judged"] == 0, "33 queries are too few for a verdict"
    assert rows["noise"]["judged"] == 1
    with refused("detector = 'parda'", "prada"):
        detection(tmp_path, 0, detector="parda", **settings)


def test_an_attacker_who_knows_pays_and_the_honest_cost_is_that_of_what_is_served(tmp_path: Path, weights: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "noise": {"defence": {"class_path": "GaussianNoise", "init_args": {"sigma": 0.3}}},
        "noise, arg max": {"against": "noise", "arg_max": True},
        "noise, 4 asked": {"against": "noise", "repeats": 4},
        "detector": {
            "detector": {"class_path": "OutOfDistributionShare", "init_args": {"benign_share": 0.9}},
            "response": "degrade",
        },
        "detector, padded": {"against": "detector", "padding": 0.5},
        "detector, 3 names": {"against": "detector", "names": 3},
        "DAWN": {"defence": {"class_path": "DAWN"}},
        "DAWN, 2 epochs": {"against": "DAWN", "epochs": 2},
        "lost": {"against": "nois"},
    }

    def run(setting: str) -> dict[str, Any]:
        (row,) = defended(
            tmp_path, 0, configs=["knockoff_digits"], weights=weights, second=weights, settings=settings,
            setting=setting, dawn_share=0.5, overrides={"data.budget": 40, "trainer.max_epochs": 1},
        )  # fmt: skip
        return row

    rows = {name: run(name) for name in settings if name != "lost"}
    shown = {name: (row["defence"], row["attacker"], row["images"], row["queries"]) for name, row in rows.items()}
    assert shown == {
        "noise": ("noise", "naive", 40, 40),
        "noise, arg max": ("noise", "defence-aware", 40, 40),
        "noise, 4 asked": ("noise", "defence-aware", 10, 40),
        "detector": ("detector", "naive", 40, 40),
        "detector, padded": ("detector", "defence-aware", 20, 40),
        "detector, 3 names": ("detector", "defence-aware", 40, 40),
        "DAWN": ("DAWN", "naive", 40, 40),
        "DAWN, 2 epochs": ("DAWN", "naive", 40, 40),
    }
    assert rows["noise"]["honest_l1"] == rows["noise, arg max"]["honest_l1"] > 0.3
    assert rows["detector"]["honest_l1"] < 1e-6, "an honest user is not flagged"
    assert 5 < rows["noise"]["dawn_marked"] < 35, "the control is of as many images as DAWN marks"
    assert rows["DAWN"]["honest_labels_changed"]["value"] == pytest.approx(0.5, abs=0.1)
    with refused("settings.lost.against = 'nois'"):
        run("lost")


def test_the_keys_of_one_attack_are_no_attacks_of_their_own() -> None:
    found = [{"flagged_at": at} for at in (5, 5, 5, 5, None, None, None, None)]
    alone, alike = extraction_defences._flagged(found, 8), extraction_defences._flagged(found, 2)
    assert (alone.n, alike.n, alike.unit) == (8, 8, "streams")
    assert alone.value == alike.value == 0.5
    assert alone == replace(wilson(4, 8), unit="streams")
    assert alike.low < 0.05  # two attacks: one was seen, one was not
    assert alike.high > 0.95
