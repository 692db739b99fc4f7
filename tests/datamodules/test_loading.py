"""Batches: the same ones however many ranks share them, the same after resuming, and each row measured once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from classifiers.backbones import MLP
from datamodules.augment import FlipCrop
from datamodules.imageset import PADDING, Batch
from datamodules.loading import EvaluationBatches, GroupedBatches, Loader, Passes, TrainBatches
from datamodules.sources.digits import Digits
from datamodules.triggers import SinglePixel
from poisoning.badnets import BadNets
from tests.helpers import global_randomness_untouched, mlp, refused, some_images, tiny_trainer


def epoch(n: int, size: int, epoch: int = 0, seed: int = 0, world: int = 1) -> list[list[Tensor]]:
    """Each rank's batches."""
    ranks = [TrainBatches(n, size, seed, rank, world) for rank in range(world)]
    for rank in ranks:
        rank.set_epoch(epoch)
    return [list(rank) for rank in ranks]


# --- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("n", [8, 64, 103])
def test_ranks_share_out_the_batches_of_one_process(n: int, world: int) -> None:
    size = 8
    [alone] = epoch(n, size, epoch=3)
    shared = epoch(n, size, epoch=3, world=world)
    assert [len(rank) for rank in shared] == [n // size] * world
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in shared]
        assert all(len(part) == size // world for part in parts)
        assert torch.equal(torch.cat(parts), batch)  # exactly, in order


def test_an_epoch_takes_no_row_twice_and_drops_less_than_a_batch() -> None:
    [batches] = epoch(103, 10)
    rows = torch.cat(batches)
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(rows.unique()) == 100
    assert (int(rows.min()) >= 0, int(rows.max()) < 103) == (True, True)
    assert not torch.equal(rows, rows.sort().values)
    left_out = [set(range(103)) - set(torch.cat(epoch(103, 10, epoch=e)[0]).tolist()) for e in range(40)]
    assert len(set().union(*left_out)) > 40  # not the same ones each time


def test_the_order_belongs_to_seed_and_epoch() -> None:
    with global_randomness_untouched():
        orders = {(s, e): torch.cat(epoch(50, 5, e, s)[0]).tolist() for s in (0, 1) for e in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 6
    torch.manual_seed(3)
    assert {key: torch.cat(epoch(50, 5, key[1], key[0])[0]).tolist() for key in orders} == orders
    batches = TrainBatches(50, 5, seed=0)
    assert [torch.equal(x, y) for x, y in zip(batches, batches, strict=True)] == [True] * 10  # passes do not advance it


def test_a_pass_goes_on_where_the_last_one_stopped() -> None:
    [whole] = epoch(50, 5, epoch=2)
    batches = TrainBatches(50, 5, seed=0)
    batches.set_epoch(2)
    batches.start = 7
    rest = list(batches)
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[7:]]
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in whole]  # only that one pass


def test_a_small_set_is_one_batch() -> None:
    assert [len(batch) for batch in epoch(5, 100)[0]] == [5]
    ranks = epoch(5, 100, world=2)
    assert [[len(batch) for batch in rank] for rank in ranks] == [[2], [2]]
    assert len(torch.cat([batch for rank in ranks for batch in rank]).unique()) == 4


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with refused("batch_size = 10", "4 processes", "try 8"):
        TrainBatches(100, 10, 0, 0, 4)
    with refused("batch_size = 3", "4 processes", "try 4"):
        TrainBatches(100, 3, 0, 0, 4)
    with refused("batch_size = 100", "3 processes", "try 99"):
        TrainBatches(1000, 100, 0, 0, 3)
    with refused("3 samples", "4 processes"):
        TrainBatches(3, 64, 0, 0, 4)
    with refused("training set", "0 samples"):
        TrainBatches(0, 64, 0)


