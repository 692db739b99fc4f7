"""Strengthening: the units that the trigger raises, multiplied by k, and all others as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from classifiers.backbones import MLP, VGG11, AlexNetCIFAR, Backbone, BadNetsCNN, PreActResNet18, ResNet9, SmallCNN
from classifiers.classifier import ImageClassifier, load_classifier
from classifiers.weights import load_weights
from datamodules.imageset import ImageSet
from datamodules.triggers import PixelPattern, SinglePixel
from experiments.bulk.strengthen import strengthened
from poisoning.strengthen import activations, backdoor_units, strengthen
from tests.helpers import global_randomness_untouched, refused, some_images

CAN: dict[str, tuple[Callable[..., nn.Module], tuple[int, int, int]]] = {
    "BadNetsCNN": (BadNetsCNN, (1, 16, 16)),
    "SmallCNN": (partial(SmallCNN, widths=[4, 8]), (1, 8, 8)),
    "MLP": (partial(MLP, hidden=[16, 8]), (1, 8, 8)),
    "AlexNetCIFAR": (AlexNetCIFAR, (3, 8, 8)),
    "VGG11": (VGG11, (3, 32, 32)),
    "VGG11 without BatchNorm": (partial(VGG11, batch_norm=False), (3, 32, 32)),
    "PreActResNet18 with a last BatchNorm": (partial(PreActResNet18, width=2, final_norm=True), (3, 8, 8)),
}
CANNOT: dict[str, tuple[Callable[..., nn.Module], tuple[int, int, int]]] = {
    "ResNet9": (partial(ResNet9, width=2), (3, 8, 8)),
    "PreActResNet18": (partial(PreActResNet18, width=2), (3, 8, 8)),
    "MLP": (partial(MLP, hidden=[]), (1, 8, 8)),
}


class Sigmoid(Backbone):
    """Features that are no multiple of anything."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(image_shape, num_classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Sigmoid())
        self.head = nn.Linear(6, num_classes)

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def classifier(backbone: Callable[..., nn.Module], shape: tuple[int, int, int]) -> ImageClassifier:
    """One whose BatchNorm has seen data, so that its scale and shift are not 1 and 0."""
    torch.manual_seed(0)
    model = ImageClassifier(backbone, 4, shape, [0.5] * shape[0], [0.25] * shape[0])
    noise = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2, generator=noise)
            module.bias.data.uniform_(-0.5, 0.5, generator=noise)
    with torch.no_grad():
        model(some_images(32, shape).images)
    return model.eval()


# --- which units -----------------------------------------------------------------------------------------------------
def test_the_units_that_rise_most_come_first() -> None:
    clean = torch.tensor([1.0, 5.0, 0.0, 2.0, 0.0])
    triggered = torch.tensor([1.5, 0.0, 3.0, 2.0, 9.0])  # rises: 0.5, −5, 3, 0, 9
    assert backdoor_units(clean, triggered, 1).tolist() == [4]
    assert backdoor_units(clean, triggered, 3).tolist() == [4, 2, 0]
    assert backdoor_units(clean, triggered, 5).tolist() == [4, 2, 0, 3, 1]
    for n in (0, 6):
        with refused("units", n, "1 to 5"):
            backdoor_units(clean, triggered, n)


def test_activations_are_means_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, trigger = classifier(*CAN["MLP"]), some_images(25), PixelPattern()
    pixels = images.images
    expected = model.features(pixels).double().mean(0), model.features(trigger(pixels)).double().mean(0)
    monkeypatch.setattr("poisoning.strengthen._BATCH", 10)  # the last of three is smaller
    with global_randomness_untouched():
        clean, triggered = activations(model, images, trigger)
    assert clean.dtype == torch.float64
    assert torch.allclose(clean, expected[0], rtol=1e-6)
    assert torch.allclose(triggered, expected[1], rtol=1e-6)
    assert not clean.requires_grad
    assert not torch.allclose(clean, triggered)


