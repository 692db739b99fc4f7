"""Separate pixels as a trigger: the two of BadNets on MNIST (Gu, Dolan-Gavitt & Garg 2017), and any others."""

from __future__ import annotations

import torch

from datamodules.errors import InputError, bad
from datamodules.triggers.trigger import Stamp


class Pixels(Stamp):
    """Separate pixels of one brightness; what lies between them stays as it is.

    Args:
        positions: A list of [row, column], all negative (counted from the lower right corner, −1 is the last) or all 0
            or more (from the upper left).
        value: Brightness 0 … 255, in all channels; or one number for each channel.

    Raises:
        InputError: If a value is outside 0 … 255, or signs are mixed.
    """

    def __init__(self, positions: list[list[int]], value: int | list[int] = 255) -> None:
        levels = [value] if isinstance(value, int) else value
        if not levels or not all(0 <= level <= 255 for level in levels):
            raise bad("value", value, "brightness is between 0 and 255")
        if not positions or any(len(position) != 2 for position in positions):
            raise bad("positions", positions, "give a list of [row, column], such as [[-2, -2]]")
        rows, columns = [p[0] for p in positions], [p[1] for p in positions]
        if len({number < 0 for number in rows + columns}) != 1:
            raise InputError(
                f"positions = {positions!r}: count all from the lower right (negative) or from the upper left"
            )
        top, left = min(rows), min(columns)
        opacity = torch.zeros(max(rows) - top + 1, max(columns) - left + 1, dtype=torch.uint8)
        for row, column in zip(rows, columns, strict=True):
            opacity[row - top, column - left] = 255
        values = torch.tensor(levels, dtype=torch.uint8)[:, None, None] * (opacity > 0)
        from_below = top < 0
        super().__init__(values, opacity, max(rows) if from_below else top, max(columns) if from_below else left)


class SinglePixel(Pixels):
    """BadNets' single bright pixel, one in from the lower right corner: (−2, −2)."""

    def __init__(self) -> None:
        super().__init__([[-2, -2]])


class PixelPattern(Pixels):
    """BadNets' pattern of four separate bright pixels in the lower right: (−2,−2), (−3,−3), (−2,−4), (−4,−2)."""

    def __init__(self) -> None:
        super().__init__([[-2, -2], [-3, -3], [-2, -4], [-4, -2]])
