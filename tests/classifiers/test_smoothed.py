"""Smoothed: the two blurs against scipy's, and that the weights file is the model behind smoothed images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from classifiers.backbones import SmallCNN
from classifiers.backbones.smoothing import Smoothing, gaussian_blur, median_blur
from classifiers.classifier import load_classifier
from classifiers.repair.smoothed import Smoothed
from datamodules.sources.digits import Digits
from tests.helpers import mlp, refused, tiny_trainer

IMAGES = torch.rand(3, 2, 9, 7, generator=torch.Generator().manual_seed(0))


# --- pure functions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [3, 5])
def test_median_is_scipys(size: int) -> None:
    expected = ndimage.median_filter(IMAGES.numpy(), size=(1, 1, size, size), mode="mirror")
    assert np.array_equal(median_blur(IMAGES, size).numpy(), expected)


@pytest.mark.parametrize("size", [3, 5])
def test_gaussian_is_scipys(size: int) -> None:
    given = {"sigma": (0, 0, size / 6, size / 6), "mode": "mirror", "radius": (0, 0, size // 2, size // 2)}
    expected = ndimage.gaussian_filter(IMAGES.double().numpy(), **given)
    np.testing.assert_allclose(gaussian_blur(IMAGES.double(), size).numpy(), expected, rtol=1e-10)


def test_a_lone_pixel_is_gone_from_the_median_and_spread_by_the_mean() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    assert not median_blur(image).any()
    assert float(gaussian_blur(image).sum()) == pytest.approx(1)
    assert int((gaussian_blur(image) > 0).sum()) == 9


@pytest.mark.parametrize("blur", [median_blur, gaussian_blur])
def test_normalisation_commutes(blur: partial[Tensor]) -> None:
    torch.testing.assert_close(blur(IMAGES * 3.2 - 1.1), blur(IMAGES) * 3.2 - 1.1)


# --- the model --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("blur", ["median", "gaussian"])
def test_it_is_the_model_behind_smoothed_images_and_its_file_rebuilds_that(blur: str, tmp_path: Path) -> None:
    data = Digits()
    plain = mlp(data, backbone=partial(SmallCNN, widths=[4, 6])).eval()
    plain.save(tmp_path / "plain.safetensors")
    made = partial(SmallCNN, widths=[4, 6])
    model = mlp(data, Smoothed, backbone=made, weights=str(tmp_path / "plain.safetensors"), blur=blur)
    tiny_trainer(max_epochs=0).fit(model, datamodule=data)
    model.save(tmp_path / "smoothed.safetensors")
    rebuilt = load_classifier(tmp_path / "smoothed.safetensors")
    assert isinstance(rebuilt.net, Smoothing)
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    function = {"median": median_blur, "gaussian": gaussian_blur}[blur]
    expected = plain(function(images / 255))
    torch.testing.assert_close(rebuilt(images), expected)
    torch.testing.assert_close(model.eval()(images), expected)
    torch.testing.assert_close(rebuilt.net.head(rebuilt.features(images)), expected)
    assert not torch.allclose(plain(images), expected, atol=1e-3)


def test_its_file_can_be_fine_tuned_further(tmp_path: Path) -> None:
    data = Digits()
    mlp(data, Smoothed, backbone=SmallCNN).save(tmp_path / "smoothed.safetensors")
    model = mlp(data, backbone=Smoothing, weights=str(tmp_path / "smoothed.safetensors"), new_head=True, frozen=True)
    assert {name for name, value in model.net.named_parameters() if value.requires_grad} == {
        "inner.head.weight", "inner.head.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"blur": "box"}, ["blur = 'box'", "median or gaussian"]),
        ({"size": 4}, ["size = 4", "odd"]),
        ({"size": 1}, ["size = 1", "3 or more"]),
        ({"size": 17}, ["size = 17", "fits images of (8, 8)"]),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], words: list[str]) -> None:
    with refused(*words):
        mlp(Digits(), Smoothed, backbone=SmallCNN, **given)


def test_a_backbone_from_elsewhere_is_refused() -> None:
    class Mine(SmallCNN):
        pass

    with refused("Mine", "not one of this project's"):
        mlp(Digits(), Smoothed, backbone=Mine)
    with refused("torch.nn.Linear", "not one of this project's"):
        Smoothing((1, 8, 8), 10, inner=f"{nn.Linear.__module__.rsplit('.', 2)[0]}.Linear")