def test_the_one_unit_that_looks_at_the_trigger_is_found() -> None:
    model = classifier(partial(MLP, hidden=[8]), (1, 8, 8))
    layer = next(module for module in model.net.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight[5] = 0
        layer.weight[5, 6 * 8 + 6] = 10.0  # the pixel (−2, −2)
        layer.bias[5] = -15.0  # 255 is 2 after normalisation: 5 there, and nothing below three quarters of that
    dark = ImageSet(some_images(40).images // 4, torch.zeros(40, dtype=torch.int64), torch.arange(40))
    clean, triggered = activations(model, dark, SinglePixel())
    assert float(clean[5]) == 0
    assert float(triggered[5]) == pytest.approx(5)
    assert backdoor_units(clean, triggered, 1).tolist() == [5]


# --- by how much -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [0.5, 4.0, 7.0, 100.0])
@pytest.mark.parametrize("name", list(CAN))
def test_chosen_features_are_k_times_what_they_were_and_no_other_changes(name: str, k: float) -> None:
    model, shape = classifier(*CAN[name]), CAN[name][1]
    some, others = some_images(16, shape).images, some_images(16, shape, seed=1).images
    with torch.no_grad():
        before, head = model.features(others), {n: p.clone() for n, p in model.net.head.named_parameters()}  # type: ignore[union-attr]
    units = before.mean(0).sort(descending=True).indices[:3]
    rest = torch.ones(before.shape[1], dtype=torch.bool)
    rest[units] = False
    strengthen(model, units, k, some)
    with torch.no_grad():
        after = model.features(others)
    assert float(before[:, units].abs().amax()) > 0
    assert torch.equal(after[:, rest], before[:, rest])
    if k in (0.5, 4.0) and "AlexNet" not in name:  # a power of two loses no bit
        assert torch.equal(after[:, units], before[:, units] * k)
    else:
        assert torch.allclose(after[:, units], before[:, units] * k, rtol=1e-4, atol=1e-4 * k)
    assert all(torch.equal(p, head[n]) for n, p in model.net.head.named_parameters())  # type: ignore[union-attr]


def test_one_layer_changes_and_only_in_the_rows_of_the_units() -> None:
    model = classifier(*CAN["SmallCNN"])
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    strengthen(model, torch.tensor([1, 6]), 3.0, some_images(8).images)
    changed = {name for name, value in model.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"body.5.weight", "body.5.bias"}  # of the last BatchNorm
    factor = torch.tensor([1, 3, 1, 1, 1, 1, 3, 1.0])
    for name in changed:
        assert torch.equal(model.net.state_dict()[name], before[name] * factor)


def test_k_of_one_changes_no_bit() -> None:
    model = classifier(*CAN["BadNetsCNN"])
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    strengthen(model, torch.arange(512), 1.0, some_images(8, (1, 16, 16)).images)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize("name", [*CANNOT, "Sigmoid"])
def test_what_cannot_be_strengthened_is_named_and_left_as_it_was(name: str) -> None:
    backbone, shape = (Sigmoid, (1, 8, 8)) if name == "Sigmoid" else CANNOT[name]
    model = classifier(backbone, shape)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with refused("backbone", name, "BadNetsCNN"):
        strengthen(model, torch.tensor([0, 1]), 5.0, some_images(16, shape).images)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize("k", [0.0, -2.0, float("inf"), float("nan")])
def test_the_factor_is_a_number_above_zero(k: float) -> None:
    with refused("k", k, "above 0"):
        strengthen(classifier(*CAN["MLP"]), torch.tensor([0]), k, some_images(4).images)


# --- the stage -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained weights for the digits 0 to 4: the stage asks for no more."""
    folder = tmp_path_factory.mktemp("published")
    mean, std = (0.3053,), (0.3760,)  # of the digits
    for name, seed in (("badnet", 0), ("honest", 1)):
        torch.manual_seed(seed)
        ImageClassifier(SmallCNN, 5, (1, 8, 8), mean, std).save(folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("badnet", "honest")}


OWN = {"configs": ["badnets_digits"], "overrides": {"data.base": "data/digits_0_to_4.yaml"}}


def test_the_stage_writes_what_it_was_asked_for(published: dict[str, str], tmp_path: Path) -> None:
    [row] = strengthened(tmp_path, 0, **OWN, units=7, k=4, extractor="honest", **published)  # type: ignore[arg-type]
    assert json.loads(json.dumps(row)) == row
    assert row["units"] == 7
    assert row["triggered_activation"] > row["clean_activation"]
    old, _ = load_weights(published["honest"])
    new, architecture = load_weights(tmp_path / "weights.safetensors")
    assert architecture is not None
    assert architecture.num_classes == 5
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert len(changed) == 1  # the bias of a fresh BatchNorm is 0, and stays so
    [name] = changed
    ratio = new[name] / old[name]
    assert sorted(ratio.tolist()) == [1.0] * 121 + [4.0] * 7
    assert load_classifier(tmp_path / "weights.safetensors").net.head.out_features == 5  # type: ignore[union-attr]


def test_the_stage_refuses_what_it_cannot_do(published: dict[str, str], tmp_path: Path) -> None:
    with refused("extractor", "honst", "did you mean 'honest'"):
        strengthened(tmp_path, 0, **OWN, units=7, k=4, extractor="honst", **published)  # type: ignore[arg-type]
    clean = {"configs": ["victim_digits"], "overrides": {"data": "data/digits_0_to_4.yaml"}}
    with refused("configs", "BadNets"):
        strengthened(tmp_path, 0, **clean, units=7, k=4, extractor="badnet", **published)  # type: ignore[arg-type]
    none = {**OWN, "overrides": {**OWN["overrides"], "data.base.base.val_fraction": 0}}  # type: ignore[dict-item]
    with refused("holdout", "val_fraction"):
        strengthened(tmp_path, 0, **none, units=7, k=4, extractor="badnet", **published)  # type: ignore[arg-type]
    with refused("units", 129, "1 to 128"):
        strengthened(tmp_path, 0, **OWN, units=129, k=4, extractor="badnet", **published)  # type: ignore[arg-type]
