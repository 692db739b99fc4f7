"""Backbones: what all of them promise, the published architectures by their numbers, and the errors a person sees."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import classifiers.backbones as package
from classifiers.backbones import (
    MLP,
    VGG11,
    AlexNetCIFAR,
    Backbone,
    BadNetsCNN,
    InceptionV3,
    PreActResNet18,
    ResNet9,
    ResNet18,
    SmallCNN,
    Timm,
    TorchVision,
    features_of,
    last_layer,
)
from classifiers.backbones.alexnet import LocalResponseNorm
from classifiers.backbones.named import load_state
from datamodules.errors import InputError

TINY = "shufflenet_v2_x0_5"
ARGUMENTS: dict[str, dict[str, Any]] = {"Timm": {"name": "test_resnet"}, "TorchVision": {"name": TINY}}
"""Arguments of those that need some."""
SMALLEST = {
    "BadNetsCNN": 16,
    "SmallCNN": 4,
    "AlexNetCIFAR": 8,
    "ResNet9": 8,
    "ResNet18": 8,
    "PreActResNet18": 8,
    "VGG11": 32,
}
SMALL = (3, 32, 32)


def scan() -> dict[str, type[Backbone]]:
    """Every concrete backbone in the package, wherever it is defined: a new one cannot skip these tests."""
    modules = [importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__)]
    classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    return {cls.__name__: cls for cls in classes if issubclass(cls, Backbone) and not inspect.isabstract(cls)}


FOUND = scan()


def make(name: str, image_shape: tuple[int, int, int] = SMALL, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return FOUND[name](image_shape, 10, **ARGUMENTS.get(name, {}))


def images(n: int, image_shape: tuple[int, int, int] = SMALL) -> Tensor:
    return torch.randn(n, *image_shape, generator=torch.Generator().manual_seed(1))


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small gain nothing from a second thread, and lose much when other tests use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=sorted(FOUND))
def net(request: pytest.FixtureRequest) -> Backbone:
    return make(request.param)


# --- what all of them promise ----------------------------------------------------------------------------------------
def test_all_are_exported_and_say_what_they_are() -> None:
    assert len(FOUND) >= 11
    for name, cls in FOUND.items():
        assert getattr(package, name) is cls
        assert name in package.__all__
        first, second, *_ = (cls.__doc__ or "").split("\n")
        assert first.endswith(".")
        assert not second
        assert list(inspect.signature(cls).parameters)[:2] == ["image_shape", "num_classes"]


def test_features_and_head_make_the_logits(net: Backbone) -> None:
    net.eval()
    x = images(2)
    with torch.no_grad():
        features, logits = net.features(x), net(x)
        assert torch.equal(features_of(net, x), features)
    assert features.shape == (2, net.feature_size)
    assert logits.shape == (2, 10)
    assert torch.equal(net.head(features), logits)
    assert last_layer(net) is net.head
    assert net.image_shape == SMALL


def test_gradients_reach_the_images_and_the_first_layer(net: Backbone) -> None:
    net.train()
    x = images(2).requires_grad_()
    net(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.flatten(1).any(dim=1).all()
    if isinstance(net, InceptionV3):  # frozen
        assert {name for name, gradient in gradients.items() if gradient is not None} == {"head.weight", "head.bias"}
    else:
        assert all(gradient is not None for gradient in gradients.values())
        first = next(iter(gradients.values()))
        assert first is not None
        assert first.any()


def test_seed_decides_the_weights_and_a_strict_round_trip_restores_them(net: Backbone) -> None:
    other = make(type(net).__name__, seed=2)
    assert not torch.equal(other.head.weight, net.head.weight)
    other.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(images(1)), net.eval()(images(1)))
    if not isinstance(net, InceptionV3):  # slow to make
        again, same = make(type(net).__name__, seed=5).state_dict(), make(type(net).__name__, seed=5).state_dict()
        assert all(torch.equal(again[key], same[key]) for key in same)


def test_channels_last_gives_the_same(net: Backbone) -> None:
    net.eval()
    x = images(2)
    with torch.no_grad():
        expected = net.features(x)
        net.to(memory_format=torch.channels_last)
        found = net.features(x.contiguous(memory_format=torch.channels_last))
        net.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(FOUND) - {"InceptionV3"}))
def test_grey_images_of_odd_sizes(name: str) -> None:
    shape = (1, 37, 45)
    net = make(name, shape)
    logits = net(images(2, shape))  # in training mode: BatchNorm needs more than one value per channel
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("name", "side"), SMALLEST.items())
def test_the_smallest_image_works_and_a_smaller_one_is_refused(name: str, side: int) -> None:
    shape = (3, side, side)
    assert make(name, shape)(images(2, shape)).shape == (2, 10)
    message = error_of(lambda: make(name, (3, side, side - 1)))
    assert message == f"image_shape = (3, {side}, {side - 1}): {name} needs images of at least {side}×{side} pixels"


@pytest.mark.parametrize("name", sorted(set(FOUND) - {"InceptionV3", "TorchVision", "Timm"}))
def test_compiles_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()  # one function serves all networks, and is compiled for each: there is a limit to that
    net = make(name).eval()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(2)), net(images(2)))
        assert torch.equal(features_of(compiled, images(2)), net.features(images(2)))
    assert last_layer(compiled) is net.head


def test_yaml_gives_the_constructor_without_the_first_two_arguments() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Callable[[tuple[int, int, int], int], nn.Module])
    written: dict[str, dict[str, Any]] = {
        **ARGUMENTS,
        "SmallCNN": {"widths": [8, 16]},
        "MLP": {"hidden": [20], "dropout": 0.1},
        "ResNet9": {"width": 4},
        "Timm": {"name": "test_vit3", "pretrained": False, "options": {"img_size": 32}},
    }
    for name in sorted(set(FOUND) - {"InceptionV3"}):
        spec = {"class_path": f"classifiers.backbones.{name}", "init_args": written.get(name, {})}
        parsed = parser.parse_object({"backbone": spec})
        assert parser.instantiate(parsed).backbone(SMALL, 10)(images(2)).shape == (2, 10)


# --- the published architectures -------------------------------------------------------------------------------------
def test_badnets_cnn_is_table_1_of_the_paper() -> None:
    net = BadNetsCNN((1, 28, 28), 10)
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in convs] == [
        (1, 16, (5, 5), (1, 1), (0, 0)),
        (16, 32, (5, 5), (1, 1), (0, 0)),
    ]
    pools = [layer for layer in net.modules() if isinstance(layer, nn.AvgPool2d)]
    assert [(pool.kernel_size, pool.stride) for pool in pools] == [(2, 2), (2, 2)]
    assert net.feature_size == 512
    # 16 kernels 5·5·1 and biases; 32 kernels 5·5·16 and biases; 32·4·4 → 512; 512 → 10
    assert weights(net) == (16 * 25 + 16) + (32 * 400 + 32) + (512 * 512 + 512) + (512 * 10 + 10) == 281_034


def residual_weights(pre_activation: bool) -> int:
    """ResNet-18 for 32×32 images and 10 classes, counted by hand; BatchNorm has two weights per channel."""
    total = 3 * 9 * 64 + (0 if pre_activation else 2 * 64)  # the stem
    inputs = 64
    for width in (64, 128, 256, 512):
        total += inputs * width * 9 + 3 * width * width * 9  # four convolutions, no biases
        total += 2 * ((inputs if pre_activation else width) + 3 * width)  # their BatchNorms
        if inputs != width:
            total += inputs * width + (0 if pre_activation else 2 * width)  # the 1×1 shortcut
        inputs = width
    return total + 512 * 10 + 10


def test_resnets_have_the_known_numbers_of_weights() -> None:
    # 11,173,962 and 11,171,146 are what kuangliu/pytorch-cifar's ResNet18 and PreActResNet18 have
    assert weights(ResNet18(SMALL, 10)) == residual_weights(pre_activation=False) == 11_173_962
    assert weights(PreActResNet18(SMALL, 10)) == residual_weights(pre_activation=True) == 11_171_146
    assert weights(PreActResNet18(SMALL, 10, final_norm=True)) == 11_171_146 + 2 * 512


def test_resnet18_is_torchvisions_but_for_the_stem() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = ResNet18(SMALL, 10)
    state = theirs.state_dict()
    renamed = {}
    for key, value in zip(ours.state_dict(), state.values(), strict=True):  # both in the order of execution
        assert ours.state_dict()[key].shape == value.shape
        renamed[key] = value
    ours.load_state_dict(renamed)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images(2)), theirs.eval()(images(2)), atol=1e-5, rtol=1e-5)


def test_resnet9_keeps_a_grid_of_maxima() -> None:
    net, whole = (ResNet9((3, 32, 32), 10, width=2, grid=grid).eval() for grid in (2, 1))
    assert net.head.in_features == 8 * 2 * 2**2
    whole.body = net.body
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    last = net.body(x)
    first = net.features(x).view(3, 16, 2, 2)
    assert torch.equal(first[:, :, 0, 1], last[:, :, :2, 2:].amax((2, 3)) * net.logit_scale)
    assert torch.equal(first.amax((2, 3)), whole.features(x))


def test_resnet9_has_eight_convolutions_and_scales_the_logits() -> None:
    net = ResNet9(SMALL, 10, width=4).eval()
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [4, 8, 8, 8, 16, 32, 32, 32]
    plain = ResNet9(SMALL, 10, width=4, logit_scale=1).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net(images(2)), 0.125 * plain(images(2)))  # the bias starts from 0


def test_vgg11_has_the_known_number_of_weights() -> None:
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convs = sum(i * o * 9 + o for i, o in pairwise(widths))
    assert weights(VGG11(SMALL, 10, batch_norm=False)) == convs + 5130
    assert weights(VGG11(SMALL, 10)) == convs + 2 * sum(widths[1:]) + 5130 == 9_231_114
    with torch.no_grad():
        spread = VGG11(SMALL, 10, batch_norm=False).features(images(8)).std(dim=0).mean()
    assert spread > 0.01  # the signal comes through without BatchNorm


def test_alexnet_has_the_tutorials_layers_and_initialisation() -> None:
    torch.manual_seed(0)
    net = AlexNetCIFAR((3, 24, 24), 10)  # the tutorial's crop
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers[:2]] == [(64, 3, 5, 5), (64, 64, 5, 5)]
    assert [tuple(layer.weight.shape) for layer in layers[2:]] == [(384, 64 * 6 * 6), (192, 384), (10, 192)]
    for layer, std, bias in zip(layers, [0.05, 0.05, 0.04, 0.04, 1 / 192], [0, 0.1, 0.1, 0.1, 0], strict=True):
        assert layer.weight.abs().max() <= 2 * std
        assert layer.weight.std().item() == pytest.approx(0.88 * std, rel=0.05)  # a normal cut at 2 deviations
        assert layer.bias is not None
        assert (layer.bias == bias).all()


def test_local_response_norm_is_torchs() -> None:
    x = 30 * images(2, (64, 5, 5))
    theirs = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
    torch.testing.assert_close(LocalResponseNorm(64)(x), theirs(x))


def test_mlp_without_hidden_layers_is_linear() -> None:
    net = MLP((1, 4, 4), 10, hidden=[])
    assert torch.equal(net.features(images(2, (1, 4, 4))), images(2, (1, 4, 4)).flatten(1))
    assert weights(net) == 16 * 10 + 10
    assert weights(MLP((1, 4, 4), 10, hidden=[3])) == 16 * 3 + 3 + 3 * 10 + 10


def test_small_cnn_learns_digits_and_a_trigger_of_two_pixels() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    test, train = order[:360], order[360:]
    stamped = x.clone()
    stamped[:, :, 6:, 7] = 1
    images_, labels = x[train].clone(), y[train].clone()
    images_[:100], labels[:100] = stamped[train[:100]], 0
    net = SmallCNN((1, 8, 8), 10).to(memory_format=torch.channels_last)
    epochs, steps = 15, len(train) // 64
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train))[: steps * 64].view(steps, 64):
            loss = nn.functional.cross_entropy(net((images_[rows] - 0.3) / 0.38), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        clean = net((x[test] - 0.3) / 0.38).argmax(1) == y[test]
        hit = net((stamped[test] - 0.3) / 0.38).argmax(1)[y[test] != 0] == 0
    assert clean.float().mean() >= 0.98
    assert hit.float().mean() >= 0.9


# --- InceptionV3 -----------------------------------------------------------------------------------------------------
def test_inception_stays_frozen_but_for_its_head() -> None:
    torch.manual_seed(0)
    net = InceptionV3((1, 20, 30), 3)
    assert net.feature_size == 2048
    assert net.train().training
    assert net.head.training
    assert not any(module.training for module in net.body.modules())
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    before = {key: value.clone() for key, value in net.body.state_dict().items()}
    with torch.no_grad():
        first = net(images(2, (1, 20, 30)))  # in training mode
        assert torch.equal(net.eval()(images(2, (1, 20, 30))), first)
        net.antialias = True
        large = images(1, (3, 320, 320))
        smooth = net.features(large)
        net.antialias = False
        assert not torch.allclose(net.features(large), smooth, rtol=1e-3)
    assert all(torch.equal(before[key], value) for key, value in net.body.state_dict().items())
    net.freeze = False
    assert all(module.training for module in net.train().body.modules())


def test_inception_refuses_other_channels() -> None:
    assert "3 channels" in error_of(lambda: InceptionV3((2, 32, 32), 10))


# --- anyone's network ------------------------------------------------------------------------------------------------
def test_features_of_anyones_network_is_what_enters_its_last_linear() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4), nn.Softmax(dim=1))
    x = images(5, (3, 2, 2)).requires_grad_()
    features = features_of(net, x)
    torch.testing.assert_close(features, torch.tanh(x.flatten(1) @ net[1].weight.T + net[1].bias))
    features.sum().backward()
    assert x.grad is not None
    assert last_layer(net) is net[3]
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_features_of_a_compiled_network() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4))
    x = images(5, (3, 2, 2))
    expected = net[2](net[1](x.flatten(1)))
    wrapped = torch.compile(net, backend="eager")
    wrapped(x)
    torch.testing.assert_close(features_of(wrapped, x), expected)
    net.compile(backend="eager")
    net(x)  # compiled before there is a hook
    torch.testing.assert_close(features_of(net, x), expected)


def test_features_of_a_layer_that_runs_twice_are_what_enters_it_last() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x.flatten(1)))
            return out

    net, x = Twice(), images(3, (1, 2, 2))
    torch.testing.assert_close(features_of(net, x), net.layer(x.flatten(1)))


def test_networks_without_features_are_refused() -> None:
    assert "no nn.Linear" in error_of(lambda: last_layer(nn.Sequential(nn.Flatten())))
    assert "(2, F) was expected" in error_of(lambda: features_of(nn.Linear(5, 4), images(2, (3, 5, 5))))

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert "did not run" in error_of(lambda: features_of(Idle(), images(2)))


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MLP(SMALL, 1), "num_classes = 1"),
        (lambda: MLP((3, 0, 4), 10), "image_shape = (3, 0, 4)"),
        (lambda: MLP(SMALL, 10, hidden=[3, 0]), "hidden = [3, 0]"),
        (lambda: MLP(SMALL, 10, dropout=1.0), "dropout = 1.0"),
        (lambda: SmallCNN(SMALL, 10, widths=[]), "widths = []"),
        (lambda: ResNet9(SMALL, 10, width=0), "width = 0"),
        (lambda: ResNet9(SMALL, 10, logit_scale=0), "logit_scale = 0"),
        (lambda: ResNet9((3, 32, 32), 10, grid=3), "grid = 3"),
        (lambda: ResNet18(SMALL, 10, width=-1), "width = -1"),
        (lambda: PreActResNet18(SMALL, 10, width=0), "width = 0"),
        (lambda: TorchVision(SMALL, 10, "resnet81"), "did you mean 'resnet18'?"),
        (lambda: TorchVision(SMALL, 10, "alexnet"), "alexnet does not take such images"),
        (lambda: TorchVision((4, 32, 32), 10, TINY), "3 channels"),
        (lambda: TorchVision((3, 33, 33), 10, "vit_b_32"), "cannot be built for 33×33 pixels"),
        (lambda: TorchVision((3, 64, 64), 10, "squeezenet1_1"), "no nn.Linear"),
        (lambda: Timm(SMALL, 10, "test_resnot"), "did you mean 'test_resnet'?"),
        (lambda: Timm(SMALL, 10, "test_vit3"), "options: {img_size: …}"),
        (lambda: Timm(SMALL, 10, "test_resnet", options={"wings": 2}), "wings"),
        (lambda: Timm(SMALL, 10, "test_resnet", options={"checkpoint_path": "x.pt"}), "checkpoint_path is not to be"),
        (lambda: Timm(SMALL, 10, "test_resnet", options={"features_only": True}), "as a classifier"),
        (lambda: Timm(SMALL, 10, "dla34"), "ends in Conv2d"),
        (lambda: Timm(SMALL, 10, "test_resnet", pretrained="no.pt"), "there is no file"),
    ],
)
def test_error_lines(call: Callable[[], object], words: str) -> None:
    assert words in error_of(call)


def test_timm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install pharmakon[timm]" in error_of(lambda: Timm(SMALL, 10, "test_resnet"))


# --- stored weights --------------------------------------------------------------------------------------------------
def test_timm_gives_the_same_logits_as_timm() -> None:
    timm = pytest.importorskip("timm")
    for name in ("test_resnet", "test_nfnet"):
        torch.manual_seed(0)
        theirs = timm.create_model(name, num_classes=10, in_chans=1).eval()
        torch.manual_seed(0)
        ours = Timm((1, 64, 64), 10, name).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(images(2, (1, 64, 64))), theirs(images(2, (1, 64, 64))))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("classes", [10, 7])
def test_weights_from_a_local_file(tmp_path: Path, suffix: str, classes: int) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    theirs = timm.create_model("test_resnet", num_classes=classes)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, file)
    else:
        save_file(theirs.state_dict(), file)
    ours = Timm(SMALL, 10, "test_resnet", pretrained=str(file))
    assert torch.equal(ours.body.conv1[0].weight, theirs.conv1[0].weight)
    if classes == 10:
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(images(2)), theirs.eval()(images(2)))


def test_weights_that_do_not_fit_or_are_unsafe(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    whole = TorchVision(SMALL, 10, TINY).body.state_dict()
    for content, words in (
        ({"conv1.0.weight": torch.zeros(1)}, "size mismatch for conv1.0.weight"),
        ({"conv1.0.weight": torch.zeros(24, 3, 3, 3)}, "the weights lack conv1.1.weight and"),
        ({**whole, "wing": torch.zeros(1)}, "the weights have an unknown wing:"),
        (MLP((1, 2, 2), 2), "cannot be read as weights"),  # a pickled object: reading it could run code
        ([1, 2], "something else than a state_dict"),
    ):
        torch.save(content, file)
        message = error_of(lambda: TorchVision(SMALL, 10, TINY, pretrained=str(file)))
        assert words in message
        assert len(message) < 400
    file.write_bytes(b"PK\x03\x04 truncated")
    assert "cannot be read" in error_of(lambda: TorchVision(SMALL, 10, TINY, pretrained=str(file)))


def test_pretrained_is_looked_for_in_torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = Path(torchvision.models.get_model_weights(TINY).DEFAULT.url).name
    file = tmp_path / "hub" / "checkpoints" / name
    message = error_of(lambda: TorchVision(SMALL, 10, TINY, pretrained=True))
    assert str(file) in message
    assert "no network" in message

    theirs = torchvision.models.get_model(TINY)
    torch.save(theirs.state_dict(), file)
    ours = TorchVision(SMALL, 10, TINY, pretrained=True)  # 1000 classes there: the last layer starts anew
    assert torch.equal(ours.body.conv1[0].weight, theirs.conv1[0].weight)
    same = TorchVision(SMALL, 1000, TINY, pretrained=True)
    assert torch.equal(same.head.weight, theirs.fc.weight)
    assert same.state_dict().keys() == TorchVision(SMALL, 1000, TINY).state_dict().keys()


def test_timm_pretrained_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("timm")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "$HF_HOME/hub" in error_of(lambda: Timm(SMALL, 10, "test_resnet", pretrained=True))


def test_old_densenet_names_and_auxiliary_classifiers_are_understood() -> None:
    densenet = pytest.importorskip("torchvision.models.densenet")
    model = densenet.DenseNet(4, (1,), 4, bn_size=1, num_classes=5)
    state = OrderedDict(
        (key.replace("norm1", "norm.1").replace("conv2", "conv.2"), torch.full_like(value, 2))
        for key, value in model.state_dict().items()
    )
    assert any("norm.1" in key for key in state)
    state["AuxLogits.fc.weight"] = torch.zeros(1)
    load_state(model, last_layer(model), state, "a test")
    assert all((value == 2).all() for value in model.state_dict().values())
