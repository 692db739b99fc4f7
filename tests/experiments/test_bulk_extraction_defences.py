"""Extraction defences in bulk: streams, and what detectors say of them, on the digits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from experiments.bulk.extraction_defences import detection, jacobian_stream
from tests.helpers import refused


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    ImageClassifier(partial(MLP, hidden=[16]), 10, (1, 8, 8), [0.5], [0.5]).save(tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def test_jacobian_augmentation_steps_from_what_was_asked_before() -> None:
    seeds = torch.randint(60, 190, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked: list[int] = []

    def ask(images: Tensor) -> Tensor:
        asked.append(len(images))
        return (images.flatten(1).float().mean(1) > 125).long()

    found = jacobian_stream(ask, seeds, 35, 0.1, 0, 2)
    assert asked == [10, 10, 15]
    assert torch.equal(found[:10], seeds)
    moved = (found[10:20].int() - found[:10].int()).abs()
    assert set(moved.flatten().tolist()) <= {0, 25, 26}, "λ = 0.1 is 25.5 grey levels, rounded"
    assert torch.equal(found, jacobian_stream(ask, seeds, 35, 0.1, 0, 2))


def test_every_stream_has_a_row_and_says_whether_it_was_judged(tmp_path: Path, weights: str) -> None:
    settings = {"weights": weights, "source": "data/digits.yaml", "length": 130, "users": 2, "trials": 1, "seeds": 40}
    rows = {row["stream"]: row for row in detection(tmp_path, 0, detector="prada", **settings)}
    assert rows["benign"]["flagged"]["n"] == 2
    assert rows["JbDA, 4 Sybils"]["flagged"]["n"] == 4
    assert rows["JbDA, 50% benign"]["queries"] == 260
    assert rows["JbDA, 4 Sybils"]["judged"] == 0, "33 queries are too few for a verdict"
    assert rows["noise"]["judged"] == 1
    with refused("detector = 'parda'", "prada"):
        detection(tmp_path, 0, detector="parda", **settings)
