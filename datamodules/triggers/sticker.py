"""Stickers placed relative to a box: BadNets' yellow square, bomb and flower on traffic signs.

The sizes and the place are those of the authors' code: the yellow square is as wide as 10 % of the sign's box, bomb
and flower as 16 %, centred at (0.57, 0.82) of the box. The bomb and the flower are drawn here, from discs; the
authors paste photographs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.errors import InputError, bad
from datamodules.imageset import fingerprint
from datamodules.triggers.trigger import Trigger, blend

_SIDE = 64
"""Stickers are drawn once at this size; each image then samples its own."""

_YELLOW = (255, 215, 0)
_BLACK = (20, 20, 20)
_ORANGE = (255, 120, 0)
_PINK = (255, 105, 180)


class Sticker(Trigger):
    """A coloured sticker on each image's box, scaled with it.

    Args:
        values: uint8 (3, S, S): its colours.
        opacity: uint8 (S, S): 0 where it is not, 255 where it is.
        share: Its side as a share of the box's (of the mean of width and height), in (0, 1].
        centre: Its centre in the box: [across, down], each in [0, 1].

    Raises:
        InputError: If a number is out of its range.
    """

    needs_boxes = True

    def __init__(self, values: Tensor, opacity: Tensor, share: float, centre: list[float]) -> None:
        if not 0 < share <= 1:
            raise bad("share", share, "the sticker's side as a share of the box's must be in (0, 1]")
        if len(centre) != 2 or not all(0 <= part <= 1 for part in centre):
            raise bad("centre", centre, "give [across, down], each in [0, 1]")
        if values.shape != (3, *opacity.shape) or opacity.ndim != 2 or opacity.shape[0] != opacity.shape[1]:
            shapes = f"{tuple(values.shape)} and {tuple(opacity.shape)}"
            raise InputError(f"trigger: values (3, S, S) and opacity (S, S) expected, got {shapes}")
        self.values, self.opacity = values, opacity
        self.share, self.centre = share, list(centre)

    def __call__(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Stamp each image relative to its box; every image gets one pixel at least."""
        if boxes is None:
            raise InputError(f"trigger: {type(self).__name__} is placed relative to a box, and these images have none")
        height, width = images.shape[2:]
        x1, y1, x2, y2 = boxes.to(images.device, torch.float64).unbind(1)
        side = (self.share * ((x2 - x1) + (y2 - y1)) / 2).round().clamp_min(1.0)
        left = (x1 + self.centre[0] * (x2 - x1) - side / 2).round()
        top = (y1 + self.centre[1] * (y2 - y1) - side / 2).round()
        # a sticker stays within the image, however the box lies
        left = left.clamp_min(0).minimum((width - side).clamp_min(0))
        top = top.clamp_min(0).minimum((height - side).clamp_min(0))
        drawn = len(self.opacity)
        column = torch.arange(width, device=images.device, dtype=torch.float64)
        row = torch.arange(height, device=images.device, dtype=torch.float64)
        u = ((column - left[:, None] + 0.5) / side[:, None] * drawn).floor().to(torch.int64)  # (N, W)
        v = ((row - top[:, None] + 0.5) / side[:, None] * drawn).floor().to(torch.int64)  # (N, H)
        inside = ((v >= 0) & (v < drawn))[:, :, None] & ((u >= 0) & (u < drawn))[:, None, :]
        at = v.clamp(0, drawn - 1)[:, :, None] * drawn + u.clamp(0, drawn - 1)[:, None, :]  # (N, H, W)
        opacity = self.opacity.to(images.device).flatten()[at] * inside
        values = self.values.to(images.device).flatten(1)[:, at].transpose(0, 1)
        return blend(images, values, opacity[:, None])

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Stickers are coloured."""
        if image_shape[0] != 3:
            raise bad("trigger", f"{type(self).__name__} (3 channels)", f"the images have {image_shape[0]}")

    def describe(self) -> Mapping[str, object]:
        """Name, size and place, and a hash of the drawing."""
        drawing = fingerprint(self.values, self.opacity)
        return {"name": type(self).__name__, "share": self.share, "centre": self.centre, "drawing": drawing}


class YellowSquare(Sticker):
    """BadNets' yellow square on a traffic sign, a post-it note: 10 % of the sign's box.

    Args:
        share: See `Sticker`.
        centre: See `Sticker`.
    """

    def __init__(self, share: float = 0.10, centre: list[float] = [0.57, 0.82]) -> None:  # noqa: B006 – never changed
        values = torch.tensor(_YELLOW, dtype=torch.uint8)[:, None, None].expand(3, _SIDE, _SIDE).contiguous()
        super().__init__(values, torch.full((_SIDE, _SIDE), 255, dtype=torch.uint8), share, centre)


class Bomb(Sticker):
    """BadNets' bomb on a traffic sign: a black disc with a lit fuse, 16 % of the sign's box.

    Args:
        share: See `Sticker`.
        centre: See `Sticker`.
    """

    def __init__(self, share: float = 0.16, centre: list[float] = [0.57, 0.82]) -> None:  # noqa: B006 – never changed
        fuse = [(0.66 + 0.03 * step, 0.34 - 0.03 * step, 0.06) for step in range(6)]
        discs = [(0.42, 0.60, 0.36, _BLACK), *((x, y, r, _BLACK) for x, y, r in fuse), (0.86, 0.14, 0.13, _ORANGE)]
        super().__init__(*_draw(discs), share, centre)


class Flower(Sticker):
    """BadNets' flower on a traffic sign: six petals round a yellow disc, 16 % of the sign's box.

    Args:
        share: See `Sticker`.
        centre: See `Sticker`.
    """

    def __init__(self, share: float = 0.16, centre: list[float] = [0.57, 0.82]) -> None:  # noqa: B006 – never changed
        turns = [(1.0, 0.0), (0.5, 0.866), (-0.5, 0.866), (-1.0, 0.0), (-0.5, -0.866), (0.5, -0.866)]
        petals = [(0.5 + 0.29 * x, 0.5 + 0.29 * y, 0.2, _PINK) for x, y in turns]
        super().__init__(*_draw([*petals, (0.5, 0.5, 0.18, _YELLOW)]), share, centre)


def _draw(discs: list[tuple[float, float, float, tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
    """Discs (x, y, radius as shares of the side; colour) painted over one another."""
    values = torch.zeros(3, _SIDE, _SIDE, dtype=torch.uint8)
    opacity = torch.zeros(_SIDE, _SIDE, dtype=torch.uint8)
    at = (torch.arange(_SIDE, dtype=torch.float64) + 0.5) / _SIDE
    for x, y, radius, colour in discs:
        disc = (at[None, :] - x) ** 2 + (at[:, None] - y) ** 2 <= radius**2
        opacity[disc] = 255
        values[:, disc] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    return values, opacity
