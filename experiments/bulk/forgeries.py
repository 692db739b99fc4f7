"""False claims: what a claimant without a mark can show of somebody's model, and what a strict judge makes of it.

The judge brings all that `lightning check-transcript` takes: the verification key that was published before, a nonce of
his own, how many triggers he wants opened, begun.json where labels come from a beacon, and his own α. He is led astray
if he then says *owned*, and the verdict says of itself that it withstands false claims.

Claimants know everything that is published, the model, and, where a nonce is asked for, the nonce; they sign what they
like. None of them has marked the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from classifiers.classifier import ImageClassifier
from classifiers.weights import content_hash, load_weights
from datamodules.errors import InputError, bad, did_you_mean
from experiments.bulk.fitting import loaded
from experiments.bulk.watermarks import black_box, plain
from watermark import canonical, derive, keys, transcript
from watermark.derive import Images
from watermark.keys import MarkingKey, VerificationKey, keygen
from watermark.transcript import Judge
from watermark.verify import Ask, verify

_BEACON = b"a beacon after it"


def forged(
    folder: Path,
    seed: int,
    *,
    weights: str,
    forgery: str,
    own: str = "",
    second: str = "",
    tries: int = 1024,
    n: int = 100,
    **models: Any,
) -> list[dict[str, Any]]:
    """A claimant without a mark tries to have one verified on somebody's model.

    Args:
        folder: Of the cell.
        seed: Of his images, and of the judge's nonce.
        weights: Of the model that he claims.
        forgery: One of `FORGERIES`.
        own: Weights of a model of his own; only ``transferred`` needs it.
        second: Of another one; empty: he has one only.
        tries: Seeds that are ground; a power of two.
        n: Triggers.
        models: Grid values that have done their work.

    Returns:
        One row: the verdict (``refused`` where the transcript does not hold, or is not what the judge asked for), what
        it says of false claims, and ``wins``: whether the judge is led astray.

    Raises:
        InputError: If there is no such forgery.
    """
    if forgery not in FORGERIES:
        raise bad("forgery", forgery, f"choose one of {', '.join(FORGERIES)}{did_you_mean(forgery, FORGERIES)}")
    for name in ("key", "edited", "owner"):  # of a cell that was cut off
        shutil.rmtree(folder / name, ignore_errors=True)
    claimant = _Claimant(folder, seed, weights, [loaded(each) for each in (own, second) if each], n, tries)
    data, by = FORGERIES[forgery](claimant)
    try:
        result = transcript.check(data, by=by).result
    except InputError as error:
        return [{"verdict": "refused", "claims": str(error), "resistance": transcript.NONE, "wins": False}]
    wins = bool(result.owned and result.resistance != transcript.NONE)
    row = {**plain(result), "claims": result.claims, "resistance": result.resistance, "wins": wins}
    return [{**row, **claimant.also}]


class _Claimant:
    """Who claims a model.

    Attributes:
        key: The folder of his key.
        ask: The model that he claims.
        also: What else is to be reported.
    """

    def __init__(
        self, folder: Path, seed: int, weights: str, own: Sequence[ImageClassifier], n: int, tries: int
    ) -> None:
        self.folder, self.seed, self.n, self.tries, self.own = folder, seed, n, tries, own
        self.model = loaded(weights)
        self.name = content_hash(load_weights(weights)[0])
        self.key = folder / "key"
        self.ask = black_box(self.model)
        self.also: dict[str, Any] = {}
        self.secret = hashlib.sha256(f"claimant {seed}".encode()).digest()
        self.nonce = hashlib.sha256(f"the judge's {seed}".encode()).digest()

    def keygen(self, **more: Any) -> None:
        """Make his key."""
        keygen(self.key, **{"classes": self.model.num_classes, "shape": self.model.image_shape, "n": self.n, **more})

    def publicly(self, ask: Ask | None = None, begun: bytes = b"") -> tuple[bytes, Judge]:
        """What a public verification comes to, and its judge."""
        given = ask or self.ask
        made = verify(
            self.key, given, self.name, "in a study", mode="public", nonce=self.nonce, count=self.n // 2
        ).transcript  # fmt: skip
        return made, self.judge(begun)

    def judge(self, begun: bytes = b"") -> Judge:
        """Who asked for half of the triggers."""
        digest = VerificationKey.read(self.key).digest
        return Judge(digest, self.nonce, self.n // 2, begun, transcript.LEAST_ALPHA_LOG2)

    def revealed(self) -> tuple[bytes, Judge]:
        """What a verification comes to that gives the seed away, and its judge."""
        made = verify(self.key, self.ask, self.name, "in a study", mode="revealed").transcript
        digest = VerificationKey.read(self.key).digest
        return made, Judge(digest, alpha_log2=transcript.LEAST_ALPHA_LOG2)

    def signed(self, data: bytes, **changes: Any) -> bytes:
        """A transcript with other fields, signed by him."""
        value = {**json.loads(data), **changes}
        del value["signature"]
        signature = MarkingKey.read(self.key).sign(transcript.SIGNED, canonical.encode(value)).hex()
        return canonical.encode({**value, "signature": signature})

    def labels(self) -> list[int]:
        """Those of a key of his secret."""
        return derive.labels(keys.seed_secret(self.secret), [-1] * self.n, self.model.num_classes)

    def ground(self) -> bytes:
        """Of many seeds, that whose labels the model gives most often."""
        best, most = b"", -1
        for number in range(self.tries):
            secret = f"ground {self.seed} {number}".encode().ljust(32, b"\0")
            labels = derive.labels(keys.seed_secret(secret), [-1] * self.n, self.model.num_classes)
            said = self.ask(derive.abstract(secret, self.n, self.model.image_shape))
            hits = sum(a == b for a, b in zip(said, labels, strict=True))
            if hits > most:
                best, most = secret, hits
        return best


def _in_advance(claimant: _Claimant) -> tuple[bytes, Judge]:
    claimant.keygen()
    return claimant.publicly()


def _ground(claimant: _Claimant) -> tuple[bytes, Judge]:
    claimant.keygen(seed=claimant.ground(), grinding_log2=(claimant.tries - 1).bit_length())
    return claimant.revealed()


def _undeclared(claimant: _Claimant) -> tuple[bytes, Judge]:
    """He says that he tried one key, and sets an α that the best of many reaches."""
    claimant.keygen(seed=claimant.ground(), alpha_log2=8)
    return claimant.revealed()


def _chosen(claimant: _Claimant) -> tuple[bytes, Judge]:
    """Images that the model already calls as the labels are."""
    images = _found(claimant.ask, claimant.labels(), claimant.seed, claimant.model.image_shape)
    claimant.keygen(source="unrelated", images=images, seed=claimant.secret)
    return claimant.publicly()


def _adversarial(claimant: _Claimant) -> tuple[bytes, Judge]:
    """Images that were changed until the model does (Liu et al., USENIX Security 2024)."""
    images = _changed([claimant.model], claimant.labels(), claimant.seed)
    claimant.keygen(source="unrelated", images=images, seed=claimant.secret)
    return claimant.publicly()


def _transferred(claimant: _Claimant) -> tuple[bytes, Judge]:
    """The same, made in advance on models of his own: the key is older than the model that he claims."""
    if not claimant.own:
        raise bad("own", "", "a claimant who prepares images needs a model of his own")
    images = _changed(claimant.own, claimant.labels(), claimant.seed)
    claimant.keygen(source="unrelated", images=images, seed=claimant.secret)
    return claimant.publicly()


def _beacon(claimant: _Claimant) -> tuple[bytes, Judge]:
    """Chosen images, and labels from a beacon that came later."""
    images = _found(claimant.ask, claimant.labels(), claimant.seed, claimant.model.image_shape)
    claimant.keygen(source="unrelated", images=images, beacon_source="the study", beacon_round="1")
    begun = (claimant.key / keys.BEGUN).read_bytes()
    keys.finish(claimant.key, _BEACON)
    return claimant.publicly(begun=begun)


def _truths(claimant: _Claimant) -> tuple[bytes, Judge]:
    """After the beacon he says of each image that such a class is true as makes the model's answer its label."""
    images = _found(claimant.ask, claimant.labels(), claimant.seed, claimant.model.image_shape)
    said, classes = claimant.ask(images), claimant.model.num_classes
    begin: dict[str, Any] = {
        "source": "images", "images": images, "seed": claimant.secret, "beacon_source": "the study",
        "beacon_round": "1",
    }  # fmt: skip
    claimant.keygen(truths=[(answer + 1) % classes for answer in said], **begin)
    first = (claimant.key / keys.BEGUN).read_bytes()
    timestamped = bytes.fromhex(json.loads(first)["trigger_root"])
    drawn = [derive.labels(keys.beacon_secret(_BEACON, timestamped), [truth] * claimant.n, classes)
             for truth in range(classes)]  # fmt: skip
    edited = [
        next((truth for truth in range(classes) if drawn[truth][at] == answer), (answer + 1) % classes)
        for at, answer in enumerate(said)
    ]
    claimant.key = claimant.folder / "edited"
    claimant.keygen(truths=edited, **begin)
    keys.finish(claimant.key, _BEACON)
    return claimant.publicly(begun=first)


