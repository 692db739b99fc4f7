"""KeyGen: a secret marking key, and the verification key that commits to it.

Scheme: Adi, Baum, Cisse, Pinkas & Keshet, "Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by
Backdooring", USENIX Security 2018: mk is a set of triggers with wrong labels and the openings of their commitments, vk
the commitments.

Threat model: whoever has vk learns nothing of the triggers; whoever has mk can neither change it later nor open it as
another one; and what a judge is shown is bound to the owner and to every parameter.

Deviations: vk is one signed Merkle root over the 2n commitments, which can be published and timestamped. Triggers,
labels and openings are derived from one secret seed; they can be shown to be so by revealing it. Labels may come from a
public beacon that is later than the commitment to the triggers and to what is true of them: then nobody could choose
them. Which beacon, and which round of it, is committed to as well: among all public numbers one is to one's liking.

mk.json and vk.json hold canonical JSON. mk.json is for its owner's eyes alone; nothing here ever prints what it holds.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from datamodules.errors import InputError, bad
from datamodules.files import full_path, under_way
from watermark import canonical, derive, merkle, signatures
from watermark.commitments import commit, label_payload, trigger_payload

SOURCES = ("abstract", "noise", "images", "overlay", "unrelated")
"""Where triggers come from; the first two are derived from the seed."""
DERIVED = ("abstract", "noise")
UNTRUE = (*DERIVED, "unrelated")
"""Sources of which no class is true; of any other image one class is, and a key says which."""

PREPROCESSING = "uint8 CHW as stored; the model normalises"

MK, VK, BEGUN, BURNT = "mk.json", "vk.json", "begun.json", "burnt.json"

_MOST_TRIGGERS, _MOST_PIXELS = 4096, 2**25
_MK_FORMAT, _VK_FORMAT, _BURNT_FORMAT = "pharmakon-mk-2", "pharmakon-vk-2", "pharmakon-burnt-2"
_BEGUN_FORMAT = "pharmakon-begun-2"
_TRIGGERS_TAG, _VK_TAG = "triggers", "verification key"


@dataclass(frozen=True)
class Parameters:
    """What every commitment of a key is bound to.

    Attributes:
        owner: The public key that signs, 64 hexadecimal digits.
        n: Triggers.
        classes: K.
        shape: (C, H, W).
        source: One of `SOURCES`.
        generator: Version of `watermark.derive`.
        reference: SHA-256 of the weights of f, which says what the truth is; ``none`` where no class is true.
        misses_allowed: ε·n as a whole number, for the published verdict.
        alpha_log2: α = 2^−alpha_log2: the significance that is asked for.
        grinding_log2: g: the owner may have tried 2^g seeds; it multiplies every p-value.
        labels_from: ``seed``, or ``beacon``: a public number that is later than the commitment to the triggers.
        beacon_source: Which public beacon that is; empty without one.
        beacon_round: Which of its numbers.
        preprocessing: What a model gets.
    """

    owner: str
    n: int
    classes: int
    shape: tuple[int, int, int]
    source: str = "abstract"
    generator: int = derive.VERSION
    reference: str = "none"
    misses_allowed: int = 10
    alpha_log2: int = 64
    grinding_log2: int = 0
    labels_from: str = "seed"
    beacon_source: str = ""
    beacon_round: str = ""
    preprocessing: str = PREPROCESSING

    def __post_init__(self) -> None:
        canonical.unhex(self.owner, "owner", signatures.PUBLIC)
        if not 1 <= self.n <= _MOST_TRIGGERS:
            raise bad("n", self.n, f"a key has 1 to {_MOST_TRIGGERS} triggers; the paper's has 100")
        if not 2 <= self.classes <= 2**31:
            raise bad("classes", self.classes, "a classifier has 2 or more")
        sizes = len(self.shape) == 3 and all(type(size) is int and 1 <= size <= 4096 for size in self.shape)
        if not sizes or min(self.shape[1:]) < 4:
            raise bad("shape", self.shape, "give channels, height and width, the last two 4 or more: 3,32,32")
        if self.n * self.shape[0] * self.shape[1] * self.shape[2] > _MOST_PIXELS:
            raise bad("n", self.n, f"so many triggers of {self.shape} have more than {_MOST_PIXELS} pixels; take fewer")
        if self.source not in SOURCES:
            raise bad("source", self.source, f"choose from {', '.join(SOURCES)}")
        if self.generator != derive.VERSION:
            raise bad("generator", self.generator, f"this release derives by version {derive.VERSION}")
        if self.reference != "none":
            canonical.unhex(self.reference, "reference", 32)
        if not 0 <= self.misses_allowed < self.n:
            raise bad("misses_allowed", self.misses_allowed, f"ε·n must be 0 or more, and below {self.n}")
        if not 1 <= self.alpha_log2 <= 1024:
            raise bad("alpha_log2", self.alpha_log2, "α = 2^−alpha_log2, from 1 to 1024; 64 is the default")
        if not 0 <= self.grinding_log2 <= 256:
            raise bad("grinding_log2", self.grinding_log2, "2^g seeds tried: g is from 0 to 256")
        if self.labels_from not in ("seed", "beacon"):
            raise bad("labels_from", self.labels_from, "choose seed or beacon")
        self._check_named()
        if self.preprocessing != PREPROCESSING:
            raise bad("preprocessing", self.preprocessing, f"this release knows: {PREPROCESSING}")

    def _check_named(self) -> None:
        for name in ("beacon_source", "beacon_round"):
            value = getattr(self, name)
            if bool(value) != (self.labels_from == "beacon"):
                raise bad(name, value, "name the beacon's source and round where labels come from one, and only there")
            canonical.line(value, name)

    def plain(self) -> dict[str, Any]:
        """Itself as plain values."""
        return {each.name: getattr(self, each.name) for each in fields(Parameters)} | {"shape": list(self.shape)}

    @cached_property
    def key_id(self) -> bytes:
        """32 bytes that enter every commitment."""
        return hashlib.sha256(b"pharmakon/watermark/key id\x00" + canonical.encode(self.plain())).digest()


_PARAMETER_KINDS: dict[str, type] = {
    "owner": str, "n": int, "classes": int, "shape": list, "source": str, "generator": int, "reference": str,
    "misses_allowed": int, "alpha_log2": int, "grinding_log2": int, "labels_from": str, "beacon_source": str,
    "beacon_round": str, "preprocessing": str,
}  # fmt: skip


def _parameters(value: Any, what: str) -> Parameters:
    given = canonical.fields(value, what, _PARAMETER_KINDS)
    try:
        return Parameters(**{**given, "shape": tuple(given["shape"])})
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


@dataclass(frozen=True)
class VerificationKey:
    """vk: what an owner publishes.

    Attributes:
        parameters: What all is bound to.
        beacon: Hexadecimal digits of the beacon that labels come from; empty without one.
        trigger_root: Merkle root over the n commitments to triggers and their true classes: 64 hexadecimal digits.
        root: Merkle root over all 2n commitments, those of the triggers first.
        signature: Of the owner, over all of it.
    """

    parameters: Parameters
    beacon: str
    trigger_root: str
    root: str
    signature: str

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`: what a judge or a timestamp names it by."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The content of vk.json."""
        return canonical.encode({**self._signed(), "signature": self.signature})

    @classmethod
    def from_bytes(cls, data: bytes, what: str = VK) -> VerificationKey:
        """Read it, and check its form and its signature.

        Raises:
            InputError: If anything in it is not as the owner signed it.
        """
        kinds: dict[str, type] = dict.fromkeys(("format", "beacon", "trigger_root", "root", "signature"), str)
        value = canonical.fields(canonical.decode(data, what, 2**16), what, {**kinds, "parameters": dict})
        if value["format"] != _VK_FORMAT:
            raise InputError(f"{what}: its format is not {_VK_FORMAT}, which this release reads; make a new key")
        parameters = _parameters(value["parameters"], f"{what}: parameters")
        beacon = canonical.unhex(value["beacon"], f"{what}: beacon")
        if bool(beacon) != (parameters.labels_from == "beacon"):
            raise InputError(f"{what}: a beacon is there if and only if labels come from it")
        for name in ("trigger_root", "root"):
            canonical.unhex(value[name], f"{what}: {name}", 32)
        signature = canonical.unhex(value["signature"], f"{what}: signature", signatures.SIGNATURE)
        key = cls(parameters, value["beacon"], value["trigger_root"], value["root"], value["signature"])
        if not signatures.check(bytes.fromhex(parameters.owner), signature, _VK_TAG, canonical.encode(key._signed())):
            raise InputError(f"{what}: the signature is not the owner's: the key was changed")
        return key

    @classmethod
    def read(cls, path: str | Path) -> VerificationKey:
        """Read vk.json, or that of a key's folder.

        Raises:
            InputError: If there is none, or it is damaged.
        """
        file = full_path(path)
        file = file / VK if file.is_dir() else file
        try:
            data = file.read_bytes()
        except OSError as error:
            raise bad("key", str(path), f"there is no verification key ({_make(path)})") from error
        return cls.from_bytes(data, str(file))

    def _signed(self) -> dict[str, Any]:
        return {
            "format": _VK_FORMAT,
            "parameters": self.parameters.plain(),
            "beacon": self.beacon,
            "trigger_root": self.trigger_root,
            "root": self.root,
        }


