"""Transcripts: what a verification saw, so that anybody can check it without torch, and without the model.

What a transcript shows for good: these triggers and labels are those that the verification key committed to; if there
was a challenge, the nonce that it names chose them. The verdict is not in it: each reader draws his own, from the
answers and from what he brings himself – the key that was published, his nonce, his α (`Judge`).

The claimant writes it, and whatever is his to choose must not help him. So triggers that he calls burnt are no excuse:
where the challenge draws them, they count as misses. The challenge is drawn among all n, whichever are burnt, and says
how many are opened; for a given nonce and count a claimant has no choice left, and p is valid whatever he writes.

What it cannot show is that the suspect gave these answers: the owner signs that he saw them, and a judge asks again.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datamodules.errors import InputError, bad
from watermark import canonical, derive, keys, merkle, signatures
from watermark.commitments import commit, label_payload, trigger_payload
from watermark.keys import DERIVED, UNTRUE, MarkingKey, Parameters, VerificationKey, beacon_secret
from watermark.statistics import least_matches, log2_ceiling, p_value

FORMAT = "pharmakon-transcript-2"
SIGNED = "transcript"
"""What a signature under a transcript is for."""

REFUSED = -1
"""The answer of a suspect that gave none."""

LEAST_NONCE = 16
MODES = ("private", "public", "revealed")

NONE, CONDITIONAL, FULL = "none", "conditional", "full"
"""How a verdict withstands a claimant who chose the key, or what he shows of it, after he saw the model: not; if what
`Result.claims` names is shown as well; or by itself, within the significance."""

LEAST_ALPHA_LOG2 = 64
"""A claimant may try so many keys that a larger α of his own choice says nothing of false claims."""

_OPENING: dict[str, type] = {
    "index": int, "label": int, "truth": int, "pixels": str, "trigger_r": str, "label_r": str, "trigger_path": list,
    "label_path": list, "subtree_path": list,
}  # fmt: skip
_FIELDS: dict[str, type] = {
    "format": str, "vk": dict, "model": str, "when": str, "mode": str, "nonce": str, "seed": str, "burnt": list,
    "openings": list, "answers": list, "signature": str,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What follows from the answers.

    Attributes:
        owned: Whether the p-value is α or less; None if it cannot be decided.
        matches: Triggers with the key's label.
        scored: Triggers that count.
        burnt: Of those, the ones that were not asked about, since they are called burnt; they count as no match.
        refused: Of those, the ones without an answer; they count as no match.
        needed: Matches that α asks for; None if so few triggers cannot reach it.
        log2_p: The smallest whole k with p ≤ 2^k.
        published: Adi et al.'s verdict: all but ε·n match.
        reason: Why it is not decided; empty if it is.
        resistance: `NONE`, `CONDITIONAL` or `FULL`: whether it withstands a claimant who chose after he saw the model.
        claims: The same for a person, and what is left to show.
        alpha_log2: α = 2^−alpha_log2.
        grinding_log2: p is multiplied by 2^this: keys that may have been tried, and numbers of openings.
    """

    owned: bool | None
    matches: int
    scored: int
    burnt: int
    refused: int
    needed: int | None
    log2_p: int
    published: bool
    reason: str
    resistance: str
    claims: str
    alpha_log2: int
    grinding_log2: int


