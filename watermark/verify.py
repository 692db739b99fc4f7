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

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import InputError, bad
from watermark import keys, transcript
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
) -> Verification:
    """Verify a model, once: each scored trigger is asked about exactly once.

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

    Returns:
        The verdict, with its transcript (empty if it stopped early).

    Raises:
        InputError: If the key is damaged or has no triggers left, or a value is wrong; nothing was asked then.
    """
    mk = keys.MarkingKey.read(folder)
    vk = keys.VerificationKey.read(folder)
    mk.check(vk)
    if mode not in transcript.MODES:
        raise bad("mode", mode, f"choose from {', '.join(transcript.MODES)}")
    if mode == "revealed" and vk.parameters.source not in keys.DERIVED:
        raise bad("mode", mode, f"triggers of the source {vk.parameters.source} are not derived from a seed")
    if mode != "public" and nonce:
        raise bad("nonce", nonce.hex(), "it belongs to a public verification")
    out = keys.burnt(folder)
    left = [index for index in range(vk.parameters.n) if index not in out]
    if not left:
        raise InputError(f"key = {str(folder)!r}: every trigger is burnt; nothing is left to verify with")
    indices = left
    if mode == "public":
        indices = transcript.challenge(vk, model, nonce, out, len(left) // 2 if count is None else count)
    images, labels = mk.images()[indices], [mk.labels()[index] for index in indices]
    if vk.parameters.reference != "none":
        _check_truths([mk.truths[index] for index in indices], images, reference)
    if mode == "revealed":
        keys.burn(folder, left)
    elif mode == "public" or (remote and not stop_early):
        keys.burn(folder, indices)
    if stop_early:
        return Verification(_one_by_one(folder, vk.parameters, suspect, images, labels, indices, remote), b"")
    answers = checked(suspect(images), len(indices), vk.parameters.classes)
    result = transcript.judge(vk.parameters, mode, labels, answers)
    written = transcript.write(
        mk, vk, result, model=model, when=when, mode=mode, nonce=nonce, burnt=out, indices=indices, answers=answers
    )
    return Verification(result, written)


def checked(answers: Sequence[int], count: int, classes: int) -> list[int]:
    """Answers as classes, `REFUSED` for all that is none.

    Raises:
        InputError: If there is not one for each image.
    """
    if len(answers) != count:
        raise InputError(f"the suspect gave {len(answers)} answers to {count} images")
    return [int(answer) if 0 <= int(answer) < classes else REFUSED for answer in answers]


def _check_truths(truths: Sequence[int], images: Images, reference: Ask | None) -> None:
    """The first step of the published procedure: every label differs from f(t)."""
    if reference is None:
        raise InputError("reference: this key's truths are those of a classifier; give its weights with --reference")
    found = list(reference(images))
    wrong = [at for at, (truth, seen) in enumerate(zip(truths, found, strict=True)) if truth != seen]
    if wrong:
        raise InputError(
            f"reference: f gives other classes to {len(wrong)} of {len(truths)} triggers than the key says"
        )


def _one_by_one(
    folder: str | Path,
    parameters: keys.Parameters,
    suspect: Ask,
    images: Images,
    labels: Sequence[int],
    indices: Sequence[int],
    remote: bool,
) -> Result:
    """Ask until the wealth of a bettor passes 1/α: the order is the key's, and the key was made at random."""
    test, aim = Betting(parameters.classes), parameters.alpha_log2 + parameters.grinding_log2
    matches = refused = asked = 0
    for at, label in enumerate(labels):
        if remote:
            keys.burn(folder, [indices[at]])
        answer = checked(suspect(images[at : at + 1]), 1, parameters.classes)[0]
        asked, matches, refused = asked + 1, matches + (answer == label), refused + (answer == REFUSED)
        if test.bet(answer == label) >= aim:
            break
    owned = test.log2_wealth >= aim
    published = (asked - matches) * parameters.n <= parameters.misses_allowed * asked
    claims = transcript.claims(parameters, "private")
    bound = min(0, -int(test.log2_wealth) + parameters.grinding_log2)
    reason = "" if owned or not refused else f"{refused} triggers got no answer"
    return Result(owned if not reason else None, matches, asked, refused, None, bound, published, reason, claims)
