"""Extractors: at rest and frozen wherever they come from, and asked in parts without a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classifiers.classifier import ImageClassifier
from datamodules.sources.digits import Digits
from poisoning.extractor import extractor_hash, features_in_parts, load_extractor, make_extractor
from tests.helpers import NormDrop, global_randomness_untouched, mlp, some_images


@pytest.fixture(params=["loaded", "made"])
def extractor(request: pytest.FixtureRequest, tmp_path: Path) -> ImageClassifier:
    with global_randomness_untouched():
        if request.param == "made":
            return make_extractor(NormDrop, Digits())
    mlp(Digits(), backbone=NormDrop).save(tmp_path / "weights.safetensors")
    with global_randomness_untouched():
        return load_extractor(tmp_path / "weights.safetensors", (1, 8, 8), NormDrop)


def test_an_extractor_is_at_rest_and_frozen(extractor: ImageClassifier) -> None:
    images = some_images(7).images
    together = extractor.features(images)
    alone = torch.cat([extractor.features(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-6)  # neither dropout nor the statistics of a batch
    assert not together.requires_grad
    x = (images.float() / 255).requires_grad_()
    extractor.features(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert all(weight.grad is None for weight in extractor.parameters())


def test_features_in_parts_are_those_of_the_whole_without_a_graph(extractor: ImageClassifier) -> None:
    x = (some_images(7).images.float() / 255).requires_grad_()
    found = features_in_parts(extractor.features, x, 3)
    assert not found.requires_grad
    assert torch.allclose(found, extractor.features(x))


def test_a_hash_is_of_weights_and_of_what_comes_before_them() -> None:
    model = make_extractor(NormDrop, Digits())
    other = ImageClassifier(NormDrop, 10, (1, 8, 8), [0.4], [0.3])
    other.net.load_state_dict(model.net.state_dict())
    before = extractor_hash(model)
    assert extractor_hash(other) != before  # mean and std decide on features too
    with torch.no_grad():
        next(model.parameters())[0] += 1
    assert extractor_hash(model) not in (before, extractor_hash(other))