@dataclass(frozen=True)
class Judge:
    """What somebody who judges a transcript brings himself. What he does not bring, the verdict says.

    Attributes:
        key: The digest of the verification key that was published; empty: not known.
        nonce: The one that he gave; empty: none.
        count: How many triggers he wanted opened; None: half of them or more, and p allows for the choice.
        begun: The content of begun.json; empty: none.
        alpha_log2: His own α; None: the key's.
        earlier: Transcripts of the same key that he had before: what they opened is burnt, and left out.
    """

    key: str = ""
    nonce: bytes = b""
    count: int | None = None
    begun: bytes = b""
    alpha_log2: int | None = None
    earlier: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """A transcript whose openings, challenge and signature hold.

    Attributes:
        vk: The key that it is about.
        model: What names the suspect.
        when: Date and time, as the owner says.
        mode: One of `MODES`.
        nonce: The one that chose the triggers; empty unless the mode is public.
        burnt: Triggers that the claimant calls burnt.
        indices: Those that are opened, increasing.
        labels: Theirs.
        pixels: Theirs: bytes of each image.
        answers: Of the suspect, as the claimant says; `REFUSED` where it gave none.
    """

    vk: VerificationKey
    model: str
    when: str
    mode: str
    nonce: bytes
    burnt: frozenset[int]
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    pixels: tuple[bytes, ...]
    answers: tuple[int, ...]

    def images(self) -> derive.Images:
        """The opened triggers: uint8 (m, C, H, W)."""
        import numpy as np

        shape = self.vk.parameters.shape
        return np.frombuffer(b"".join(self.pixels), np.uint8).reshape(len(self.pixels), *shape).copy()


class Checked(NamedTuple):
    """A transcript, and what follows from it.

    Attributes:
        transcript: As it was read.
        result: The verdict.
    """

    transcript: Transcript
    result: Result


def judge(
    parameters: Parameters,
    labels: Sequence[int],
    answers: Sequence[int],
    *,
    burnt: int = 0,
    alpha_log2: int | None = None,
    choices_log2: int = 0,
) -> Result:
    """The verdict on the answers to some triggers, which says nothing of false claims yet.

    Args:
        parameters: Of the key.
        labels: Of the triggers that were asked about.
        answers: Of the suspect; `REFUSED` where it gave none.
        burnt: Triggers that count as misses beside them.
        alpha_log2: α; None: the key's.
        choices_log2: Choices that the claimant had beside the key's grinding.
    """
    n, classes, grinding = len(labels) + burnt, parameters.classes, parameters.grinding_log2 + choices_log2
    alpha = parameters.alpha_log2 if alpha_log2 is None else alpha_log2
    matches = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    refused = sum(answer == REFUSED for answer in answers)
    needed = least_matches(n, classes, alpha, grinding) if n else None
    log2_p = log2_ceiling(p_value(matches, n, classes, grinding)) if n else 0
    published = bool(n) and (n - matches) * parameters.n <= parameters.misses_allowed * n
    owned: bool | None = needed is not None and matches >= needed
    reason = ""
    if needed is None:
        owned, reason = None, f"{n} triggers are too few for 2^-{alpha}"
    elif not owned and matches + refused >= needed:
        owned, reason = None, f"{refused} triggers got no answer; with them the verdict could be another"
    return Result(owned, matches, n, burnt, refused, needed, log2_p, published, reason, NONE, "", alpha, grinding)


def claims(parameters: Parameters, mode: str, log2_p: int, by: Judge, left_out: int = 0) -> tuple[str, str]:
    """What a verdict cannot exclude: that the claimant made the key for this model, after he had seen it.

    Args:
        parameters: Of the key.
        mode: Of the verification.
        log2_p: Of the p-value.
        by: What the judge brought; his begun.json has been checked.
        left_out: Triggers that earlier transcripts left out.

    Returns:
        `NONE`, `CONDITIONAL` or `FULL`, and a line for a person.
    """
    why_not = (
        (mode == "private", "a private look of the owner, not for a judge"),
        (
            by.alpha_log2 is None and parameters.alpha_log2 < LEAST_ALPHA_LOG2,
            f"α = 2^-{parameters.alpha_log2} is the claimant's choice, and above 2^-{LEAST_ALPHA_LOG2}; give your own",
        ),
        (mode == "public" and not by.nonce, "the nonce may be the claimant's own"),
        (
            mode == "public" and parameters.labels_from != "beacon",
            "triggers and labels may have been chosen after seeing the model",
        ),
        (mode == "public" and not by.begun, "give begun.json, which committed to the triggers before the beacon"),
        (mode == "public" and not by.key, "name the key that was published; another may have been made for your nonce"),
    )
    for applies, why in why_not:
        if applies:
            return NONE, f"not resistant to false claims: {why}"
    beyond = f"2^{parameters.grinding_log2} tried keys are allowed for"
    if log2_p < 0:
        beyond += f", and a search through 2^{-log2_p} that was not declared is not excluded"
    if mode == "revealed":
        return FULL, f"resistant to false claims: all is derived from one seed; {beyond}"
    shown = f"begun.json (SHA-256 {hashlib.sha256(by.begun).hexdigest()}) was timestamped before round"
    shown += f" {parameters.beacon_round} of {parameters.beacon_source}, and that number is the key's beacon"
    if left_out:
        shown += f"; and the transcripts that leave {left_out} triggers out are older than this claim"
    return CONDITIONAL, f"resistant to false claims if {shown}; {beyond}"


