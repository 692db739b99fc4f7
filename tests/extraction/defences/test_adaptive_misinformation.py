"""Adaptive misinformation: by hand, f′'s content in its identity, answers that stand by themselves."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifiers.backbones import SmallCNN
from classifiers.classifier import ImageClassifier
from classifiers.weights import Architecture, save_weights
from extraction.defences.adaptive_misinformation import AdaptiveMisinformation, mixed
from extraction.oracle import identity_of
from tests.helpers import refused

SHAPE = (1, 8, 8)


def pictures(n: int) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def second(path: Path, seed: int) -> ImageClassifier:
    torch.manual_seed(seed)
    model = ImageClassifier(SmallCNN, 3, SHAPE, [0.5], [0.5])
    save_weights(path, model.net.state_dict(), Architecture("classifiers.backbones.SmallCNN", 3, SHAPE, (0.5,), (0.5,)))
    return model.eval()


def test_mixed_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    other = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    # nu 10, tau 0.5: alpha is 1 / (1 + e^4), 1/2, 1 / (1 + e)
    alpha = [1 / (1 + math.exp(4)), 0.5, 1 / (1 + math.e)]
    expected = [[(1 - a) * y, (1 - a) * (1 - y) + a] for a, y in zip(alpha, [0.9, 0.5, 0.6], strict=True)]
    torch.testing.assert_close(mixed(scores, other, 0.5, 10), torch.tensor(expected, dtype=torch.float64))


def test_sure_answers_stay_and_unsure_ones_are_the_second_models(tmp_path: Path) -> None:
    model = second(tmp_path / "a.safetensors", 1)
    scores = torch.tensor([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]])
    images = pictures(2)
    found = AdaptiveMisinformation(str(tmp_path / "a.safetensors"), tau=0.7)(scores, images, torch.arange(2))
    assert torch.equal(found[0], scores[0])
    with torch.no_grad():
        torch.testing.assert_close(found[1], model(images).softmax(1)[1])


def test_an_answer_does_not_depend_on_what_is_asked_with_it(tmp_path: Path) -> None:
    second(tmp_path / "a.safetensors", 1)
    defence = AdaptiveMisinformation(str(tmp_path / "a.safetensors"), tau=1)
    images, scores, numbers = pictures(300), torch.full((300, 3), 1 / 3), torch.arange(300)
    whole = defence(scores, images, numbers)
    for row in (0, 255, 256, 299):
        alone = defence(scores[row : row + 1], images[row : row + 1], numbers[row : row + 1])
        assert torch.equal(alone[0], whole[row])


def test_identity_is_of_the_weights_and_not_of_their_path(tmp_path: Path) -> None:
    one, two, three = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    second(Path(one), 1)
    second(Path(two), 2)
    shutil.copy(one, three)
    assert identity_of(AdaptiveMisinformation(one)) == identity_of(AdaptiveMisinformation(three))
    assert identity_of(AdaptiveMisinformation(one)) != identity_of(AdaptiveMisinformation(two))
    assert identity_of(AdaptiveMisinformation(one)) != identity_of(AdaptiveMisinformation(one, tau=0.6))


def test_what_is_refused(tmp_path: Path) -> None:
    with refused("tau = 1.5"):
        AdaptiveMisinformation("x", tau=1.5)
    with refused("nu = 0"):
        AdaptiveMisinformation("x", nu=0)
    second(tmp_path / "a.safetensors", 1)
    with refused("defence.weights", "other images or classes"):
        AdaptiveMisinformation(str(tmp_path / "a.safetensors"))(torch.ones(1, 4) / 4, pictures(1), torch.arange(1))


@pytest.mark.parametrize("n", [0])
def test_no_images(tmp_path: Path, n: int) -> None:
    second(tmp_path / "a.safetensors", 1)
    found = AdaptiveMisinformation(str(tmp_path / "a.safetensors"))(torch.ones(n, 3), pictures(n), torch.arange(n))
    assert found.shape == (0, 3)
