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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from classifiers.classifier import BackboneFactory, ImageClassifier
from datamodules.errors import bad
from datamodules.imageset import ImageSet

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


@torch.no_grad()
def last_convolution(model: ImageClassifier) -> list[str]:
    """The convolution that runs last, and the BatchNorm that gets what it gives, if one does: names in `model.net`.

    Raises:
        InputError: If there is no convolution.
    """
    names: list[str] = []
    given: list[Tensor] = []  # by the convolution that ran last

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            names[:], given[:] = [name], [output]
        elif given and inputs[0] is given[0]:
            names.append(name)

    layers = [each for each in model.net.named_modules() if isinstance(each[1], nn.Conv2d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(partial(look, name)) for name, layer in layers]
    _run(model, torch.zeros(1, *model.image_shape), hooks)
    if not names:
        raise bad("backbone", type(model.net).__name__, "it has no convolution; prune by magnitude")
    return names


@torch.no_grad()
def activity(model: ImageClassifier, layer: str, images: ImageSet) -> Tensor:
    """Mean positive output of each channel of a layer, on clean images: float64 (C,).

    It is to be the BatchNorm behind a convolution, where there is one: before it a channel may lie below zero that
    comes out above, and the other way round.
    """
    sums: list[Tensor] = []

    def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        sums.append(output.relu().mean((2, 3), dtype=torch.float64).sum(0))

    for rows in torch.arange(len(images)).split(_BATCH):
        _run(model, images.images_at(rows), [model.net.get_submodule(layer).register_forward_hook(add)])
    return torch.stack(sums).sum(0) / len(images)


def dormant_masks(net: nn.Module, layers: Sequence[str], activity: Tensor, share: float) -> Masks:
    """Keep the channels of the last convolution that are most active on clean images.

    Args:
        net: The network.
        layers: Names of that convolution and of the BatchNorm behind it, if one is, which would make something of a
            channel that is zero.
        activity: (C,): mean activation of each channel, as `activity` measures it.
        share: Of the channels, how many are pruned: exactly round(share · C). Of equal ones, the first.

    Returns:
        Masks of all parameters of these layers.
    """
    kept = torch.ones(len(activity), dtype=torch.bool)
    kept[activity.argsort(stable=True)[: round(share * len(activity))].cpu()] = False
    return {
        f"{layer}.{name}": kept.view(-1, *[1] * (value.ndim - 1)).expand_as(value).contiguous()
        for layer in layers
        for name, value in net.get_submodule(layer).named_parameters()
    }


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

    def setup(self, stage: str) -> None:
        """Prune, once: whatever is to be done, and before a checkpoint is restored."""
        super().setup(stage)
        if not self._masks:
            self.to(self.trainer.strategy.root_device)
            self._masks = self.trainer.strategy.broadcast(self.masks())  # of several processes, the first one's
            apply(self.net, self._masks)

    def on_fit_start(self) -> None:
        """Have the masks where the weights are, rather than carry them there at each step."""
        super().on_fit_start()
        self._masks = {name: mask.to(self.device) for name, mask in self._masks.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Prune again what momentum and weight decay brought back, before a callback writes it into a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        apply(self.net, self._masks)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the masks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks"] = {name: mask.cpu() for name, mask in self._masks.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the masks of the run that is resumed."""
        super().on_load_checkpoint(checkpoint)
        if "masks" not in checkpoint:
            remedy = "it is of a network that was not pruned; start from its weights: --model.weights"
            raise bad("ckpt_path", str(getattr(self.trainer, "ckpt_path", "")), remedy)
        self._masks = {name: mask.to(self.device) for name, mask in checkpoint["masks"].items()}


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
        layers = last_convolution(self)
        found = activity(self, layers[-1], self._datamodule().train_set)
        return dormant_masks(self.net, layers, found, self.share)


def _run(model: ImageClassifier, images: Tensor, hooks: Sequence[RemovableHandle]) -> None:
    was = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not know of the hooks
            model(images.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was)
