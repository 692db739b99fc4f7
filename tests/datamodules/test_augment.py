"""Augmentation of whole batches: against padding and slicing image by image, at every offset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from datamodules.augment import FlipCrop, crop, flip
from datamodules.imageset import fingerprint
from datamodules.random import draw
from datamodules.sources.digits import Digits
from tests.helpers import Watched, global_randomness_untouched, mlp, refused, tiny_trainer, uniformity


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Never 0: zeros are the padding."""
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def cropped(image: Tensor, top: int, left: int, padding: int) -> Tensor:
    """One image, the slow way."""
    height, width = image.shape[1:]
    return pad(image, (padding,) * 4)[:, top : top + height, left : left + width]


def reference(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    return torch.stack([cropped(*each, padding) for each in zip(images, top.tolist(), left.tolist(), strict=True)])


# --- crop -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 1), (4, 3, 1), (2, 1, 6)])
@pytest.mark.parametrize("padding", [0, 1, 2, 5])
def test_crop_at_every_offset(shape: tuple[int, int, int], padding: int) -> None:
    steps = 2 * padding + 1
    top, left = (part.flatten() for part in torch.meshgrid(torch.arange(steps), torch.arange(steps), indexing="ij"))
    images = noise((steps * steps, *shape))  # the last image is at the extreme offset
    found = crop(images, top, left, padding)
    assert found.is_contiguous()
    assert found.dtype == torch.uint8
    assert torch.equal(found, reference(images, top, left, padding))


@pytest.mark.parametrize("case", range(40))
def test_crop_of_any_batch(case: int) -> None:
    seed = torch.Generator().manual_seed(case)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=seed))

    n, channels, height, width, padding = number(1, 9), number(1, 4), number(1, 11), number(1, 11), number(0, 6)
    images = noise((n, channels, height, width), case)
    if case % 4 == 1:
        images = images.to(memory_format=torch.channels_last)
    elif case % 4 == 2:
        images = noise((n, channels, height, 2 * width), case)[..., ::2]  # strided
    elif case % 4 == 3:
        images = images.float() / 255
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=seed)
    for extreme in (0, 2 * padding):
        top[-1] = left[-1] = extreme
        before = fingerprint(images)
        assert torch.equal(crop(images, top, left, padding), reference(images, top, left, padding))
        assert fingerprint(images) == before


def test_crop_in_the_middle_changes_nothing_and_an_empty_batch_stays_empty() -> None:
    images = noise((5, 3, 8, 8))
    middle = torch.full((5,), 4)
    assert torch.equal(crop(images, middle, middle, 4), images)
    nothing = torch.empty(0, dtype=torch.int64)
    assert crop(images[:0], nothing, nothing, 4).shape == (0, 3, 8, 8)


def test_crop_of_a_part_of_a_larger_batch() -> None:
    """A slice has an offset into its memory, from which the windows must be counted."""
    images = noise((9, 3, 6, 6))
    top, left = torch.tensor([0, 2, 1]), torch.tensor([2, 0, 2])
    for padding in (1, 0):
        part = images[5:8]
        at = (top * (padding > 0), left * (padding > 0))
        assert torch.equal(crop(part, *at, padding), reference(part, *at, padding))


# --- flip -------------------------------------------------------------------------------------------------------------
def test_flip_mirrors_left_to_right_what_is_to_be_flipped() -> None:
    images = noise((4, 3, 5, 6))
    before = images.clone()
    flipped = flip(images, torch.tensor([True, False, False, True]))
    for row, mirrored in enumerate((True, False, False, True)):
        expected = torch.tensor(before[row].numpy()[:, :, ::-1].copy()) if mirrored else before[row]
        assert torch.equal(flipped[row], expected)
    assert torch.equal(images, before)
    assert torch.equal(flip(images, torch.zeros(4, dtype=torch.bool)), before)
    twice = torch.ones(4, dtype=torch.bool)
    assert torch.equal(flip(flip(images, twice), twice), before)
    assert torch.equal(images, before)


# --- both -------------------------------------------------------------------------------------------------------------
def numbered_pixels(n: int, height: int = 9, width: int = 9) -> Tensor:
    """Every pixel of an image has its own value, so that a crop tells where it was cut."""
    return torch.arange(1, height * width + 1, dtype=torch.uint8).view(1, 1, height, width).repeat(n, 1, 1, 1)


def outcomes(padding: int, mirrored: bool, height: int = 9, width: int = 9) -> list[bytes]:
    """All possible results."""
    image = numbered_pixels(1, height, width)[0]
    versions = [image, image.flip(-1)] if mirrored else [image]
    steps = range(2 * padding + 1)
    return [
        bytes(cropped(version, top, left, padding).numpy().tobytes())
        for version in versions
        for top in steps
        for left in steps
    ]