@dataclass(frozen=True, repr=False)
class MarkingKey:
    """mk: the secret. It shows nothing of itself, and is never pickled.

    Attributes:
        parameters: As in vk.
        truths: f(t) of each trigger; −1 where no class is true.
        beacon: As in vk.
    """

    parameters: Parameters
    truths: tuple[int, ...]
    beacon: str
    _seed: bytes = field(repr=False)
    _signing: bytes = field(repr=False)
    _given: bytes = field(repr=False)

    def __post_init__(self) -> None:
        parameters, pixels = self.parameters, self._given
        n, classes = parameters.n, parameters.classes
        if len(self._seed) != 32 or len(self._signing) != 32:
            raise InputError("mk: the seed and the signing secret have 32 bytes each")
        if len(self.truths) != n or not all(type(truth) is int and -1 <= truth < classes for truth in self.truths):
            raise InputError(f"mk: truths: one class below {classes}, or -1, is expected for each of {n} triggers")
        if parameters.source in DERIVED and pixels:
            raise InputError(f"mk: {parameters.source} triggers are derived from the seed, and there are images")
        if parameters.source in UNTRUE and set(self.truths) != {-1}:
            raise InputError(f"mk: {parameters.source} triggers have no true class: truths must be -1")
        if parameters.source not in UNTRUE and -1 in self.truths:
            raise InputError(
                f"mk: truths: {parameters.source} triggers have a true class each: give y in the file, or --reference; "
                "of images of another task none is true: --source unrelated"
            )
        if parameters.source not in DERIVED and len(pixels) != n * int(np.prod(parameters.shape)):
            raise InputError(f"mk: images: {n} images of {parameters.shape} are expected")
        if signatures.public(self._signing).hex() != parameters.owner:
            raise InputError("mk: the signing secret is not the owner's")

    def __repr__(self) -> str:
        return f"MarkingKey(n={self.parameters.n}, source={self.parameters.source!r}, secret)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a marking key is not pickled, copied or sent to other processes: pass its folder")

    @classmethod
    def read(cls, folder: str | Path) -> MarkingKey:
        """Read the key of a folder; vk.json must lie beside it, and belong to it.

        Raises:
            InputError: If it is missing, readable by others, damaged, or another key's.
        """
        key = cls._load(full_path(folder))
        vk = VerificationKey.read(folder)
        key.check(vk)
        return key

    def check(self, vk: VerificationKey) -> None:
        """See that a verification key commits to this.

        Raises:
            InputError: If not; it names what differs.
        """
        if vk.parameters != self.parameters:
            names = [each.name for each in fields(Parameters)]
            other = [name for name in names if getattr(vk.parameters, name) != getattr(self.parameters, name)]
            raise InputError(f"mk and vk are of different keys: {', '.join(other)} differ")
        if vk.beacon != self.beacon:
            raise InputError("mk and vk are of different keys: the beacon differs")
        if vk.trigger_root != merkle.root(self.leaves()[: self.parameters.n]).hex():
            raise InputError("mk and vk are of different keys: vk does not commit to these triggers")
        if vk.root != merkle.root(self.leaves()).hex():
            raise InputError("mk and vk are of different keys: vk does not commit to these labels")

    def images(self) -> derive.Images:
        """The triggers: uint8 (n, C, H, W)."""
        parameters = self.parameters
        if parameters.source not in DERIVED:
            return np.frombuffer(self._given, np.uint8).reshape(parameters.n, *parameters.shape).copy()
        return _derived(parameters, self._seed)

    def labels(self) -> list[int]:
        """Their labels, wrong ones: n numbers."""
        return derive.labels(self.label_secret(), self.truths, self.parameters.classes)

    def label_secret(self) -> bytes:
        """What labels are drawn from; with a beacon, nothing secret.

        Raises:
            InputError: If labels come from a beacon, and there is none yet.
        """
        if self.parameters.labels_from == "seed":
            return seed_secret(self._seed)
        if not self.beacon:
            raise InputError("mk: its labels wait for a beacon: lightning keygen --out DIR --beacon HEX")
        return beacon_secret(bytes.fromhex(self.beacon), merkle.root(self._trigger_leaves))

    def nonces(self) -> list[bytes]:
        """The r of the 2n commitments, those of the triggers first."""
        return derive.nonces(self._seed, self.parameters.n)

    def leaves(self) -> list[bytes]:
        """The 2n commitments, those of the triggers first."""
        return [*self._trigger_leaves, *_commit_labels(self.parameters, self.nonces(), self.labels())]

    @cached_property
    def _trigger_leaves(self) -> list[bytes]:
        return _commit_triggers(self.parameters, self.nonces(), self.images(), self.truths)

    def sign(self, purpose: str, message: bytes) -> bytes:
        """The owner's signature of a message, for one purpose: 64 bytes."""
        return signatures.sign(self._signing, purpose, message)

    def reveal(self) -> bytes:
        """The seed, for a judge who derives all again. From then on every trigger is known."""
        return self._seed

    def verification_key(self) -> VerificationKey:
        """The key that commits to this, signed.

        Raises:
            InputError: If two triggers are the same, or a label waits for its beacon.
        """
        if len({image.tobytes() for image in self.images()}) != self.parameters.n:
            raise InputError("mk: two triggers are the same image; take other ones")
        leaves = self.leaves()
        roots = merkle.root(leaves[: self.parameters.n]).hex(), merkle.root(leaves).hex()
        unsigned = VerificationKey(self.parameters, self.beacon, *roots, "")
        signature = signatures.sign(self._signing, _VK_TAG, canonical.encode(unsigned._signed()))
        return VerificationKey(self.parameters, self.beacon, *roots, signature.hex())

    def _begun(self) -> bytes:
        """What is published, and timestamped, before the beacon is known."""
        root = merkle.root(self._trigger_leaves).hex()
        value = {"format": _BEGUN_FORMAT, "parameters": self.parameters.plain(), "trigger_root": root}
        signature = signatures.sign(self._signing, _TRIGGERS_TAG, canonical.encode(value))
        return canonical.encode({**value, "signature": signature.hex()})

    def _bytes(self) -> bytes:
        """The content of mk.json."""
        value = {
            "format": _MK_FORMAT,
            "parameters": self.parameters.plain(),
            "truths": list(self.truths),
            "beacon": self.beacon,
            "seed": self._seed.hex(),
            "signing": self._signing.hex(),
            "images": base64.b64encode(self._given).decode("ascii"),
        }
        return canonical.encode(value)

    @classmethod
    def _load(cls, folder: Path) -> MarkingKey:
        file = folder / MK
        what = str(file)
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise bad("key", str(folder), f"there is no marking key ({_make(folder)})") from error
        except OSError as error:
            raise bad("key", str(folder), f"{MK} cannot be read ({error.strerror}); a link is not followed") from error
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise bad("key", str(folder), f"{MK} is no file")
            if status.st_mode & 0o077:
                raise bad("key", str(folder), f"others may read or write {MK}: chmod 600 it, and consider it known")
            data = opened.read(canonical.LIMIT + 1)
        texts: dict[str, type] = dict.fromkeys(("format", "beacon", "seed", "signing", "images"), str)
        value = canonical.decode(data, what)
        value = canonical.fields(value, what, {**texts, "parameters": dict, "truths": list})
        if value["format"] != _MK_FORMAT:
            raise InputError(f"{what}: its format is not {_MK_FORMAT}, which this release reads; make a new key")
        try:
            given = base64.b64decode(value["images"], validate=True)
        except ValueError as error:
            raise InputError(f"{what}: images: base64 is expected") from error
        if base64.b64encode(given).decode("ascii") != value["images"]:
            raise InputError(f"{what}: images: not in canonical form")
        canonical.unhex(value["beacon"], f"{what}: beacon")
        seed = canonical.unhex(value["seed"], f"{what}: seed", 32)
        signing = canonical.unhex(value["signing"], f"{what}: signing", 32)
        parameters = _parameters(value["parameters"], f"{what}: parameters")
        try:
            return cls(parameters, tuple(value["truths"]), value["beacon"], seed, signing, given)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error


