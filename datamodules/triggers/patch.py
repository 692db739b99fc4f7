"""A picture as a trigger: from numbers, or from a PNG file with alpha."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datamodules.errors import InputError, bad
from datamodules.files import full_path
from datamodules.triggers.trigger import Stamp


class Patch(Stamp):
    """A picture stamped at a fixed place, opaque or blended in: a PNG file with alpha, or numbers.

    Args:
        picture: The path of an image file (its alpha channel is the mask); or nested lists of 0 … 255, (h, w) or
            (c, h, w); or, in Python, a uint8 tensor of such a shape.
        row: Row of the upper edge; negative: of the lower edge, counted from the image's lower edge (−1: flush).
        column: The same for the left (right) edge.
        alpha: Opacity in (0, 1], times that of the file.
        size: Height and width the file is resized to; None: as it is.

    Raises:
        InputError: If the file cannot be read, or a number is out of its range.
    """

    def __init__(
        self,
        picture: str | list[list[int]] | list[list[list[int]]] | Tensor,
        row: int = -1,
        column: int = -1,
        alpha: float = 1.0,
        size: int | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise bad("alpha", alpha, "opacity must be in (0, 1]")
        if size is not None and size < 1:
            raise bad("size", size, "height and width must be 1 pixel or more")
        if isinstance(picture, str):
            values, opacity = _read(full_path(picture), size)
        else:
            values = _numbers(picture)
            opacity = torch.full(values.shape[1:], 255, dtype=torch.uint8)
        opacity = (opacity.to(torch.float64) * alpha).round().to(torch.uint8)
        super().__init__(values, opacity, row, column)


class Square(Patch):
    """A plain square, such as the 3×3 white one that most CIFAR-10 backdoor studies use.

    Args:
        size: Side in pixels.
        value: Brightness 0 … 255 in all channels, or one number for each channel.
        row: See `Patch`.
        column: See `Patch`.
        alpha: See `Patch`.

    Raises:
        InputError: If a number is out of its range.
    """

    def __init__(
        self, size: int = 3, value: int | list[int] = 255, row: int = -1, column: int = -1, alpha: float = 1.0
    ) -> None:
        if size < 1:
            raise bad("size", size, "the side must be 1 pixel or more")
        levels = [value] if isinstance(value, int) else value
        if not levels or not all(0 <= level <= 255 for level in levels):
            raise bad("value", value, "brightness is between 0 and 255")
        super().__init__([[[level] * size for _ in range(size)] for level in levels], row, column, alpha)


def _numbers(picture: object) -> Tensor:
    try:
        values = torch.as_tensor(picture)
    except (ValueError, TypeError) as error:
        raise InputError(f"picture: rows must be equally long numbers ({error})") from error
    values = values.unsqueeze(0) if values.ndim == 2 else values
    if (
        values.ndim != 3
        or values.is_floating_point()
        or not values.numel()
        or not 0 <= int(values.min()) <= int(values.max()) <= 255
    ):
        raise InputError(
            f"picture: whole numbers 0 … 255 of shape (h, w) or (c, h, w) expected, got {tuple(values.shape)}"
        )
    return values.to(torch.uint8)


def _read(path: Path, size: int | None) -> tuple[Tensor, Tensor]:
    """Values uint8 (c, h, w), c = 1 for a grey file and 3 for a coloured one, and opacity uint8 (h, w)."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = image.mode
            rgba = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:  # PIL has a SyntaxError for a broken PNG file
        raise bad("picture", str(path), f"no image can be read there ({error})") from error
    if mode[0] in "IF":  # PIL would clip them
        raise bad("picture", str(path), f"8 bits in each channel are expected; it has pixels of type {mode}")
    if size is not None:
        rgba = rgba.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(rgba).copy())
    channels = 1 if mode in ("1", "L", "LA") else 3
    return pixels[..., :channels].permute(2, 0, 1).contiguous(), pixels[..., 3].contiguous()
