"""The stages of the watermark studies, on the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.bulk.forgeries import FORGERIES, forged
from experiments.bulk.watermarks import carried, marked, null, panel, removed
from tests.helpers import refused
from watermark import transcript

FAST: dict[str, Any] = {"trainer.max_epochs": 8}


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A marked model, beside its key and the unmarked one, and its row."""
    folder = tmp_path_factory.mktemp("marked")
    (row,) = marked(folder, 0, configs=["watermark_digits"], unmarked=["victim_digits"], overrides=FAST, n=60)
    return folder, row


def test_a_marked_model(cell: tuple[Path, dict[str, Any]]) -> None:
    folder, row = cell
    assert row["verdict"] == "owned"
    assert row["trigger_accuracy"]["n"] == 60
    assert row["unmarked_matches"] < 25
    assert row["lost"] == pytest.approx(row["unmarked_accuracy"]["value"] - row["clean_accuracy"]["value"])
    assert (folder / "key" / "mk.json").stat().st_mode & 0o077 == 0


def test_what_is_left_after_an_attack(cell: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, before = cell
    attacks: dict[str, Any] = {
        "none": {},
        "RTAL": {"configs": ["repair_digits"], "overrides": {"model.new_head": True, "trainer.max_epochs": 2}},
        "steal": {
            "configs": ["knockoff_digits"],
            "weights_at": "data.oracle.weights",
            "overrides": {"data.budget": 500, "trainer.max_epochs": 5},
        },
        "overwrite": {"configs": ["watermark_digits"], "overwrite": True, "overrides": FAST},
        "careful": {"refuse_below": 1.1},
        "random": {"random_below": 1.1},
    }

    def run(attack: str) -> dict[str, Any]:
        place = tmp_path / attack
        place.mkdir()
        given = {"weights": str(folder / "weights.safetensors"), "attacks": attacks, "data": "data/digits.yaml"}
        (row,) = removed(place, 0, attack=attack, **given)
        return row

    none = run("none")
    assert (none["matches"], none["lost"]) == (before["matches"], 0)
    anew = run("RTAL")
    assert anew["replugged_matches"] > 30, "what is inside is still there"
    assert anew["matches"] < anew["replugged_matches"], "and what counts is what the model answers"
    assert run("steal")["log2_p"] > -64
    over = run("overwrite")
    assert over["thief_verdict"] == "owned"
    assert over["thief_on_original"] < 30, "who was first knows both models"
    careful = run("careful")
    assert (careful["verdict"], careful["refused"]) == ("undecided", 60)
    assert run("random")["clean_accuracy"]["value"] < 0.3
    with refused("attack = 'nonne'", "none"):
        removed(tmp_path, 0, weights=str(folder / "weights.safetensors"), attack="nonne", attacks=attacks, data="")


def test_keys_that_have_nothing_to_do_with_a_model_fail(cell: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    weights = str(cell[0] / "unmarked.safetensors")
    (row,) = panel(tmp_path, 0, weights=weights, data="data/digits.yaml", key_count=3, n=50)
    assert (row["keys"], row["verified"]) == (3, 0)
    assert row["most_matches"] < 25
    rows = null(tmp_path, 0, weights=str(cell[0] / "weights.safetensors"), sets=10, draws=100, n=60)
    assert rows[0]["observed"] == rows[0]["binomial"] == 1
    assert rows[-1]["observed"] == 0
    assert all(row["observed"] <= row["binomial"] * 1.3 + 0.05 for row in rows), "the bound is one"
    assert rows[0]["rank_p"] == pytest.approx(1 / 1001), "no decoy does as well as the true key"


OWNED = ("chosen", "adversarial")
REFUSED = ("truths edited", "replayed", "relabelled")


@pytest.mark.parametrize("forgery", [name for name in FORGERIES if name != "transferred"])
def test_no_forgery_wins(cell: tuple[Path, dict[str, Any]], tmp_path: Path, forgery: str) -> None:
    weights = str(cell[0] / "unmarked.safetensors")
    (row,) = forged(tmp_path, 0, weights=weights, forgery=forgery, tries=16, n=60)
    assert not row["wins"]
    expected = "owned" if forgery in OWNED else "refused" if forgery in REFUSED else "not owned"
    assert row["verdict"] == expected, row
    withstands = {"ground": "full", "ground, undeclared": "full", "beacon": "conditional"}
    assert row["resistance"] == withstands.get(forgery, "none")
    if forgery == "ground, undeclared":
        assert "2^0 tried keys are allowed for, and a search through" in row["claims"]
    if forgery == "second mark":
        assert row["matches_of_the_copy"] > 50
        assert row["matches"] < 15
    if forgery == "truths edited":
        assert "other triggers" in row["claims"]


def test_images_made_in_advance_on_own_models_may_match_and_do_not_win(
    cell: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    own = str(cell[0] / "weights.safetensors")
    (row,) = forged(tmp_path, 0, weights=str(cell[0] / "unmarked.safetensors"), forgery="transferred", own=own, n=60)
    assert row["matches"] > 8, "more than chance: what fools one model fools another"
    assert (row["resistance"], row["wins"]) == ("none", False)
    (row,) = forged(tmp_path / "itself", 0, weights=own, forgery="transferred", own=own, n=60)
    assert (row["verdict"], row["wins"]) == ("owned", False)


def test_a_judge_who_brings_less_would_be_led_astray(
    cell: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So `wins` can be true: with labels that were chosen, and a beacon that nobody looked into."""
    claims = transcript.claims
    monkeypatch.setattr(transcript, "claims", lambda *given: ("conditional", claims(*given)[1]))
    (row,) = forged(tmp_path, 0, weights=str(cell[0] / "unmarked.safetensors"), forgery="chosen", n=60)
    assert row["wins"]


def test_an_unknown_forgery(cell: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with refused("forgery = 'grund'", "ground"):
        forged(tmp_path, 0, weights=str(cell[0] / "unmarked.safetensors"), forgery="grund")


def test_what_a_surrogate_inherits(cell: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    weights, base = str(cell[0] / "weights.safetensors"), {"class_path": "Triggered", "init_args": {}}
    base["init_args"] = {"base": "data/digits.yaml", "trigger": {"class_path": "PixelPattern"}, "target_label": 0}  # type: ignore[assignment]
    over = {"data.budget": 500, "trainer.max_epochs": 5, "data.base": base}
    settings: dict[str, Any] = {"labels": {"data.oracle.mode": "label"}}
    given: dict[str, Any] = {"settings": settings, "overrides": over, "configs": ["knockoff_digits"]}
    (row,) = carried(tmp_path, 0, weights=weights, setting="labels", **given)
    assert row["victim_fidelity"]["value"] == 1
    assert {"clean_accuracy", "fidelity", "attack_success_rate", "victim_attack_success_rate", "log2_p"} <= set(row)
