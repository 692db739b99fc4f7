"""The stages of `extraction_budget`: surrogates by strategy, answer mode and budget, each trained from scratch.

A strategy is an attack's configs and what differs from them. A surrogate of 250 images and one of 60,000 are trained
for as many steps, not epochs, where the stage says how many: an epoch of 250 images would be two steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifiers.classifier import ImageClassifier
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.imageset import ImageSet
from datamodules.measures import wilson
from experiments.bulk.end_to_end import read_source
from experiments.bulk.fitting import fit, loaded, start_config
from experiments.bulk.functionally_equivalent import recover
from extraction.oracle import LocalOracle
from extraction.rounds import Rounds
from extraction.strategy import NEAR_BOUNDARY, Extraction, Similarity

_BATCH = 500


def surrogate(
    folder: Path,
    seed: int,
    *,
    configs: Sequence[str],
    weights: str,
    strategy: str,
    mode: str,
    budget: int,
    overrides: Mapping[str, Any] | None = None,
    variants: Mapping[str, Mapping[str, Any] | None] | None = None,
    steps: int | None = None,
    pretrained: str | None = None,
    far: str | None = None,
    **victims: Any,
) -> list[dict[str, Any]]:
    """Train a surrogate on a victim's answers, and measure it on the task's test images.

    Args:
        folder: Of the cell.
        seed: Of the surrogate and of all choices.
        configs: The attack's: model, trainer, and an `Extraction` from a `LocalOracle`.
        weights: Of the victim.
        strategy: Which of the variants; its name where there are none.
        mode: What the oracle answers.
        budget: Queries, at most.
        overrides: Keys that differ from the configs.
        variants: Strategy → keys that differ besides.
        steps: Of the optimizer, at least: whole epochs; of each round where there are several, counted with all of the
            budget: earlier rounds have fewer images, and fewer steps. None: the config's epochs.
        pretrained: Weights that the surrogate starts from, where its config takes any.
        far: A YAML of images of the same shape that are none of the task's; None: fidelity on such is not measured.
        victims: Grid values that belong to the victim and have done their work.

    Returns:
        One row. ``fidelity`` is on all test images, ``boundary_fidelity`` on those nearest to the victim's boundary,
        ``far_fidelity`` on the test images of `far`.

    Raises:
        InputError: If there is no such variant, or the configs describe something else.
    """
    if variants is not None and strategy not in variants:
        raise bad("strategy", strategy, f"choose one of {', '.join(variants)}{did_you_mean(strategy, variants)}")
    own = (variants or {}).get(strategy) or {}
    asked = {"data.oracle.weights": weights, "data.oracle.mode": mode, "data.budget": budget, "data.seed": seed}
    if pretrained is not None:
        asked["model.weights"] = pretrained
    line = start_config(configs, {**(overrides or {}), **own, **asked}, seed)
    data = line.datamodule
    if not isinstance(data, Extraction) or not isinstance(data.oracle, LocalOracle):
        raise InputError("configs: the data must be an attack on a LocalOracle")
    model = fit(line, data, None if steps is None else epochs_for(steps, data))
    data.setup("test")
    victim, test = loaded(weights), data.test_set
    guessed, truth = _logits(model, test), _logits(victim, test)
    same = guessed.argmax(1) == truth.argmax(1)
    best = truth.softmax(1).topk(2, dim=1).values
    near = (best[:, 0] - best[:, 1]).argsort(stable=True)[: max(1, round(NEAR_BOUNDARY * len(test)))]
    distance = Similarity("kl")
    distance.update(guessed, truth.softmax(1))
    assert data.spent is not None
    elsewhere = {}
    if far is not None:
        other = read_source(far)
        data.check_pool(other, "far")
        other.prepare_data()
        other.setup("test")
        agreed = _logits(model, other.test_set).argmax(1) == _logits(victim, other.test_set).argmax(1)
        elsewhere["far_fidelity"] = _share(agreed)
    return [
        {
            "accuracy": _share(guessed.argmax(1) == test.labels),
            "fidelity": _share(same),
            "boundary_fidelity": _share(same[near]),
            **elsewhere,
            "kl": float(distance.compute()),
            "victim_accuracy": _share(truth.argmax(1) == test.labels),
            "queries": data.spent.queries,
            "samples": data.spent.samples,
            "steps": model.trainer.global_step,
        }
    ]


def epochs_for(steps: int, data: Extraction) -> int:
    """The epochs that make so many steps, or the few more that whole epochs are.

    Args:
        steps: Of a round, where there are several.
        data: An attack; one without rounds asks the victim.

    Raises:
        InputError: If `steps` is below 1.
    """
    if steps < 1:
        raise bad("steps", steps, "give their number, 1 or more")
    if isinstance(data, Rounds):  # what the last round trains on is not known before
        batches, rounds = max(1, data.affordable // data.loading.batch_size), data.rounds
    else:
        data.prepare_data()
        data.setup("fit")
        batches, rounds = len(data.train_batches()), 1
    return -(-steps // batches) * rounds


def equivalent(
    folder: Path, seed: int, *, weights: str, source: str, strategy: str, mode: str, **victims: Any
) -> list[dict[str, Any]]:
    """Recover a network with one hidden layer as `functionally_equivalent` does, and measure it as a surrogate.

    Args:
        folder: Of the cell.
        seed: Of the attack's lines.
        weights: Of an MLP with one hidden layer; its inputs are real numbers.
        source: A YAML of data, on whose test images both are compared.
        strategy: The name of the row.
        mode: ``logits`` or ``scores``.
        victims: Grid values that belong to the victim and have done their work.

    Returns:
        One row; the recovered network is as accurate as the victim where their labels are all the same, and its
        accuracy is left out where they are not, as all measures are where no network was found.
    """
    data = read_source(source)
    data.prepare_data()
    data.setup("test")
    (found,) = recover(folder, seed, weights=weights, source=source, answers=mode)
    own = _share(_logits(loaded(weights), data.test_set).argmax(1) == data.test_set.labels)
    row = {"victim_accuracy": own, "failure": found["failure"]}
    if not found["recovered"]:
        return [row]
    row |= {"fidelity": found["fidelity_test"], "queries": found["queries"], "samples": found["queries"]}
    return [row | ({"accuracy": own} if found["fidelity_test"]["value"] == 1 else {})]


@torch.no_grad()
def _logits(model: ImageClassifier, images: ImageSet) -> Tensor:
    """Of all images, on the CPU."""
    model = model.eval()
    parts = torch.arange(len(images)).split(_BATCH)
    return torch.cat([model(images.images_at(part).to(model.device)).cpu() for part in parts])


def _share(hits: Tensor) -> dict[str, Any]:
    return asdict(wilson(int(hits.sum()), len(hits)))
