"""Learning-rate schedules: the share of the highest rate at steps worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from classifiers.schedules import Cosine, OneCycle, Steps
from datamodules.errors import InputError
from datamodules.imageset import Batch
from datamodules.sources.digits import Digits
from tests.helpers import mlp, refused, tiny_trainer


def rates(schedule: Callable[..., LRScheduler], total: int, n: int | None = None, **kwargs: Any) -> list[float]:
    """The learning rates of the steps 0 … n, for a highest rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, total, **kwargs)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(total if n is None else n):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_one_cycle_rises_and_falls_in_straight_lines() -> None:
    # peak at step 2 of 10: up by thirds – never a step of rate 0 –, then down by eighths
    assert rates(OneCycle, 10) == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert rates(OneCycle, 4, peak=0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 0])
    assert rates(OneCycle, 4, peak=0.5, final=0.2) == pytest.approx([1 / 3, 2 / 3, 1, 0.6, 0.2])


def test_cosine_by_hand() -> None:
    assert rates(Cosine, 6) == pytest.approx([1, 0.933012702, 0.75, 0.5, 0.25, 0.066987298, 0])
    # a quarter of 8 steps warms up, by thirds
    assert rates(Cosine, 8, warmup=0.25) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.933012702, 0.75, 0.5, 0.25, 0.066987298, 0], abs=1e-9
    )


def test_steps_by_hand() -> None:
    assert rates(Steps, 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert rates(Steps, 4, milestones=[0.25], factor=0.5) == [1, 0.5, 0.5, 0.5, 0.5]
    assert rates(Steps, 4, milestones=[]) == [1] * 5


@pytest.mark.parametrize(
    "schedule", [OneCycle, Cosine, Steps, partial(OneCycle, final=0.3), partial(Cosine, warmup=0.5)]
)
@pytest.mark.parametrize("total", [2, 7, 100])
def test_the_rate_stays_between_nought_and_the_highest_past_the_end_too(
    schedule: Callable[..., LRScheduler], total: int
) -> None:
    found = rates(schedule, total, 2 * total + 3)
    assert all(0 <= rate <= 1 for rate in found)
    assert found[0] > 0  # the first step does something
    assert found[total:] == [pytest.approx(found[total])] * (total + 4)  # after the end it stays


def test_what_is_out_of_range_is_refused() -> None:
    for peak in (-0.1, 1.0, float("nan")):
        with refused(f"peak = {peak}"):
            rates(OneCycle, 4, peak=peak)
    for final in (-0.1, 1.5):
        with refused(f"final = {final}"):
            rates(OneCycle, 4, final=final)
    for warmup in (-0.1, 1.0):
        with refused(f"warmup = {warmup}"):
            rates(Cosine, 4, warmup=warmup)
    for milestones in ([0.0, 0.5], [0.5, 1.0], [0.75, 0.5], [30, 60], [float("nan")]):
        with refused(f"milestones = {milestones}", "(0, 1)"):
            rates(Steps, 4, milestones=milestones)
    for factor in (0.0, -1.0, float("nan")):
        with refused(f"factor = {factor}", "above 0"):
            rates(Steps, 4, factor=factor)


def test_a_trainer_gives_the_number_of_steps_and_steps_once_for_each_batch() -> None:
    data = Digits(batch_size=283)  # four batches in an epoch
    asked: list[int] = []

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        asked.append(steps)
        return OneCycle(optimizer, steps, peak=0.5)

    model = mlp(data, schedule=schedule, optimizer=partial(torch.optim.SGD, lr=0.3))
    used: list[float] = []
    step = model.training_step

    def training_step(batch: Batch, batch_idx: int) -> torch.Tensor:
        used.append(model.optimizers().param_groups[0]["lr"])
        loss: torch.Tensor = step(batch, batch_idx)
        return loss

    model.training_step = training_step
    tiny_trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
    assert asked == [8]
    assert used == pytest.approx([0.3 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("kind", ["LBFGS", "SparseAdam"])
def test_an_optimizer_that_does_not_train_by_batches_is_refused(kind: str) -> None:
    model = mlp(Digits(batch_size=283), optimizer=partial(getattr(torch.optim, kind), lr=0.1))
    with pytest.raises(InputError, match=f"^optimizer = '{kind}': "):
        tiny_trainer(max_epochs=1, limit_val_batches=0, limit_train_batches=1).fit(model, Digits(batch_size=283))


# --- torch's own, by class path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), [1, 1, 0.5, 0.5, 0.25, 0.25]),
        (partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2], gamma=0.1), [1, 1, 1, 1, 0.1, 0.1]),
        (partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), [1, 1, 0.5, 0.5, 0.25, 0.25]),
        (partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2), [1, 1, 0.5, 0.5, 0, 0]),
        (torch.optim.lr_scheduler.CosineAnnealingLR, [1, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
        (partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, pct_start=0.5, anneal_strategy="linear"),
         [0.04, 0.52, 1, 0.666671, 0.333335, 4e-6]),
        (partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9, factor=0.5),
         [1, 1, 0.5, 0.5, 0.25, 0.25]),
        (partial(Steps, milestones=[0.5], factor=0.1), [1, 1, 1, 0.1, 0.1, 0.1]),
    ],
    ids=["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR", "the whole training", "OneCycleLR",
         "ReduceLROnPlateau", "ours"],
)  # fmt: skip
def test_torchs_go_by_epochs_unless_they_last_as_long_as_training(factory: Any, expected: list[float]) -> None:
    """Three epochs of two batches."""
    found: list[float] = []

    class Seen(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            found.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    data = Digits(batch_size=64)
    model = mlp(data, optimizer=lambda parameters: Seen(parameters, lr=1.0), schedule=factory)
    tiny_trainer(max_epochs=3, limit_train_batches=2, limit_val_batches=1).fit(model, data)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["StepLR", "MultiStepLR", "ExponentialLR", "OneCycleLR", "CyclicLR", "LambdaLR"])
def test_what_one_of_torchs_needs_is_named(name: str) -> None:
    data = Digits(batch_size=64)
    model = mlp(data, schedule=getattr(torch.optim.lr_scheduler, name))
    with refused(f"schedule = {name}", "needs"):
        tiny_trainer(max_epochs=1, limit_train_batches=1).fit(model, data)
