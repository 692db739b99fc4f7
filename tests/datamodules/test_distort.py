"""Affine distortion, contrast and cutout: by hand, and against torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as reference

from datamodules.distort import Affine, Strong, affine, contrast, cutout
from tests.helpers import global_randomness_untouched, refused, some_images

IDS = torch.arange(100, 106)


def smooth(n: int = 4, channels: int = 1, side: int = 16) -> Tensor:
    """Blurred noise: between its pixels there is little to disagree about."""
    noise = torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0))
    return reference.gaussian_blur(noise, [5, 5], [2.0, 2.0])


def full(n: int, value: float) -> Tensor:
    return torch.full((n,), value)


def test_nothing_drawn_is_nothing_changed() -> None:
    images = some_images(6, (3, 8, 10)).images
    same = affine(images, full(6, 0.0), full(6, 1.0), full(6, 0.0), torch.zeros(6, 2))
    assert torch.equal(same, images)
    assert torch.equal(contrast(images, full(6, 1.0)), images)
    assert torch.equal(cutout(images, torch.zeros(6, 2).long(), 0), images)


def test_a_shift_by_whole_pixels_is_exact_and_brings_zeros_in() -> None:
    images = some_images(1, (1, 8, 10)).images
    moved = affine(images, full(1, 0.0), full(1, 1.0), full(1, 0.0), torch.tensor([[2.0, 1.0]]))  # right, down
    assert torch.equal(moved[:, :, 1:, 2:], images[:, :, :-1, :-2])
    assert not moved[:, :, 0].any()
    assert not moved[:, :, :, :2].any()


def test_a_quarter_turn_is_exact() -> None:
    images = some_images(1, (1, 8, 8)).images
    turned = affine(images, full(1, math.pi / 2), full(1, 1.0), full(1, 0.0), torch.zeros(1, 2))
    assert torch.equal(turned, images.rot90(-1, (2, 3)))  # clockwise


@pytest.mark.parametrize(
    ("degrees", "scale", "shift"), [(20.0, 1.0, (0, 0)), (-15.0, 1.2, (2, -1)), (0.0, 0.8, (0, 3))]
)
def test_as_torchvision_does_it(degrees: float, scale: float, shift: tuple[int, int]) -> None:
    images = smooth()
    ours = affine(
        images, full(4, math.radians(degrees)), full(4, scale), full(4, 0.0), torch.tensor([shift] * 4).float()
    )
    theirs = reference.affine(
        images, degrees, list(shift), scale, [0.0, 0.0], interpolation=reference.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_shear_moves_rows_by_their_distance_from_the_centre() -> None:
    images = torch.zeros(1, 1, 9, 9)
    images[..., 4] = 1.0  # a vertical line
    sheared = affine(images, full(1, 0.0), full(1, 1.0), full(1, 1.0), torch.zeros(1, 2))
    assert torch.equal(sheared[0, 0].argmax(1), torch.arange(9))  # from the upper left to the lower right


def test_contrast_and_cutout_by_hand() -> None:
    images = torch.tensor([[[[0, 100], [100, 200]]]], dtype=torch.uint8)
    assert contrast(images, full(1, 0.5)).flatten().tolist() == [50, 100, 100, 150]
    assert contrast(images, full(1, 2.0)).flatten().tolist() == [0, 100, 100, 255]
    ones = torch.ones(1, 1, 5, 5)
    assert (cutout(ones, torch.tensor([[2, 3]]), 3)[0, 0] == 0).nonzero().tolist() == [
        [row, column] for row in (1, 2, 3) for column in (2, 3, 4)
    ]
    assert int(cutout(ones, torch.tensor([[0, 0]]), 3).sum()) == 25 - 4, "cut off at the border"


@pytest.mark.parametrize("kind", [Affine(), Strong(), Strong(flip=True)], ids=["affine", "strong", "flipping"])
@pytest.mark.parametrize("real", [False, True])
def test_what_an_image_becomes_depends_on_seed_epoch_and_id_alone(kind: Affine | Strong, real: bool) -> None:
    images = some_images(6, (3, 8, 10)).images
    if real:
        images = images / 255
    with global_randomness_untouched():
        whole = kind(images, IDS, 1, 2)
    assert (whole.dtype, whole.shape) == (images.dtype, images.shape)
    order = torch.tensor([4, 0, 5])
    assert torch.equal(kind(images[order], IDS[order], 1, 2), whole[order])
    assert not torch.equal(kind(images, IDS, 2, 2), whole)
    assert not torch.equal(kind(images, IDS, 1, 3), whole)
    assert len(kind(images[:0], IDS[:0], 1, 2)) == 0


def test_draws_fill_their_range() -> None:
    ids = torch.arange(2000)
    images = torch.zeros(2000, 1, 9, 9)
    images[..., 4, 4] = 1.0
    moved = Affine(0, 0, 0, shift=2 / 9)(images, ids, 0, 0).flatten(1).argmax(1)
    seen = {(int(at) // 9 - 4, int(at) % 9 - 4) for at in moved}
    assert seen == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}
    white = torch.full((2000, 1, 8, 8), 0.5)
    black = (Strong(degrees=0, scale=0, shear=0, shift=0, contrast=0, cutout=0.5)(white, ids, 0, 0) == 0).sum((1, 2, 3))
    assert (int(black.min()), int(black.max())) == (4, 16)  # a square of side 4, at most half of each side cut off


def test_what_is_refused() -> None:
    with refused("degrees = -1"):
        Affine(degrees=-1)
    with refused("scale = 1"):
        Affine(scale=1)
    with refused("cutout = 2"):
        Strong(cutout=2)