def challenge(
    vk: VerificationKey, model: str, nonce: bytes, count: int, burnt: frozenset[int] = frozenset()
) -> list[int]:
    """The triggers that a verifier's nonce opens: the first of the draw that are not burnt.

    The nonce must be the verifier's, and fresh: an owner who chooses it can try nonces until he likes the triggers.
    What is burnt is the owner's word, and changes nothing of the order.

    Args:
        vk: The key.
        model: The suspect: the hash of its weights, or its address.
        nonce: 16 bytes or more.
        count: How many to open.
        burnt: Triggers that are out.

    Returns:
        Their indices, increasing.

    Raises:
        InputError: If the nonce is too short, or not so many are left.
    """
    if len(nonce) < LEAST_NONCE:
        raise bad("nonce", nonce.hex(), f"{LEAST_NONCE} bytes or more are expected, from the verifier")
    left = vk.parameters.n - len(burnt)
    if not 1 <= count <= left:
        raise bad("count", count, f"{left} of {vk.parameters.n} triggers are not burnt yet; open 1 to {left}")
    return sorted(_first(vk, model, nonce, count, burnt))


def _first(vk: VerificationKey, model: str, nonce: bytes, count: int, out: frozenset[int]) -> list[int]:
    """The first `count` of the draw that are not out, in its order."""
    name = model.encode()
    parts = [bytes.fromhex(vk.digest), len(name).to_bytes(4, "big"), name, len(nonce).to_bytes(4, "big"), nonce]
    # the count is hashed, too: else the openings for fewer would be the first of those for more, and the owner would
    # stop where he likes
    parts.append(count.to_bytes(4, "big"))
    secret = hashlib.sha256(b"pharmakon/watermark/challenge/2\x00" + b"".join(parts)).digest()
    return [index for index in derive.order(secret, vk.parameters.n) if index not in out][:count]


def write(
    mk: MarkingKey,
    vk: VerificationKey,
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
    }
    return canonical.encode({**value, "signature": mk.sign(SIGNED, canonical.encode(value)).hex()})


def read(data: bytes, what: str = "transcript") -> Transcript:
    """Read a transcript, and check every statement in it that can be checked without the model.

    Args:
        data: Its bytes.
        what: Its name, for complaints.

    Raises:
        InputError: If anything does not hold; it names what.
    """
    value = canonical.fields(canonical.decode(data, what), what, _FIELDS)
    if value["format"] != FORMAT:
        raise InputError(f"{what}: its format is not {FORMAT}")
    vk = VerificationKey.from_bytes(canonical.encode(value["vk"]), f"{what}: vk")
    signature = canonical.unhex(value["signature"], f"{what}: signature", signatures.SIGNATURE)
    unsigned = canonical.encode({name: part for name, part in value.items() if name != "signature"})
    if not signatures.check(bytes.fromhex(vk.parameters.owner), signature, SIGNED, unsigned):
        raise InputError(f"{what}: the signature is not the owner's: the transcript was changed")
    model, when = (canonical.line(value[name], f"{what}: {name}") for name in ("model", "when"))
    parameters, mode = vk.parameters, value["mode"]
    if mode not in MODES:
        raise InputError(f"{what}: its mode is not one of {', '.join(MODES)}")
    burnt = frozenset(canonical.increasing(value["burnt"], parameters.n, f"{what}: burnt"))
    opened = [_opening(each, vk, f"{what}: opening {at}") for at, each in enumerate(value["openings"])]
    indices = canonical.increasing([each["index"] for each in opened], parameters.n, f"{what}: openings")
    pixels = tuple(_pixels(each["pixels"], f"{what}: pixels") for each in opened)
    if len(set(pixels)) != len(pixels):
        raise InputError(f"{what}: two of its triggers are the same image")
    nonce = canonical.unhex(value["nonce"], f"{what}: nonce")
    _check_indices(vk, model, mode, nonce, indices, burnt, what)
    _check_seed(value["seed"], mode, vk, what)
    _check_beacon(vk, opened, what)
    answers = value["answers"]
    if len(answers) != len(opened) or not all(type(a) is int and REFUSED <= a < parameters.classes for a in answers):
        raise InputError(f"{what}: answers: a class, or {REFUSED}, is expected for each opened trigger")
    labels = tuple(each["label"] for each in opened)
    return Transcript(vk, model, when, mode, nonce, burnt, tuple(indices), labels, pixels, tuple(answers))


