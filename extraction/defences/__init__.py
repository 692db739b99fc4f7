"""What an oracle does to its scores before it shows them, and how it tells attackers from users.

Each defence is a function of scores, a pure one but for a seed: `Perturbation`. Fewer answers – labels alone, the k
likeliest – are not here: they are the oracle's answer mode. `DAWN` marks whoever trains on the answers. `PRADA` and
`OutOfDistributionShare` look at queries and flag a client.
"""

from __future__ import annotations

from extraction.defences.adaptive_misinformation import AdaptiveMisinformation
from extraction.defences.dawn import DAWN
from extraction.defences.gaussian_noise import GaussianNoise
from extraction.defences.out_of_distribution import OutOfDistributionShare
from extraction.defences.perturbation import Perturbation
from extraction.defences.prada import PRADA
from extraction.defences.prediction_poisoning import PredictionPoisoning
from extraction.defences.reverse_sigmoid import ReverseSigmoid
from extraction.defences.rounding import Rounding

__all__ = [
    "DAWN",
    "PRADA",
    "AdaptiveMisinformation",
    "GaussianNoise",
    "OutOfDistributionShare",
    "Perturbation",
    "PredictionPoisoning",
    "ReverseSigmoid",
    "Rounding",
]