def _derived(parameters: Parameters, seed: bytes) -> derive.Images:
    make = {"abstract": derive.abstract, "noise": derive.noise}[parameters.source]
    return make(seed, parameters.n, parameters.shape)


def _commit_triggers(
    parameters: Parameters, nonces: Sequence[bytes], images: derive.Images, truths: Sequence[int]
) -> list[bytes]:
    """Commitments to the triggers; of the 2n nonces theirs come first."""
    return [
        commit(r, parameters.key_id, index, "trigger", trigger_payload(image.tobytes(), parameters.shape, truth))
        for index, r, image, truth in zip(range(parameters.n), nonces, images, truths, strict=False)
    ]


def _commit_labels(parameters: Parameters, nonces: Sequence[bytes], labels: Sequence[int]) -> list[bytes]:
    """Commitments to the labels; of the 2n nonces theirs come last."""
    return [
        commit(r, parameters.key_id, index, "label", label_payload(label))
        for index, r, label in zip(range(parameters.n), nonces[parameters.n :], labels, strict=True)
    ]


def roots(parameters: Parameters, seed: bytes, beacon: bytes) -> tuple[str, str]:
    """Both roots of a key whose triggers are derived, from its seed alone: of the triggers, and of all.

    Args:
        parameters: Of the key; its source is one of `DERIVED`.
        seed: 32 bytes.
        beacon: Where labels come from one.
    """
    nonces, truths = derive.nonces(seed, parameters.n), [-1] * parameters.n
    triggers = _commit_triggers(parameters, nonces, _derived(parameters, seed), truths)
    top = merkle.root(triggers)
    secret = seed_secret(seed) if parameters.labels_from == "seed" else beacon_secret(beacon, top)
    labels = derive.labels(secret, truths, parameters.classes)
    return top.hex(), merkle.root([*triggers, *_commit_labels(parameters, nonces, labels)]).hex()


