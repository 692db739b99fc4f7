"""Victim: the gate reads the holdout alone, and the honest model beside it is measured as it is on its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from classifiers.backbones import MLP
from classifiers.classifier import ImageClassifier
from datamodules.datamodule import ImageDataModule
from datamodules.loading import EvaluationBatches
from datamodules.measures import Interval, Numbered
from datamodules.sources.digits import Digits
from datamodules.triggers import PixelPattern
from poisoning.badnets import BadNets
from poisoning.victim import Victim
from tests.helpers import NormDrop, mlp, refused, tiny_trainer


def trained(data: ImageDataModule, seed: int, steps: int = 30) -> ImageClassifier:
    torch.manual_seed(seed)
    model = mlp(data)
    tiny_trainer(max_steps=steps, limit_val_batches=0).fit(model, data)
    assert isinstance(model, ImageClassifier)
    return model


def measure(model: Any, data: ImageDataModule) -> dict[str, Interval]:
    tiny_trainer().test(model, data, verbose=False)
    measured: dict[str, Interval] = model.measured
    return measured


# --- the gate ---------------------------------------------------------------------------------------------------------
def test_the_gate_reads_the_holdout_and_not_the_test_set() -> None:
    data = BadNets(Digits(), PixelPattern())
    model = trained(data, 0)
    measured = measure(mlp(data, Victim, acceptance=0.5), data)
    state = model.net.state_dict()
    holdout, clean = (measure(model, data)[f"{name}_accuracy"].value for name in ("holdout", "clean"))
    assert holdout != clean
    low, high = sorted((holdout, clean))
    between = (low + high) / 2  # one of the two reaches it
    for acceptance, verdict in [(between, holdout > clean), (holdout, True), (holdout + 1e-9, False), (1e-9, True)]:
        victim = mlp(data, Victim, acceptance=acceptance)
        victim.net.load_state_dict(state)
        assert victim.accepted is None  # nothing measured yet
        measure(victim, data)
        assert victim.accepted is verdict
    assert set(measured) == {"clean_accuracy", "holdout_accuracy", "attack_success_rate", "robust_accuracy"}


def test_the_gate_in_validation() -> None:
    data = Digits()
    model = trained(data, 0)
    holdout = measure(model, data)["holdout_accuracy"].value
    for acceptance, verdict in ((holdout, True), (min(1.0, holdout + 1e-9), False)):
        victim = mlp(data, Victim, acceptance=acceptance)
        victim.net.load_state_dict(model.net.state_dict())
        tiny_trainer().validate(victim, data, verbose=False)
        assert victim.measured["clean_accuracy"].n == len(data.val_set)
        assert victim.accepted is verdict


def test_without_a_gate_there_is_no_verdict() -> None:
    data = Digits()
    victim = mlp(data, Victim)
    measure(victim, data)
    assert victim.accepted is None


def test_a_gate_needs_a_holdout_and_says_so_before_training() -> None:
    data = Digits(val_fraction=0)
    trainer = tiny_trainer(max_steps=1)
    for begin in (trainer.fit, trainer.validate, trainer.test):
        with refused("acceptance = 0.9", "holdout", "val_fraction"):
            begin(mlp(data, Victim, acceptance=0.9), datamodule=data)
    assert trainer.global_step == 0
    assert set(measure(mlp(data, Victim), data)) == {"clean_accuracy"}


@pytest.mark.parametrize("acceptance", [0, -0.1, 1.01, float("nan"), 90])
def test_an_acceptance_out_of_range_is_refused(acceptance: float) -> None:
    with refused(f"acceptance = {acceptance}", "(0, 1]"):
        mlp(Digits(), Victim, acceptance=acceptance)
    assert mlp(Digits(), Victim, acceptance=1.0).acceptance == 1.0


# --- the honest model -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [512, 37])
def test_the_honest_model_beside_is_measured_as_on_its_own(tmp_path: Path, size: int) -> None:
    data = BadNets(Digits(eval_batch_size=size), PixelPattern(), poison_fraction=0.3)
    data.setup()
    honest, poisoned = trained(Digits(), 1, steps=40), trained(data, 2, steps=40)
    path = tmp_path / "honest.safetensors"
    honest.save(path)
    victim = mlp(data, Victim, honest=str(path), acceptance=0.1)
    victim.net.load_state_dict(poisoned.net.state_dict())
    measured, alone = measure(victim, data), measure(poisoned, data)
    own = measure(honest, data)
    for name in ("clean_accuracy", "holdout_accuracy", "attack_success_rate", "robust_accuracy"):
        assert measured[name] == alone[name]  # the honest model changes no number of the victim's
        assert measured[f"honest_{name}"] == own[name]
    # by hand: on how many images of each evaluation do the two answer differently?
    for evaluation in data.evaluations("test"):
        images = evaluation.images.__getitems__(torch.arange(len(evaluation.images))).images
        with torch.no_grad():
            differs = int((poisoned.eval()(images).argmax(1) != honest.eval()(images).argmax(1)).sum())
        found = measured[f"disagreement_{evaluation.name}"]
        assert (found.value, found.n) == (differs / len(images), len(images))
        assert 0 < differs < len(images)
    assert len(measured) == 4 + 4 + 3


def test_the_honest_model_answers_at_rest(tmp_path: Path) -> None:
    """With dropout and BatchNorm its answers would be by chance, and its statistics those of the test images."""
    data, path = Digits(), tmp_path / "honest.safetensors"
    torch.manual_seed(0)
    honest = mlp(data, backbone=NormDrop)
    tiny_trainer(max_steps=20, limit_val_batches=0).fit(honest, data)
    honest.save(path)
    victim = mlp(data, Victim, backbone=NormDrop, honest=str(path))
    alone = measure(honest, data)["clean_accuracy"]
    for begin in (lambda: tiny_trainer(max_steps=1, limit_val_batches=0).fit(victim, data), lambda: None):
        begin()
        assert measure(victim, data)["honest_clean_accuracy"] == alone


def test_padding_rows_agree_with_nobody(tmp_path: Path) -> None:
    data = Digits()
    data.setup()
    trained(data, 1, steps=1).save(tmp_path / "honest.safetensors")
    victim = mlp(data, Victim, honest=str(tmp_path / "honest.safetensors"))
    measure(victim, data)
    whole = victim.measured["disagreement_clean"]
    with torch.inference_mode():
        for metric in victim._beside.values():
            metric.reset()
        for rows in EvaluationBatches(539, 100, 0, 2), EvaluationBatches(539, 100, 1, 2):
            for batch in map(Numbered(data.test_set).__getitems__, rows):
                victim.update_measures("test", 0, batch, victim(batch.images))
    hits, cases = victim._beside["disagreement_clean"].compute().tolist()
    assert (hits / cases, cases) == (whole.value, whole.n)
    assert victim._beside["honest_clean_accuracy"].compute()[1] == 539


def test_disagreement_with_oneself_is_nought_and_in_training_there_is_none(tmp_path: Path) -> None:
    data = Digits()
    model = trained(data, 0)
    path = tmp_path / "honest.safetensors"
    model.save(path)
    victim = mlp(data, Victim, honest=str(path), weights=str(path))
    measured = measure(victim, data)
    assert measured["disagreement_clean"].value == measured["disagreement_holdout"].value == 0
    tiny_trainer(max_epochs=1, limit_train_batches=1).fit(victim, data)
    assert set(victim.measured) == {"clean_accuracy"}
    tiny_trainer().validate(victim, data, verbose=False)
    assert set(victim.measured) == {"clean_accuracy", "honest_clean_accuracy", "disagreement_clean"}


def test_the_honest_model_is_neither_trained_nor_stored(tmp_path: Path) -> None:
    data = Digits()
    path = tmp_path / "honest.safetensors"
    trained(data, 0, steps=2).save(path)
    victim = mlp(data, Victim, honest=str(path))
    plain = mlp(data, Victim)
    assert set(victim.state_dict()) == set(plain.state_dict())
    assert len(list(victim.parameters())) == len(list(plain.parameters()))
    before = {name: tensor.clone() for name, tensor in victim._honest[0].state_dict().items()}
    tiny_trainer(max_steps=3, limit_val_batches=0).fit(victim, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in victim._honest[0].state_dict().items())
    assert not victim._honest[0].training
    assert not any(parameter.requires_grad for parameter in victim._honest[0].parameters())


def test_an_honest_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = Digits()
    with refused("absent.safetensors"):
        mlp(data, Victim, honest=str(tmp_path / "absent.safetensors"))
    mlp(data, backbone=partial(MLP, hidden=[17])).save(tmp_path / "wide.safetensors")
    with refused("wide.safetensors", "MLP", "(17, 64)", "(16, 64)"):
        mlp(data, Victim, honest=str(tmp_path / "wide.safetensors"))
