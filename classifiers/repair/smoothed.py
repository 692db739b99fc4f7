"""Smoothed: the model as it is, behind smoothed images (Xu, Evans & Qi 2018), which a small trigger may not survive.

Threat model: whoever deploys the model repairs nothing in it; he needs neither data nor training, and may fine-tune it
to such images. The smoothing is part of the network that is written, so that it is part of what is verified.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from classifiers.backbones.smoothing import Smoothing
from classifiers.classifier import ImageClassifier


class Smoothed(ImageClassifier):
    """A model that sees its images smoothed by a median or a Gaussian blur; no epochs: nothing else is changed.

    Args:
        blur: ``median`` or ``gaussian``.
        size: Of the window, odd and at least 3.
        kwargs: See `ImageClassifier`; the backbone must be one of this project's.

    Raises:
        InputError: If the blur is neither of the two, the size does not fit, or the backbone is from elsewhere.
    """

    version = 1

    def __init__(
        self, *args: Any, blur: Literal["median", "gaussian"] = "median", size: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        about, inner = self.architecture, self.net
        own: dict[str, Any] = {"inner": about.class_path, "inner_args": about.init_args, "blur": blur, "size": size}
        with torch.random.fork_rng(devices=[]):  # it draws weights of its own, which are thrown away
            self.net = Smoothing(about.image_shape, about.num_classes, **own)
        self.net.inner = inner
        path = f"{Smoothing.__module__}.{Smoothing.__qualname__}"
        self.architecture = replace(about, class_path=path, init_args=own)
