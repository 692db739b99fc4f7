"""Triggers: changes of pixels with explicit masks."""

from datamodules.triggers.patch import Patch, Square
from datamodules.triggers.pixels import PixelPattern, Pixels, SinglePixel
from datamodules.triggers.sticker import Bomb, Flower, Sticker, YellowSquare
from datamodules.triggers.trigger import Stamp, Trigger, blend

__all__ = [
    "Bomb",
    "Flower",
    "Patch",
    "PixelPattern",
    "Pixels",
    "SinglePixel",
    "Square",
    "Stamp",
    "Sticker",
    "Trigger",
    "YellowSquare",
    "blend",
]
