"""MarginBased: the ascent stays in its ball and goes up, and triggers end with a margin."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from classifiers.backbones import MLP
from datamodules.sources.digits import Digits
from tests.helpers import refused, tiny_trainer
from watermark.keys import MarkingKey, keygen
from watermark.margin_based import MarginBased, ascend
from watermark.trigger_set import TriggerSet
from watermark.watermarked import Watermarked


def test_the_ascent_by_hand() -> None:
    """Logits (x, −x) for label 0: the loss falls with x, so that every view goes down, to the edge of its ball."""

    def logits(x: Tensor) -> Tensor:
        value = x.flatten(1).sum(1, keepdim=True)
        return torch.cat([value, -value], 1)

    images = torch.tensor([0.5, 0.05]).view(2, 1, 1, 1)
    start = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    labels = torch.zeros(2, dtype=torch.int64)
    found = ascend(logits, images, labels, start, radius=0.1, steps=5)
    assert found.flatten().tolist() == pytest.approx([0.4, 0.0])  # the second at the end of a pixel's range
    other = ascend(logits, images, 1 - labels, start, radius=0.1, steps=5)
    assert other.flatten().tolist() == pytest.approx([0.6, 0.15])
    one = ascend(logits, images, labels, start, radius=0.1, steps=1)
    assert one.flatten().tolist() == pytest.approx([0.4, 0.0])
    assert not found.requires_grad


def margin(model: Watermarked, key: MarkingKey, radius: float) -> float:
    """Of the views that the model likes least, the share with the key's label."""
    images, labels = torch.from_numpy(key.images()).float() / 255, torch.tensor(key.labels())
    model.eval()
    views = ascend(model, images, labels, torch.zeros_like(images), radius, 10)
    return float((model(views).argmax(1) == labels).float().mean())


def test_triggers_get_a_margin(tmp_path: Path) -> None:
    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8), n=20)
    key, found = MarkingKey.read(tmp_path / "key"), []
    for kind, more in ((Watermarked, {}), (MarginBased, {"radius": 0.15, "views": 2})):
        data = Digits(seed=0)
        torch.manual_seed(0)
        optimizer = partial(torch.optim.Adam, lr=3e-3)
        model = kind(partial(MLP, hidden=[64]), 10, data.image_shape, data.mean, data.std, optimizer=optimizer, **more)  # type: ignore[operator]
        tiny_trainer(max_epochs=12).fit(model, TriggerSet(data, str(tmp_path / "key"), per_batch=4))
        found.append(margin(model, key, 0.15))
    plain, wide = found
    assert wide > plain + 0.3


def test_bad_values() -> None:
    data = Digits()
    make = partial(MarginBased, partial(MLP, hidden=[4]), 10, data.image_shape, data.mean, data.std)
    for field, value in (("radius", 0), ("radius", 1.5), ("steps", 0), ("views", 0), ("margin_weight", -1)):
        with refused(f"{field} = {value}"):
            make(**{field: value})


def test_it_needs_triggers_outermost(tmp_path: Path) -> None:
    from datamodules.share import Share

    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8), n=20)
    data = Digits()
    model = MarginBased(partial(MLP, hidden=[4]), 10, data.image_shape, data.mean, data.std)
    with refused("TriggerSet", "outermost"):
        tiny_trainer(max_epochs=1).fit(model, Share(TriggerSet(data, str(tmp_path / "key")), 0.5))


def test_without_a_radius_views_are_the_triggers() -> None:
    images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    weight = torch.randn(4, 2)
    views = ascend(lambda x: x.flatten(1) @ weight, images, labels, torch.rand_like(images), 1e-9, 3)
    torch.testing.assert_close(views, images, atol=1e-6, rtol=0)
    assert F.cross_entropy(views.flatten(1) @ weight, labels).isfinite()
