"""Randomness by counter: a draw belongs to (seed, purpose, epoch, id), and to nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch

from datamodules.augment import FlipCrop
from datamodules.imageset import Batch
from datamodules.loading import Loader, TrainBatches
from datamodules.random import derive, draw, generator, uniform
from datamodules.sources.digits import Digits
from datamodules.triggers import PixelPattern
from poisoning.badnets import BadNets
from poisoning.label_flip import LabelFlip
from tests.helpers import global_randomness_untouched, some_images, uniformity

WORD = 2**64
IDS = torch.arange(50_000)


def splitmix(seed: int, purpose: str, epoch: int, sample: int, columns: int) -> list[int]:
    """The definition in unbounded integers: SHA-256 for the key, splitmix64 of the counter, its top 31 bits."""
    key = int.from_bytes(hashlib.sha256(f"{seed}|{purpose}|{epoch}".encode()).digest()[:8], "big")
    numbers = []
    for column in range(columns):
        x = ((sample * columns + column) * 0x9E3779B97F4A7C15 + key) % WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
        numbers.append((x ^ (x >> 31)) >> 33)
    return numbers


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_draw_is_splitmix64_of_the_counter(seed: int, columns: int) -> None:
    ids = torch.tensor([0, 1, 2, -1, -7, 999_983, 2**31, 2**62, -(2**63)])
    expected = [splitmix(seed, "purpose", 4, int(i), columns) for i in ids]
    assert draw(seed, "purpose", 4, ids, columns).tolist() == expected


def test_known_answers() -> None:
    """Published: whoever changes these changes every poisoned set, every augmented batch and every stored hash."""
    assert derive(0, "crop") == -4736760555318215347
    assert derive(7, "poison", 3) == 7868737617676058875
    assert draw(0, "crop", 0, torch.tensor([0, 1, 2, -1])).flatten().tolist() == [
        2023385227,
        229311969,
        1263387811,
        1309673068,
    ]
    assert draw(7, "poison", 3, torch.tensor([5, 2**40]), columns=2).tolist() == [
        [434217609, 7286434],
        [452400628, 107851571],
    ]
    assert torch.randperm(8, generator=generator(0, "poison")).tolist() == [5, 1, 7, 2, 4, 6, 0, 3]


def test_a_sample_gets_the_same_number_in_any_batch_and_order() -> None:
    ids = IDS[:1000] * 37 + 5
    whole = draw(3, "crop", 2, ids, columns=3)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(3, "crop", 2, ids[order], columns=3), whole[order])
    parts = [draw(3, "crop", 2, part, columns=3) for part in ids.split([1, 3, 496, 500])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(3, "crop", 2, ids[7:8].expand(4), columns=3), whole[7].expand(4, 3))  # repeated ids


@pytest.mark.parametrize(("seed", "purpose", "epoch"), [(4, "crop", 2), (3, "flip", 2), (3, "crop", 3)])
def test_seeds_purposes_and_epochs_have_streams_of_their_own(seed: int, purpose: str, epoch: int) -> None:
    one, other = draw(3, "crop", 2, IDS).squeeze(1), draw(seed, purpose, epoch, IDS).squeeze(1)
    assert int((one == other).sum()) <= 2  # 50,000 chances of one in 2³¹
    # nor is one the other, shifted: sorted sets of numbers do not overlap either
    assert len(torch.cat([one, other]).unique()) > 99_990
    # and no linear relation
    correlation = torch.corrcoef(torch.stack([one, other]).double())[0, 1]
    assert abs(float(correlation)) < 0.02


@pytest.mark.parametrize("shift", [0, 7, 15, 23])
def test_every_part_of_the_bits_is_uniform(shift: int) -> None:
    assert uniformity((draw(0, "crop", 0, IDS) >> shift) & 255, 256) > 1e-4


def test_ids_columns_epochs_and_seeds_are_independent_of_one_another() -> None:
    def cells(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one >> 28) * 8 + (other >> 28)

    pairs = draw(0, "crop", 0, IDS, columns=3)
    single = draw(0, "crop", 0, IDS).squeeze(1)
    assert uniformity(cells(pairs[:, 0], pairs[:, 1]), 64) > 1e-4
    assert uniformity(cells(pairs[:, 1], pairs[:, 2]), 64) > 1e-4
    assert uniformity(cells(single[:-1], single[1:]), 64) > 1e-4  # neighbouring ids
    assert uniformity(cells(single, draw(0, "crop", 1, IDS).squeeze(1)), 64) > 1e-4
    assert uniformity(cells(single, draw(1, "crop", 0, IDS).squeeze(1)), 64) > 1e-4


def test_range_of_draw_and_uniform() -> None:
    numbers, shares = draw(0, "x", 0, IDS), uniform(0, "x", 0, IDS)
    assert numbers.dtype == torch.int64
    assert 0 <= int(numbers.min()) < 2**17  # the smallest of 50,000
    assert 2**31 - 2**17 < int(numbers.max()) < 2**31
    assert shares.dtype == torch.float32
    assert torch.equal(shares.double(), (numbers >> 7).double() / 2**24)  # exact, so never rounded up to 1
    assert float(((2**31 - 1) >> 7) * 2.0**-24) < 1
    assert draw(0, "x", 0, torch.empty(0, dtype=torch.int64), columns=2).shape == (0, 2)


def test_a_generator_is_private_and_named() -> None:
    def first(seed: int, purpose: str, epoch: int = 0) -> list[int]:
        return torch.randint(0, 2**31, (4,), generator=generator(seed, purpose, epoch)).tolist()

    with global_randomness_untouched():
        assert first(0, "order") == first(0, "order")
    assert len({tuple(first(*key)) for key in [(0, "order"), (1, "order"), (0, "poison"), (0, "order", 1)]}) == 4
    torch.manual_seed(1)
    one = first(0, "order")
    torch.manual_seed(2)
    assert first(0, "order") == one
    assert first(-1, "order") != one  # negative seeds are seeds too


@pytest.mark.parametrize("placement", ["before", "after"])
def test_the_global_generators_are_left_alone_by_data(placement: str) -> None:
    with global_randomness_untouched():
        base = LabelFlip(Digits(augment=FlipCrop(2)), seed=1)
        data = BadNets(base, PixelPattern(), poison_fraction=0.2, placement=placement, seed=2)  # type: ignore[arg-type]
        data.prepare_data()
        data.setup("fit")
        for batch in data.train_dataloader():
            data.rewrite_batch(data.augment(batch, 0))
        for loader in [*data.val_dataloader(), *data.test_dataloader(), *data.predict_dataloader()]:
            assert sum(len(batch.images) for batch in loader)
        data.materialise(torch.arange(10))
        data.train_set.digest()
        data.facts()


def test_the_global_generators_are_left_alone_by_a_loader_with_a_worker() -> None:
    images = some_images(20)
    with global_randomness_untouched():
        batches: list[Batch] = list(Loader(images, TrainBatches(20, 5, seed=0), num_workers=1))
    expected = list(Loader(images, TrainBatches(20, 5, seed=0)))
    assert len(batches) == 4
    for one, other in zip(batches, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_numbers() -> None:
    for columns in (1, 3):
        expected = draw(5, "crop", 2, IDS - 1000, columns)
        assert torch.equal(draw(5, "crop", 2, (IDS - 1000).cuda(), columns).cpu(), expected)
    assert torch.equal(uniform(5, "crop", 2, IDS.cuda()).cpu(), uniform(5, "crop", 2, IDS))
