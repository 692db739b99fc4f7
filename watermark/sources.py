"""Triggers from an owner's images: his own, those of an unrelated task, or training images with a word over them.

They are chosen by the system's randomness, never by an experiment's seed. A key of such triggers gets the weaker
verdict, "not resistant to false claims", unless its labels come from a later beacon: who may choose images can choose
ones that a model already calls as he likes.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np

from datamodules.errors import bad
from watermark.derive import Images

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
WORD = "TEST"


def pick(path: Path, n: int, shape: tuple[int, int, int]) -> tuple[Images, list[int] | None]:
    """Some images at random, without replacement.

    Args:
        path: An npz with ``x``, uint8 (N, H, W) or (N, H, W, C) or (N, C, H, W), and perhaps ``y``, their classes; or a
            folder of pictures, in the order of their names.
        n: How many.
        shape: (C, H, W); pictures of a folder are resized, those of an npz must have it.

    Returns:
        uint8 (n, C, H, W), and their classes, if they are known.

    Raises:
        InputError: If there are fewer, or they are something else.
    """
    if path.is_dir():
        images, truths = _folder(path, shape), None
    elif path.is_file() and path.suffix == ".npz":
        images, truths = _npz(path, shape)
    else:
        raise bad("images", str(path), "give an .npz file with x, or a folder of pictures")
    images, first = np.unique(images, axis=0, return_index=True)  # duplicates make no triggers
    if len(images) < n:
        raise bad("images", str(path), f"{len(images)} different images, and {n} triggers are wanted")
    rows = list(range(len(images)))
    secrets.SystemRandom().shuffle(rows)
    chosen = rows[:n]
    return images[chosen], None if truths is None else [int(truths[first[row]]) for row in chosen]


def overlay(images: Images, word: str = WORD) -> Images:
    """Images with a word across their middle: uint8 (n, C, H, W)."""
    from PIL import Image, ImageDraw

    height, width = images.shape[2:]
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.textbbox((0, 0), word)
    scale = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(scale).text((1 - left, 1 - top), word, fill=255)
    band = scale.resize((width, max(4, height // 3)))
    mask.paste(band, (0, (height - band.height) // 2))
    return np.where(np.asarray(mask) > 96, np.uint8(255), images).astype(np.uint8)


def _folder(path: Path, shape: tuple[int, int, int]) -> Images:
    from PIL import Image

    channels, height, width = shape
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
    if channels not in (1, 3) or not files:
        raise bad("images", str(path), f"grey or RGB pictures are expected ({', '.join(_SUFFIXES)})")
    found = []
    for file in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB").resize((width, height)))
        found.append(pixels.reshape(height, width, channels).transpose(2, 0, 1))
    return np.stack(found)


def _npz(path: Path, shape: tuple[int, int, int]) -> tuple[Images, list[int] | None]:
    try:
        with np.load(path, allow_pickle=False) as content:
            x = content["x"]
            y = content["y"].tolist() if "y" in content else None
    except (OSError, ValueError, KeyError) as error:
        raise bad("images", str(path), f"it cannot be read ({error}); an array x is expected") from error
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1:] != shape and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype != np.uint8 or x.shape[1:] != shape or (y is not None and len(y) != len(x)):
        raise bad("images", str(path), f"x is {x.dtype} {x.shape}; uint8 (N, {', '.join(map(str, shape))}) is expected")
    return x, y
