"""DFME: the arithmetic by hand, every query counted, and nothing paid for twice."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from classifiers.backbones import MLP
from datamodules.sources.digits import Digits
from extraction.dfme import DFME, DataFree, Generator, as_bytes, decay, distance, forward_difference, recovered_logits
from extraction.oracle import LocalOracle
from tests.helpers import global_randomness_untouched, mlp, refused, tiny_trainer

STEP = 8 * (1 * (2 + 1) + 3)
"""Queries of a step of `fitted`: B(g(m + 1) + d)."""


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


def made(data: DataFree) -> DFME:
    torch.manual_seed(1)
    model: DFME = mlp(
        data, DFME, batch=8, directions=2, surrogate_updates=3, generator_width=4, latent=10,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    )  # fmt: skip
    return model


def fitted(victim: str, budget: int, mode: str = "scores", **trainer: object) -> tuple[DFME, DataFree]:
    data = DataFree(Digits(), LocalOracle(victim, mode), budget, seed=2)
    model = made(data)
    with global_randomness_untouched():
        tiny_trainer(**{"max_epochs": 3, "limit_val_batches": 0, **trainer}).fit(model, data)
    return model, data


def state(model: DFME) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


# --- the pure parts ---------------------------------------------------------------------------------------------------
def test_logits_come_back_from_scores_up_to_a_constant() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -9.0]])
    torch.testing.assert_close(recovered_logits(logits.softmax(1)), logits - logits.mean(1, keepdim=True))
    assert recovered_logits(torch.tensor([[1.0, 0.0]])).isfinite().all(), "a score that was rounded to zero"


def test_differences_along_all_directions_give_the_gradient() -> None:
    slope = torch.tensor([[3.0, -1.0], [0.5, 2.0]]).view(2, 1, 1, 2)
    here = torch.zeros(2, 1, 1, 2)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).view(4, 1, 1, 1, 2).expand(4, 2, 1, 1, 2)

    def value(images: Tensor) -> Tensor:
        return (slope * images).flatten(-3).sum(-1)

    found = forward_difference(value(here), value(here + 0.1 * signs), signs, 0.1)
    torch.testing.assert_close(found, slope)


def test_images_are_bytes_and_the_rates_fall() -> None:
    assert as_bytes(torch.tensor([-20.0, 0.0, 20.0])).tolist() == [0, 128, 255]
    assert [round(decay(share), 3) for share in (0.0, 0.1, 0.3, 0.5, 0.99)] == [1.0, 0.3, 0.09, 0.027, 0.027]
    assert Generator(5, (3, 9, 14), 4)(torch.zeros(2, 5)).shape == (2, 3, 9, 14)


# --- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["scores", "logits"])
def test_every_query_is_counted_and_training_stops_at_the_budget(victim: str, mode: str) -> None:
    model, data = fitted(victim, 5 * STEP + STEP - 1, mode)
    assert model.cost == STEP
    assert model.steps_done == 5
    assert data.facts()["queries"] == 5 * STEP
    assert model.trainer.should_stop


def test_both_networks_learn(victim: str) -> None:
    model, data = fitted(victim, 2 * STEP)
    before = made(data)
    for part in ("net", "generator"):
        pairs = zip(getattr(model, part).parameters(), getattr(before, part).parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs), part


def test_the_generator_parts_the_networks(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a surrogate that stands still, what it makes comes to be farther from the victim."""

    def bright(self: DataFree, images: Tensor, request: str) -> Tensor:
        first = images.flatten(1).float().mean(1, keepdim=True) / 25
        return torch.cat([first, -first, torch.zeros(len(images), 8)], 1)

    monkeypatch.setattr(DataFree, "logits", bright)
    data = DataFree(Digits(batch_size=50), LocalOracle(victim), 60 * 16 * 3, seed=2)
    torch.manual_seed(1)
    model: DFME = mlp(
        data, DFME, batch=16, surrogate_updates=1, generator_width=4, latent=10, generator_lr=0.01,
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip

    def apart() -> float:
        with torch.no_grad():
            images = as_bytes(model.generator(torch.randn(64, 10, generator=torch.Generator().manual_seed(0))))
            return float(distance(model(images), bright(data, images, "")).mean())

    before = apart()
    tiny_trainer(max_epochs=3, limit_val_batches=0).fit(model, data)
    assert model.steps_done == 60
    assert apart() > 1.3 * before


def test_a_resumed_run_pays_for_nothing_twice_and_ends_the_same(victim: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=8, save_top_k=1)  # two steps of four
    whole, data = fitted(victim, 5 * STEP, enable_checkpointing=True, callbacks=[saving], max_steps=8)
    assert whole.steps_done == 2
    torch.manual_seed(9)
    again = DataFree(Digits(), LocalOracle(victim), 5 * STEP, seed=2)
    model: DFME = made(again)
    path = str(tmp_path / "middle.ckpt")
    tiny_trainer(max_epochs=3, limit_val_batches=0).fit(model, again, ckpt_path=path, weights_only=True)
    assert model.steps_done == 5
    assert again.facts()["queries"] == 5 * STEP, "the two steps before were paid for by the same client"
    assert again._run == data._run
    undisturbed, _ = fitted(victim, 5 * STEP)
    assert torch.equal(state(undisturbed), state(model))
    # from the checkpoint once more: all that is asked was answered before
    third = DataFree(Digits(), LocalOracle(victim), 5 * STEP, seed=2)
    repeated = made(third)
    tiny_trainer(max_epochs=3, limit_val_batches=0).fit(repeated, third, ckpt_path=path, weights_only=True)
    assert third.facts()["queries"] == 5 * STEP
    assert torch.equal(state(repeated), state(model))


def test_the_task_s_images_have_no_influence(victim: str) -> None:
    model, data = fitted(victim, 2 * STEP)
    assert int(data.train_set.labels.max()) == -1
    rows = torch.arange(len(data.train_set))
    assert not torch.equal(data.train_set.images_at(rows), data.base.train_set.images_at(rows))
    assert len(model.trainer.datamodule.train_set) == len(data.base.train_set)  # type: ignore[attr-defined]


def test_what_is_refused(victim: str) -> None:
    with refused("mode = 'top_k'", "scores or logits"):
        DataFree(Digits(), LocalOracle(victim, "top_k", 3))
    with refused("mode = 'label'", "DFME", "scores or logits"):
        fitted(victim, STEP, "label")
    with refused(f"budget = {STEP - 1}", f"costs {STEP} queries"):
        fitted(victim, STEP - 1)
    with refused("DataFree", "Digits"):
        tiny_trainer(max_epochs=1).fit(made(DataFree(Digits(), LocalOracle(victim))), Digits())
    with refused("epsilon = 0"):
        mlp(Digits(), DFME, epsilon=0)
