"""Resized: the images, boxes and measures of another size."""

from __future__ import annotations

import pytest
import torch

from datamodules.classes import Classes
from datamodules.errors import InputError
from datamodules.imageset import Batch, ImageSet
from datamodules.resized import Resized, ResizedImages, resize
from datamodules.sources.digits import Digits
from datamodules.triggers import PixelPattern
from poisoning.badnets import BadNets


def noise(n: int, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    private = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, *size), generator=private, dtype=torch.uint8)


def test_bicubic_rounded_and_each_image_by_itself() -> None:
    images = noise(300)
    found = resize(images, 20)
    real = torch.nn.functional.interpolate(images[:5].double(), (20, 20), mode="bicubic", align_corners=False)
    assert found.dtype == torch.uint8
    assert float((found[:5].double() - real.clamp(0, 255)).abs().max()) <= 0.5 + 1e-3
    assert float(real.max()) > 260  # bicubic overshoots, and a byte must not wrap round
    assert torch.equal(resize(images[7:8], 20), found[7:8])
    assert torch.equal(resize(images, 8), images)
    flat = torch.full((1, 1, 9, 9), 77, dtype=torch.uint8)
    for size in (3, 9, 31):
        assert resize(flat, size).unique().tolist() == [77]
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(1, 1, 64, 64)
    middle = resize(stripes, 8)[..., 1:-1].float()
    assert 110 < float(middle.min()) <= float(middle.max()) < 145  # smoothed, not every eighth column
    assert resize(images[:0], 20).shape == (0, 3, 20, 20)


def test_boxes_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 8.0]]).expand(4, -1)
    base = ImageSet(
        noise(4, (8, 16)), torch.arange(4), torch.arange(10, 14), {"boxes": boxes, "other": torch.arange(4)}
    )
    large = ResizedImages(base, 32)
    assert large.image_shape == (3, 32, 32)
    assert large.extras_at(torch.tensor([2]))["boxes"].tolist() == [[2.0, 8.0, 10.0, 32.0]]
    assert large.extras_at(torch.tensor([2]))["other"].tolist() == [2]
    rows = torch.tensor([3, 1])
    kept = large.__getitems__(rows)
    monkeypatch.setattr("datamodules.resized.KEPT", 100)
    assert torch.equal(ResizedImages(base, 32).images_at(rows), kept.images)  # too many to keep: the same
    assert kept.ids.tolist() == [13, 11]
    assert torch.equal(large.select(rows).images_at(torch.tensor([0])), kept.images[:1])
    assert len({base.digest(), large.digest(), ResizedImages(base, 33).digest()}) == 3
    assert ResizedImages(base, 32).to("cpu").digest() == large.digest()


def test_classes_and_attacks_go_round_it() -> None:
    inner = Resized(Digits(), 16)
    data = Classes(inner, [3, 5], 20)
    attack = BadNets(data, PixelPattern(), target_label=0, poison_fraction=0.5)
    attack.setup()
    assert attack.image_shape == (1, 16, 16)
    assert attack.test_set.images_at(torch.tensor([0])).shape == (1, 1, 16, 16)
    assert {each.images.image_shape for each in attack.evaluations("test")} == {(1, 16, 16)}
    plain = Classes(Digits(), [3, 5], 20)
    plain.setup()
    assert torch.equal(data.train_set.ids, plain.train_set.ids)
    rows = torch.arange(10)
    assert torch.equal(data.train_set.images_at(rows), resize(plain.train_set.images_at(rows), 16))
    assert data.facts()["image_size"] == 16


def test_round_an_attack_it_shows_what_was_made_of_small_images() -> None:
    attack = BadNets(Digits(), PixelPattern(), poison_fraction=0.1)
    data = Resized(attack, 12)
    data.setup()
    for mine, theirs in zip(data.evaluations("test"), attack.evaluations("test"), strict=True):
        rows = torch.arange(3)
        assert torch.equal(mine.images.images_at(rows), resize(theirs.images.images_at(rows), 12))
        assert [measure.name for measure in mine.measures] == [measure.name for measure in theirs.measures]
    late = Resized(BadNets(Digits(), PixelPattern(), poison_fraction=0.5, placement="after"), 12)
    late.setup()
    batch = late.train_set.__getitems__(torch.arange(len(late.train_set)))
    with pytest.raises(InputError, match="put Resized inside BadNets"):
        late.rewrite_batch(Batch(*batch))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, "size = 0"),
        ({"size": 9, "mean": [0.5, 0.5]}, "mean = .*give 1 numbers"),
        ({"size": 9, "mean": [127.0]}, "mean = .*in \\[0, 1\\]"),
        ({"size": 9, "std": [0.0]}, "std = .*above 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Resized(Digits(), **options)  # type: ignore[arg-type]