def judged(
    seen: Transcript, by: Judge | None = None, answers: Sequence[int] | None = None, what: str = "transcript"
) -> Result:
    """The verdict on a transcript that was read.

    Args:
        seen: The transcript.
        by: What the judge brings himself; None: nothing.
        answers: Of the suspect, asked again about the opened triggers; None: those of the transcript.
        what: The transcript's name, for complaints.

    Raises:
        InputError: If it is not what the judge asked for: another key, nonce or count.
    """
    by = by or Judge()
    vk, parameters = seen.vk, seen.vk.parameters
    if by.key and by.key != vk.digest:
        raise InputError(f"{what}: it is of the key {vk.digest}, not of the one that was given")
    if by.nonce and seen.mode != "public":
        raise InputError(f"{what}: it is {seen.mode}, and no nonce chose its triggers")
    if by.nonce and by.nonce != seen.nonce:
        raise InputError(f"{what}: its nonce is not yours; ask the owner for one that answers it")
    if by.begun:
        keys.check_begun(by.begun, vk, "begun")
    out = _left_out(seen, by.earlier)
    choices, drawn = 0, [index for index in range(parameters.n) if index not in out]
    if seen.mode == "public":
        choices = _choices(len(seen.indices), len(drawn), by.count, what)
        drawn = _first(vk, seen.model, seen.nonce, len(seen.indices), out)
    elif by.count is not None:
        raise InputError(f"{what}: it is {seen.mode}, and opens all triggers that are left")
    given = seen.answers if answers is None else answers
    answered = {index: (label, a) for index, label, a in zip(seen.indices, seen.labels, given, strict=True)}
    scored = [answered[index] for index in drawn if index in answered]
    result = judge(
        parameters,
        [label for label, _ in scored],
        [answer for _, answer in scored],
        burnt=len(drawn) - len(scored),  # the claimant calls them burnt, and nothing shows that they are
        alpha_log2=by.alpha_log2,
        choices_log2=choices,
    )
    resistance, line = claims(parameters, seen.mode, result.log2_p, by, len(out))
    fields = {**result.__dict__, "resistance": resistance, "claims": line}
    if seen.mode == "public" and not by.nonce:
        fields |= {"owned": None, "reason": "the nonce may be the claimant's own; give yours: --nonce HEX"}
    return Result(**fields)


def check(data: bytes, what: str = "transcript", by: Judge | None = None) -> Checked:
    """Read a transcript, and judge it.

    Args:
        data: Its bytes.
        what: Its name, for complaints.
        by: What the judge brings himself; None: nothing.

    Raises:
        InputError: If anything does not hold; it names what.
    """
    seen = read(data, what)
    return Checked(seen, judged(seen, by, what=what))