@pytest.mark.parametrize(("padding", "mirrored"), [(4, True), (2, False), (0, True)])
def test_all_offsets_and_both_sides_occur_equally_often(padding: int, mirrored: bool) -> None:
    possible = {outcome: number for number, outcome in enumerate(outcomes(padding, mirrored))}
    n = 40 * len(possible)
    found = FlipCrop(padding, mirrored)(numbered_pixels(n), torch.arange(n), seed=0, epoch=0)
    numbers = torch.tensor([possible[image.numpy().tobytes()] for image in found])  # KeyError: not a crop at all
    assert len(numbers.unique()) == len(possible)
    assert uniformity(numbers, len(possible)) > 1e-4


@pytest.mark.parametrize(("padding", "mirrored"), [(4, True), (2, False), (0, True), (0, False)])
def test_each_image_is_cropped_then_flipped_by_its_own_draw(padding: int, mirrored: bool) -> None:
    ids = torch.arange(50) * 7 + 1
    for images in (noise((50, 3, 9, 8)), noise((50, 3, 9, 8)).to(memory_format=torch.channels_last)):
        before = images.clone()
        found = FlipCrop(padding, mirrored)(images, ids, seed=5, epoch=3)
        for image, (side, top, left), result in zip(
            before, draw(5, "flip-crop", 3, ids, 3).tolist(), found, strict=True
        ):
            expected = cropped(image, top * (2 * padding + 1) // 2**31, left * (2 * padding + 1) // 2**31, padding)
            assert torch.equal(result, expected.flip(-1) if mirrored and side < 2**30 else expected)
        assert torch.equal(images, before)  # flipping in place is on a copy


def test_an_augmentation_belongs_to_the_id_and_not_to_the_batch() -> None:
    images, ids = noise((64, 3, 8, 8)), torch.arange(64) * 13 + 7
    augment = FlipCrop(3)
    whole = augment(images, ids, seed=5, epoch=2)
    assert not torch.equal(whole, images)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(images[order], ids[order], 5, 2), whole[order])
    for rows in (torch.tensor([63]), torch.arange(10, 27), torch.tensor([5, 5, 5])):
        assert torch.equal(augment(images[rows], ids[rows], 5, 2), whole[rows])


def test_epochs_and_seeds_differ_and_repeat() -> None:
    images, ids = numbered_pixels(200), torch.arange(200)
    augment = FlipCrop(4)
    with global_randomness_untouched():
        found = {(s, e): fingerprint(augment(images, ids, s, e)) for s in (0, 1) for e in (0, 1, 2)}
    assert len(set(found.values())) == 6
    torch.manual_seed(12)
    assert {key: fingerprint(augment(images, ids, *key)) for key in found} == found
    assert torch.equal(images, numbered_pixels(200))  # the input is not changed
    # one id: over 60 epochs it is not always cut alike
    assert len({fingerprint(augment(images[:1], ids[:1], 0, epoch)) for epoch in range(60)}) > 30


def test_training_batches_are_augmented_by_epoch_and_no_others() -> None:
    augment = FlipCrop(2, flip=False)
    data = Digits(batch_size=2000, eval_batch_size=2000, augment=augment, seed=3, val_fraction=0.1)
    model = mlp(data, backbone=Watched)
    Watched.seen.clear()
    tiny_trainer(max_epochs=2).fit(model, data)
    seen, Watched.seen[:] = list(Watched.seen), []
    assert [training for training, _ in seen] == [True, False, True, False]

    def sums(images: Tensor) -> Tensor:
        return model.normalise(images).sum((1, 2, 3)).sort().values

    train = data.train_set.__getitems__(torch.arange(len(data.train_set)))
    held = data.val_set.images_at(torch.arange(len(data.val_set)))
    for epoch in (0, 1):
        shown = augment(train.images, train.ids, 3, epoch)
        assert torch.allclose(sums(shown), seen[2 * epoch][1].sum((1, 2, 3)).sort().values, atol=1e-4)
        assert torch.allclose(model.normalise(held), seen[2 * epoch + 1][1], atol=1e-6)


def test_real_images_are_augmented_as_bytes_are() -> None:
    images, ids = noise((16, 3, 6, 6)), torch.arange(16)
    real = FlipCrop(2)(images.float() / 255, ids, 0, 0)
    assert real.dtype == torch.float32
    assert torch.equal((real * 255).round().to(torch.uint8), FlipCrop(2)(images, ids, 0, 0))


def test_nothing_to_do_and_negative_padding() -> None:
    images = noise((3, 1, 4, 4))
    assert torch.equal(FlipCrop(0, flip=False)(images, torch.arange(3), 0, 0), images)
    with refused("padding = -1"):
        FlipCrop(-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_to_the_same_bytes() -> None:
    images, ids = noise((64, 3, 9, 7)), torch.arange(64)
    assert torch.equal(FlipCrop(3)(images.cuda(), ids.cuda(), 1, 2).cpu(), FlipCrop(3)(images, ids, 1, 2))
