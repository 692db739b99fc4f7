"""Backbones by name, from timm and torchvision, and what both need: stored weights, and the last layer taken out."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.backbones.backbone import Backbone, as_rgb, check_rgb, last_layer
from classifiers.torch_files import check_torch, read_torch
from classifiers.weights import load_weights
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import full_path

TIMM_RESERVED = (
    *("model_name", "num_classes", "in_chans", "cache_dir"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
)
"""Arguments of ``timm.create_model`` that are ours to give; some would unpickle a file, which nothing here does."""


class Timm(Backbone):
    """Any network of timm by its name, such as `resnet26d` or `vit_tiny_patch16_224`.

    Wightman, "PyTorch Image Models", https://github.com/huggingface/pytorch-image-models. Built for the images' number
    of channels and for `num_classes`; timm's initialisation. Its last layer is taken out and becomes `head`, so that
    the features are what entered it, dropout included.

    Args:
        image_shape: (C, H, W); what sizes will do, the network says.
        num_classes: The number of logits.
        name: The network; ``timm.list_models()`` has them all.
        pretrained: True for timm's weights, fetched from the Hugging Face hub or found in its cache; or the path of a
            state_dict in a local file (safetensors, or what ``torch.load`` reads with weights_only). All must fit but
            the last layer, which is taken from the file if it has the same shape and starts anew otherwise.
        options: Further arguments of ``timm.create_model``, such as ``{img_size: 32, drop_path_rate: 0.1}``.

    Raises:
        InputError: If timm is not installed, there is no such network, it does not take these images or options, it
            does not end in a linear layer, or the weights are not found or do not fit.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        name: str,
        pretrained: bool | str = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(image_shape, num_classes)
        try:
            import timm
        except ImportError:
            raise InputError("backbone Timm: timm is not installed; pip install pharmakon[timm]") from None
        if not timm.is_model(name):
            raise bad("name", name, f"timm has no such model{did_you_mean(name, timm.list_models())}")
        for key in options or {}:
            if key in TIMM_RESERVED:
                raise bad("options", options, f"{key} is not to be set here; weights come by `pretrained`")
        arguments = {"num_classes": num_classes, "in_chans": self.image_shape[0], **(options or {})}
        try:
            body = timm.create_model(name, **arguments)
            layer = body.get_classifier()
        except Exception as error:  # whatever the constructors of some thousand networks may raise
            raise bad("options", options, f"timm cannot build {name!r} as a classifier: {one_line(error)}") from error
        if pretrained is True:
            try:
                body = timm.create_model(name, pretrained=True, **arguments)
            except Exception as error:  # each version of the hub's client has its own errors
                remedy = (
                    f"no usable weights of {name!r} in the Hugging Face cache ($HF_HOME/hub), and none can be fetched "
                    f"({one_line(error)}); name a local file, pretrained: PATH"
                )
                raise bad("pretrained", pretrained, remedy) from error
            layer = body.get_classifier()
        if not isinstance(layer, nn.Linear):
            kind = type(layer).__name__ if isinstance(layer, nn.Module) else "several layers"
            raise bad("name", name, f"ends in {kind}, not in one nn.Linear; take another model")
        if isinstance(pretrained, str):
            load_file(body, layer, pretrained)
        check_ends_in(body, layer, self.image_shape, name, hint="; some models take options: {img_size: …}")
        self.body, self.head = take_out(body, layer)

    def features(self, x: Tensor) -> Tensor:
        """What enters timm's last layer: (N, C, H, W) → (N, F)."""
        features: Tensor = self.body(x)  # not forward_head(pre_logits=True): for VGG that leaves (N, F, 1, 1)
        return features


class TorchVision(Backbone):
    """Any ImageNet classifier of torchvision by its name, such as `resnet18` or `mobilenet_v3_small`.

    Built for `num_classes` with torchvision's initialisation and without auxiliary logits. Its last layer is taken out
    and becomes `head`. Grey images are shown as three equal channels. The pretrained weights were made for images
    normalised with ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225).

    Args:
        image_shape: (C, H, W), C of 1 or 3; what sizes will do, the network says. Vision transformers are built for
            square images of H pixels.
        num_classes: The number of logits.
        name: The network; ``torchvision.models.list_models(torchvision.models)`` has them all.
        pretrained: True for torchvision's default weights, looked for in $TORCH_HOME/hub/checkpoints and fetched if
            missing; or the path of a state_dict in a local file (safetensors, or what ``torch.load`` reads with
            weights_only). All must fit but the last layer, which is taken from the file if it has the same shape and
            starts anew otherwise.

    Raises:
        InputError: If there is no such network, it does not take these images, it does not end in a linear layer, or
            the weights are not found or do not fit.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, name: str, pretrained: bool | str = False
    ) -> None:
        super().__init__(image_shape, num_classes)
        check_rgb(self.image_shape, name)
        body = torchvision_model(name, num_classes, image_size=self.image_shape[1])
        layer = last_layer(body)
        load_torchvision(body, layer, name, pretrained)
        check_ends_in(body, layer, (3, *self.image_shape[1:]), name)
        self.body, self.head = take_out(body, layer)

    def features(self, x: Tensor) -> Tensor:
        """What enters the last layer: (N, C, H, W) → (N, F)."""
        features: Tensor = self.body(as_rgb(x))
        return features


def torchvision_model(name: str, num_classes: int, image_size: int, initialise: bool = True) -> nn.Module:
    """A fresh torchvision classifier without auxiliary logits, whose `forward` returns a tensor in training too.

    Args:
        name: One of ``torchvision.models.list_models(torchvision.models)``.
        num_classes: The number of logits.
        image_size: For transformers, the height and width of the images.
        initialise: Whether GoogLeNet and InceptionV3, where it is slow, get torchvision's own initialisation.

    Raises:
        InputError: If there is none of that name or it cannot be built for that size.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise bad("name", name, f"torchvision has no such classifier{did_you_mean(name, known)}")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # their weights expect it, with or without them: pretrained or not must
        options = {"aux_logits": False, "init_weights": initialise, "transform_input": True}  # be the same architecture
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except Exception as error:  # torch's assertions on sizes are of any kind
        raise bad("name", name, f"cannot be built for {image_size}×{image_size} pixels: {one_line(error)}") from error
    return model


