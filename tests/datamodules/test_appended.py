"""Appended: the rows of two sets in one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules.appended import Appended
from datamodules.errors import InputError
from datamodules.imageset import ImageSet


def images(n: int, first: int, side: int = 2, **more: Tensor) -> ImageSet:
    pixels = torch.arange(first, first + n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, side, side)
    return ImageSet(pixels, torch.arange(n), torch.arange(first, first + n), more)


def test_rows_of_both_in_any_order() -> None:
    both = Appended(images(3, 0, boxes=torch.ones(3, 4)), images(2, 10))
    batch = both.__getitems__([4, 0, 3, 2])
    assert batch.images[:, 0, 0, 0].tolist() == batch.ids.tolist() == [11, 0, 10, 2]
    assert batch.labels.tolist() == [1, 0, 0, 2]
    assert both.extras_at(torch.tensor([4, 0]))["boxes"].tolist() == [[0] * 4, [1] * 4]
    assert both.__getitems__([1]).images.flatten().tolist() == [1] * 4
    assert both.select(torch.tensor([3, 1])).__getitems__([0, 1]).ids.tolist() == [10, 1]
    assert both.to("cpu").digest() == both.digest()
    digests = [Appended(images(3, base), images(2, more)).digest() for base, more in ((0, 10), (0, 11), (1, 10))]
    assert len({*digests, both.digest()}) == 4  # extras count too
    assert both.image_shape == (1, 2, 2)


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="images"):
        Appended(images(3, 0), images(2, 10, side=3))
    soft = ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.ones(2, 10), torch.arange(2))
    with pytest.raises(InputError, match="labels"):
        Appended(images(3, 0), soft)
