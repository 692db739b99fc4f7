"""Batches: the same ones on any number of ranks, after resuming, and counted exactly in evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.errors import InputError, bad
from datamodules.imageset import PADDING, Batch, ImageSet
from datamodules.random import generator


class Batches(Sampler[Tensor], ABC):
    """Training batches that are keyed by the epoch and can begin in its middle."""

    epoch = 0
    start = 0
    repeat = False
    """Whether every epoch is the first one: for the trainer's `overfit_batches`."""

    @property
    def sampler(self) -> Batches:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = 0 if self.repeat else epoch

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    def _begin(self) -> int:
        """The batch to begin with; the next epoch begins with its first."""
        first, self.start = self.start, 0
        return first


class TrainBatches(Batches):
    """Shuffled batches, keyed by (seed, epoch); the batch size is global, and each rank takes its part of every batch.

    The last incomplete batch of an epoch is left out; which samples those are changes from epoch to epoch. A set
    smaller than one batch is one batch.

    Args:
        n: Samples.
        batch_size: Samples in a batch, over all ranks together.
        seed: Of the shuffling.
        rank: This process.
        world_size: How many there are.

    Raises:
        InputError: If a batch cannot be shared out evenly.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if n < world_size:
            raise InputError(f"training set: {n} samples for {world_size} processes; each needs one at least")
        size = min(batch_size, n - n % world_size)
        if size % world_size:
            below = max(world_size, size // world_size * world_size)
            raise bad(
                "batch_size", batch_size, f"it is global and must divide over {world_size} processes; try {below}"
            )
        self.n, self.size, self.seed = n, size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.n // self.size

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.n, generator=generator(self.seed, "order", self.epoch))
        share = self.size // self.world_size
        for batch in range(self._begin(), len(self)):
            at = batch * self.size + self.rank * share
            yield order[at : at + share]


class GroupedBatches(Batches):
    """Batches with so many rows of each group, such as labelled and unlabelled ones; a group's rows come together.

    An epoch is one pass through the group that lasts longest, or through the one that is named; its last incomplete
    batch comes with the next epoch. A group that is used up sooner begins another pass, in another order: within one
    pass, no row comes twice.

    Args:
        groups: The rows of each group: int64 (n,).
        counts: How many rows of each group a batch has, over all ranks together.
        seed: Of the shuffling.
        rank: This process.
        world_size: How many there are.
        through: The number of the group that an epoch is one pass through; None: the one that lasts longest.

    Raises:
        InputError: If a group is empty, or its count cannot be shared out evenly.
    """

    def __init__(
        self,
        groups: Sequence[Tensor],
        counts: Sequence[int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        through: int | None = None,
    ) -> None:
        if len(groups) != len(counts) or not groups:
            raise bad("counts", list(counts), f"give one for each of {len(groups)} groups, one group at least")
        for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
            if count < 1 or count % world_size:
                raise bad("counts", count, f"it is global: 1 or more, and it must divide over {world_size} processes")
            if not len(group):
                raise InputError(f"groups: group {number} has no rows, and each batch needs {count} of them")
        self.groups, self.counts, self.seed = list(groups), list(counts), seed
        self.rank, self.world_size, self.through = rank, world_size, through

    def __len__(self) -> int:
        passes = [len(group) // count for group, count in zip(self.groups, self.counts, strict=True)]
        return max(1, *passes) if self.through is None else max(1, passes[self.through])

    def __iter__(self) -> Iterator[Tensor]:
        first = self.epoch * len(self)
        orders: dict[int, tuple[int, Tensor]] = {}
        for batch in range(first + self._begin(), first + len(self)):
            parts = []
            for number, (group, count) in enumerate(zip(self.groups, self.counts, strict=True)):
                share = count // self.world_size
                at = batch * count + self.rank * share
                parts.append(group[self._places(number, at, share, orders)])
            yield torch.cat(parts)

    def _places(self, number: int, at: int, share: int, orders: dict[int, tuple[int, Tensor]]) -> Tensor:
        """Places `at` … `at + share` of a group's passes, one after the other; the newest pass is kept in `orders`."""
        size, parts = len(self.groups[number]), []
        while share:
            which, place = divmod(at, size)
            if number not in orders or orders[number][0] != which:
                made = torch.randperm(size, generator=generator(self.seed, f"order of group {number}", which))
                orders[number] = (which, made)
            parts.append(orders[number][1][place : place + share])
            at, share = at + len(parts[-1]), share - len(parts[-1])
        return torch.cat(parts)


class EvaluationBatches(Sampler[Tensor]):
    """Every row once, in order; all ranks get equally many batches, and what fills them up is marked −1.

    Uneven shards hang a model with BatchNorm under DDP, and padding by repetition counts rows twice.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.n, self.rank, self.world_size = n, rank, world_size
        self.size = max(1, min(batch_size, -(-n // world_size)))

    def __len__(self) -> int:
        return math.ceil(self.n / (self.size * self.world_size))

    def __iter__(self) -> Iterator[Tensor]:
        for batch in range(len(self)):
            at = (batch * self.world_size + self.rank) * self.size
            rows = torch.arange(at, at + self.size)
            if self.world_size == 1:
                yield rows[: self.n - at]
            else:
                yield rows.masked_fill_(rows >= self.n, PADDING)


def _as_it_is(batch: Batch) -> Batch:
    return batch


class Loader(DataLoader[Batch]):
    """A DataLoader that fetches whole batches and can go on in the middle of an epoch.

    Args:
        images: The set.
        batches: Yields the rows of each batch.
        num_workers: Worker processes. With the set in memory, 0 is fastest.
        done: Tells how many batches of the epoch were trained on; training goes on after them.
        pin_memory: Whether batches go to page-locked memory, for faster copies to a GPU.
    """

    def __init__(
        self,
        images: ImageSet,
        batches: Batches | EvaluationBatches,
        num_workers: int = 0,
        done: Callable[[], int] | None = None,
        pin_memory: bool = False,
    ) -> None:
        # a generator of its own: a DataLoader draws a seed for its workers from the global one at every epoch
        super().__init__(
            images,
            batch_sampler=batches,  # type: ignore[arg-type] # tensors of rows, not lists
            num_workers=num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type] # a batch is fetched whole
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(0),
        )
        self._batches = batches
        self._done = done

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches, from where training stands when the first one is asked for.

        Not from where it stands now: Lightning makes the iterator before it has restored a checkpoint's progress and
        told the epoch – with a schedule that asks for the number of steps, or with worker processes, which start at
        once.
        """
        if isinstance(self._batches, Batches) and self._done is not None:
            self._batches.start = self._done() % max(1, len(self))
        if self.num_workers or self.pin_memory:
            yield from super().__iter__()
        else:  # in this process there is nothing to arrange, and a DataLoader's own iterator costs 50 µs a batch
            for rows in self._batches:
                yield self.dataset.__getitems__(rows)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own progress tells; but Lightning warns of a loader without it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is needed."""


class Passes:
    """A loader that Lightning leaves as it is: to predict, it would rebuild a DataLoader with a sampler of its own."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)
