"""Pruning: weights, or channels that clean images leave dormant, are set to zero and stay zero in fine-tuning.

Papers: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (magnitudes);
Liu, Dolan-Gavitt & Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018.

Threat model: whoever holds the model has some clean images, and no idea of the trigger.

Deviations: the paper prunes channels until accuracy on a holdout falls by 4 %; here the share is given, and a study
sweeps it: nothing is chosen by what is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.backbones.backbone import last_layer
from classifiers.classifier import BackboneFactory, ImageClassifier
from datamodules.errors import bad
from datamodules.imageset import Batch, ImageSet

Masks = dict[str, Tensor]
"""Name of a parameter → bool of its shape: what is kept."""

_BATCH = 500


def magnitude_masks(net: nn.Module, share: float) -> Masks:
    """Keep all weights but the smallest, over all convolutions and linear layers together.

    Args:
        net: The network.
        share: Of these weights, how many are pruned: exactly round(share · all). Of equal ones, the first.

    Returns:
        Masks of their weights; biases are left alone.
    """
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    weights = {f"{name}.weight".lstrip("."): layer.weight.detach() for name, layer in layers.items()}
    sizes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    kept = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[sizes.argsort(stable=True)[: round(share * len(sizes))]] = False
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def dormant_masks(net: nn.Module, activity: Tensor, share: float) -> Masks:
    """Keep the channels of the last convolution that are most active on clean images.

    Args:
        net: The network.
        activity: (C,): mean activation of each channel, as `activity` measures it.
        share: Of the channels, how many are pruned: exactly round(share · C). Of equal ones, the first.

    Returns:
        Masks of that convolution's weight and, if it has one, its bias; and of the BatchNorm behind it, which would
        make something of a channel that is zero.
    """
    name, layer = _last_convolution(net)
    kept = torch.ones(len(activity), dtype=torch.bool, device=layer.weight.device)
    kept[activity.argsort(stable=True)[: round(share * len(activity))].to(kept.device)] = False
    masks = {f"{name}.weight": kept[:, None, None, None].expand_as(layer.weight)}
    if layer.bias is not None:
        masks[f"{name}.bias"] = kept
    modules = list(net.named_modules())
    after = modules[[each for each, _ in modules].index(name) + 1 :]
    if after and isinstance(after[0][1], nn.BatchNorm2d) and after[0][1].num_features == len(kept):
        masks |= {f"{after[0][0]}.weight": kept, f"{after[0][0]}.bias": kept}
    return masks


@torch.no_grad()
def activity(model: ImageClassifier, images: ImageSet) -> Tensor:
    """Mean positive output of each channel of the last convolution, on clean images: float64 (C,)."""
    _, layer = _last_convolution(model.net)
    sums: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, out: sums.append(out.relu().double().mean((2, 3)).sum(0)))
    was = model.training
    model.eval()
    try:
        for rows in torch.arange(len(images)).split(_BATCH):
            model(images.images_at(rows).to(model.device))
    finally:
        hook.remove()
        model.train(was)
    return torch.stack(sums).sum(0) / len(images)


@torch.no_grad()
def apply(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what is not kept to zero."""
    parameters = dict(net.named_parameters())
    for name, mask in masks.items():
        parameters[name].mul_(mask.to(parameters[name].device))


class Masked(ImageClassifier, ABC):
    """A classifier of which some weights are zero, and stay zero while the others are fine-tuned.

    Args:
        backbone: See `ImageClassifier`.
        num_classes: See `ImageClassifier`.
        image_shape: See `ImageClassifier`.
        mean: See `ImageClassifier`.
        std: See `ImageClassifier`.
        share: What is pruned, in [0, 1).
        **kwargs: See `ImageClassifier`; ``weights`` are of the model to repair.

    Raises:
        InputError: If the share is out of its range, or there are no weights.
    """

    def __init__(
        self,
        backbone: BackboneFactory,
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        share: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, image_shape, mean, std, **kwargs)
        if not 0 <= share < 1:
            raise bad("share", share, "the share that is pruned must be in [0, 1)")
        if kwargs.get("weights") is None:
            raise bad("weights", None, "there is nothing to prune; give those of a trained model")
        self.share = share
        self._masks: Masks = {}

    @abstractmethod
    def masks(self) -> Masks:
        """What is kept."""

    def on_fit_start(self) -> None:
        """Prune, before the first step."""
        if not self._masks:
            self._masks = self.masks()
        apply(self.net, self._masks)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Prune again what momentum and weight decay brought back."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        apply(self.net, self._masks)


class Pruned(Masked):
    """Magnitude pruning: the smallest weights go (Han et al. 2015); see `Masked` for the arguments."""

    version = 1

    def masks(self) -> Masks:
        """By magnitude."""
        return magnitude_masks(self.net, self.share)


class FinePruned(Masked):
    """Fine-pruning: channels that clean images leave dormant go (Liu et al. 2018); see `Masked` for the arguments."""

    version = 1

    def masks(self) -> Masks:
        """By activity on the training images, which must be clean; the same on each rank."""
        return dormant_masks(self.net, activity(self, self._datamodule().train_set), self.share)


def _last_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    head = last_layer(net)
    found = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
    if not found:
        raise bad("backbone", type(net).__name__, f"it has no convolution, and only {head} is left; prune by magnitude")
    return found[-1]
