"""Transcripts: what a verification saw, so that anybody can check it without torch, and without the model.

What a transcript shows for good: these triggers and labels are those that the verification key committed to; if there
was a challenge, the verifier's nonce chose them; the matches, the p-value and the verdict follow from the answers. What
it cannot show is that the suspect gave these answers: the owner signs that he saw them, and a judge asks again.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.errors import InputError, bad
from watermark import canonical, derive, merkle, signatures
from watermark.commitments import commit, image_payload, label_payload
from watermark.keys import DERIVED, MarkingKey, Parameters, VerificationKey, beacon_secret
from watermark.statistics import least_matches, log2_ceiling, p_value

FORMAT = "pharmakon-transcript-1"
SIGNED = "transcript"
"""What a signature under a transcript is for."""

REFUSED = -1
"""The answer of a suspect that gave none."""

LEAST_NONCE = 16
MODES = ("private", "public", "revealed")

_OPENING: dict[str, type] = {
    "index": int, "label": int, "truth": int, "pixels": str, "trigger_r": str, "label_r": str, "trigger_path": list,
    "label_path": list, "subtree_path": list,
}  # fmt: skip
_FIELDS: dict[str, type] = {
    "format": str, "vk": dict, "model": str, "when": str, "mode": str, "nonce": str, "seed": str, "burnt": list,
    "openings": list, "answers": list, "result": dict, "signature": str,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What follows from the answers.

    Attributes:
        owned: Whether the p-value is α or less; None if it cannot be decided.
        matches: Triggers with the key's label.
        scored: Triggers that were asked about.
        refused: Of those, the ones without an answer; they count as no match.
        needed: Matches that α asks for; None if so few triggers cannot reach it.
        log2_p: The smallest whole k with p ≤ 2^k.
        published: Adi et al.'s verdict: all but ε·n match.
        reason: Why it is not decided; empty if it is.
        claims: Whether it withstands a claimant who chose the key after he saw the model.
    """

    owned: bool | None
    matches: int
    scored: int
    refused: int
    needed: int | None
    log2_p: int
    published: bool
    reason: str
    claims: str

    def plain(self) -> dict[str, Any]:
        """Itself as plain values."""
        verdict = {True: "owned", False: "not owned", None: "undecided"}[self.owned]
        needed = -1 if self.needed is None else self.needed
        return {**self.__dict__, "owned": verdict, "needed": needed}


def judge(parameters: Parameters, mode: str, labels: Sequence[int], answers: Sequence[int]) -> Result:
    """The verdict on the answers to some triggers, by the key's own significance.

    Args:
        parameters: Of the key.
        mode: One of `MODES`.
        labels: Of the triggers that were asked about.
        answers: Of the suspect; `REFUSED` where it gave none.
    """
    n, classes, grinding = len(labels), parameters.classes, parameters.grinding_log2
    matches = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    refused = sum(answer == REFUSED for answer in answers)
    needed = least_matches(n, classes, parameters.alpha_log2, grinding) if n else None
    log2_p = log2_ceiling(p_value(matches, n, classes, grinding)) if n else 0
    published = bool(n) and (n - matches) * parameters.n <= parameters.misses_allowed * n
    owned: bool | None = needed is not None and matches >= needed
    reason = ""
    if needed is None:
        owned, reason = None, f"{n} triggers are too few for 2^-{parameters.alpha_log2}"
    elif not owned and matches + refused >= needed:
        owned, reason = None, f"{refused} triggers got no answer; with them the verdict could be another"
    return Result(owned, matches, n, refused, needed, log2_p, published, reason, claims(parameters, mode))


def claims(parameters: Parameters, mode: str) -> str:
    """What a verdict cannot exclude: that the claimant made the key for this model, after he had seen it."""
    if parameters.labels_from == "beacon":
        return "resistant to false claims if the triggers' root was timestamped before the beacon"
    if mode == "revealed" and parameters.source in DERIVED:
        tried = f"2^{parameters.grinding_log2}"
        return f"resistant to false claims: all is derived from one seed, and {tried} tried seeds are allowed for"
    return "not resistant to false claims: triggers and labels may have been chosen after seeing the model"


