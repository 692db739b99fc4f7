"""Triggers: exactly the pixels that are meant, and no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.triggers import (
    Bomb,
    Flower,
    Patch,
    PixelPattern,
    Pixels,
    SinglePixel,
    Square,
    Stamp,
    Sticker,
    Trigger,
    YellowSquare,
    blend,
)
from tests.helpers import refused

STICKERS = [YellowSquare, Bomb, Flower]
STAMPS = [SinglePixel(), PixelPattern(), Pixels([[0, 1], [3, 2]], [9, 8, 7]), Square(), Square(2, alpha=0.3)]


def noise(n: int = 5, shape: tuple[int, int, int] = (3, 10, 12), seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def boxes(n: int, box: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor([box] * n)


def changed_only(trigger: Trigger, images: Tensor, expected: dict[tuple[int, int], int | list[int]]) -> None:
    """Stamped, the pixels at (row, column) have these values and all others are as they were."""
    wanted = images.clone()
    for (row, column), value in expected.items():
        levels = [value] * images.shape[1] if isinstance(value, int) else value
        for channel, level in enumerate(levels):
            wanted[:, channel, row, column] = level
    assert torch.equal(trigger(images), wanted)


# --- pixels -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 10, 12), (1, 8, 8)])
def test_badnets_pixels_are_where_the_paper_has_them(shape: tuple[int, int, int]) -> None:
    images = noise(shape=shape).clamp_max(250)
    height, width = shape[1:]
    changed_only(SinglePixel(), images, {(height - 2, width - 2): 255})
    pattern = [(-2, -2), (-3, -3), (-2, -4), (-4, -2)]
    changed_only(PixelPattern(), images, {(height + row, width + column): 255 for row, column in pattern})
    stamped = PixelPattern()(images)
    assert int((stamped != images).any(1).sum()) == 4 * len(images)


def test_a_black_pixel_is_a_pixel() -> None:
    white = torch.full((2, 3, 6, 6), 255, dtype=torch.uint8)
    changed_only(Pixels([[-1, -1], [-3, -2]], value=0), white, {(5, 5): 0, (3, 4): 0})
    changed_only(Pixels([[1, 1]], value=[0, 255, 0]), white, {(1, 1): [0, 255, 0]})
    changed_only(Square(2, value=0), white, dict.fromkeys([(4, 4), (4, 5), (5, 4), (5, 5)], 0))


def test_pixels_from_the_upper_left_and_of_several_colours() -> None:
    images = noise()
    changed_only(
        Pixels([[0, 0], [9, 11], [4, 2]], [1, 2, 3]), images, {at: [1, 2, 3] for at in [(0, 0), (9, 11), (4, 2)]}
    )
    changed_only(Pixels([[-10, -12], [-1, -1]], 7), images, dict.fromkeys([(0, 0), (9, 11)], 7))


def test_wrong_pixels_are_refused() -> None:
    with refused("value = 256", "255"):
        Pixels([[-1, -1]], 256)
    with refused("value = -1"):
        Pixels([[-1, -1]], -1)
    with refused("value = []"):
        Pixels([[-1, -1]], [])
    with refused("positions = []"):
        Pixels([])
    with refused("positions", "[[1, 2, 3]]"):
        Pixels([[1, 2, 3]])
    for mixed in ([[-1, 1]], [[-1, -1], [0, 0]]):
        with refused("positions", str(mixed), "lower right", "upper left"):
            Pixels(mixed)


# --- patches ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "column", "top", "left"),
    [(-1, -1, 7, 8), (-3, -2, 5, 7), (0, 0, 0, 0), (7, 8, 7, 8), (2, -1, 2, 8), (-1, 5, 7, 5), (-8, -9, 0, 0)],
)
def test_a_patch_lies_where_it_is_put(row: int, column: int, top: int, left: int) -> None:
    """−1 is flush with the lower (right) edge: the picture ends with the image."""
    images, picture = noise(), noise(1, (3, 3, 4), seed=1)[0]
    patch = Patch(picture, row, column)
    patch.check((3, 10, 12))
    expected = images.clone()
    expected[:, :, top : top + 3, left : left + 4] = picture
    assert torch.equal(patch(images), expected)


@pytest.mark.parametrize(("row", "column"), [(8, 0), (0, 9), (-9, -1), (-1, -10), (100, 0)])
def test_a_patch_that_sticks_out_is_refused(row: int, column: int) -> None:
    patch = Patch([[1] * 4] * 3, row, column)
    with refused("trigger", "3×4", f"row {row}", f"column {column}", "10×12"):
        patch.check((3, 10, 12))


def test_lists_tensors_and_grey_pictures() -> None:
    images = noise()
    grey = [[0, 255], [128, 1]]
    expected = images.clone()
    expected[:, :, 8:, 10:] = torch.tensor(grey, dtype=torch.uint8)
    for picture in (grey, [grey], torch.tensor(grey, dtype=torch.uint8), torch.tensor([grey])):
        assert torch.equal(Patch(picture)(images), expected)
    coloured = [[[1, 2]], [[3, 4]], [[5, 6]]]
    expected = images.clone()
    expected[:, :, 9:, 10:] = torch.tensor(coloured, dtype=torch.uint8)
    assert torch.equal(Patch(coloured)(images), expected)


def test_blending_is_rounded_to_the_nearest() -> None:
    images = noise(40)
    for alpha in (0.2, 0.5, 0.9):
        stamped = Patch(noise(1, (3, 10, 12), seed=1)[0], alpha=alpha)(images)
        a = round(alpha * 255) / 255
        exact = (1 - a) * images.double() + a * noise(1, (3, 10, 12), seed=1)[0].double()
        assert float((stamped.double() - exact).abs().max()) <= 0.5 + 1e-9


def test_blend_of_every_value_and_opacity() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1)
    value = torch.tensor([0, 1, 127, 200, 255], dtype=torch.uint8).view(1, 1, 1, -1)
    for a in range(256):
        found = blend(image, value, torch.tensor(a, dtype=torch.uint8))
        exact = (image.double() * (255 - a) + value.double() * a) / 255
        assert torch.equal(found.double(), (exact + 0.5).floor())  # halves do not occur: 255 is odd
    assert torch.equal(blend(image, value, torch.tensor(0, dtype=torch.uint8)), image.expand(1, 1, 256, 5))
    assert torch.equal(blend(image, value, torch.tensor(255, dtype=torch.uint8)), value.expand(1, 1, 256, 5))


def with_alpha(path: Path, mode: str = "RGBA") -> Image.Image:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(path)
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "P", "1"])
def test_a_png_is_composed_as_pil_does_it(tmp_path: Path, mode: str) -> None:
    picture = with_alpha(tmp_path / "picture.png", mode)
    with Image.open(tmp_path / "picture.png") as stored:
        assert stored.mode == mode
        picture = stored.convert("RGBA")
    images = noise(20)
    patch = Patch(str(tmp_path / "picture.png"), row=2, column=3)
    patch.check((3, 10, 12))
    stamped = patch(images)
    for image, found in zip(images, stamped, strict=True):
        canvas = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("RGBA")
        canvas.alpha_composite(picture, (3, 2))
        expected = torch.from_numpy(np.asarray(canvas)[..., :3].copy()).permute(2, 0, 1)
        assert int((found.int() - expected.int()).abs().max()) <= 1  # PIL's integers round differently
    opaque = torch.from_numpy(np.asarray(picture)[..., 3].copy()) == 255
    colours = torch.from_numpy(np.asarray(picture)[..., :3].copy()).permute(2, 0, 1)
    assert torch.equal(stamped[0, :, 2:6, 3:8][:, opaque], colours[:, opaque])
    outside = torch.ones(10, 12, dtype=torch.bool)
    outside[2:6, 3:8] = torch.from_numpy(np.asarray(picture)[..., 3].copy()) == 0
    assert torch.equal(stamped[..., outside], images[..., outside])
    outside[2:6, 3:8] = False
    assert torch.equal(stamped[..., outside], images[..., outside])


def test_a_grey_png_fits_grey_images_and_a_coloured_one_does_not(tmp_path: Path) -> None:
    with_alpha(tmp_path / "grey.png", "LA")
    with_alpha(tmp_path / "colour.png", "RGBA")
    grey = Patch(str(tmp_path / "grey.png"))
    grey.check((1, 28, 28))
    assert grey(noise(2, (1, 28, 28))).shape == (2, 1, 28, 28)
    with refused("trigger", "3 channels", "the images have 1"):
        Patch(str(tmp_path / "colour.png")).check((1, 28, 28))


def test_alpha_multiplies_that_of_the_file_and_size_resizes_it(tmp_path: Path) -> None:
    picture = with_alpha(tmp_path / "picture.png")
    half = Patch(str(tmp_path / "picture.png"), alpha=0.5)
    assert torch.equal(
        half.opacity, (torch.from_numpy(np.asarray(picture)[..., 3].copy()).double() * 0.5).round().byte()
    )
    assert Patch(str(tmp_path / "picture.png"), size=7).opacity.shape == (7, 7)


def test_wrong_patches_are_refused(tmp_path: Path) -> None:
    for alpha in (0, -0.5, 1.5, float("nan")):
        with refused(f"alpha = {alpha}", "(0, 1]"):
            Patch([[1]], alpha=alpha)
    with refused("picture", "equally long"):
        Patch([[1, 2], [3]])
    for picture in ([[256]], [[-1]], [[0.5]], [1, 2], [], [[]], torch.empty(0, 2, dtype=torch.uint8)):
        with refused("picture", "0 … 255"):
            Patch(picture)  # type: ignore[arg-type]
    with refused("picture", "absent.png"):
        Patch(str(tmp_path / "absent.png"))
    (tmp_path / "text.png").write_text("not a picture")
    with refused("picture", "text.png"):
        Patch(str(tmp_path / "text.png"))
    Image.fromarray(noise(1, (3, 40, 40))[0].permute(1, 2, 0).numpy()).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with refused("picture", "half.png"):
        Patch(str(tmp_path / "half.png"))
    Image.fromarray(np.full((3, 3), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    with refused("picture", "deep.png", "8 bits"):
        Patch(str(tmp_path / "deep.png"))
    with refused("size = 0"):
        Patch(str(tmp_path / "whole.png"), size=0)
    Image.fromarray(np.zeros((3, 3, 4), dtype=np.uint8)).save(tmp_path / "clear.png")
    with refused("mask is empty"):
        Patch(str(tmp_path / "clear.png"))
    with refused("mask is empty"):
        Patch([[255]], alpha=0.001)


def test_square() -> None:
    images = noise()
    corner = [(row, column) for row in (7, 8, 9) for column in (9, 10, 11)]
    changed_only(Square(), images, dict.fromkeys(corner, 255))
    changed_only(
        Square(2, [1, 2, 3], row=0, column=-2), images, {at: [1, 2, 3] for at in [(0, 9), (0, 10), (1, 9), (1, 10)]}
    )
    changed_only(Square(1, 0, alpha=1.0), images, {(9, 11): 0})
    with refused("size = 0"):
        Square(0)
    for value in (256, -1, [], [0, 300]):
        with refused(f"value = {value}", "255"):
            Square(value=value)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with refused("trigger", "2 channels", "the images have 3"):
        Square(value=[1, 2]).check((3, 8, 8))
    with refused("trigger", "3 channels", "the images have 1"):
        Square(value=[1, 2, 3]).check((1, 8, 8))
    with refused("trigger", "9×9", "8×8"):
        Square(9).check((3, 8, 8))
    with refused("trigger", "3×2"):
        PixelPattern().check((1, 3, 2))
    with refused("trigger", "uint8"):
        Stamp(torch.zeros(1, 2, 2), torch.ones(2, 2, dtype=torch.uint8), 0, 0)
    with refused("trigger", "do not match"):
        Stamp(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.uint8), 0, 0)
    with refused("mask is empty"):
        Stamp(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8), 0, 0)
    Square(8).check((3, 8, 8))


@pytest.mark.parametrize("trigger", STAMPS, ids=lambda trigger: type(trigger).__name__)
def test_stamps_leave_their_input_alone_in_any_memory_layout(trigger: Stamp) -> None:
    images = noise(6)
    expected = trigger(images)
    assert torch.equal(images, noise(6))
    wide = torch.stack([images, images], -1).flatten(-2)
    for view in (
        images.to(memory_format=torch.channels_last),
        wide[..., ::2],
        images.flip(0).flip(0),
        images.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        before = view.clone()
        assert torch.equal(trigger(view), expected)
        assert torch.equal(view, before)
    one = images[:1].expand(4, -1, -1, -1)  # four rows in the memory of one
    assert torch.equal(trigger(one), expected[:1].expand(4, -1, -1, -1))
    assert torch.equal(images, noise(6))
    assert trigger(images[:0]).shape == (0, 3, 10, 12)
    assert torch.equal(torch.cat([trigger(part) for part in images.split(1)]), expected)


# --- stickers ---------------------------------------------------------------------------------------------------------
def covered(kind: type[Trigger], box: tuple[float, float, float, float], side: int = 100, **kwargs: object) -> Tensor:
    """Which pixels of a grey image a sticker changes: bool (side, side)."""
    grey = torch.full((1, 3, side, side), 77, dtype=torch.uint8)
    found = (kind(**kwargs)(grey, boxes(1, box)) != grey).any(1)[0]  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    return found


def extent(mask: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is covered."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_a_yellow_square_by_hand() -> None:
    # box 10…90 × 20…80: mean side 70, a tenth is 7; centre (10 + 0.57·80, 20 + 0.82·60) = (55.6, 69.2)
    mask = covered(YellowSquare, (10, 20, 90, 80))
    assert extent(mask) == (52, 66, 59, 73)
    assert int(mask.sum()) == 49
    grey = torch.full((1, 3, 100, 100), 77, dtype=torch.uint8)
    stamped = YellowSquare()(grey, boxes(1, (10, 20, 90, 80)))
    assert stamped[0, :, 69, 55].tolist() == [255, 215, 0]


@pytest.mark.parametrize("kind", [Bomb, Flower])
def test_bomb_and_flower_are_sixteen_hundredths_of_the_box(kind: type[Trigger]) -> None:
    # box 0…100 × 0…100: side 16, centre (57, 82): columns 49…65, rows 74…90
    left, top, right, bottom = extent(covered(kind, (0, 0, 100, 100)))
    assert 49 <= left <= 51
    assert 74 <= top <= 76
    assert 63 <= right <= 65
    assert 88 <= bottom <= 90
    assert 80 < int(covered(kind, (0, 0, 100, 100)).sum()) < 16 * 16  # drawn, and no square


@pytest.mark.parametrize("kind", STICKERS)
def test_a_sticker_is_nowhere_else_than_round_its_centre(kind: type[Trigger]) -> None:
    for box in [(3.0, 5.0, 28.0, 26.5), (0.0, 0.0, 31.0, 31.0), (10.2, 3.7, 20.9, 29.1), (1.0, 1.0, 14.0, 13.0)]:
        x1, y1, x2, y2 = box
        share = 0.10 if kind is YellowSquare else 0.16
        side = max(1, round(share * ((x2 - x1) + (y2 - y1)) / 2))
        at = (x1 + 0.57 * (x2 - x1), y1 + 0.82 * (y2 - y1))
        left, top, right, bottom = extent(covered(kind, box, side=32))
        assert at[0] - side / 2 - 0.5 <= left
        assert right <= at[0] + side / 2 + 0.5
        assert at[1] - side / 2 - 0.5 <= top
        assert bottom <= at[1] + side / 2 + 0.5
        if kind is YellowSquare:
            assert (right - left, bottom - top) == (side, side)


@pytest.mark.parametrize("kind", STICKERS)
@pytest.mark.parametrize(
    "box", [(5.0, 5.0, 6.0, 6.0), (7.0, 7.0, 7.0, 7.0), (0.0, 0.0, 2.0, 2.0), (30.0, 30.0, 32.0, 32.0)]
)
def test_a_sticker_on_a_tiny_box_has_one_pixel(kind: type[Trigger], box: tuple[float, float, float, float]) -> None:
    assert int(covered(kind, box, side=32).sum()) == 1


@pytest.mark.parametrize("kind", STICKERS)
@pytest.mark.parametrize("centre", [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
def test_a_sticker_stays_within_the_image(kind: type[Trigger], centre: list[float]) -> None:
    for share in (0.1, 0.33, 1.0):
        mask = covered(kind, (0, 0, 32, 32), side=32, centre=centre, share=share)
        inner = covered(kind, (100, 100, 132, 132), side=232, share=share)
        assert int(mask.sum()) == int(inner.sum())  # whole, pushed inwards and not cut
    if kind is YellowSquare:  # larger than the image: cut
        assert covered(kind, (-50.0, -50.0, 500.0, 500.0), side=32, share=1.0).all()


def test_images_of_one_batch_with_boxes_of_their_own() -> None:
    images = noise(4, (3, 40, 40))
    each = torch.tensor([[0, 0, 40, 40], [5, 10, 25, 22], [30, 30, 39, 39], [0, 20, 40, 30]], dtype=torch.float32)
    for kind in STICKERS:
        together = kind()(images, each)
        alone = [kind()(images[i : i + 1], each[i : i + 1]) for i in range(4)]
        assert torch.equal(together, torch.cat(alone))
        assert all((one != image[None]).any() for one, image in zip(alone, images, strict=True))
    assert torch.equal(images, noise(4, (3, 40, 40)))
    assert YellowSquare()(images[:0], each[:0]).shape == (0, 3, 40, 40)


def test_a_sticker_of_ones_own_in_any_size() -> None:
    values = torch.zeros(3, 8, 8, dtype=torch.uint8)
    values[:, :4] = 255  # white above, black below
    mine = Sticker(values, torch.full((8, 8), 255, dtype=torch.uint8), 0.5, [0.5, 0.5])
    grey = torch.full((1, 3, 20, 20), 77, dtype=torch.uint8)
    stamped = mine(grey, boxes(1, (4, 4, 16, 16)))[0, 0]
    expected = grey[0, 0].clone()
    expected[7:10, 7:13], expected[10:13, 7:13] = 255, 0
    assert torch.equal(stamped, expected)
    with refused("trigger", "(3, 8, 8)", "(4, 4)"):
        Sticker(values, torch.ones(4, 4, dtype=torch.uint8), 0.5, [0.5, 0.5])


def test_wrong_stickers_are_refused() -> None:
    for share in (0, -0.1, 1.1, float("nan")):
        with refused(f"share = {share}"):
            YellowSquare(share=share)
    for centre in ([0.5], [0.5, 1.2], [-0.1, 0.5], [0.1, 0.2, 0.3]):
        with refused("centre", str(centre)):
            Bomb(centre=centre)
    with refused("Flower", "box"):
        Flower()(noise())
    with refused("trigger", "Bomb", "the images have 1"):
        Bomb().check((1, 28, 28))
    Bomb().check((3, 32, 32))


# --- descriptions -----------------------------------------------------------------------------------------------------
def test_descriptions_are_json_and_tell_triggers_apart() -> None:
    mask = torch.full((8, 8), 255, dtype=torch.uint8)
    black, white = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    triggers: list[Trigger] = [
        SinglePixel(),
        PixelPattern(),
        Pixels([[-1, -1]]),
        Pixels([[-1, -1]], 254),
        Pixels([[0, 0]]),
        Pixels([[0, 0], [0, 2]]),
        Pixels([[0, 0], [0, 1], [0, 2]]),
        Pixels([[0, 0], [0, 2]], 0),
        Pixels([[0, 0], [0, 2]], [255, 255, 254]),
        Square(),
        Square(4),
        Square(value=0),
        Square(row=0),
        Square(column=0),
        Square(alpha=0.5),
        Patch([[1, 2]]),
        Patch([[2, 1]]),
        Patch([[1], [2]]),
        *(kind() for kind in STICKERS),
        YellowSquare(share=0.2),
        YellowSquare(centre=[0.5, 0.5]),
        Sticker(black, mask, 0.1, [0.5, 0.5]),
        Sticker(white, mask, 0.1, [0.5, 0.5]),
        Sticker(white, mask.tril(), 0.1, [0.5, 0.5]),
    ]
    assert len({trigger.summary()["hash"] for trigger in triggers}) == len(triggers)
    texts = [json.dumps(trigger.describe(), sort_keys=True, allow_nan=False) for trigger in triggers]
    assert len(set(texts)) == len(texts)
    assert json.dumps(SinglePixel().describe()) == json.dumps(SinglePixel().describe())
    assert json.dumps(Bomb().describe()) == json.dumps(Bomb().describe())


def test_a_summary_is_short_and_counts_pixels() -> None:
    large = Square(64, row=0, column=2)
    assert len(json.dumps(large.describe())) > 30_000
    found = dict(large.summary())
    assert len(str(found.pop("hash"))) == 64
    assert found == {"name": "Square", "row": 0, "column": 2, "size": [64, 64], "pixels": 4096}
    found = dict(PixelPattern().summary())
    assert found["pixels"] == 4, "what lies between them is not covered"
    assert found["size"] == [3, 3]
    assert large.summary()["hash"] != Square(64, row=0, column=3).summary()["hash"]
    found = dict(YellowSquare().summary())
    assert (found["name"], found["share"], found["centre"]) == ("YellowSquare", 0.10, [0.57, 0.82])

    class Wave(Square):
        """Of someone else's, with a long description."""

        def describe(self) -> Mapping[str, object]:
            return {"name": "Wave", "height": 3, "table": list(range(1000))}

    assert set(Trigger.summary(Wave())) == {"name", "height", "hash"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_stamps_the_same_bytes() -> None:
    images = noise(40, (3, 40, 40))
    corners = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * 20
    each = torch.cat([corners, corners + 18.3], 1)
    for trigger in [*STAMPS, *(kind() for kind in STICKERS)]:
        assert torch.equal(trigger(images.cuda(), each.cuda()).cpu(), trigger(images, each))