def load_torchvision(model: nn.Module, layer: nn.Linear, name: str, pretrained: bool | str) -> None:
    """Gives a torchvision model its default weights (True) or those of a local file (a path).

    Raises:
        InputError: If the weights are not found or do not fit.
    """
    if isinstance(pretrained, str):
        load_file(model, layer, pretrained)
    elif pretrained:
        import torchvision

        weights = torchvision.models.get_model_weights(name).DEFAULT
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if file.is_file():  # its hash was compared when it was fetched, and is not when it is found again
            try:
                check_torch(file)
            except InputError as error:
                raise bad("pretrained", pretrained, f"{error}: remove it, and it is fetched anew") from error
        try:
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:  # the network's errors, a wrong hash, a damaged file
            remedy = (
                f"no usable {file} ($TORCH_HOME/hub/checkpoints), and {weights.url} cannot be fetched "
                f"({one_line(error)}); put the file there, or name another one, pretrained: PATH"
            )
            raise bad("pretrained", pretrained, remedy) from error
        load_state(model, layer, state, "pretrained = True")


def load_file(model: nn.Module, layer: nn.Linear, path: str) -> None:
    """Loads a state_dict from a local file into a model whose last layer is `layer`, without unpickling anything.

    Raises:
        InputError: If there is no such file, it cannot be read as weights only, or it does not fit.
    """
    load_state(model, layer, read_state(path), f"pretrained = {path!r}")


def read_state(path: str) -> dict[str, Tensor]:
    """The state_dict in a local file, without unpickling anything.

    Raises:
        InputError: If there is no such file, it cannot be read as weights only, or it holds something else.
    """
    file = full_path(path)
    if not file.is_file():
        raise bad("pretrained", path, f"there is no file {file.absolute()}")
    try:
        # of ours, the seal is compared; of others', torch's archives have checksums, and safetensors has none
        state = load_weights(file)[0] if file.suffix == ".safetensors" else read_torch(file, unchecked=True)
    except InputError as error:
        raise bad("pretrained", path, f"cannot be read as weights: {one_line(error)}") from error
    for key in ("state_dict", "model"):  # as training scripts store it, next to the optimiser
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise bad("pretrained", path, "holds something else than a state_dict")
    return state


def load_state(model: nn.Module, layer: nn.Linear, state: MutableMapping[str, Tensor], origin: str) -> None:
    """Loads `state` strictly, but for auxiliary classifiers and a last layer of another shape, which stays as it is.

    Args:
        model: The network.
        layer: Its last layer.
        state: Is changed in place: torch hides the format's version in the object, and a copy would lose it.
        origin: What to call the weights in an error.

    Raises:
        InputError: If a key is missing, unknown or of another shape.
    """
    head = name_of(layer, model)
    wanted = {f"{head}.{key}": value.shape for key, value in layer.state_dict().items()}
    same_head = all(key in state and state[key].shape == shape for key, shape in wanted.items())
    for key in list(state):
        if (key in wanted and not same_head) or key.startswith(("AuxLogits.", "aux1.", "aux2.")):
            del state[key]
        elif (old := re.fullmatch(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)", key)) is not None:
            state[old[1] + old[2]] = state.pop(key)  # DenseNet's files are older than the ban on dots in names
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{origin}: the weights do not fit {type(model).__name__}: {one_line(error)}") from error
    missing = [key for key in missing if key not in wanted]
    for keys, what in ((missing, "lack"), (unknown, "have an unknown")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{origin}: the weights {what} {keys[0]}{more}: they are not of {type(model).__name__}")


def check_ends_in(
    model: nn.Module, layer: nn.Linear, image_shape: tuple[int, int, int], name: str, hint: str = ""
) -> None:
    """Sends one black image through a fresh network: does it take this size, and is `layer` the last thing in it?

    Args:
        model: The network, in training mode before and after.
        layer: What should be its last layer.
        image_shape: (C, H, W).
        name: What to call the network in an error.
        hint: What to add to the error for a size that it does not take.

    Raises:
        InputError: If it does not take such images, or does something else after `layer`.
    """
    caught: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
    model.eval()  # the image must not enter BatchNorm's statistics, nor use random numbers
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *image_shape))
    except Exception as error:  # a network that is given too few pixels fails anywhere
        remedy = f"{name} does not take such images: {one_line(error)}{hint}"
        raise bad("image_shape", image_shape, remedy) from error
    finally:
        handle.remove()
        model.train()
    last = bool(caught) and caught[-1][0].ndim == 2
    if not last or not torch.allclose(caught[-1][1], logits, equal_nan=True):
        raise bad("name", name, "its logits are not the output of one nn.Linear; take another model")


def take_out(model: nn.Module, layer: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    """Splits a network: without its last layer it gives the features; and that layer."""
    path, _, attribute = name_of(layer, model).rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Identity())
    return model, layer


def name_of(layer: nn.Module, model: nn.Module) -> str:
    """The dotted name of a layer in a model."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[layer]


def one_line(error: Exception) -> str:
    """The first two lines of an error as one, at most 160 characters: torch names the culprit in the second."""
    text = " ".join(" ".join(str(error).split("\n")[:2]).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"
