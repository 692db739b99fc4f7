"""KeyGen: a secret marking key, and the verification key that commits to it.

Scheme: Adi, Baum, Cisse, Pinkas & Keshet, "Turning Your Weakness Into a Strength: Watermarking Deep Neural Networks by
Backdooring", USENIX Security 2018: mk is a set of triggers with wrong labels and the openings of their commitments, vk
the commitments.

Threat model: whoever has vk learns nothing of the triggers; whoever has mk can neither change it later nor open it as
another one; and what a judge is shown is bound to the owner and to every parameter.

Deviations: vk is one signed Merkle root over the 2n commitments, which can be published and timestamped. Triggers,
labels and openings are derived from one secret seed; they can be shown to be so by revealing it. Labels may come from a
public beacon that is later than the commitment to the triggers: then nobody could choose them.

mk.json and vk.json hold canonical JSON. mk.json is for its owner's eyes alone; nothing here ever prints what it holds.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from datamodules.errors import InputError, bad
from watermark import canonical, derive, merkle, signatures
from watermark.commitments import commit, image_payload, label_payload

SOURCES = ("abstract", "noise", "images", "overlay", "unrelated")
"""Where triggers come from; the first two are derived from the seed."""
DERIVED = ("abstract", "noise")

PREPROCESSING = "uint8 CHW as stored; the model normalises"

MK, VK, BEGUN, BURNT = "mk.json", "vk.json", "begun.json", "burnt.json"

_MOST_TRIGGERS, _MOST_PIXELS = 4096, 2**25
_MK_FORMAT, _VK_FORMAT, _BURNT_FORMAT = "pharmakon-mk-1", "pharmakon-vk-1", "pharmakon-burnt-1"
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
        if self.preprocessing != PREPROCESSING:
            raise bad("preprocessing", self.preprocessing, f"this release knows: {PREPROCESSING}")

    def plain(self) -> dict[str, Any]:
        """Itself as plain values."""
        return {each.name: getattr(self, each.name) for each in fields(Parameters)} | {"shape": list(self.shape)}

    @cached_property
    def key_id(self) -> bytes:
        """32 bytes that enter every commitment."""
        return hashlib.sha256(b"pharmakon/watermark/key id\x00" + canonical.encode(self.plain())).digest()


_PARAMETER_KINDS: dict[str, type] = {
    "owner": str, "n": int, "classes": int, "shape": list, "source": str, "generator": int, "reference": str,
    "misses_allowed": int, "alpha_log2": int, "grinding_log2": int, "labels_from": str, "preprocessing": str,
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
        trigger_root: Merkle root over the n commitments to triggers: 64 hexadecimal digits.
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
            raise InputError(f"{what}: format {value['format']!r} is not {_VK_FORMAT}")
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
        file = Path(path) / VK if Path(path).is_dir() else Path(path)
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
        if parameters.source in DERIVED and (pixels or set(self.truths) != {-1}):
            raise InputError(f"mk: {parameters.source} triggers are derived from the seed, and have no true class")
        if parameters.source not in DERIVED and len(pixels) != n * int(np.prod(parameters.shape)):
            raise InputError(f"mk: images: {n} images of {parameters.shape} are expected")
        if classes == 2 and -1 in self.truths and parameters.source not in DERIVED:
            raise InputError("mk: of two classes one must be true of each image; give truths")
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
        key = cls._load(Path(folder))
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
        make = {"abstract": derive.abstract, "noise": derive.noise}[parameters.source]
        return make(self._seed, parameters.n, parameters.shape)

    def labels(self) -> list[int]:
        """Their labels, wrong ones: n numbers."""
        return derive.labels(self.label_secret(), self.truths, self.parameters.classes)

    def label_secret(self) -> bytes:
        """What labels are drawn from; with a beacon, nothing secret.

        Raises:
            InputError: If labels come from a beacon, and there is none yet.
        """
        if self.parameters.labels_from == "seed":
            return hashlib.sha256(b"pharmakon/watermark/labels\x00" + self._seed).digest()
        if not self.beacon:
            raise InputError("mk: its labels wait for a beacon: lightning keygen --out DIR --beacon HEX")
        return beacon_secret(bytes.fromhex(self.beacon), merkle.root(self._trigger_leaves))

    def nonces(self) -> list[bytes]:
        """The r of the 2n commitments, those of the triggers first."""
        return derive.nonces(self._seed, self.parameters.n)

    def leaves(self) -> list[bytes]:
        """The 2n commitments, those of the triggers first."""
        n, key_id = self.parameters.n, self.parameters.key_id
        drawn = zip(self.nonces()[n:], self.labels(), self.truths, strict=True)
        made = [
            commit(r, key_id, index, "label", label_payload(label, truth))
            for index, (r, label, truth) in enumerate(drawn)
        ]
        return [*self._trigger_leaves, *made]

    @cached_property
    def _trigger_leaves(self) -> list[bytes]:
        parameters = self.parameters
        drawn = zip(range(parameters.n), self.nonces(), self.images(), strict=False)
        return [
            commit(r, parameters.key_id, index, "trigger", image_payload(image.tobytes(), parameters.shape))
            for index, r, image in drawn
        ]

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
        value = {"parameters": self.parameters.plain(), "trigger_root": merkle.root(self._trigger_leaves).hex()}
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
            raise InputError(f"{what}: format {value['format']!r} is not {_MK_FORMAT}")
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
    beacon_later: bool = False,
    seed: bytes | None = None,
) -> VerificationKey | None:
    """Make a key, in a folder of its own.

    Args:
        out: The folder: it gets mk.json, for the owner alone, and vk.json.
        classes: K.
        shape: (C, H, W).
        n: Triggers.
        source: One of `SOURCES`.
        images: uint8 (n, C, H, W) where the source is not derived from the seed.
        truths: f(t) of each of the images; None: no class is true.
        reference: SHA-256 of the weights of f; ``none``.
        misses_allowed: ε·n; None: a tenth of n.
        alpha_log2: See `Parameters`.
        grinding_log2: See `Parameters`.
        beacon_later: Whether labels come from a beacon: only the triggers are committed to now, in begun.json, which is
            to be timestamped; `finish` makes the rest.
        seed: 32 bytes that are known; for published test vectors alone. None: drawn from the system's randomness.

    Returns:
        vk, or None where it waits for the beacon.

    Raises:
        InputError: If there is a key already, a value is out of its range, or two triggers are the same.
    """
    folder = Path(out)
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
        labels_from="beacon" if beacon_later else "seed",
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
    if not beacon_later:
        vk = key.verification_key()
        key.check(vk)
    elif len({image.tobytes() for image in key.images()}) != n:
        raise InputError("mk: two triggers are the same image; take other ones")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(folder / MK, key._bytes(), 0o600)
        _create(folder / (BEGUN if vk is None else VK), key._begun() if vk is None else vk.to_bytes(), 0o644)
    except FileExistsError as error:
        raise bad("out", str(out), "there is a key already, and it stays as it is; choose another folder") from error
    except OSError as error:
        raise bad("out", str(out), f"cannot be written ({error.strerror}); choose another folder") from error
    return vk


def finish(folder: str | Path, beacon: bytes) -> VerificationKey:
    """Complete a key whose labels come from a beacon.

    Args:
        folder: Of a key that `keygen` began.
        beacon: 16 bytes or more that became public after begun.json was timestamped.

    Raises:
        InputError: If there is no such key, it is complete already, or the beacon is too short.
    """
    place = Path(folder)
    key = MarkingKey._load(place)
    if key.parameters.labels_from != "beacon":
        raise bad("beacon", beacon.hex(), "the labels of this key come from its seed")
    if len(beacon) < 16:
        raise bad("beacon", beacon.hex(), "16 bytes or more are expected")
    if key.beacon or (place / VK).exists():
        raise bad("beacon", beacon.hex(), "this key is complete, and stays as it is")
    try:
        begun = (place / BEGUN).read_bytes()
    except OSError as error:
        raise bad("key", str(folder), f"{BEGUN} is missing") from error
    if begun != key._begun():
        raise InputError(f"{place / BEGUN}: it does not commit to the triggers of this key")
    whole = MarkingKey(key.parameters, key.truths, beacon.hex(), key._seed, key._signing, key._given)
    vk = whole.verification_key()
    _replace(place / MK, whole._bytes(), 0o600)
    _create(place / VK, vk.to_bytes(), 0o644)
    return vk


def burnt(folder: str | Path) -> frozenset[int]:
    """The triggers that others have seen; they count in no later p-value.

    Raises:
        InputError: If their record is damaged.
    """
    file = Path(folder) / BURNT
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return frozenset()
    value = canonical.fields(canonical.decode(data, str(file)), str(file), {"format": str, "burnt": list})
    indices = value["burnt"]
    increasing = all(type(index) is int and index >= 0 for index in indices) and sorted(set(indices)) == indices
    if value["format"] != _BURNT_FORMAT or not increasing:
        raise InputError(f"{file}: it is damaged; restore it, or consider every trigger burnt")
    return frozenset(indices)


def burn(folder: str | Path, indices: Sequence[int]) -> frozenset[int]:
    """Record triggers as burnt, before they are shown to anybody; the record only grows.

    Returns:
        All that are burnt.
    """
    place = Path(folder)
    with _locked(place):
        all_of_them = burnt(place) | {int(index) for index in indices}
        value = {"format": _BURNT_FORMAT, "burnt": sorted(all_of_them)}
        _replace(place / BURNT, canonical.encode(value), 0o600)
    return frozenset(all_of_them)


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
    partial = _written(path, data, mode)
    try:
        os.link(partial, path)  # unlike a rename, it never replaces
    finally:
        os.unlink(partial)
    _sync(path.parent)


def _replace(path: Path, data: bytes, mode: int) -> None:
    os.replace(_written(path, data, mode), path)
    _sync(path.parent)


def _written(path: Path, data: bytes, mode: int) -> Path:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask takes away or leaves
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return partial


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(folder: str | Path) -> str:
    return f"make one: lightning keygen --out {folder} --classes K --shape C,H,W"
