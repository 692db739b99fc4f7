"""The run's seed: a number, or one by chance that is drawn here, handed to every process and kept."""

from __future__ import annotations

import os
import secrets
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_utilities.core.rank_zero import rank_zero_only

from datamodules.errors import bad

END = 2**32
"""Seeds are whole numbers below this."""


def chosen_seed(given: Any) -> int:
    """The number that `seed_everything` stands for.

    Lightning takes the previous run's number, or else 0, for ``true``: repetitions would all be one run.

    Args:
        given: A number; or True, for one by chance.

    Raises:
        InputError: If it is neither.
    """
    if given is True:
        return _by_chance()
    if given is None or given is False:
        raise bad("seed_everything", given, "give a number, or true for one by chance: a run is to be repeatable")
    if not 0 <= given < END:
        raise bad("seed_everything", given, "give a whole number from 0 to 2³² − 1")
    return int(given)


def _by_chance() -> int:
    """Drawn by the first process; those that Lightning starts get it by the environment."""
    outside = TorchElasticEnvironment.detect() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if outside or (SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", "1")) > 1):
        remedy = "each of the processes, which were not started by this one, would draw another; give a number"
        raise bad("seed_everything", True, remedy)
    if getattr(rank_zero_only, "rank", 0) and "PL_GLOBAL_SEED" in os.environ:
        return int(os.environ["PL_GLOBAL_SEED"])
    return secrets.randbelow(END)
