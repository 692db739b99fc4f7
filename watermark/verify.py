"""Verify(mk, vk, M): whether a model was marked with a key.

Scheme: Adi et al. 2018: the labels are wrong ones, all openings are valid, and M gives the labels to all but ε of the
triggers. Their verdict is reported; ours asks for significance under the exact null distribution, since a fixed ε says
nothing of how easily an unmarked model reaches it.

Threat model: the suspect is a black box that answers images with labels, and may refuse. The claimant may be the thief:
`watermark.transcript.claims` says of each verdict whether that is excluded.

What is sent to a suspect elsewhere is known from then on, as is what a judge is shown: it is burnt before it is sent,
so that nothing that goes wrong in between leaves a trigger that was seen and still counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import InputError, bad
from watermark import canonical, keys, transcript
from watermark.derive import Images
from watermark.statistics import Betting
from watermark.transcript import REFUSED, Result

Ask = Callable[[Images], Sequence[int]]
"""uint8 (m, C, H, W) → m classes, `REFUSED` where there is no answer."""


class Verification(NamedTuple):
    """A verdict, and what proves it.

    Attributes:
        result: The verdict.
        transcript: Canonical bytes, signed: it shows the triggers that it opens.
    """

    result: Result
    transcript: bytes


def verify(
    folder: str | Path,
    suspect: Ask,
    model: str,
    when: str,
    *,
    mode: str = "private",
    nonce: bytes = b"",
    count: int | None = None,
    remote: bool = False,
    reference: Ask | None = None,
    stop_early: bool = False,
    keep: Callable[[bytes], object] | None = None,
) -> Verification:
    """Verify a model, once: each scored trigger is asked about exactly once.

    A verification that burns triggers and is cut off before it has its answers is gone on with by the same call: it
    asks about the same triggers again.

    Args:
        folder: Of the key.
        suspect: The model.
        model: What names it: the hash of its weights, or its address.
        when: Date and time, for the record.
        mode: ``private``: the owner looks for himself, at all triggers that are left. ``public``: a verifier's nonce
            says which are opened. ``revealed``: the seed is given away, and all is derived again. What is opened by
            the last two is burnt.
        nonce: Of the verifier, where the mode is public.
        count: How many a public verification opens; None: half of those that are left.
        remote: Whether others see what the suspect is asked.
        reference: f, where the key's truths are those of a reference classifier.
        stop_early: Whether to ask one by one, and stop as soon as an anytime-valid test is certain; the verdict then is
            that test's, and there is no transcript.
        keep: Takes the transcript as soon as there is one, and before the verification counts as done. A private look
            makes one for it alone, which opens all triggers that are left, and burns them.

    Returns:
        The verdict, with its transcript (empty if there is none). Of a public verification it is that of a judge who
        gave nonce and count, and knows nothing of what is burnt; of a private one it is about what is left.

    Raises:
        InputError: If the key is damaged or has no triggers left, or a value is wrong; nothing was asked then.
    """
    mk = keys.MarkingKey.read(folder)
    vk = keys.VerificationKey.read(folder)
    mk.check(vk)
    parameters = vk.parameters
    _check(parameters, mode, nonce, model, when)
    known = keys.burnt(folder)

    def choose(out: frozenset[int]) -> list[int]:
        left = [index for index in range(parameters.n) if index not in out]
        if mode == "revealed":  # what is burnt counts again: a judge sees that none of it was chosen
            return list(range(parameters.n))
        if not left:
            raise InputError(f"key = {str(folder)!r}: every trigger is burnt; nothing is left to verify with")
        if mode == "public":
            return transcript.challenge(vk, model, nonce, len(left) // 2 if count is None else count, out)
        return left

    run = run_of(vk, model, mode, nonce, count)
    burns = mode != "private" or keep is not None or remote
    if parameters.reference != "none":  # before anything is burnt
        _check_truths(mk, reference)
    if stop_early:
        return Verification(_one_by_one(folder, mk, suspect, choose(known), remote), b"")
    taken = keys.take(folder, choose, run) if burns else keys.Taken(known, choose(known))
    indices, out = taken.indices, frozenset() if mode == "revealed" else taken.before
    answers = checked(suspect(mk.images()[indices]), len(indices), parameters.classes)
    written = b""
    if mode != "private" or keep is not None:
        written = transcript.write(
            mk, vk, model=model, when=when, mode=mode, nonce=nonce, burnt=out, indices=indices, answers=answers
        )
    if mode == "private":
        labels = mk.labels()
        result = transcript.judge(parameters, [labels[index] for index in indices], answers)
        line = transcript.claims(parameters, mode, result.log2_p, transcript.Judge())
        result = replace(result, resistance=line[0], claims=line[1])
    else:
        wanted = len(indices) if mode == "public" else None
        by = transcript.Judge(vk.digest, nonce, wanted, keys.begun(folder, vk) or b"")
        result = transcript.check(written, by=by).result
    if keep is not None:
        keep(written)
    if burns:
        keys.finished(folder, run)
    return Verification(result, written)


def run_of(vk: keys.VerificationKey, model: str, mode: str, nonce: bytes, count: int | None) -> str:
    """What names a verification that may be cut off and gone on with: 64 hexadecimal digits."""
    named = [vk.digest, model, mode, nonce.hex(), -1 if count is None else count]
    return hashlib.sha256(b"pharmakon/watermark/verification\x00" + canonical.encode(named)).hexdigest()


def _check(parameters: keys.Parameters, mode: str, nonce: bytes, model: str, when: str) -> None:
    """Refuse values that are wrong, before anything is burnt."""
    if mode not in transcript.MODES:
        raise bad("mode", mode, f"choose from {', '.join(transcript.MODES)}")
    if mode == "revealed" and parameters.source not in keys.DERIVED:
        raise bad("mode", mode, f"triggers of the source {parameters.source} are not derived from a seed")
    if mode != "public" and nonce:
        raise bad("nonce", nonce.hex(), "it belongs to a public verification")
    canonical.line(model, "model")
    canonical.line(when, "when")


def checked(answers: Sequence[int], count: int, classes: int) -> list[int]:
    """Answers as classes, `REFUSED` for all that is none.

    Raises:
        InputError: If there is not one for each image.
    """
    if len(answers) != count:
        raise InputError(f"the suspect gave {len(answers)} answers to {count} images")
    return [int(answer) if 0 <= int(answer) < classes else REFUSED for answer in answers]


def _check_truths(mk: keys.MarkingKey, reference: Ask | None) -> None:
    """The first step of the published procedure: every label differs from f(t)."""
    if reference is None:
        raise InputError("reference: this key's truths are those of a classifier; give its weights with --reference")
    wrong = sum(truth != seen for truth, seen in zip(mk.truths, reference(mk.images()), strict=True))
    if wrong:
        raise InputError(f"reference: f gives other classes to {wrong} of {len(mk.truths)} triggers than the key says")


def _one_by_one(folder: str | Path, mk: keys.MarkingKey, suspect: Ask, indices: Sequence[int], remote: bool) -> Result:
    """Ask until the wealth of a bettor passes 1/α: the order is the key's, and the key was made at random."""
    parameters, images, labels = mk.parameters, mk.images(), mk.labels()
    test, aim = Betting(parameters.classes), parameters.alpha_log2 + parameters.grinding_log2
    least = least_queries(parameters)
    matches = refused = asked = 0
    for index in indices if len(indices) >= least else ():  # fewer could decide nothing
        if remote and not keys.take(folder, _unless_burnt(index)).indices:
            continue  # another verification took it meanwhile
        answer = checked(suspect(images[index : index + 1]), 1, parameters.classes)[0]
        asked, matches, refused = asked + 1, matches + (answer == labels[index]), refused + (answer == REFUSED)
        if test.bet(answer == labels[index]) >= aim:
            break
    owned: bool | None = test.log2_wealth >= aim
    published = bool(asked) and (asked - matches) * parameters.n <= parameters.misses_allowed * asked
    bound = min(0, -int(test.log2_wealth) + parameters.grinding_log2)
    reason = ""
    if asked < least and not owned:
        found = len(indices) if len(indices) < least else asked
        owned, reason = None, f"{found} triggers are too few for 2^-{parameters.alpha_log2}: {least} are needed"
    elif refused and not owned:
        owned, reason = None, f"{refused} triggers got no answer"
    resistance, claims = transcript.claims(parameters, "private", bound, transcript.Judge())
    return Result(
        owned, matches, asked, 0, refused, None, bound, published, reason, resistance, claims,
        parameters.alpha_log2, parameters.grinding_log2,
    )  # fmt: skip


def _unless_burnt(index: int) -> Callable[[frozenset[int]], list[int]]:
    return lambda out: [] if index in out else [index]


def least_queries(parameters: keys.Parameters) -> int:
    """How many matches one after the other let `stop_early` decide: no verification asks less."""
    test, aim = Betting(parameters.classes), parameters.alpha_log2 + parameters.grinding_log2
    asked = 1
    while test.bet(True) < aim:
        asked += 1
    return asked