def seed_secret(seed: bytes) -> bytes:
    """What labels are drawn from where they come from the seed."""
    return hashlib.sha256(b"pharmakon/watermark/labels\x00" + seed).digest()


def check_begun(data: bytes, vk: VerificationKey, what: str = BEGUN) -> str:
    """See that a begun.json is what a verification key was begun with.

    Args:
        data: Its bytes.
        vk: The key, complete.
        what: Its name, for complaints.

    Returns:
        SHA-256 of it: what a timestamp is about.

    Raises:
        InputError: If it is another key's, or was changed.
    """
    kinds: dict[str, type] = {"format": str, "parameters": dict, "trigger_root": str, "signature": str}
    value = canonical.fields(canonical.decode(data, what, 2**16), what, kinds)
    if value["format"] != _BEGUN_FORMAT:
        raise InputError(f"{what}: its format is not {_BEGUN_FORMAT}")
    if _parameters(value["parameters"], f"{what}: parameters") != vk.parameters:
        raise InputError(f"{what}: it is of a key with other parameters")
    if value["trigger_root"] != vk.trigger_root:
        raise InputError(f"{what}: it commits to other triggers than the verification key")
    signature = canonical.unhex(value["signature"], f"{what}: signature", signatures.SIGNATURE)
    unsigned = canonical.encode({name: part for name, part in value.items() if name != "signature"})
    if not signatures.check(bytes.fromhex(vk.parameters.owner), signature, _TRIGGERS_TAG, unsigned):
        raise InputError(f"{what}: the signature is not the owner's: it was changed")
    return hashlib.sha256(data).hexdigest()