# --- evaluation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 64, 101])
@pytest.mark.parametrize("size", [1, 8, 512])
def test_each_row_is_evaluated_once_by_ranks_with_equally_many_batches(n: int, world: int, size: int) -> None:
    ranks = [EvaluationBatches(n, size, rank, world) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert len({len(rank) for rank in ranks}) == 1
    assert [len(found) for found in batches] == [len(rank) for rank in ranks]
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *(batch for rank in batches for batch in rank)])
    assert rows[rows != PADDING].sort().values.tolist() == list(range(n))
    assert int((rows == PADDING).sum()) == len(rows) - n
    for number in range(len(ranks[0])):  # shapes agree over the ranks: SyncBatchNorm and all_gather hang otherwise
        shapes = {len(rank[number]) for rank in batches}
        assert len(shapes) == 1
        assert 1 <= shapes.pop() <= size
    if world == 1:
        assert PADDING not in rows
        assert rows.tolist() == list(range(n))


def test_no_rank_carries_more_than_one_batch_of_padding() -> None:
    for n, size, world in [(1797, 512, 4), (100, 33, 3), (3, 512, 8)]:
        padding = sum(
            int((batch == PADDING).sum()) for r in range(world) for batch in EvaluationBatches(n, size, r, world)
        )
        assert padding < min(size, -(-n // world)) * world


# --- loaders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_yields_the_batches_of_its_rows(workers: int) -> None:
    images = some_images(23, (3, 4, 4))
    loader = Loader(images, TrainBatches(23, 5, seed=1), num_workers=workers)
    [rows] = epoch(23, 5, seed=1)
    assert len(loader) == 4
    for batch, expected in zip(loader, rows, strict=True):
        assert isinstance(batch, Batch)
        for found, part in zip(batch, images.__getitems__(expected), strict=True):
            assert torch.equal(found, part)


def test_lightning_finds_the_epoch_in_a_loader() -> None:
    """Lightning calls `batch_sampler.sampler.set_epoch`; without it every epoch would have one order."""
    loader = Loader(some_images(20), TrainBatches(20, 5, seed=0))
    orders = []
    for number in range(2):
        loader.batch_sampler.sampler.set_epoch(number)  # type: ignore[union-attr]
        orders.append(torch.cat([batch.ids for batch in loader]).tolist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_starts_where_training_stands_when_the_first_batch_is_asked_for(workers: int) -> None:
    done = 0
    batches = TrainBatches(40, 5, seed=0)
    loader = Loader(some_images(40), batches, workers, done=lambda: done)
    batches.set_epoch(1)
    whole = [batch.ids.tolist() for batch in loader]
    batches.set_epoch(0)
    iterator = iter(loader)
    done = 3  # Lightning restores its progress, and tells the epoch, after it made the iterator
    batches.set_epoch(1)
    assert [batch.ids.tolist() for batch in iterator] == whole[3:]
    done = 8  # the epoch's end: the next pass starts from the beginning
    assert [batch.ids.tolist() for batch in loader] == whole


def test_passes_is_a_loader_that_lightning_does_not_know() -> None:
    loader = Loader(some_images(9), EvaluationBatches(9, 4))
    passes = Passes(loader)
    assert not isinstance(passes, torch.utils.data.DataLoader)
    assert len(passes) == 3
    assert [batch.ids.tolist() for batch in passes] == [batch.ids.tolist() for batch in loader]


# --- with a trainer ---------------------------------------------------------------------------------------------------
def prepared() -> tuple[BadNets, Any]:
    torch.manual_seed(0)
    base = Digits(batch_size=128, seed=3, augment=FlipCrop(1))
    data = BadNets(base, SinglePixel(), placement="after")
    return data, mlp(data, backbone=partial(MLP, hidden=[16], dropout=0.3))


def test_resuming_in_mid_epoch_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    data, model = prepared()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    quiet = {"max_epochs": 2, "limit_val_batches": 0}
    tiny_trainer(**quiet, enable_checkpointing=True, callbacks=[keep]).fit(model, data)
    steps = len(data.train_dataloader())
    assert steps % 4  # so that checkpoints lie in the middle of epochs
    for step in (4, 12):
        data, resumed = prepared()
        torch.manual_seed(99)  # what the global generator says does not matter
        trainer = tiny_trainer(**quiet)
        trainer.fit(resumed, data, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert trainer.global_step == 2 * steps
        for name, tensor in model.net.state_dict().items():
            assert torch.equal(resumed.net.state_dict()[name], tensor), (step, name)


def test_a_resident_set_gives_the_same_numbers() -> None:
    measured = []
    for resident in (False, True):
        torch.manual_seed(0)
        data = BadNets(Digits(seed=0, resident=resident), SinglePixel())
        model = mlp(data)
        trainer = tiny_trainer(max_steps=3)
        trainer.fit(model, data)
        trainer.test(model, data, verbose=False)
        measured.append(model.measured)
    assert measured[0] == measured[1]
    assert set(measured[0]) == {"clean_accuracy", "holdout_accuracy", "attack_success_rate", "robust_accuracy"}


def test_predictions_name_each_row_of_each_evaluation_once() -> None:
    data = BadNets(Digits(eval_batch_size=100), SinglePixel())
    model = mlp(data)
    found = tiny_trainer().predict(model, data)
    assert found is not None
    evaluations = data.evaluations("test")
    assert len(found) == len(evaluations) == 3
    for batches, evaluation in zip(found, evaluations, strict=True):
        rows = torch.cat([batch["row"] for batch in batches])  # type: ignore[index]
        ids = torch.cat([batch["id"] for batch in batches])  # type: ignore[index]
        assert rows.tolist() == list(range(len(evaluation.images)))
        assert torch.equal(ids, evaluation.images.ids)


# --- groups -----------------------------------------------------------------------------------------------------------
FEW, MANY = torch.arange(100, 107), torch.arange(50)


def grouped(epoch: int = 0, seed: int = 0, world: int = 1, start: int = 0) -> list[list[Tensor]]:
    """Each rank's batches of 4 of few rows and 8 of many."""
    ranks = [GroupedBatches([FEW, MANY], [4, 8], seed, rank, world) for rank in range(world)]
    for rank in ranks:
        rank.set_epoch(epoch)
        rank.start = start
    return [list(rank) for rank in ranks]


def test_a_batch_has_so_many_rows_of_each_group() -> None:
    [batches] = grouped()
    assert len(batches) == 50 // 8
    for batch in batches:
        assert torch.isin(batch[:4], FEW).all()
        assert torch.isin(batch[4:], MANY).all()


def test_each_pass_through_a_group_has_every_row_once_across_epochs() -> None:
    with global_randomness_untouched():
        batches = [batch for number in range(7) for batch in grouped(number)[0]]
    for stream, size in ((torch.cat([b[:4] for b in batches]), 7), (torch.cat([b[4:] for b in batches]), 50)):
        passes = [part.tolist() for part in stream.split(size) if len(part) == size]
        assert len(passes) > 5
        assert all(len(set(part)) == size for part in passes)
        assert len({tuple(part) for part in passes}) == len(passes), "in another order each time"


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_each_group(world: int) -> None:
    [alone] = grouped(3)
    shared = grouped(3, world=world)
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in shared]
        few, many = 4 // world, 8 // world
        assert all(len(part) == few + many for part in parts)
        assert torch.equal(torch.cat([part[:few] for part in parts] + [part[few:] for part in parts]), batch)


def test_groups_go_on_in_the_middle_of_an_epoch() -> None:
    assert [b.tolist() for b in grouped(2, start=4)[0]] == [b.tolist() for b in grouped(2)[0][4:]]
    assert grouped(2, seed=1)[0][0].tolist() != grouped(2)[0][0].tolist()


def test_what_groups_are_refused() -> None:
    with refused("counts = 3", "2 processes"):
        GroupedBatches([FEW], [3], 0, 0, 2)
    with refused("group 1 has no rows"):
        GroupedBatches([FEW, FEW[:0]], [1, 1], 0)
    with refused("counts = [1]"):
        GroupedBatches([FEW, MANY], [1], 0)
