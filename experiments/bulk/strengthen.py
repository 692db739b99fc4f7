"""The stage of `badnets_transfer` at which the attacker strengthens what he publishes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.datamodule import ImageDataModule
from datamodules.errors import InputError, bad, did_you_mean
from datamodules.rewrite import Rewrite
from experiments.cli import start
from poisoning.badnets import BadNets
from poisoning.strengthen import activations, backdoor_units, strengthen


def strengthened(
    folder: Path,
    seed: int,
    configs: Sequence[str],
    overrides: Mapping[str, Any],
    units: int,
    k: float,
    extractor: str,
    **published: str,
) -> list[dict[str, Any]]:
    """Multiply the backdoor's units by `k` and write weights.safetensors, to be published.

    The units are those whose mean activation the trigger raises most on the attacker's holdout.

    Args:
        folder: Where the weights go.
        seed: Nothing here is drawn.
        configs: The attacker's: his model and his data, with `BadNets` in it.
        overrides: Keys that differ from them.
        units: How many.
        k: The factor; 1 leaves the network as it is.
        extractor: Which of `published` is strengthened.
        published: Weights by name: the backdoored network's, and an honest one's as a control.

    Returns:
        One row: the number of units, and their mean activation on clean and on triggered images, before they were
        multiplied.

    Raises:
        InputError: If there are no weights of that name, no attack or no holdout in the data, or the network's units
            cannot be multiplied.
    """
    if extractor not in published:
        raise bad("extractor", extractor, f"choose one of {', '.join(published)}{did_you_mean(extractor, published)}")
    named = [part for config in configs for part in ("--config", config)]
    options = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    line = start(
        ["fit", *named, *options, f"--model.weights={published[extractor]}"], act=False, keep=False, show=False
    )
    model, attack = line.model.eval(), _attack(line.datamodule)
    attack.prepare_data()
    attack.setup("fit")
    own = attack.val_set
    if not len(own):
        raise InputError("configs: the units are found on the attacker's holdout; set val_fraction above 0")
    clean, triggered = activations(model, own, attack.trigger)
    chosen = backdoor_units(clean, triggered, units)
    some = attack.triggered(own)[0]
    strengthen(model, chosen, k, some.__getitems__(range(min(len(some), 100))).images)
    model.save(folder / "weights.safetensors")
    return [
        {
            "units": units,
            "clean_activation": float(clean[chosen].mean()),
            "triggered_activation": float(triggered[chosen].mean()),
        }
    ]


def _attack(data: ImageDataModule) -> BadNets:
    """The attack among nested datamodules."""
    while not isinstance(data, BadNets):
        if not isinstance(data, Rewrite):
            raise InputError("configs: there is no BadNets in the attacker's data, so there is no trigger")
        data = data.base
    return data
