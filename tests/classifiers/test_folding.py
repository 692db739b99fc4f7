"""Folding: what is merged, what is not, and that it answers the same."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from classifiers.backbones import ResNet9, Timm
from classifiers.classifier import ImageClassifier
from classifiers.folding import folded, folded_classifier
from classifiers.weights import content_hash


def lived(network: nn.Module, shape: tuple[int, ...] = (3, 16, 16)) -> nn.Module:
    """The network with BatchNorm statistics and scales that matter."""
    private = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                assert values is not None
                values.data.normal_(1, 0.3, generator=private)
            assert module.running_var is not None
            module.running_var.uniform_(0.2, 3, generator=private)
    return network


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Forked(nn.Module):
    """What the convolution gives goes to BatchNorm and round it: nothing can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return torch.cat([y, self.norm(y)], 1)


class Shared(nn.Module):
    """One convolution before two BatchNorm layers, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(self.convolution(self.one(self.convolution(x))))
        return found


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: ResNet9((3, 16, 16), 10, width=4), 0),
        (lambda: Timm((3, 16, 16), 10, "test_efficientnet"), 0),  # its BatchNorm holds its activation
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 2),
        (Forked, 1),
        (Shared, 2),
    ],
    ids=["ResNet9", "timm", "not next to each other", "forked", "shared"],
)
def test_the_same_answers_with_fewer_layers(make: partial[nn.Module], left: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = lived(make())
    before = content_hash(network.state_dict())
    x, other = images(4, 3, 16, 16), 2 * images(3, 3, 16, 16) - 1
    found = folded(network, x)
    assert network.training
    assert content_hash(network.state_dict()) == before
    assert all(each.requires_grad for each in network.parameters())
    assert norms(found) == left < max(norms(network), left + 1)
    assert not found.training
    assert not any(each.requires_grad for each in found.parameters())
    plain = copy.deepcopy(network).eval()
    torch.testing.assert_close(found(other), plain(other), rtol=1e-4, atol=1e-4)
    gradients = []
    for module in (found, plain):
        pixels = other.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(pixels).square().sum(), pixels)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


def test_a_classifier_folds_its_network_and_keeps_its_own() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = ImageClassifier(partial(ResNet9, width=4), 10, (3, 16, 16), [0.4] * 3, [0.3] * 3)
    lived(model.net)
    model.eval()
    swift = folded_classifier(model)
    x = images(4, 3, 16, 16)
    assert norms(model.net) > norms(swift.net) == 0
    with torch.no_grad():
        torch.testing.assert_close(swift.features(x), model.features(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(swift(x), model(x), rtol=1e-4, atol=1e-4)
