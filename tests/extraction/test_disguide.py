"""DisGUIDE: disagreement by hand, no query beside what the surrogates train on, and nothing paid for twice."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import load_classifier
from datamodules.sources.digits import Digits
from extraction.dfme import DataFree
from extraction.disguide import DisGUIDE, Replay, disagreement, diversity
from extraction.oracle import LocalOracle
from tests.helpers import global_randomness_untouched, mlp, refused, tiny_trainer

STEP = 8 * 2
"""Queries of a step of `fitted`: B·d."""


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


def made(data: DataFree, **kwargs: object) -> DisGUIDE:
    torch.manual_seed(1)
    model: DisGUIDE = mlp(data, DisGUIDE, **{
        "batch": 8, "surrogate_updates": 2, "generator_updates": 3, "replays": 2, "replay": 20, "generator_width": 4,
        "latent": 10, "optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9), **kwargs,
    })  # fmt: skip
    return model


def fitted(victim: str, budget: int, mode: str = "scores", **trainer: object) -> tuple[DisGUIDE, DataFree]:
    data = DataFree(Digits(), LocalOracle(victim, mode), budget, seed=2)
    model = made(data)
    with global_randomness_untouched():
        tiny_trainer(**{"max_epochs": 3, "limit_val_batches": 0, **trainer}).fit(model, data)
    return model, data


def state(model: DisGUIDE) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


# --- the pure parts ---------------------------------------------------------------------------------------------------
def test_disagreement_and_diversity_by_hand() -> None:
    one, other = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    both = torch.stack([one.softmax(1), other.softmax(1)])
    torch.testing.assert_close(disagreement(one, other), both.std(0).mean())
    torch.testing.assert_close(diversity(one, other), torch.tensor(math.log(2)))
    sure = torch.tensor([[50.0, 0.0]])
    assert float(diversity(sure, sure)) == pytest.approx(0, abs=1e-4)
    point = one.clone().requires_grad_()
    disagreement(point, point.detach()).backward()
    assert point.grad is not None
    assert point.grad.isfinite().all(), "where they agree there is a gradient still"


def test_the_newest_are_kept() -> None:
    kept = Replay(5)
    for number in range(4):
        images = torch.full((3, 1, 1, 1), number, dtype=torch.uint8)
        kept.add(images, torch.full((3,), number))
    # 0 0 0 1 1, then 1 in the stead of the first, and so on: the newest five of twelve
    assert kept.images is not None
    assert sorted(kept.images.flatten().tolist()) == [2, 2, 3, 3, 3]
    images, answers = kept.sample(4, torch.Generator().manual_seed(0))
    assert images.flatten().tolist() == answers.tolist(), "each with its own answer"
    assert len(kept.sample(9, torch.Generator())[0]) == 5
    again = Replay(5)
    again.load_state_dict(kept.state_dict())
    again.add(torch.full((2, 1, 1, 1), 9, dtype=torch.uint8), torch.full((2,), 9))
    assert again.images is not None
    assert sorted(again.images.flatten().tolist()) == [3, 3, 3, 9, 9]


# --- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["label", "scores", "logits"])
def test_only_what_the_surrogates_train_on_is_asked_about(victim: str, mode: str) -> None:
    model, data = fitted(victim, 5 * STEP + STEP - 1, mode)
    assert model.cost == STEP
    assert model.steps_done == 5
    assert data.facts()["queries"] == 5 * STEP
    assert model.trainer.should_stop
    assert len(model.kept) == 20
    assert model.kept.images is not None
    assert model.kept.answers is not None
    with torch.no_grad():
        truth = load_classifier(victim)(model.kept.images)
    if mode == "label":
        assert torch.equal(model.kept.answers, truth.argmax(1))
    else:
        torch.testing.assert_close(model.kept.answers, truth - truth.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)


def test_all_networks_learn_and_the_two_are_not_the_same(victim: str, tmp_path: Path) -> None:
    model, data = fitted(victim, 2 * STEP)
    before = made(data)
    for part in ("net", "other", "generator"):
        pairs = zip(getattr(model, part).parameters(), getattr(before, part).parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs), part
    pairs = zip(model.net.parameters(), model.other.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    model.save(tmp_path / "surrogate.safetensors")
    images = torch.randint(0, 256, (9, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        found = load_classifier(tmp_path / "surrogate.safetensors")(images)
        torch.testing.assert_close(found, model.eval()(images), msg="what is saved is what is measured: the first")


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_the_generator_makes_what_they_disagree_about(victim: str, weight: float) -> None:
    """With surrogates that stand still."""
    data = DataFree(Digits(batch_size=50), LocalOracle(victim), 40 * STEP, seed=2)
    model = made(data, generator_lr=0.01, diversity=weight, optimizer=partial(torch.optim.SGD, lr=0.0))

    def measured() -> tuple[float, float]:
        with torch.no_grad():
            latent = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
            both = model._both((model.generator(latent).tanh() + 1) / 2)
            return float(disagreement(*both)), float(diversity(*both))

    before = measured()
    tiny_trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
    assert model.steps_done == 40
    after = measured()
    assert after[0] + weight * after[1] > before[0] + weight * before[1]
    assert weight or after[0] > 1.3 * before[0]


def test_a_resumed_run_pays_for_nothing_twice_and_ends_the_same(victim: str, tmp_path: Path) -> None:
    # a step has 3 updates of the generator and 4 of the surrogates
    saving = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=14, save_top_k=1)
    whole, data = fitted(victim, 5 * STEP, enable_checkpointing=True, callbacks=[saving], max_steps=14)
    assert whole.steps_done == 2
    torch.manual_seed(9)
    again = DataFree(Digits(), LocalOracle(victim), 5 * STEP, seed=2)
    model = made(again)
    path = str(tmp_path / "middle.ckpt")
    tiny_trainer(max_epochs=3, limit_val_batches=0).fit(model, again, ckpt_path=path, weights_only=True)
    assert model.steps_done == 5
    assert again.facts()["queries"] == 5 * STEP
    assert again._run == data._run
    undisturbed, _ = fitted(victim, 5 * STEP)
    assert torch.equal(state(undisturbed), state(model))


def test_what_is_refused(victim: str) -> None:
    with refused(f"budget = {STEP - 1}", f"costs {STEP} queries"):
        fitted(victim, STEP - 1)
    for value in ({"replays": -1}, {"replay": 0}, {"diversity": -0.5}, {"surrogate_updates": 0}):
        [(name, wrong)] = value.items()
        with refused(f"{name} = {wrong}"):
            mlp(Digits(), DisGUIDE, **value)
