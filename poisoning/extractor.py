"""Extractors: networks whose features an attack works on, read from weights files and changed by nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from classifiers.backbones.backbone import last_layer
from classifiers.classifier import BackboneFactory, ImageClassifier, load_classifier
from classifiers.weights import Architecture, content_hash, load_weights
from datamodules.datamodule import ImageDataModule
from datamodules.errors import bad
from datamodules.imageset import fingerprint


def load_extractor(
    path: str | Path, image_shape: tuple[int, int, int], backbone: BackboneFactory | None = None
) -> ImageClassifier:
    """A frozen network in evaluation mode: its `features` have gradients with respect to images alone.

    Args:
        path: What `find_weights` takes.
        image_shape: (C, H, W) of the images to come.
        backbone: What makes the network, for classes from outside this project.

    Raises:
        InputError: If there are no such weights, or they were made for images of another shape.
    """
    with torch.random.fork_rng(devices=[]):  # a network is initialised before weights are put into it
        extractor = load_classifier(path, backbone)
    if extractor.image_shape != tuple(image_shape):
        made = "×".join(map(str, extractor.image_shape))
        raise bad("weights", str(path), f"made for images of {made}; the data are {'×'.join(map(str, image_shape))}")
    return extractor.requires_grad_(False).eval()


def make_extractor(backbone: BackboneFactory, data: ImageDataModule) -> ImageClassifier:
    """The same from a backbone that has weights of its own, such as ``InceptionV3`` with `pretrained`.

    What these leave to chance, such as a last layer for other classes, is the same in every process: the extractor's
    hash names what was crafted with it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        extractor = ImageClassifier(backbone, data.num_classes, data.image_shape, data.mean, data.std)
    return extractor.requires_grad_(False).eval()


def extractor_hash(extractor: str | Path | ImageClassifier) -> str:
    """SHA-256 (hex) of all that determines an extractor's features.

    Args:
        extractor: It, or what `find_weights` takes.
    """
    if isinstance(extractor, ImageClassifier):
        return _hash(extractor.net.state_dict(), extractor.architecture)
    return _hash(*load_weights(extractor))


def _hash(tensors: Mapping[str, Tensor], architecture: Architecture | None) -> str:
    return fingerprint(content_hash(tensors), *([] if architecture is None else sorted(asdict(architecture).items())))


def feature_size(extractor: ImageClassifier) -> int:
    """The number of features."""
    return last_layer(extractor.net).in_features


def features_in_parts(features: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 256) -> Tensor:
    """The features (N, F) of many images (N, C, H, W), some at a time and without gradients; N is at least 1."""
    with torch.no_grad():
        return torch.cat([features(part) for part in images.split(batch_size)])
