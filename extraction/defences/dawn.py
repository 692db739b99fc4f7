"""DAWN: a keyed, tiny share of answers is wrong, always in the same way: a surrogate that learned them is marked.

Paper: Szyller, Atli, Marchal & Asokan, "DAWN: Dynamic Adversarial Watermarking of Neural Networks", ACM MM 2021, arXiv
1906.00830.

Threat model: the attacker trains on the answers, and later shows his surrogate's predictions, as a service does.

Deviations: which images are marked is decided by a keyed hash of their bytes, where the paper hashes what a mapping
makes of them: an image changed by one grey level is another image here. The p-value is exact under the owner's random
key, where the paper bounds the error of a threshold on the share of agreement.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.errors import bad
from datamodules.files import full_path
from datamodules.imageset import fingerprint
from extraction.defences.perturbation import Perturbation

_LEAST = 16


class Verdict(NamedTuple):
    """What a suspect's predictions say.

    Attributes:
        marked: Images whose answers were altered.
        agreeing: Of those, the ones for which the suspect says what was answered.
        p_value: That an independent model agrees as often or more.
    """

    marked: int
    agreeing: int
    p_value: float


class DAWN(Perturbation):
    """Wrong labels for a keyed share of images.

    The top score and that of a keyed wrong class are exchanged, so that every answer mode shows the mark.

    Args:
        key_file: Of a secret of 16 bytes or more; it is read when first needed, and shown nowhere.
        share: Of images that are marked, in (0, 1); the paper's is 0.005 and below.

    Raises:
        InputError: If `share` is out of its range; at the first use, if there is no such key.
    """

    version = 1

    def __init__(self, key_file: str, share: float = 0.005) -> None:
        if not 0 < share < 1:
            raise bad("share", share, "it lies between 0 and 1; the paper's is 0.005")
        self.key_file, self.share = key_file, share

    def identity(self) -> str:
        """Of a hash of the key, and the share."""
        hashed = hashlib.sha256(b"dawn identity" + self._key()).hexdigest()
        return fingerprint("dawn", self.version, hashed, self.share)

    def __call__(self, scores: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        """Scores, two of them exchanged where the image is marked."""
        marked, shift = self.marks(images, scores.shape[1])
        rows = marked.nonzero()[:, 0].to(scores.device)
        top = scores[rows].argmax(1)
        wrong = (top + shift[marked].to(top)) % scores.shape[1]
        found = scores.clone()
        found[rows, top], found[rows, wrong] = scores[rows, wrong], scores[rows, top]
        return found

    def marks(self, images: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Which images are marked, and by how many classes their label is off.

        Args:
            images: uint8 (N, C, H, W).
            classes: K, 2 or more.

        Returns:
            Bool (N,) and int64 (N,) in 1 … K − 1, on the CPU.
        """
        key, bound = self._key(), int(self.share * 2**64)
        digests = [hmac.digest(key, image.numpy().tobytes(), "sha256") for image in images.cpu().contiguous()]
        marked = [int.from_bytes(digest[:8], "big") < bound for digest in digests]
        shift = [1 + int.from_bytes(digest[8:16], "big") % (classes - 1) for digest in digests]
        return torch.tensor(marked, dtype=torch.bool), torch.tensor(shift, dtype=torch.int64)

    def verify(self, images: Tensor, victim: Tensor, predictions: Tensor) -> Verdict:
        """Whether a suspect's predictions agree with the altered answers more often than chance has it.

        The wrong class is drawn by the key from K − 1: a model that never saw the answers agrees with probability
        1 / (K − 1) where it differs from the victim, and never where it does not; 1 / (K − 1) bounds both.

        Args:
            images: uint8 (N, C, H, W), each once: what was asked about, or as much of it as the owner kept.
            victim: Its own scores, unaltered: real (N, K).
            predictions: The suspect's classes: int64 (N,).
        """
        from scipy.stats import binom

        marked, shift = self.marks(images, victim.shape[1])
        altered = (victim.cpu().argmax(1) + shift) % victim.shape[1]
        n, agreeing = int(marked.sum()), int((predictions.cpu() == altered)[marked].sum())
        return Verdict(n, agreeing, float(binom.sf(agreeing - 1, n, 1 / (victim.shape[1] - 1))))

    def _key(self) -> bytes:
        try:
            key = full_path(self.key_file).read_bytes()
        except OSError as error:
            raise bad("key_file", self.key_file, "no such file; make one: head -c 32 /dev/urandom > FILE") from error
        if len(key) < _LEAST:
            raise bad("key_file", self.key_file, f"a key of {_LEAST} bytes or more is expected")
        return key
