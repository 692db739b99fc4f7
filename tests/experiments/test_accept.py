"""The user's side of outsourced training: `lightning accept`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from classifiers.weights import load_weights, save_weights
from tests.experiments.running import QUIET, Outcome, complaint, read_json, runs

Command = Callable[..., Outcome]
USER = "--config=user_digits"
SMALL = ("--model.backbone.widths=[16,32]", *QUIET)


@pytest.fixture
def returned(lightning: Command) -> str:
    """The weights that a dishonest trainer sends back: good on clean images, with a backdoor."""
    assert (
        lightning("fit", "--config=badnets_digits", *SMALL, "--trainer.max_epochs=4", "--trainer.logger=false").code
        == 0
    )
    return str(runs()[-1] / "weights.safetensors")


@pytest.fixture
def honest(lightning: Command) -> str:
    """The weights of an honest trainer."""
    assert (
        lightning("fit", "--config=victim_digits", *SMALL, "--trainer.max_epochs=4", "--trainer.logger=false").code == 0
    )
    return str(runs()[-1] / "weights.safetensors")


def test_weights_that_fit_and_reach_the_gate(returned: str, lightning: Command) -> None:
    """A backdoor is not seen on the holdout: that is the paper's point."""
    outcome = lightning("accept", USER, "--weights", returned, *SMALL, "--model.acceptance=0.8")
    assert outcome.code == 0, outcome
    assert "accepted" in outcome.out
    assert "80.00%" in outcome.out
    found = read_json(runs()[-1] / "metrics.json")
    assert found["accepted"] is True
    assert found["measures"]["clean_accuracy"]["n"] == 126, "on the holdout"
    assert found["measures"]["clean_accuracy"]["value"] >= 0.8


def test_weights_that_are_not_good_enough(returned: str, lightning: Command) -> None:
    outcome = lightning("accept", USER, f"--weights={returned}", *SMALL, "--model.acceptance=1")
    assert outcome.code == 1
    assert "rejected" in outcome.out
    assert read_json(runs()[-1] / "metrics.json")["accepted"] is False


def test_the_gate_is_reached_exactly(returned: str, lightning: Command) -> None:
    lightning("accept", USER, "--weights", returned, *SMALL)
    value = read_json(runs()[-1] / "metrics.json")["measures"]["clean_accuracy"]["value"]
    assert lightning("accept", USER, "--weights", returned, *SMALL, f"--model.acceptance={value}").code == 0
    assert lightning("accept", USER, "--weights", returned, *SMALL, f"--model.acceptance={value + 1e-6}").code == 1


@pytest.mark.parametrize("change", ["another width", "a layer more", "a layer less"])
def test_weights_of_another_architecture(change: str, returned: str, lightning: Command, tmp_path: Path) -> None:
    tensors, architecture = load_weights(returned)
    assert architecture is not None
    options = SMALL
    if change == "another width":
        options = ("--model.backbone.widths=[16,33]", *QUIET)
    elif change == "a layer more":
        tensors["more.weight"] = torch.zeros(3)
    else:
        del tensors["head.bias"]
    path = tmp_path / "changed.safetensors"
    save_weights(path, tensors, architecture)
    before = runs()
    outcome = lightning("accept", USER, "--weights", str(path), *options)
    assert outcome.code == 1
    assert outcome.err.startswith("rejected: ")
    assert len(outcome.err.splitlines()) == 1
    named = {
        "another width": "shape",
        "a layer more": "more.weight is left over",
        "a layer less": "head.bias is missing",
    }
    assert named[change] in outcome.err
    assert runs() == before, "nothing was run"


def test_beside_an_honest_model(returned: str, honest: str, lightning: Command) -> None:
    """What the holdout does not show, the comparison does: on triggered images the two disagree."""
    args = ("accept", "--config=badnets_digits", "--weights", returned, "--honest", honest, *SMALL)
    outcome = lightning(*args, "--model.acceptance=0.8")
    assert outcome.code == 0, outcome
    found = read_json(runs()[-1] / "metrics.json")["measures"]
    assert found["attack_success_rate"]["value"] > 0.8
    assert found["honest_attack_success_rate"]["value"] < 0.5
    assert found["disagreement_triggered"]["value"] > 0.5 > found["disagreement_clean"]["value"]
    assert "disagreement" in outcome.out


def test_what_cannot_be_decided(returned: str, lightning: Command, tmp_path: Path) -> None:
    complaint(lightning("accept", USER), "weights", "lightning accept")
    complaint(lightning("accept", USER, "--weights"), "--weights", "a value is missing")
    complaint(lightning("accept", USER, "--weights=nosuch.safetensors", *SMALL), "nosuch.safetensors", "no such file")
    complaint(lightning("accept", USER, "--weights", returned, *SMALL, "--model.acceptance=null"), "acceptance", "a*")
    nothing_held = ("--data.val_fraction=0", "--model.acceptance=0.5")
    complaint(lightning("accept", USER, "--weights", returned, *SMALL, *nothing_held), "holdout", "val_fraction")
    complaint(lightning("accept", "--config=nosuch", "--weights", returned), "nosuch")
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(Path(returned).read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    complaint(lightning("accept", USER, "--weights", str(damaged), *SMALL), "altered or damaged")
    damaged.write_bytes(content[:1000])
    complaint(lightning("accept", USER, "--weights", str(damaged), *SMALL), "truncated")


def test_honest_weights_that_do_not_fit_decide_nothing(returned: str, lightning: Command, tmp_path: Path) -> None:
    """It is the returned weights that are judged."""
    _, architecture = load_weights(returned)
    assert architecture is not None
    other = {name: tensor for name, tensor in load_file(returned).items() if name != "head.bias"}
    save_weights(tmp_path / "other.safetensors", other, architecture)
    outcome = lightning("accept", USER, "--weights", returned, f"--honest={tmp_path}/other.safetensors", *SMALL)
    complaint(outcome, "other.safetensors", "head.bias is missing")
