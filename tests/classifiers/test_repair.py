"""Model repair: exactly as much is pruned as was asked for, it stays pruned, and grids are what they should be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from classifiers.backbones import MLP, BadNetsCNN, PreActResNet18, ResNet9, ResNet18, SmallCNN
from classifiers.classifier import ImageClassifier, load_classifier
from classifiers.repair import FinePruned, Pruned, Quantised
from classifiers.repair.pruning import activity, apply, dormant_masks, last_convolution, magnitude_masks
from classifiers.repair.quantisation import rounded
from classifiers.repair.smoothing import median
from datamodules.imageset import ImageSet
from datamodules.sources.digits import Digits
from tests.helpers import refused, tiny_trainer

CNN = partial(SmallCNN, widths=[4, 8])


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    data = Digits()
    ImageClassifier(CNN, 10, data.image_shape, data.mean, data.std).save(tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def made(kind: type[ImageClassifier], weights: str, **more: object) -> ImageClassifier:
    data = Digits()
    return kind(CNN, 10, data.image_shape, data.mean, data.std, weights=weights, **more)  # type: ignore[arg-type]


def fitted(model: ImageClassifier, epochs: int) -> ImageClassifier:
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, Digits())
    return model


def test_the_smallest_weights_of_all_layers_go() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.1, -3.0], [0.5, 0.5]]))
        net[1].weight.copy_(torch.tensor([[-0.2, 9.0]]))
        net[0].bias.fill_(0.01)
    masks = magnitude_masks(net, 0.5)
    assert masks["0.weight"].tolist() == [[False, True], [False, True]]  # of the two 0.5, the first
    assert masks["1.weight"].tolist() == [[False, True]]
    apply(net, masks)
    assert net[0].weight.tolist() == [[0, -3.0], [0, 0.5]]
    assert net[0].bias.tolist() == pytest.approx([0.01, 0.01])
    assert all(bool(mask.all()) for mask in magnitude_masks(net, 0.0).values())


@pytest.mark.parametrize("epochs", [0, 2])
def test_pruned_weights_stay_zero_and_the_file_has_them(weights: str, tmp_path: Path, epochs: int) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    model = fitted(made(Pruned, weights, share=0.7, optimizer=optimizer), epochs)
    model.save(tmp_path / "pruned.safetensors")
    net = load_classifier(tmp_path / "pruned.safetensors").net
    own = [layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    zeros, total = sum(int((weight == 0).sum()) for weight in own), sum(weight.numel() for weight in own)
    assert zeros == round(0.7 * total)
    before = dict(load_classifier(weights).net.named_parameters())
    changed = any(
        not torch.equal(value[value != 0], before[name][value != 0]) for name, value in net.named_parameters()
    )
    assert changed == (epochs > 0)


class Built(nn.Module):
    """Four channels that are x, −x, 0 and x + 5 before BatchNorm, and x, 0.5 − x, 0.25 and x − 1 behind it."""

    def __init__(self, image_shape: tuple[int, int, int] = (1, 1, 2), classes: int = 2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, eps=1e-12)  # registered before the convolution that it follows
        self.conv = nn.Conv2d(1, 4, 1)
        self.head = nn.Linear(4, classes)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1.0]).view(4, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))  # type: ignore[union-attr]
            self.norm.running_mean.copy_(torch.tensor([0.0, 0.0, 0.0, 6.0]))  # type: ignore[union-attr]
            self.norm.bias.copy_(torch.tensor([0.0, 0.5, 0.25, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.conv(x)).relu().amax((2, 3)))
        return logits


def test_dormant_channels_are_found_behind_batchnorm() -> None:
    model = ImageClassifier(Built, 2, (1, 1, 2), (0.0,), (1.0,)).eval()
    pixels = torch.tensor([[0, 255], [51, 51], [0, 0]], dtype=torch.uint8).view(3, 1, 1, 2)  # 0, 1; 0.2, 0.2; 0, 0
    images = ImageSet(pixels, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    layers = last_convolution(model)
    assert layers == ["conv", "norm"]
    # x; 0.5 − x, where that is above 0; 0.25; never above 0
    expected = torch.tensor([1.4 / 6, 2.1 / 6, 0.25, 0.0], dtype=torch.float64)
    found = activity(model, "norm", images)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(activity(model, "norm", images.select(torch.tensor([2, 0, 1]))), found)
    assert not model.net.conv._forward_hooks
    masks = dormant_masks(model.net, layers, found, 0.5)
    assert set(masks) == {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}
    for mask in masks.values():
        assert mask.reshape(4, -1).all(1).tolist() == [False, True, True, False]
    apply(model.net, masks)
    assert model.net.norm(model.net.conv(torch.randn(9, 1, 1, 2)))[:, [0, 3]].abs().max() == 0
    assert dormant_masks(model.net, ["conv"], torch.zeros(4), 0.5)["conv.bias"].tolist() == [False, False, True, True]
    for share, left in ((0.1, 4), (0.2, 3), (0.4, 2), (0.7, 1)):  # 0.4, 0.8, 1.6 and 2.8 channels
        assert int(dormant_masks(model.net, ["conv"], found, share)["conv.bias"].sum()) == left


@pytest.mark.parametrize(
    ("backbone", "shape", "norm"),
    [
        (SmallCNN, (1, 8, 8), True),
        (BadNetsCNN, (1, 16, 16), False),
        (partial(ResNet9, width=2), (3, 16, 16), True),
        (partial(ResNet18, width=2), (3, 8, 8), True),
        (partial(PreActResNet18, width=2), (3, 8, 8), False),
        (partial(PreActResNet18, width=2, final_norm=True), (3, 8, 8), False),  # that is of the sum with the shortcut
    ],
)
def test_the_last_convolution_of_each_kind(backbone: Any, shape: tuple[int, int, int], norm: bool) -> None:
    channels = shape[0]
    model = ImageClassifier(backbone, 4, shape, (0.5,) * channels, (0.3,) * channels)
    found = last_convolution(model)
    assert model.training
    assert found[0] == [name for name, layer in model.net.named_modules() if isinstance(layer, nn.Conv2d)][-1]
    assert [type(model.net.get_submodule(name)) for name in found[1:]] == [nn.BatchNorm2d] * norm


def test_fine_pruning_runs(weights: str) -> None:
    model = fitted(made(FinePruned, weights, share=0.5), 1)
    last = [layer for layer in model.net.modules() if isinstance(layer, nn.Conv2d)][-1]
    assert int((last.weight.flatten(1).abs().sum(1) == 0).sum()) == 4


class Seen(Callback):
    """How many weights are zero, as a callback sees it that writes a checkpoint."""

    def __init__(self) -> None:
        self.zeros: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weights = [value for value in pl_module.net.parameters() if value.ndim > 1]
        self.zeros.append(sum(int((value == 0).sum()) for value in weights))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_no_callback_sees_a_pruned_weight_move(weights: str, optimizer: Any) -> None:
    seen, model = Seen(), made(Pruned, weights, share=0.75, optimizer=optimizer)
    layers = [layer for layer in model.net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    tiny_trainer(max_epochs=1, callbacks=[seen]).fit(model, datamodule=Digits())
    assert len(seen.zeros) > 9
    assert set(seen.zeros) == {round(0.75 * sum(layer.weight.numel() for layer in layers))}


class First(Callback):
    """What an optimizer knows before its first step."""

    def __init__(self) -> None:
        self.known: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.known = len(trainer.optimizers[0].state)


@pytest.mark.parametrize("kind", [ImageClassifier, Pruned, FinePruned])
def test_whoever_repairs_a_model_gets_nothing_of_its_optimizer(kind: type[ImageClassifier], tmp_path: Path) -> None:
    """A checkpoint has the momentum of its training, and a thief has the weights alone."""
    keep, data = ModelCheckpoint(tmp_path, filename="first"), Digits()
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    first = ImageClassifier(CNN, 10, data.image_shape, data.mean, data.std, optimizer=momentum)
    tiny_trainer(max_epochs=1, callbacks=[keep], enable_checkpointing=True).fit(first, datamodule=Digits())
    checkpoint = tmp_path / "first.ckpt"
    assert torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"], "there is something to hand over"
    seen = First()
    tiny_trainer(max_epochs=1, callbacks=[seen]).fit(made(kind, str(checkpoint), optimizer=momentum), datamodule=data)
    assert seen.known == 0


@pytest.mark.parametrize("kind", [FinePruned, Pruned])
def test_a_resumed_run_prunes_what_it_began_with(kind: type[ImageClassifier], weights: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="first")
    first = made(kind, weights, share=0.5)
    tiny_trainer(max_epochs=1, callbacks=[keep], enable_checkpointing=True).fit(first, datamodule=Digits())
    data = Digits()
    ImageClassifier(CNN, 10, data.image_shape, data.mean, data.std).save(weights)  # another one of that name
    resumed = made(kind, weights, share=0.5)
    tiny_trainer(max_epochs=3).fit(resumed, datamodule=Digits(), ckpt_path=tmp_path / "first.ckpt")
    kept = [model.net.get_submodule("body.4").weight != 0 for model in (first, resumed)]
    assert torch.equal(*kept)
    assert not kept[0].all()
    if kind is FinePruned:
        assert int(kept[0].flatten(1).any(1).sum()) == 4


def test_it_is_pruned_and_rounded_without_a_fit_too(weights: str) -> None:
    model = made(Pruned, weights, share=0.5)
    tiny_trainer().test(model, datamodule=Digits(), verbose=False)
    assert int((model.net.get_submodule("body.4").weight == 0).sum()) > 0
    assert all(len(channel.unique()) <= 7 for channel in made(Quantised, weights, bits=3).net.body[4].weight)


def test_all_processes_take_the_masks_of_the_first(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trainer = made(Pruned, weights, share=0.5), tiny_trainer(max_epochs=0)
    theirs = {"head.weight": torch.zeros(10, 8, dtype=torch.bool)}
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda own, src=0: theirs)
    trainer.fit(model, datamodule=Digits())
    assert not model.net.get_submodule("head").weight.any()
    assert model.net.get_submodule("body.4").weight.all()


def test_the_file_of_a_quantised_run_that_trained_is_on_the_grid(weights: str, tmp_path: Path) -> None:
    class Writes(Callback):
        """As the record of a run does: before any hook of the model at the end of a fit."""

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.save(tmp_path / "int4.safetensors")

    model = made(Quantised, weights, bits=4)
    tiny_trainer(max_epochs=1, callbacks=[Writes()]).fit(model, datamodule=Digits())
    unwritten = made(Quantised, weights, bits=4)
    tiny_trainer(max_epochs=1).fit(unwritten, datamodule=Digits())
    assert all(len(channel.unique()) <= 15 for channel in unwritten.net.get_submodule("body.4").weight)
    written = load_classifier(tmp_path / "int4.safetensors").net.get_submodule("body.4").weight
    assert all(len(channel.unique()) <= 15 for channel in written)
    assert torch.equal(written, model.net.get_submodule("body.4").weight)


def test_eight_bits() -> None:
    weight = torch.tensor([[1.27, -0.634, 0.004], [0.0, 0.0, 0.0], [-12.7, 0.06, 0.04]])
    found = rounded(weight)
    assert found.tolist() == [pytest.approx([1.27, -0.63, 0.0]), [0, 0, 0], pytest.approx([-12.7, 0.1, 0.0])]
    torch.manual_seed(0)
    large = torch.randn(5, 4, 3, 3)
    steps = large.abs().flatten(1).amax(1) / 127
    assert ((rounded(large) - large).abs().flatten(1).amax(1) <= steps / 2 + 1e-7).all()
    assert max(len(channel.unique()) for channel in rounded(large, 2)) <= 3
    torch.testing.assert_close(rounded(rounded(large)), rounded(large))


def test_a_quantised_file_is_on_the_grid(weights: str, tmp_path: Path) -> None:
    fitted(made(Quantised, weights), 0).save(tmp_path / "int8.safetensors")
    net, before = load_classifier(tmp_path / "int8.safetensors").net, load_classifier(weights).net
    for layer, old in zip(net.modules(), before.modules(), strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert isinstance(old, nn.Conv2d | nn.Linear)
            assert not torch.equal(layer.weight, old.weight)
            torch.testing.assert_close(layer.weight, rounded(old.weight))


def test_a_median_takes_one_pixel_away() -> None:
    image = torch.full((1, 1, 5, 5), 10, dtype=torch.uint8)
    image[0, 0, 2, 2] = 255
    assert median(image).unique().tolist() == [10]
    image[0, 0, :, 3:] = 200
    assert median(image)[0, 0, 0].tolist() == [10, 10, 10, 200, 200]
    for size in (1, 4, 7):
        with refused(f"size = {size}"):
            median(image, size)


def test_bad_values(weights: str) -> None:
    data = Digits()
    with refused("share = 1"):
        made(Pruned, weights, share=1)
    with refused("bits = 1"):
        made(Quantised, weights, bits=1)
    for kind in (Pruned, Quantised):
        with refused("weights = None"):
            kind(CNN, 10, data.image_shape, data.mean, data.std)
    with refused("backbone", "no convolution"):
        last_convolution(ImageClassifier(partial(MLP, hidden=[4]), 10, data.image_shape, data.mean, data.std))