def _check_indices(
    vk: VerificationKey, model: str, mode: str, nonce: bytes, indices: list[int], burnt: frozenset[int], what: str
) -> None:
    """That the triggers that are opened are those of the mode."""
    if (mode == "public") != bool(nonce):
        raise InputError(f"{what}: a nonce is there if and only if the verification is public")
    if mode == "revealed" and (burnt or len(indices) != vk.parameters.n):
        raise InputError(f"{what}: a revealed seed opens all triggers, and none of them is left out as burnt")
    if burnt & set(indices):
        raise InputError(f"{what}: a burnt trigger is scored")
    if mode == "private" and len(indices) + len(burnt) != vk.parameters.n:
        raise InputError(f"{what}: not all triggers that are left are scored")
    if not indices:
        raise InputError(f"{what}: it opens nothing")
    if mode == "public":
        if len(burnt) + len(indices) > vk.parameters.n:
            raise InputError(f"{what}: it has more triggers than the key")
        if indices != challenge(vk, model, nonce, len(indices), burnt):
            raise InputError(f"{what}: these are not the triggers that the verifier's nonce opens")


def _left_out(seen: Transcript, earlier: Sequence[bytes]) -> frozenset[int]:
    """What is burnt, as other transcripts show."""
    out: set[int] = set()
    for at, data in enumerate(earlier):
        before = read(data, f"earlier transcript {at + 1}")
        if before.vk.digest != seen.vk.digest:
            raise InputError(f"earlier transcript {at + 1}: it is of another key")
        out |= set(before.indices)
    return frozenset(out & seen.burnt)


def _choices(count: int, left: int, wanted: int | None, what: str) -> int:
    """How often the claimant could choose how many to open, as a power of two."""
    if wanted is not None:
        if count != wanted:
            raise InputError(f"{what}: it opens {count} triggers, and you wanted {wanted}")
        return 0
    least = max(1, left // 2)
    if count < least:
        remedy = "give the earlier transcripts that burnt the others, or say with --count how many you wanted"
        raise InputError(f"{what}: it opens {count} of {left} triggers, fewer than half: {remedy}")
    return (left - least).bit_length()


def _pixels(text: str, what: str) -> bytes:
    """The bytes of base64; of each bytes there is one text."""
    try:
        found = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InputError(f"{what}: base64 is expected") from error
    if base64.b64encode(found).decode("ascii") != text:
        raise InputError(f"{what}: not in canonical form")
    return found


def _opening(value: Any, vk: VerificationKey, what: str) -> dict[str, Any]:
    """One opening that leads to the root."""
    given = canonical.fields(value, what, _OPENING)
    parameters, index, label, truth = vk.parameters, given["index"], given["label"], given["truth"]
    n = parameters.n
    if not (0 <= index < n and 0 <= label < parameters.classes and -1 <= truth < parameters.classes):
        raise InputError(f"{what}: index, label or truth is out of range")
    if (truth == -1) != (parameters.source in UNTRUE):
        raise InputError(f"{what}: truth: of {parameters.source} triggers {_true(parameters)}")
    if label == truth:
        raise InputError(f"{what}: the label is the true one")
    try:
        payload = trigger_payload(_pixels(given["pixels"], f"{what}: pixels"), parameters.shape, truth)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: pixels: an image of {parameters.shape} is expected") from error
    trigger = commit(_nonce(given, "trigger_r", what), parameters.key_id, index, "trigger", payload)
    named = commit(_nonce(given, "label_r", what), parameters.key_id, index, "label", label_payload(label))
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


def _true(parameters: Parameters) -> str:
    return "no class is true, which is -1" if parameters.source in UNTRUE else "each has a true class"


def _nonce(opening: dict[str, Any], name: str, what: str) -> bytes:
    return canonical.unhex(opening[name], f"{what}: {name}", 32)


def _check_seed(text: str, mode: str, vk: VerificationKey, what: str) -> None:
    """That a revealed seed leads to both roots, by which all openings are those that follow from it."""
    if (mode == "revealed") != bool(text):
        raise InputError(f"{what}: a seed is there if and only if it is revealed")
    if mode != "revealed":
        return
    seed, parameters = canonical.unhex(text, f"{what}: seed", 32), vk.parameters
    if parameters.source not in DERIVED:
        raise InputError(f"{what}: triggers of the source {parameters.source} are not derived from a seed")
    if keys.roots(parameters, seed, bytes.fromhex(vk.beacon)) != (vk.trigger_root, vk.root):
        raise InputError(f"{what}: the key is not derived from the revealed seed")


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