def challenge(vk: VerificationKey, model: str, nonce: bytes, burnt: frozenset[int], count: int) -> list[int]:
    """The triggers that a verifier's nonce opens.

    The nonce must be the verifier's, and fresh: an owner who chooses it can try nonces until he likes the triggers.

    Args:
        vk: The key.
        model: The suspect: the hash of its weights, or its address.
        nonce: 16 bytes or more.
        burnt: Triggers that are out.
        count: How many to open.

    Returns:
        Their indices, increasing.

    Raises:
        InputError: If the nonce is too short, or not so many are left.
    """
    if len(nonce) < LEAST_NONCE:
        raise bad("nonce", nonce.hex(), f"{LEAST_NONCE} bytes or more are expected, from the verifier")
    left = [index for index in range(vk.parameters.n) if index not in burnt]
    if not 1 <= count <= len(left):
        raise bad("count", count, f"{len(left)} of {vk.parameters.n} triggers are not burnt yet; open 1 to {len(left)}")
    name = model.encode()
    parts = [bytes.fromhex(vk.digest), len(name).to_bytes(4, "big"), name, len(nonce).to_bytes(4, "big"), nonce]
    out = b"".join(index.to_bytes(4, "big") for index in sorted(burnt))
    secret = hashlib.sha256(b"pharmakon/watermark/challenge\x00" + b"".join(parts) + out).digest()
    return [left[place] for place in derive.sample(secret, count, len(left))]


def write(
    mk: MarkingKey,
    vk: VerificationKey,
    result: Result,
    *,
    model: str,
    when: str,
    mode: str,
    nonce: bytes,
    burnt: frozenset[int],
    indices: Sequence[int],
    answers: Sequence[int],
) -> bytes:
    """A transcript, signed by the owner. It shows the triggers that it opens."""
    n, leaves, images, labels, nonces = vk.parameters.n, mk.leaves(), mk.images(), mk.labels(), mk.nonces()
    openings = [
        {
            "index": index,
            "label": labels[index],
            "truth": mk.truths[index],
            "pixels": base64.b64encode(images[index].tobytes()).decode("ascii"),
            "trigger_r": nonces[index].hex(),
            "label_r": nonces[n + index].hex(),
            "trigger_path": [each.hex() for each in merkle.path(leaves, index)],
            "label_path": [each.hex() for each in merkle.path(leaves, n + index)],
            "subtree_path": [each.hex() for each in merkle.path(leaves[:n], index)],
        }
        for index in indices
    ]
    value = {
        "format": FORMAT,
        "vk": canonical.decode(vk.to_bytes(), "vk"),
        "model": model,
        "when": when,
        "mode": mode,
        "nonce": nonce.hex(),
        "seed": mk.reveal().hex() if mode == "revealed" else "",
        "burnt": sorted(burnt),
        "openings": openings,
        "answers": list(answers),
        "result": result.plain(),
    }
    return canonical.encode({**value, "signature": mk.sign(SIGNED, canonical.encode(value)).hex()})


def check(data: bytes, what: str = "transcript") -> tuple[VerificationKey, Result]:
    """Check every statement of a transcript that can be checked without the model.

    Args:
        data: Its bytes.
        what: Its name, for complaints.

    Returns:
        The key that it is about, and the result, computed again.

    Raises:
        InputError: If anything does not hold; it names what.
    """
    value = canonical.fields(canonical.decode(data, what), what, _FIELDS)
    if value["format"] != FORMAT:
        raise InputError(f"{what}: format {value['format']!r} is not {FORMAT}")
    vk = VerificationKey.from_bytes(canonical.encode(value["vk"]), f"{what}: vk")
    signature = canonical.unhex(value["signature"], f"{what}: signature", signatures.SIGNATURE)
    unsigned = canonical.encode({name: part for name, part in value.items() if name != "signature"})
    if not signatures.check(bytes.fromhex(vk.parameters.owner), signature, SIGNED, unsigned):
        raise InputError(f"{what}: the signature is not the owner's: the transcript was changed")
    parameters, mode = vk.parameters, value["mode"]
    if mode not in MODES:
        raise InputError(f"{what}: mode {mode!r} is not one of {', '.join(MODES)}")
    burnt = _increasing(value["burnt"], parameters.n, f"{what}: burnt")
    opened = [_opening(each, vk, f"{what}: opening {at}") for at, each in enumerate(value["openings"])]
    indices = _increasing([each["index"] for each in opened], parameters.n, f"{what}: openings")
    nonce = canonical.unhex(value["nonce"], f"{what}: nonce")
    if (mode == "public") != bool(nonce):
        raise InputError(f"{what}: a nonce is there if and only if the verification is public")
    if set(indices) & set(burnt):
        raise InputError(f"{what}: a burnt trigger is scored")
    if mode == "public" and indices != challenge(vk, value["model"], nonce, frozenset(burnt), max(1, len(indices))):
        raise InputError(f"{what}: these are not the triggers that the verifier's nonce opens")
    if mode != "public" and len(indices) + len(burnt) != parameters.n:
        raise InputError(f"{what}: not all triggers that are left are scored")
    _check_seed(value["seed"], mode, vk, opened, what)
    _check_beacon(vk, opened, what)
    answers = value["answers"]
    if len(answers) != len(opened) or not all(type(a) is int and REFUSED <= a < parameters.classes for a in answers):
        raise InputError(f"{what}: answers: a class, or {REFUSED}, is expected for each opened trigger")
    result = judge(parameters, mode, [each["label"] for each in opened], answers)
    if result.plain() != value["result"]:
        raise InputError(f"{what}: the result does not follow from the answers")
    return vk, result


