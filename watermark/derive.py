"""Triggers, labels and nonces from a secret: whole numbers alone, so that every machine derives the same bytes.

The abstract triggers are smooth fields with a few shapes on them: a network learns them in some fifty exposures, where
white noise is still a third unlearned. Nothing here depends on a model, on data, or on a random number generator that a
library may change: all bytes come from SHAKE256, under a tag of their own for each use.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Of the derivation; a key names it."""

Images = NDArray[np.uint8]
"""uint8 (n, C, H, W)."""

_TAG = b"pharmakon/watermark/derive/1/"
_GRID = 4  # corners of the smooth field along each side
_SHAPES = 3


def stream(purpose: str, secret: bytes, index: int, size: int) -> bytes:
    """`size` pseudo-random bytes of one purpose and index."""
    name = purpose.encode()
    start = _TAG + bytes([len(name)]) + name + len(secret).to_bytes(4, "big") + secret + index.to_bytes(4, "big")
    return hashlib.shake_256(start).digest(size)


def abstract(seed: bytes, n: int, shape: tuple[int, int, int]) -> Images:
    """Smooth fields of colour with discs, rings and bars.

    Args:
        seed: 32 secret bytes.
        n: How many.
        shape: (C, H, W), H and W 4 or more.
    """
    return np.stack([_abstract(seed, index, shape) for index in range(n)])


def noise(seed: bytes, n: int, shape: tuple[int, int, int]) -> Images:
    """White noise: each pixel is uniform."""
    size = int(np.prod(shape))
    drawn = [np.frombuffer(stream("noise", seed, index, size), np.uint8) for index in range(n)]
    return np.stack(drawn).reshape(n, *shape)


def labels(secret: bytes, truths: Sequence[int], classes: int) -> list[int]:
    """A wrong label for each trigger, uniform among the wrong ones.

    Args:
        secret: What they are drawn from: an owner's secret, or a beacon that came later, with the root of the triggers.
        truths: f(t) of each trigger; −1 where no class is true, and every label is wrong.
        classes: K, 2 or more.
    """
    found = []
    for index, truth in enumerate(truths):
        label = next(_below(classes - (truth >= 0), secret, index))
        found.append(label + (0 <= truth <= label))
    return found


def nonces(seed: bytes, n: int) -> list[bytes]:
    """The r of the 2n commitments, those of the triggers first: 32 bytes each."""
    return [hmac.digest(seed, _TAG + b"nonce" + index.to_bytes(4, "big"), "sha256") for index in range(2 * n)]


def order(secret: bytes, total: int) -> list[int]:
    """The numbers below `total` in an order that the secret alone decides: a challenge."""
    places = list(range(total))
    for at in range(total - 1):
        other = at + next(_below(total - at, secret, at))
        places[at], places[other] = places[other], places[at]
    return places


def _below(bound: int, secret: bytes, index: int) -> Iterator[int]:
    """Uniform numbers below `bound`: draws from the incomplete last round of 2³² are thrown away."""
    limit = 2**32 - 2**32 % bound
    size = 64
    while True:
        data = stream("below", secret, index, size)
        for at in range(size // 2 if size > 64 else 0, size, 4):
            drawn = int.from_bytes(data[at : at + 4], "big")
            if drawn < limit:
                yield drawn % bound
        size *= 2


def _abstract(seed: bytes, index: int, shape: tuple[int, int, int]) -> Images:
    channels, height, width = shape
    data = iter(stream("abstract", seed, index, 4096 + channels * _GRID**2))
    corners = np.array([[next(data) for _ in range(_GRID**2)] for _ in range(channels)], np.int64)
    image = _smooth(corners.reshape(channels, _GRID, _GRID), height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    small = min(height, width)
    for _ in range(_SHAPES):
        kind, cy, cx = next(data) % 3, next(data) * height // 256, next(data) * width // 256
        radius = 2 + next(data) * small // 768  # up to a third of the image
        distance = (y - cy) ** 2 + (x - cx) ** 2
        if kind == 0:
            inside = distance <= radius**2
        elif kind == 1:
            inside = (distance <= radius**2) & (4 * distance >= radius**2)
        else:
            dy, dx = next(data) - 128, (next(data) | 1) - 128  # never both 0
            across = abs((y - cy) * dx - (x - cx) * dy)
            inside = 4 * across * across <= max(1, radius**2 // 4) * (dy * dy + dx * dx)
        for channel in range(channels):
            image[channel][inside] = 255 * (next(data) & 1)
    return image.astype(np.uint8)


def _smooth(corners: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """A grid of values, interpolated bilinearly in 1/256 steps: int64 (C, H, W)."""
    y0, fy = _places(height)
    x0, fx = _places(width)
    rows = corners[:, y0, :] * (256 - fy)[:, None] + corners[:, y0 + 1, :] * fy[:, None]
    both = rows[:, :, x0] * (256 - fx) + rows[:, :, x0 + 1] * fx
    return np.right_shift(both.astype(np.int64), 16)


def _places(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each pixel, the corner before it and how far it is past that one, in 1/256."""
    at = np.arange(size, dtype=np.int64) * ((_GRID - 1) * 256) // max(1, size - 1)
    before = np.minimum(at >> 8, _GRID - 2)
    return before, at - (before << 8)
