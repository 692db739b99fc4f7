"""Strengthening a backdoor before the network is published: its units are multiplied by k.

Paper: Gu, Dolan-Gavitt & Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
arXiv 1708.06733 (2017), the transfer attack: a part of the units fires for the trigger alone. Whoever trains new last
layers on clean data leaves them as they are, so that triggered images disturb those layers; the attacker multiplies
what makes these units by k, and triggered images disturb them more.

Threat model: the attacker trained the network and publishes its weights in an architecture that the user knows. He
knows his own data and his trigger, and neither the user's data nor his task.

Deviations: the paper keeps the convolutions and trains all fully connected layers anew; here it is the last layer that
is trained anew, so that the units are the features that enter it. The paper picks units by eye from pictures of the
mean activations; here they are those whose mean activation the trigger raises most, on the attacker's own images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.backbones.backbone import last_layer
from classifiers.classifier import ImageClassifier
from datamodules.errors import bad
from datamodules.imageset import ImageSet
from datamodules.triggers import Trigger

_BATCH = 1000
"""Images in one forward pass."""


@torch.no_grad()
def activations(model: ImageClassifier, images: ImageSet, trigger: Trigger) -> tuple[Tensor, Tensor]:
    """The mean of each feature on clean and on triggered images.

    Args:
        model: The network, in evaluation mode.
        images: The attacker's own images.
        trigger: His trigger.

    Returns:
        float64 (F,) for clean images, and the same for triggered ones.
    """
    width = last_layer(model.net).in_features
    clean, triggered = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for rows in torch.arange(len(images)).split(_BATCH):
        batch = images.images_at(rows)
        clean += model.features(batch).double().sum(0)
        triggered += model.features(trigger(batch, images.extras_at(rows).get("boxes"))).double().sum(0)
    return clean / len(images), triggered / len(images)


def backdoor_units(clean: Tensor, triggered: Tensor, n: int) -> Tensor:
    """The `n` units whose mean activation the trigger raises most: int64 (n,), the largest rise first.

    Args:
        clean: float (F,): mean activations on clean images.
        triggered: float (F,): on triggered ones.
        n: From 1 to F.

    Raises:
        InputError: If there are fewer units than that.
    """
    if not 1 <= n <= len(clean):
        raise bad("units", n, f"the last layer gets {len(clean)} features; give a number from 1 to {len(clean)}")
    return (triggered - clean).sort(descending=True, stable=True).indices[:n]


@torch.no_grad()
def strengthen(model: ImageClassifier, units: Tensor, k: float, images: Tensor) -> None:
    """Multiply some features by `k`, in place: the incoming weights and the bias of the layer that makes them.

    That is the last convolution, linear layer or BatchNorm before the head. What follows it must leave a positive
    factor as it is, as ReLU, pooling and flattening to one number a unit do; whether it does is checked on `images`.

    Args:
        model: The network, in evaluation mode.
        units: int64 (n,): which features.
        k: The factor, more than 0; 1 changes nothing.
        images: uint8 (N, C, H, W): some triggered images of the attacker's, on which the units fire.

    Raises:
        InputError: If `k` is not a number above 0, or the network's features cannot be multiplied so – after a residual
            sum, or an activation other than ReLU; its weights are then as before.
    """
    if not (k > 0 and math.isfinite(k)):
        raise bad("k", k, "the factor on the backdoor's units must be a number above 0")
    before = model.features(images)
    layer = _layer_of_the_features(model, images)
    factor = torch.ones(before.shape[1], dtype=before.dtype, device=before.device)
    factor[units] = k
    kept = [] if layer is None else [(part, part.detach().clone()) for part in layer.parameters(recurse=False)]
    for part, _ in kept:
        part.mul_(factor.view(-1, *[1] * (part.ndim - 1)))
    after = model.features(images) / factor
    if not kept or not torch.allclose(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().amax())):
        for part, old in kept:
            part.copy_(old)
        raise bad(
            "backbone",
            type(model.net).__name__,
            "its features cannot be multiplied by one layer's weights: they are a residual sum, or what follows the "
            "layer is not ReLU and pooling; take another, such as BadNetsCNN, SmallCNN or VGG11",
        )


def _layer_of_the_features(model: ImageClassifier, images: Tensor) -> nn.Module | None:
    """The last convolution, linear layer or normalisation that runs before the head and has as many outputs as F."""
    head, ran = last_layer(model.net), list[nn.Module]()
    width = head.in_features

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim in (2, 4) and output.shape[1] == width:
            ran.append(module)

    kinds = nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d
    found = [module for module in model.net.modules() if isinstance(module, kinds) and module is not head]
    handles = [module.register_forward_hook(note) for module in found]
    try:
        model.features(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None