def opened_images(data: bytes) -> list[bytes]:
    """The pixels of the triggers of a transcript that was checked, in its order: a judge asks the suspect again."""
    return [base64.b64decode(each["pixels"]) for each in canonical.decode(data, "transcript")["openings"]]


def model_of(data: bytes) -> str:
    """What names the suspect of a transcript that was checked."""
    return str(canonical.decode(data, "transcript")["model"])


def _opening(value: Any, vk: VerificationKey, what: str) -> dict[str, Any]:
    """One opening that leads to the root."""
    given = canonical.fields(value, what, _OPENING)
    parameters, index, label, truth = vk.parameters, given["index"], given["label"], given["truth"]
    n = parameters.n
    if not (0 <= index < n and 0 <= label < parameters.classes and -1 <= truth < parameters.classes):
        raise InputError(f"{what}: index, label or truth is out of range")
    if label == truth:
        raise InputError(f"{what}: the label is the true one")
    try:
        payload = image_payload(base64.b64decode(given["pixels"], validate=True), parameters.shape)
    except ValueError as error:
        raise InputError(f"{what}: pixels: an image of {parameters.shape} is expected") from error
    labelled = label_payload(label, truth)
    trigger = commit(_nonce(given, "trigger_r", what), parameters.key_id, index, "trigger", payload)
    named = commit(_nonce(given, "label_r", what), parameters.key_id, index, "label", labelled)
    for path, leaf, place, count, top in (
        ("trigger_path", trigger, index, 2 * n, vk.root),
        ("label_path", named, n + index, 2 * n, vk.root),
        ("subtree_path", trigger, index, n, vk.trigger_root),
    ):
        beside = [canonical.unhex(each, f"{what}: {path}", 32) for each in given[path]]
        reached = merkle.climb(leaf, place, count, beside)
        if reached is None or reached.hex() != top:
            raise InputError(f"{what}: {path}: it does not open a commitment of the verification key")
    return given


def _nonce(opening: dict[str, Any], name: str, what: str) -> bytes:
    return canonical.unhex(opening[name], f"{what}: {name}", 32)


def _check_seed(text: str, mode: str, vk: VerificationKey, opened: Sequence[dict[str, Any]], what: str) -> None:
    if (mode == "revealed") != bool(text):
        raise InputError(f"{what}: a seed is there if and only if it is revealed")
    if mode != "revealed":
        return
    seed, parameters = canonical.unhex(text, f"{what}: seed", 32), vk.parameters
    nonces = derive.nonces(seed, parameters.n)
    if parameters.source not in DERIVED:
        raise InputError(f"{what}: triggers of the source {parameters.source} are not derived from a seed")
    images = {"abstract": derive.abstract, "noise": derive.noise}[parameters.source](
        seed, parameters.n, parameters.shape
    )
    secret = hashlib.sha256(b"pharmakon/watermark/labels\x00" + seed).digest()
    labels = derive.labels(secret, [-1] * parameters.n, parameters.classes)
    for each in opened:
        index = each["index"]
        same = base64.b64decode(each["pixels"]) == images[index].tobytes()
        same &= bytes.fromhex(each["trigger_r"]) == nonces[index]
        same &= bytes.fromhex(each["label_r"]) == nonces[parameters.n + index]
        if parameters.labels_from == "seed":
            same &= each["label"] == labels[index]
        if not same:
            raise InputError(f"{what}: opening of trigger {index} is not derived from the revealed seed")


def _check_beacon(vk: VerificationKey, opened: Sequence[dict[str, Any]], what: str) -> None:
    """With a beacon every label can be computed by anybody."""
    if vk.parameters.labels_from != "beacon":
        return
    n = vk.parameters.n
    secret = beacon_secret(bytes.fromhex(vk.beacon), bytes.fromhex(vk.trigger_root))
    truths = [-1] * n
    for each in opened:
        truths[each["index"]] = each["truth"]
    labels = derive.labels(secret, truths, vk.parameters.classes)
    for each in opened:
        if each["label"] != labels[each["index"]]:
            raise InputError(f"{what}: the label of trigger {each['index']} is not the beacon's")


def _increasing(value: list[Any], n: int, what: str) -> list[int]:
    if not all(type(index) is int and 0 <= index < n for index in value) or sorted(set(value)) != value:
        raise InputError(f"{what}: increasing numbers below {n} are expected")
    return value
