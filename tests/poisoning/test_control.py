"""The control of a sweep: an attack that poisons nothing changes nothing, and has the measures of the attack."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import poisoning
from classifiers.backbones.mlp import MLP
from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError
from datamodules.rewrite import Rewrite
from datamodules.sources.digits import Digits
from datamodules.triggers.patch import Square
from experiments.registry import import_all
from poisoning.adversarial_poison import AdversarialPoison
from poisoning.badnets import BadNets
from poisoning.bullseye_polytope import BullseyePolytope
from poisoning.choosing import choose
from poisoning.feature_collision import FeatureCollision
from poisoning.gradient_matching import GradientMatching
from poisoning.label_flip import LabelFlip
from poisoning.unlearnable import Unlearnable

AMOUNTS = ("poison_fraction", "flip_fraction", "poisons")
AIM = {"target_label": 3, "base_label": 5, "iterations": 1}

CASES: dict[type[Rewrite], list[dict[str, Any]]] = {
    BadNets: [
        {"trigger": Square(2), "mode": mode, "placement": placement}
        for mode in ("add", "replace")
        for placement in ("before", "after")
    ],
    LabelFlip: [{}],
    AdversarialPoison: [{"backbone": MLP}],
    Unlearnable: [{"backbone": MLP}],
    GradientMatching: [{**AIM, "restarts": 1}],
    BullseyePolytope: [AIM],
    FeatureCollision: [AIM],
}


def test_every_attack_that_has_an_amount_is_tried() -> None:
    import_all()
    kinds, todo = set(), [Rewrite]
    while todo:
        kind = todo.pop()
        todo += type.__subclasses__(kind)
        if kind.__module__.startswith(f"{poisoning.__name__}.") and not inspect.isabstract(kind):
            kinds |= {kind} if set(AMOUNTS) & set(inspect.signature(kind.__init__).parameters) else set()
    assert kinds == set(CASES)


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, cases in CASES.items() for number in range(len(cases))]
)
def test_none(kind: type[Rewrite], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    arguments: dict[str, Any] = dict(CASES[kind][number])
    names = inspect.signature(kind.__init__).parameters
    if "weights" in names:
        base = Digits()
        path = tmp_path / "weights.safetensors"
        ImageClassifier(MLP, 10, base.image_shape, base.mean, base.std).save(path)
        arguments["weights"] = str(path)
    (amount,) = set(AMOUNTS) & set(names)

    def made(value: float) -> Rewrite:
        data = kind(Digits(), **{**arguments, amount: value})
        data.prepare_data()
        data.setup()
        return data

    control, attack = made(0), made(2 if amount == "poisons" else 0.01)
    assert control.train_set.digest() == control.base.train_set.digest() != attack.train_set.digest()
    assert sum(len(changes.ids) for changes in control.changes()) == 0 < len(attack.changes()[-1].ids)
    for split in ("val", "test"):
        mine, theirs = ([(e.name, e.images.digest(), [m.name for m in e.measures]) for e in data.evaluations(split)]
                        for data in (control, attack))  # fmt: skip
        assert mine == theirs
    facts, known = control.facts(), attack.facts()
    amounts = ("poisoned", "poisoned_share_of_set", "epsilon_reached", "flipped", amount)
    assert all(facts[name] == 0 for name in amounts if name in facts)
    assert {"poisoned", "flipped"} & set(facts)
    assert facts.get("target_id") == known.get("target_id")
    batch = control.materialise(torch.arange(5))
    assert torch.equal(control.rewrite_batch(batch).images, batch.images)


@pytest.mark.parametrize("n", [2, 7, 1132, 60000])
def test_the_smallest_fraction_that_poisons_one_does(n: int) -> None:
    everything = torch.ones(n, dtype=torch.bool)
    with pytest.raises(InputError, match="rounds to no sample") as caught:
        choose(everything, n, 0.4 / n, "poison_fraction", 0)
    least = float(str(caught.value).rsplit(" ", 1)[-1])
    assert len(choose(everything, n, least, "poison_fraction", 0)) == 1
    assert least <= 0.56 / n, "to two digits"
    assert len(choose(everything, n, 0, "poison_fraction", 0)) == 0


def test_no_set_is_drawn_from_by_mistake() -> None:
    empty = torch.zeros(4, dtype=torch.bool)
    assert len(choose(empty, 4, 0.0, "poison_fraction", 0)) == 0
    with pytest.raises(InputError, match="asks for 2 of 0 eligible"):
        choose(empty, 4, 0.5, "poison_fraction", 0)