def begun(folder: str | Path, vk: VerificationKey) -> bytes | None:
    """The content of a key's begun.json; None where its labels come from the seed, or the file is not there.

    Raises:
        InputError: If it is another key's.
    """
    file = full_path(folder) / BEGUN
    if vk.parameters.labels_from != "beacon" or not file.is_file():
        return None
    data = file.read_bytes()
    check_begun(data, vk, str(file))
    return data


def beacon_secret(beacon: bytes, trigger_root: bytes) -> bytes:
    """What labels are drawn from where they come from a beacon: anybody can compute it, once the beacon is out."""
    return hashlib.sha256(b"pharmakon/watermark/beacon\x00" + trigger_root + beacon).digest()


def keygen(
    out: str | Path,
    *,
    classes: int,
    shape: tuple[int, int, int],
    n: int = 100,
    source: str = "abstract",
    images: derive.Images | None = None,
    truths: Sequence[int] | None = None,
    reference: str = "none",
    misses_allowed: int | None = None,
    alpha_log2: int = 64,
    grinding_log2: int = 0,
    beacon_source: str = "",
    beacon_round: str = "",
    seed: bytes | None = None,
) -> VerificationKey | None:
    """Make a key, in a folder of its own.

    Args:
        out: The folder, new or empty: it gets mk.json, for the owner alone, burnt.json, and vk.json. It is there with
            all of them, or not at all.
        classes: K.
        shape: (C, H, W).
        n: Triggers.
        source: One of `SOURCES`.
        images: uint8 (n, C, H, W) where the source is not derived from the seed.
        truths: f(t) of each of the images; None where no class is true: for sources in `UNTRUE`.
        reference: SHA-256 of the weights of f; ``none``.
        misses_allowed: ε·n; None: a tenth of n.
        alpha_log2: See `Parameters`.
        grinding_log2: See `Parameters`.
        beacon_source: The public beacon that labels are to come from; empty: they come from the seed. With one, only
            the triggers are committed to now, in begun.json, which is to be timestamped; `finish` makes the rest.
        beacon_round: Which of its numbers: one that is not out yet.
        seed: 32 bytes that are known; for published test vectors alone. None: drawn from the system's randomness.

    Returns:
        vk, or None where it waits for the beacon.

    Raises:
        InputError: If there is a key already, a value is out of its range, or two triggers are the same.
    """
    folder = full_path(out)
    if any((folder / name).exists() for name in (MK, VK, BEGUN)):
        raise bad("out", str(out), "there is a key already, and it stays as it is; choose another folder")
    signing = secrets.token_bytes(32) if seed is None else hashlib.sha256(b"test vector" + seed).digest()
    parameters = Parameters(
        owner=signatures.public(signing).hex(),
        n=n,
        classes=classes,
        shape=shape,
        source=source,
        reference=reference,
        misses_allowed=n // 10 if misses_allowed is None else misses_allowed,
        alpha_log2=alpha_log2,
        grinding_log2=grinding_log2,
        labels_from="beacon" if beacon_source or beacon_round else "seed",
        beacon_source=beacon_source,
        beacon_round=beacon_round,
    )
    if (images is not None) == (source in DERIVED):
        raise bad("images", "given" if images is not None else "none", f"source {source} is about its own images")
    if images is not None and (images.dtype != np.uint8 or images.shape != (n, *parameters.shape)):
        raise bad("images", f"{images.dtype} {images.shape}", f"uint8 {(n, *parameters.shape)} is expected")
    key = MarkingKey(
        parameters,
        tuple(int(truth) for truth in truths) if truths is not None else (-1,) * n,
        "",
        secrets.token_bytes(32) if seed is None else seed,
        signing,
        b"" if images is None else images.tobytes(),
    )
    vk = None
    if parameters.labels_from == "seed":
        vk = key.verification_key()
        key.check(vk)
    elif len({image.tobytes() for image in key.images()}) != n:
        raise InputError("mk: two triggers are the same image; take other ones")
    if vk is None:
        files = {MK: (key._bytes(), 0o600), BEGUN: (key._begun(), 0o644)}
    else:
        files = {MK: (key._bytes(), 0o600), BURNT: (_record(vk.digest), 0o600), VK: (vk.to_bytes(), 0o644)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _create_folder(folder, files)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise bad("out", str(out), "it is not empty, and stays as it is; choose another folder") from error
        raise bad("out", str(out), f"cannot be written ({error.strerror}); choose another folder") from error
    return vk


def finish(folder: str | Path, beacon: bytes) -> VerificationKey:
    """Complete a key whose labels come from a beacon.

    Args:
        folder: Of a key that `keygen` began.
        beacon: 16 bytes or more that became public after begun.json was timestamped: the number that the parameters
            name.

    Raises:
        InputError: If there is no such key, it is complete already or has another beacon, or the beacon is too short.
    """
    place = full_path(folder)
    key = MarkingKey._load(place)
    if key.parameters.labels_from != "beacon":
        raise bad("beacon", beacon.hex(), "the labels of this key come from its seed")
    if len(beacon) < 16:
        raise bad("beacon", beacon.hex(), "16 bytes or more are expected")
    if (place / VK).exists() or key.beacon not in ("", beacon.hex()):
        raise bad("beacon", beacon.hex(), "this key is complete, and stays as it is")
    try:
        begun = (place / BEGUN).read_bytes()
    except OSError as error:
        raise bad("key", str(folder), f"{BEGUN} is missing") from error
    if begun != key._begun():
        raise InputError(f"{place / BEGUN}: it does not commit to the triggers of this key")
    whole = MarkingKey(key.parameters, key.truths, beacon.hex(), key._seed, key._signing, key._given)
    vk = whole.verification_key()
    # vk comes last: whoever was cut off before it completes the key with the same beacon
    _replace(place / MK, whole._bytes(), 0o600)
    if not (place / BURNT).exists():
        _create(place / BURNT, _record(vk.digest), 0o600)
    _recorded(place, vk)
    _create(place / VK, vk.to_bytes(), 0o644)
    return vk


class Taken(NamedTuple):
    """Triggers that a verification took for itself.

    Attributes:
        before: Those that were burnt before it.
        indices: Its own, burnt from now on.
    """

    before: frozenset[int]
    indices: list[int]


@dataclass(frozen=True)
class _Burnt:
    """What burnt.json records: what is burnt, and the verifications that were begun and have no answers yet."""

    indices: frozenset[int] = frozenset()
    pending: Mapping[str, Taken] = field(default_factory=dict)


def burnt(folder: str | Path) -> frozenset[int]:
    """The triggers that others have seen; they count in no later p-value.

    Raises:
        InputError: If their record is missing, damaged or another key's: then nobody knows.
    """
    place = full_path(folder)
    return _recorded(place, VerificationKey.read(place)).indices


def take(folder: str | Path, choose: Callable[[frozenset[int]], Sequence[int]], run: str = "") -> Taken:
    """Choose triggers and record them as burnt, before they are shown to anybody; the record only grows.

    To read the record, to choose and to write happen under one lock: two verifications at once never share a trigger,
    unless both choose burnt ones.

    Args:
        folder: Of the key.
        choose: Those that are burnt → those to burn. It may raise; nothing is burnt then.
        run: What names a verification that may be cut off: asked for again before `finished`, it gets what it got.
            Empty: it cannot be gone on with.

    Raises:
        InputError: If the record is missing or damaged.
    """
    place = full_path(folder)
    vk = VerificationKey.read(place)
    with _locked(place):
        record = _recorded(place, vk)
        if run in record.pending:
            return record.pending[run]
        taken = Taken(record.indices, [int(index) for index in choose(record.indices)])
        pending = {**record.pending, **({run: taken} if run else {})}
        _replace(place / BURNT, _record(vk.digest, record.indices | set(taken.indices), pending), 0o600)
    return taken


def pending(folder: str | Path, run: str) -> Taken | None:
    """What a verification took that was cut off; None: there is no such."""
    place = full_path(folder)
    return _recorded(place, VerificationKey.read(place)).pending.get(run)


def finished(folder: str | Path, run: str) -> None:
    """Record that a verification has its answers: it will not be gone on with."""
    place = full_path(folder)
    vk = VerificationKey.read(place)
    with _locked(place):
        record = _recorded(place, vk)
        if run in record.pending:
            pending = {name: taken for name, taken in record.pending.items() if name != run}
            _replace(place / BURNT, _record(vk.digest, record.indices, pending), 0o600)


def _record(digest: str, indices: Collection[int] = (), pending: Mapping[str, Taken] | None = None) -> bytes:
    """The content of burnt.json."""
    begun = [
        {"run": run, "before": sorted(taken.before), "indices": sorted(taken.indices)}
        for run, taken in sorted((pending or {}).items())
    ]
    return canonical.encode({"format": _BURNT_FORMAT, "vk": digest, "burnt": sorted(indices), "pending": begun})


def _recorded(place: Path, vk: VerificationKey) -> _Burnt:
    file, n = place / BURNT, vk.parameters.n
    remedy = "restore it; without it nobody knows which triggers still count"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: it cannot be read ({error.strerror}): {remedy}") from error
    try:
        kinds: dict[str, type] = {"format": str, "vk": str, "burnt": list, "pending": list}
        value = canonical.fields(canonical.decode(data, str(file)), str(file), kinds)
        if value["format"] != _BURNT_FORMAT or value["vk"] != vk.digest:
            raise InputError(f"{file}: it is of another key, or of another version")
        pending = {}
        for each in value["pending"]:
            given = canonical.fields(each, f"{file}: pending", {"run": str, "before": list, "indices": list})
            before = canonical.increasing(given["before"], n, f"{file}: before")
            indices = canonical.increasing(given["indices"], n, f"{file}: indices")
            pending[given["run"]] = Taken(frozenset(before), indices)
        return _Burnt(frozenset(canonical.increasing(value["burnt"], n, f"{file}: burnt")), pending)
    except InputError as error:
        raise InputError(f"{error}: {remedy}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(path: Path, data: bytes, mode: int) -> None:
    """A new file, whole or absent; `FileExistsError` if there is one."""
    with _written(path, data, mode) as partial:
        os.link(partial, path)  # unlike a rename, it never replaces
    _sync(path.parent)


def _create_folder(folder: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """A new folder with these files, whole or absent; `OSError` if there is one with something in it."""
    with under_way(folder, folder=True, mode=0o700) as partial:
        for name, (data, mode) in files.items():
            _create(partial / name, data, mode)
        os.rename(partial, folder)  # of a folder: it replaces an empty one, and nothing else
    _sync(folder.parent)


def _replace(path: Path, data: bytes, mode: int) -> None:
    with _written(path, data, mode) as partial:
        os.replace(partial, path)
    _sync(path.parent)


@contextlib.contextmanager
def _written(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    with under_way(path, mode=mode) as partial:
        with partial.open("wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask takes away or leaves
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(folder: str | Path) -> str:
    return f"make one: lightning keygen --out {folder} --classes K --shape C,H,W"