def _burnt(claimant: _Claimant) -> tuple[bytes, Judge]:
    """He calls triggers burnt that the model does not give his labels to, as many as leave the number asked for."""
    claimant.keygen()
    key = MarkingKey.read(claimant.key)
    pairs = enumerate(zip(key.labels(), claimant.ask(key.images()), strict=True))
    misses = [index for index, (label, answer) in pairs if label != answer]
    keys.take(claimant.key, lambda _: misses[: claimant.n - claimant.n // 2])
    return claimant.publicly()


def _replayed(claimant: _Claimant) -> tuple[bytes, Judge]:
    """What the owner showed, under the claimant's key."""
    claimant.keygen()
    own, claimant.key = claimant.key, claimant.folder / "owner"
    claimant.keygen()
    key = MarkingKey.read(claimant.key)
    known = {image.tobytes(): label for image, label in zip(key.images(), key.labels(), strict=True)}
    shown, _ = claimant.publicly(lambda images: [known[image.tobytes()] for image in images])
    claimant.key = own
    vk = canonical.decode(VerificationKey.read(own).to_bytes(), "vk")
    return claimant.signed(shown, vk=vk), claimant.judge()


def _relabelled(claimant: _Claimant) -> tuple[bytes, Judge]:
    """His own openings, with the labels that the model gives."""
    claimant.keygen()
    shown, by = claimant.publicly()
    value = json.loads(shown)
    pairs = zip(value["openings"], value["answers"], strict=True)
    return claimant.signed(shown, openings=[{**opening, "label": answer} for opening, answer in pairs]), by


def _second(claimant: _Claimant) -> tuple[bytes, Judge]:
    """He marks a copy, and claims the original."""
    claimant.keygen()
    key, copied = MarkingKey.read(claimant.key), copy.deepcopy(claimant.model)
    images = torch.from_numpy(key.images()).to(copied.device)
    labels = torch.tensor(key.labels(), device=copied.device)
    optimizer = torch.optim.Adam(copied.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(copied(images), labels).backward()
        optimizer.step()
    said = black_box(copied)(key.images())
    claimant.also["matches_of_the_copy"] = sum(a == b for a, b in zip(said, key.labels(), strict=True))
    return claimant.publicly()


FORGERIES: dict[str, Callable[[_Claimant], tuple[bytes, Judge]]] = {
    "in advance": _in_advance,
    "ground": _ground,
    "ground, undeclared": _undeclared,
    "chosen": _chosen,
    "adversarial": _adversarial,
    "transferred": _transferred,
    "beacon": _beacon,
    "truths edited": _truths,
    "misses burnt": _burnt,
    "replayed": _replayed,
    "relabelled": _relabelled,
    "second mark": _second,
}
"""What a claimant does, by name: a key made without seeing the model; the best of many seeds, declared or not; images
for which it says what the labels are, found, or made by its gradient, or made in advance by that of his own models;
chosen images with labels from a later beacon, and with true classes edited after it; misses called burnt; another
owner's openings; labels altered in his own; a mark that he put into a copy."""


def _found(ask: Ask, labels: Sequence[int], seed: int, shape: tuple[int, int, int]) -> Images:
    """Images that a model calls as one likes."""
    secret = f"pool {seed}".encode().ljust(32, b"\0")
    pool = np.concatenate([derive.abstract(secret + bytes([part]), 500, shape) for part in range(20)])
    said = np.array(ask(pool))
    used: dict[int, None] = {}
    for label in labels:
        at = next((int(at) for at in np.flatnonzero(said == label) if int(at) not in used), None)
        if at is None:  # it hardly ever says this: any other image
            at = next(at for at in range(len(pool)) if at not in used)
        used[at] = None
    return pool[list(used)]


def _changed(models: Sequence[ImageClassifier], labels: Sequence[int], seed: int) -> Images:
    """Images that were changed until all of some models call them as one likes, with some noise on them, too."""
    device, shape = models[0].device, models[0].image_shape
    wanted = torch.tensor(labels, device=device)
    secret = f"pool {seed}".encode().ljust(32, b"\0")
    images = torch.from_numpy(derive.noise(secret, len(labels), shape)).to(device).float() / 255
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(200):
        images.requires_grad_(True)
        shaken = (images + 0.1 * torch.randn(images.shape, generator=generator, device=device)).clamp(0, 1)
        loss = sum(F.cross_entropy(model(shaken), wanted) for model in models)
        (slope,) = torch.autograd.grad(loss, images)  # type: ignore[arg-type]
        images = (images.detach() - slope.sign() / 50).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).cpu().numpy()
