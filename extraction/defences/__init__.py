"""What an oracle does to its scores before it shows them: the defences that perturb answers.

Each is a function of scores, a pure one but for a seed: `Perturbation`. Fewer answers – labels alone, the k likeliest –
are not here: they are the oracle's answer mode. And `PRADA`, which looks at queries and flags a client.
"""

from __future__ import annotations

from extraction.defences.gaussian_noise import GaussianNoise
from extraction.defences.perturbation import Perturbation
from extraction.defences.prada import PRADA
from extraction.defences.reverse_sigmoid import ReverseSigmoid
from extraction.defences.rounding import Rounding

__all__ = ["PRADA", "GaussianNoise", "Perturbation", "ReverseSigmoid", "Rounding"]
