"""The base of all backbones, and two functions that find the last linear layer of any other network.

A backbone is a network without its surroundings: normalised images in, logits out. Attacks and defences need one thing
more of it, the *features*: what enters the last linear layer (Activation Clustering and Spectral Signatures look at
them, Poison Frogs collide in them, Fine-Pruning ranks channels by them). A network of someone else's needs no base
class for that: `features_of` reads them off while it runs.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.errors import InputError, bad


class Backbone(nn.Module, ABC):
    """The abstract base: `features`, then one linear layer, `head`.

    A subclass sets `head` and implements `features`. Its constructor takes `image_shape` and `num_classes` first and
    its own arguments after them, which become the keys of `init_args` in YAML. An argument `pretrained` changes weights
    only, never the architecture, so that a stored model is rebuilt with it off.

    Args:
        image_shape: (C, H, W) of the images to come.
        num_classes: The number of logits, at least 2.
        smallest: The least height and width that the architecture can work with.

    Attributes:
        head: The last layer.
        image_shape: (C, H, W).
        num_classes: The number of logits.

    Raises:
        InputError: If the images are too small or an argument is out of range.
    """

    head: nn.Linear

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, *, smallest: int = 1) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise bad("image_shape", image_shape, "must be (channels, height, width), each at least 1")
        channels, height, width = image_shape
        if min(height, width) < smallest:
            name = type(self).__name__
            raise bad("image_shape", image_shape, f"{name} needs images of at least {smallest}×{smallest} pixels")
        if num_classes < 2:
            raise bad("num_classes", num_classes, "must be at least 2")
        self.image_shape = (channels, height, width)
        self.num_classes = num_classes

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """The input of the last layer: float32 normalised (N, C, H, W) → float32 (N, F)."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits: float32 normalised (N, C, H, W) → float32 (N, K)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @property
    def feature_size(self) -> int:
        """F, the width of the last layer's input."""
        return self.head.in_features


def last_layer(module: nn.Module) -> nn.Linear:
    """The head of a `Backbone`; of any other network its last `nn.Linear`, in the order of registration.

    Raises:
        InputError: If it has no linear layer.
    """
    module = _eager(module)
    if isinstance(module, Backbone):
        return module.head
    found = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if not found:
        raise InputError(f"{type(module).__name__} has no nn.Linear: features are what enters the last one")
    return found[-1]


def features_of(module: nn.Module, x: Tensor) -> Tensor:
    """The input of the last linear layer of any network, gradients attached.

    Args:
        module: A `Backbone`, or any network of images that ends in a linear layer.
        x: float32 normalised (N, C, H, W).

    Returns:
        float32 (N, F).

    Raises:
        InputError: If there is no linear layer, if it does not run, or if what enters it is not (N, F).
    """
    module = _eager(module)
    if isinstance(module, Backbone):
        return module.features(x)
    caught: list[Tensor] = []
    layer = last_layer(module)
    handle = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not know of the hook
            module(x)
    finally:
        handle.remove()
    name = type(module).__name__
    if not caught:
        raise InputError(f"{name}: its last nn.Linear did not run; give it a features method: derive it from Backbone")
    if caught[-1].ndim != 2 or len(caught[-1]) != len(x):
        shape = tuple(caught[-1].shape)
        raise InputError(f"{name}: features of shape {shape} enter its last nn.Linear, and ({len(x)}, F) was expected")
    return caught[-1]


def named_backbone(class_path: str) -> type[nn.Module]:
    """The backbone that a weights file names: one of this project's, since a file must not choose what is imported.

    Raises:
        InputError: If it is from elsewhere, or there is none of that name.
    """
    module, _, name = class_path.rpartition(".")
    if not f"{module}.".startswith("classifiers.backbones."):
        raise InputError(f"its backbone {class_path} is not one of this project's; pass the class as `backbone`")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"there is no backbone {class_path}")
    return found


def check_positive(**values: int) -> None:
    """Raises InputError for the first value below 1: ``check_positive(width=width)``."""
    for name, value in values.items():
        if value < 1:
            raise bad(name, value, "must be at least 1")


def check_rgb(image_shape: tuple[int, int, int], name: str) -> None:
    """Raises InputError unless `as_rgb` can feed such images to a network that was made for colour."""
    if image_shape[0] not in (1, 3):
        raise bad("image_shape", image_shape, f"{name} takes images of 3 channels, or of 1 (used three times)")


def as_rgb(x: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) as (N, 3, H, W), without a copy; colour images as they are."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution that keeps the size (divides it by `stride`), without bias: BatchNorm follows or precedes."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _eager(module: nn.Module) -> nn.Module:
    """The network inside the wrapper that `torch.compile` puts round it; else itself."""
    inner: Any = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, torch.nn.Module) else module
