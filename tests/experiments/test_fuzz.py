"""A few of the values that nobody would write; `make fuzz` tries them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import fuzz
from tests.experiments.running import Outcome

EACH = 12
"""Of the pairs of key and value of a config."""


@pytest.mark.parametrize("config", ["badnets_digits", "victim_digits"])
def test_a_value_that_nobody_would_write(config: str, lightning: Callable[..., Outcome], here: Path) -> None:
    fuzz.prepare(here)
    pairs = [(key, value) for key in fuzz.keys_of(config) for value in fuzz.VALUES]
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:EACH].tolist()
    found = {pairs[row]: fuzz.outcome(config, *pairs[row]) for row in chosen}
    assert not {pair: what for pair, what in found.items() if what is not None}
