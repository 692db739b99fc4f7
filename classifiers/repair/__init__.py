"""Model repair: what takes a backdoor out of a trained classifier, and so a watermark too.

Fine-tuning needs nothing of its own: `ImageClassifier` starts from ``weights``, with a ``new_head`` or with all but the
last layer ``frozen``, on a clean `datamodules.share.Share`:

* FTLL, the last layer: ``frozen: true``; FTAL, all layers: as it is;
* RTLL, the last layer anew: ``frozen: true, new_head: true``; RTAL, and then all: ``new_head: true``.
"""

from classifiers.repair.pruning import FinePruned, Pruned
from classifiers.repair.quantisation import Quantised
from classifiers.repair.smoothed import Smoothed

__all__ = ["FinePruned", "Pruned", "Quantised", "Smoothed"]
