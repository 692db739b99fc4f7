"""Verification and its transcripts: each altered byte, forged claim and half-way failure."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import InputError
from tests.watermark.test_keys import _mutated
from watermark import canonical, derive, keys, merkle, transcript
from watermark.derive import Images
from watermark.keys import MarkingKey, VerificationKey, keygen
from watermark.transcript import REFUSED, Judge, Result
from watermark.verify import Verification, least_queries, verify

NONCE = b"of the verifier!"


class Model:
    """A suspect that knows some triggers by heart, and counts what it is asked."""

    def __init__(self, folder: Path, known: int | None = None, otherwise: int = 0) -> None:
        key = MarkingKey.read(folder)
        pairs = list(zip(key.images(), key.labels(), strict=True))[:known]
        self.known = {image.tobytes(): label for image, label in pairs}
        self.otherwise, self.asked = otherwise, 0

    def __call__(self, images: Images) -> list[int]:
        self.asked += len(images)
        return [self.known.get(image.tobytes(), self.otherwise) for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8))
    return tmp_path / "key"


def run(folder: Path, model: Any = None, **more: Any) -> Verification:
    return verify(folder, model or Model(folder), "the model", "today", **more)


def test_a_marked_model_is_owned_for_n_queries(folder: Path) -> None:
    model = Model(folder)
    found = run(folder, model)
    assert model.asked == 100
    assert (found.result.owned, found.result.matches, found.result.log2_p) == (True, 100, -316)
    assert found.result.published
    assert found.transcript == b""
    assert not keys.burnt(folder), "the owner looked for himself"


def test_a_private_look_that_is_shown_burns_what_it_shows(folder: Path) -> None:
    kept: list[bytes] = []
    found = run(folder, keep=kept.append)
    assert kept == [found.transcript]
    assert transcript.check(found.transcript).result == found.result
    assert found.result.claims.endswith("a private look of the owner, not for a judge")
    assert len(keys.burnt(folder)) == 100
    with pytest.raises(InputError, match="every trigger is burnt"):
        run(folder)


def test_the_threshold_is_exact(folder: Path) -> None:
    key = MarkingKey.read(folder)
    for matches, owned in ((48, True), (47, False)):
        labels = key.labels()
        given = [label if at < matches else (label + 1) % 10 for at, label in enumerate(labels)]
        result = run(folder, lambda images, given=given: given).result
        assert (result.owned, result.matches, result.published) == (owned, matches, False)


@pytest.mark.parametrize(("misses", "published"), [(10, True), (11, False)])
def test_the_published_rule_is_not_off_by_one(folder: Path, misses: int, published: bool) -> None:
    labels = MarkingKey.read(folder).labels()
    given = [(label + (at < misses)) % 10 for at, label in enumerate(labels)]
    assert run(folder, lambda images: given).result.published is published


def test_whatever_an_unmarked_model_prefers_it_is_not_owned(folder: Path) -> None:
    for label in range(10):
        assert run(folder, lambda images, label=label: [label] * len(images)).result.owned is False


def test_a_suspect_that_refuses_is_undecided(folder: Path) -> None:
    result = run(folder, lambda images: [REFUSED] * len(images)).result
    assert result.owned is None
    assert "100 triggers got no answer" in result.reason
    labels = MarkingKey.read(folder).labels()
    half = run(folder, lambda images: labels[:60] + [99] * 40).result
    assert (half.owned, half.refused) == (True, 40)


def test_a_public_verification_burns_what_it_opens(folder: Path) -> None:
    first = run(folder, mode="public", nonce=NONCE)
    opened = keys.burnt(folder)
    assert first.result.scored == len(opened) == 50
    assert first.result.owned
    second = run(folder, mode="public", nonce=NONCE)
    assert len(keys.burnt(folder)) == 75
    seen = transcript.read(second.transcript)
    assert seen.burnt == opened
    assert len(seen.indices) == 25
    rest = run(folder)
    assert rest.result.scored == 25
    assert rest.result.needed == 23
    assert rest.result.claims.startswith("not resistant to false claims")


def test_what_a_claimant_calls_burnt_is_a_miss_where_nothing_shows_it(folder: Path) -> None:
    first = run(folder, mode="public", nonce=NONCE)
    second = run(folder, mode="public", nonce=NONCE)
    order = transcript._first(VerificationKey.read(folder), "the model", NONCE, 25, frozenset())
    burnt = len(set(order) & keys.burnt(folder) - set(transcript.read(second.transcript).indices))
    assert 0 < burnt < 25
    alone = transcript.check(second.transcript, by=Judge(nonce=NONCE, count=25)).result
    assert alone == second.result
    assert (alone.scored, alone.burnt, alone.matches, alone.owned) == (25, burnt, 25 - burnt, False)
    assert not alone.published
    by = Judge(nonce=NONCE, count=25, earlier=(first.transcript,))
    shown = transcript.check(second.transcript, by=by).result
    assert (shown.scored, shown.burnt, shown.matches, shown.owned) == (25, 0, 25, True)
    with pytest.raises(InputError, match="25 of 100 triggers, fewer than half: give the earlier"):
        transcript.check(second.transcript, by=Judge(nonce=NONCE))


def test_transcripts_of_another_key_leave_nothing_out(folder: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "other", classes=10, shape=(1, 8, 8))
    other = run(tmp_path / "other", mode="public", nonce=NONCE).transcript
    run(folder, mode="public", nonce=NONCE)
    second = run(folder, mode="public", nonce=NONCE).transcript
    with pytest.raises(InputError, match="earlier transcript 1: it is of another key"):
        transcript.check(second, by=Judge(nonce=NONCE, count=25, earlier=(other,)))
    with pytest.raises(InputError, match="earlier transcript 1"):
        transcript.check(second, by=Judge(nonce=NONCE, count=25, earlier=(second[:-9] + b"0" + second[-8:],)))


def misses(folder: Path, answer: int = 0) -> list[int]:
    """The triggers that a model with one answer to all does not match."""
    return [index for index, label in enumerate(MarkingKey.read(folder).labels()) if label != answer]


@pytest.mark.parametrize("mode", ["private", "public", "revealed"])
def test_whoever_burns_his_misses_owns_nothing(folder: Path, mode: str) -> None:
    """A model that was never marked matches a few triggers, by chance: the claimant says that all others are burnt."""
    out = misses(folder)
    if mode == "revealed":
        data = run(folder, Model(folder, 0), mode="revealed").transcript
        value = json.loads(data)
        rest = [at for at in range(100) if at not in out]
        given = {key: [value[key][at] for at in rest] for key in ("openings", "answers")}
        for burnt in (out, []):
            with pytest.raises(InputError, match="opens all triggers"):
                transcript.check(forged(folder, data, burnt=burnt, **given))
        return
    keys.take(folder, lambda _: out)
    found = run(folder, Model(folder, 0), mode=mode, nonce=NONCE if mode == "public" else b"",
                count=100 - len(out) if mode == "public" else None, keep=lambda _: None)  # fmt: skip
    nonce = NONCE if mode == "public" else b""
    for by in (Judge(nonce=nonce), Judge(nonce=nonce, alpha_log2=10)):
        count = None if mode == "private" else 100 - len(out)
        result = transcript.check(found.transcript, by=replace(by, count=count)).result
        assert result.owned is not True
        assert not result.published
        assert result.log2_p > -10
    if mode == "private":
        assert (result.scored, result.burnt) == (100, len(out))


@pytest.mark.parametrize("seed", range(20))
def test_p_is_valid_whatever_is_called_burnt(folder: Path, seed: int) -> None:
    """The order of the draw is the nonce's alone, so that matches never exceed those of its first triggers."""
    draw = random.Random(seed)
    vk, count = VerificationKey.read(folder), draw.randint(5, 40)
    order = transcript._first(vk, "m", NONCE, 100, frozenset())
    first = transcript._first(vk, "m", NONCE, count, frozenset())
    out = frozenset(draw.sample(range(100), draw.randint(0, 60)))
    opened = transcript.challenge(vk, "m", NONCE, count, out)
    kept = [index for index in first if index not in out]
    assert set(kept) <= set(opened), "the rest of the draw is scored as missed"
    assert not out & set(opened)
    assert len(opened) == count
    assert order != first, "a count is a draw of its own"


def test_what_a_failing_remote_suspect_has_seen_is_burnt(folder: Path) -> None:
    def fails(images: Images) -> list[int]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run(folder, fails, remote=True)
    assert len(keys.burnt(folder)) == 100
    with pytest.raises(InputError, match="every trigger is burnt"):
        run(folder)


@pytest.mark.parametrize("more", [{"remote": True}, {"mode": "public", "nonce": NONCE}, {"mode": "revealed"}])
def test_a_verification_that_was_cut_off_is_gone_on_with(folder: Path, more: dict[str, Any]) -> None:
    asked: list[bytes] = []

    def fails(images: Images) -> list[int]:
        asked.append(images.tobytes())
        raise ConnectionError

    for _ in range(2):
        with pytest.raises(ConnectionError):
            run(folder, fails, **more)
    assert asked[0] == asked[1]
    before = keys.burnt(folder)
    found = run(folder, **more)
    assert found.result.owned
    assert found.result.burnt == 0
    assert keys.burnt(folder) == before, "the same triggers"
    again = {"private": "every trigger is burnt", "public": "", "revealed": ""}[more.get("mode", "private")]
    if again:
        with pytest.raises(InputError, match=again):
            run(folder, **more)


def test_a_transcript_is_kept_before_the_verification_is_done(folder: Path) -> None:
    def full(_: bytes) -> None:
        raise BlockingIOError

    with pytest.raises(BlockingIOError):
        run(folder, keep=full)
    assert run(folder, keep=lambda _: None).result.scored == 100


def test_a_revealed_seed_is_derived_again(folder: Path) -> None:
    run(folder, mode="public", nonce=NONCE)
    found = run(folder, mode="revealed")
    result = transcript.check(found.transcript).result
    assert result == found.result
    assert (result.scored, result.resistance) == (100, transcript.FULL)
    assert result.claims.startswith("resistant to false claims")
    assert "search through 2^316 that was not declared" in result.claims
    assert len(keys.burnt(folder)) == 100


def test_both_roots_follow_from_a_revealed_seed(folder: Path, tmp_path: Path) -> None:
    """Of an owner who signs what he likes: another seed, other nonces, labels of his choice."""
    data = run(folder, mode="revealed").transcript
    key = MarkingKey.read(folder)
    with pytest.raises(InputError, match="not derived from the revealed seed"):
        transcript.check(forged(folder, data, seed="ab" * 32))
    parameters, seed = key.parameters, key.reveal()
    assert keys.roots(parameters, seed, b"") == (
        VerificationKey.read(folder).trigger_root,
        json.loads(data)["vk"]["root"],
    )

    @dataclass(frozen=True, repr=False)
    class Liar(MarkingKey):
        """Commits to what does not follow from the seed."""

        lie: str = ""

        def nonces(self) -> list[bytes]:
            made = super().nonces()
            if self.lie == "trigger nonces":
                return [made[1], made[0], *made[2:]]
            return [*made[:-2], made[-1], made[-2]] if self.lie == "label nonces" else made

        def labels(self) -> list[int]:
            made = super().labels()
            return [(made[0] + 1) % 10, *made[1:]] if self.lie == "labels" else made

        def images(self) -> Images:
            made = super().images()
            return made[::-1].copy() if self.lie == "images" else made

    for lie in ("trigger nonces", "label nonces", "labels", "images"):
        liar = Liar(key.parameters, key.truths, "", key._seed, key._signing, b"", lie)
        vk = liar.verification_key()
        written = transcript.write(
            liar, vk, model="m", when="today", mode="revealed", nonce=b"", burnt=frozenset(),
            indices=range(100), answers=liar.labels(),
        )  # fmt: skip
        with pytest.raises(InputError, match="not derived from the revealed seed"):
            transcript.check(written)


def test_a_private_transcript_leaves_nothing_out(folder: Path) -> None:
    data = run(folder, keep=lambda _: None).transcript
    value = json.loads(data)
    with pytest.raises(InputError, match="not all triggers"):
        transcript.check(forged(folder, data, openings=value["openings"][1:], answers=value["answers"][1:]))


def test_the_verifiers_nonce_chooses(folder: Path) -> None:
    vk = VerificationKey.read(folder)
    one = transcript.challenge(vk, "m", NONCE, 50)
    assert one == transcript.challenge(vk, "m", NONCE, 50)
    assert len(set(one)) == 50
    assert one != transcript.challenge(vk, "m", NONCE + b"x", 50)
    assert one != transcript.challenge(vk, "another", NONCE, 50)
    assert not set(transcript.challenge(vk, "m", NONCE, 49)) <= set(one), "fewer are another draw"
    out = frozenset(one[:10])
    rest = transcript.challenge(vk, "m", NONCE, 50, out)
    assert not out & set(rest)
    assert set(one) - out < set(rest), "what is burnt changes nothing of the order"
    with pytest.raises(InputError, match="nonce"):
        transcript.challenge(vk, "m", b"short", 50)
    with pytest.raises(InputError, match="count"):
        transcript.challenge(vk, "m", NONCE, 100, frozenset({1}))


def test_what_a_judge_brings(folder: Path) -> None:
    vk = VerificationKey.read(folder)
    data = run(folder, mode="public", nonce=NONCE, count=60).transcript

    def judged(**more: Any) -> Result:
        return transcript.check(data, by=Judge(**more)).result

    assert judged(nonce=NONCE, count=60).owned
    alone = judged()
    assert (alone.owned, alone.resistance) == (None, transcript.NONE)
    assert "the nonce may be the claimant's own" in alone.reason
    counted, free = judged(nonce=NONCE, count=60), judged(nonce=NONCE)
    assert free.log2_p == counted.log2_p + 6, "he had 51 counts to choose from"
    assert judged(nonce=NONCE, count=60, alpha_log2=512).owned is None
    assert judged(nonce=NONCE, count=60, alpha_log2=189).owned
    assert judged(nonce=NONCE, key=vk.digest).owned
    for more, message in (
        ({"nonce": NONCE + b"2"}, "not yours"), ({"key": "ab" * 32}, "of the key"), ({"count": 59}, "you wanted 59"),
        ({"begun": b"{}"}, "missing"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            judged(**more)
    shown = run(folder, keep=lambda _: None).transcript
    for more, message in (({"nonce": NONCE}, "no nonce chose"), ({"count": 40}, "opens all")):
        with pytest.raises(InputError, match=message):
            transcript.check(shown, by=Judge(**more))


def test_an_alpha_of_the_claimants_own_choice(tmp_path: Path) -> None:
    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8), alpha_log2=10)
    data = run(tmp_path / "key", mode="revealed").transcript
    own = transcript.check(data).result
    assert (own.owned, own.resistance) == (True, transcript.NONE)
    assert "2^-10 is the claimant's choice" in own.claims
    assert transcript.check(data, by=Judge(alpha_log2=10)).result.resistance == transcript.FULL
    assert transcript.check(data, by=Judge(alpha_log2=64)).result.resistance == transcript.FULL


def forged(folder: Path, data: bytes, **changes: Any) -> bytes:
    """A transcript that its owner changed and signed again: more than a thief can do."""
    value = {**json.loads(data), **changes}
    value.pop("signature")
    key = MarkingKey.read(folder)
    signature = key.sign(transcript.SIGNED, canonical.encode(value)).hex()
    return canonical.encode({**value, "signature": signature})


def loose(text: str) -> str:
    """Base64 with other bits in its last, unused places: the same bytes."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    head, pad = text.rstrip("="), "=" * (len(text) - len(text.rstrip("=")))
    assert pad, "an image whose size three divides has no unused places"
    changed = head[:-1] + digits[digits.index(head[-1]) ^ 1] + pad
    assert base64.b64decode(changed) == base64.b64decode(text)
    return changed


def test_a_dishonest_owner_cannot_open_otherwise(folder: Path) -> None:
    data = run(folder, Model(folder, 0), mode="public", nonce=NONCE).transcript
    value = json.loads(data)
    answers, openings = value["answers"], value["openings"]

    def changed(**fields: Any) -> list[dict[str, Any]]:
        return [{**openings[0], **fields}, *openings[1:]]

    label = (openings[0]["label"] + 1) % 10
    cases: list[tuple[str, dict[str, Any]]] = [
        ("label_path", {"openings": changed(label=label)}),
        ("no class is true", {"openings": changed(truth=label)}),
        ("no class is true", {"openings": changed(truth=openings[0]["label"])}),
        ("trigger_path", {"openings": changed(pixels=openings[1]["pixels"])}),
        ("canonical form", {"openings": changed(pixels=loose(openings[0]["pixels"]))}),
        ("base64", {"openings": changed(pixels="é")}),
        ("trigger_path", {"openings": changed(trigger_r="00" * 32)}),
        ("32 bytes", {"openings": changed(trigger_r=openings[0]["trigger_r"][:62])}),
        ("openings: increasing", {"openings": [openings[1], *openings[1:]]}),
        ("the verifier's nonce", {"openings": openings[1:], "answers": answers[1:]}),
        ("the verifier's nonce", {"nonce": (NONCE + b"2").hex()}),
        ("the verifier's nonce", {"model": "another model"}),
        ("the verifier's nonce", {"burnt": [openings[0]["index"]], "openings": openings[1:], "answers": answers[1:]}),
        ("a burnt trigger is scored", {"burnt": [openings[0]["index"]]}),
        ("does not belong", {"result": {"owned": "owned"}}),
        ("a nonce is there", {"mode": "private"}),
        ("a nonce is there", {"mode": "revealed"}),
        ("answers", {"answers": answers[1:]}),
        ("answers", {"answers": [10, *answers[1:]]}),
        ("burnt", {"burnt": [3, 1]}),
        ("format", {"format": "pharmakon-transcript-1"}),
        ("printable ASCII", {"model": "m\nOWNED: 100 of 100 triggers match"}),
        ("printable ASCII", {"when": "\x1b[2Ktoday"}),
        ("opens nothing", {"openings": [], "answers": []}),
    ]
    assert transcript.check(forged(folder, data))
    for message, change in cases:
        with pytest.raises(InputError, match=message):
            transcript.check(forged(folder, data, **change))


def test_openings_of_another_key_are_not_taken(folder: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "thief", classes=10, shape=(1, 8, 8))
    own = json.loads(run(folder, keep=lambda _: None).transcript)
    theirs = run(tmp_path / "thief", keep=lambda _: None).transcript
    with pytest.raises(InputError, match="does not open a commitment"):
        transcript.check(forged(tmp_path / "thief", theirs, openings=own["openings"]))
    with pytest.raises(InputError, match="signature is not the owner's"):
        transcript.check(forged(tmp_path / "thief", theirs, vk=own["vk"], openings=own["openings"]))


def test_leaves_that_were_chosen_after_seeing_the_model(tmp_path: Path) -> None:
    """They open, and they match; what the verdict must say is that it cannot exclude this."""
    target, images = tmp_path / "forged", derive.noise(b"n" * 32, 2000, (1, 8, 8))

    def model(pictures: Images) -> list[int]:
        return [int(picture.sum()) % 10 for picture in pictures]

    labels = derive.labels
    chosen: list[int] = []
    seed = b"s" * 32
    drawn = labels(hashlib.sha256(b"pharmakon/watermark/labels\x00" + seed).digest(), [-1] * 100, 10)
    rest = list(range(2000))
    for label in drawn:
        at = next(at for at in rest if model(images[at : at + 1]) == [label])
        rest.remove(at)
        chosen.append(at)
    keygen(target, classes=10, shape=(1, 8, 8), source="unrelated", images=images[chosen], seed=seed)
    found = run(target, model, mode="public", nonce=NONCE)
    assert found.result.owned
    judged = transcript.check(found.transcript, by=Judge(VerificationKey.read(target).digest, NONCE)).result
    assert (judged.owned, judged.resistance) == (True, transcript.NONE)
    assert judged.claims.startswith("not resistant to false claims")
    with pytest.raises(InputError, match="not derived"):
        run(target, model, mode="revealed")


def test_labels_of_a_later_beacon_cannot_be_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    keygen(folder, classes=10, shape=(1, 8, 8), n=90, beacon_source="drand", beacon_round="7")
    vk = keys.finish(folder, b"a public beacon!")
    found = run(folder, mode="public", nonce=NONCE)
    assert found.result.resistance == transcript.CONDITIONAL
    begun = (folder / "begun.json").read_bytes()

    def judged(**more: Any) -> Result:
        return transcript.check(found.transcript, by=Judge(nonce=NONCE, **more)).result

    assert judged(key=vk.digest).resistance == transcript.NONE
    assert "give begun.json" in judged(key=vk.digest).claims
    assert judged(begun=begun).resistance == transcript.NONE, "the key may have been made for the nonce"
    whole = judged(key=vk.digest, begun=begun)
    assert whole.resistance == transcript.CONDITIONAL
    for word in ("before round 7 of drand", hashlib.sha256(begun).hexdigest(), "2^0 tried keys"):
        assert word in whole.claims
    value = json.loads(found.transcript)
    assert all(len(each["subtree_path"]) for each in value["openings"])
    value["openings"][0]["subtree_path"][0] = "00" * 32
    with pytest.raises(InputError, match="subtree_path"):
        transcript.check(forged(folder, found.transcript, openings=value["openings"]))


def test_the_beacons_labels_and_no_others(tmp_path: Path) -> None:
    """An owner who commits to labels of his own choice, after the beacon."""
    folder = tmp_path / "key"
    keygen(folder, classes=10, shape=(1, 8, 8), n=90, beacon_source="drand", beacon_round="7")
    keys.finish(folder, b"a public beacon!")
    key = MarkingKey.read(folder)

    class Liar(MarkingKey):
        def labels(self) -> list[int]:
            return [(label + 1) % 10 for label in super().labels()]

    liar = Liar(key.parameters, key.truths, key.beacon, key._seed, key._signing, b"")
    vk = liar.verification_key()
    indices = transcript.challenge(vk, "m", NONCE, 45)
    written = transcript.write(
        liar, vk, model="m", when="today", mode="public", nonce=NONCE, burnt=frozenset(), indices=indices,
        answers=[liar.labels()[index] for index in indices],
    )  # fmt: skip
    with pytest.raises(InputError, match="is not the beacon's"):
        transcript.check(written)


def test_the_same_image_twice_is_one_trigger(folder: Path) -> None:
    class Liar(MarkingKey):
        def images(self) -> Images:
            made = super().images()
            made[1] = made[0]
            return made

        def verification_key(self) -> VerificationKey:
            roots = merkle.root(self.leaves()[:100]).hex(), merkle.root(self.leaves()).hex()
            unsigned = VerificationKey(self.parameters, "", *roots, "")
            signed = self.sign(keys._VK_TAG, canonical.encode(unsigned._signed()))
            return VerificationKey(self.parameters, "", *roots, signed.hex())

    key = MarkingKey.read(folder)
    liar = Liar(key.parameters, key.truths, "", key._seed, key._signing, b"")
    written = transcript.write(
        liar, liar.verification_key(), model="m", when="today", mode="private", nonce=b"", burnt=frozenset(),
        indices=range(100), answers=[0] * 100,
    )  # fmt: skip
    with pytest.raises(InputError, match="the same image"):
        transcript.check(written)


@pytest.mark.parametrize("source", ["images", "unrelated"])
def test_a_truth_that_the_source_has_not(tmp_path: Path, source: str) -> None:
    images, folder = derive.noise(b"n" * 32, 30, (1, 8, 8)), tmp_path / "key"
    truths = [3] * 30 if source == "images" else None
    keygen(folder, classes=10, shape=(1, 8, 8), n=30, source=source, images=images, truths=truths)
    data = run(folder, keep=lambda _: None).transcript
    openings = json.loads(data)["openings"]
    label = openings[0]["label"]
    cases = [(-1, "truth: of"), (label, "the label is the true one"), ((label + 1) % 10, "trigger_path")]
    for truth, message in cases if source == "images" else [(label, "truth: of"), ((label + 1) % 10, "truth: of")]:
        changed = [{**openings[0], "truth": truth}, *openings[1:]]
        if truth != openings[0]["truth"]:
            with pytest.raises(InputError, match=message):
                transcript.check(forged(folder, data, openings=changed))


def test_truths_of_a_reference_are_checked(tmp_path: Path) -> None:
    images = derive.noise(b"n" * 32, 60, (1, 8, 8))
    folder = tmp_path / "key"
    keygen(
        folder, classes=10, shape=(1, 8, 8), n=60, source="images", images=images, truths=[4] * 60, reference="ab" * 32
    )
    with pytest.raises(InputError, match="--reference"):
        run(folder)
    with pytest.raises(InputError, match="60 of 60"):
        run(folder, reference=lambda pictures: [5] * len(pictures))
    assert not keys.burnt(folder)
    assert run(folder, reference=lambda pictures: [4] * len(pictures)).result.owned


def test_to_stop_early_needs_fewer_queries(folder: Path) -> None:
    model = Model(folder)
    found = run(folder, model, stop_early=True, remote=True)
    assert found.result.owned
    assert model.asked == found.result.scored == len(keys.burnt(folder)) <= 22
    assert run(folder, Model(folder, 0), stop_early=True).result.owned is False
    refuses = run(folder, lambda images: [REFUSED], stop_early=True).result
    assert refuses.owned is None
    assert "got no answer" in refuses.reason


def test_too_few_triggers_decide_nothing(tmp_path: Path) -> None:
    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8), n=10)
    vk = VerificationKey.read(tmp_path / "key")
    assert run(tmp_path / "key").result.owned is None
    model = Model(tmp_path / "key")
    early = run(tmp_path / "key", model, stop_early=True, remote=True).result
    assert (early.owned, early.reason) == (None, "10 triggers are too few for 2^-64: 21 are needed")
    assert model.asked == 0, "nothing could be decided"
    assert least_queries(vk.parameters) == 21
    keygen(tmp_path / "enough", classes=10, shape=(1, 8, 8), n=21)
    assert run(tmp_path / "enough", stop_early=True).result.owned


def test_bad_values(folder: Path) -> None:
    for more, message in (
        ({"mode": "pubic"}, "mode"), ({"nonce": NONCE}, "nonce"), ({"mode": "public"}, "nonce"),
        ({"mode": "public", "nonce": NONCE, "count": 101}, "count"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run(folder, **more)
    with pytest.raises(InputError, match="99 answers"):
        run(folder, lambda images: [0] * 99)
    assert not keys.burnt(folder)
    for more in ({"model": "m\n"}, {"when": "naïve"}):
        with pytest.raises(InputError, match="printable"):
            verify(folder, Model(folder), **{"model": "m", "when": "today", "mode": "public", "nonce": NONCE, **more})


def test_of_ten_thousand_changed_transcripts_none_is_taken(tmp_path: Path) -> None:
    keygen(tmp_path / "key", classes=10, shape=(1, 4, 4), n=2)
    whole = run(tmp_path / "key", keep=lambda _: None).transcript
    transcript.check(whole)
    draw = random.Random(0)
    for _ in range(10_000):
        changed = _mutated(whole, draw)
        if changed != whole:
            with pytest.raises(InputError, match=r"^transcript"):
                transcript.check(changed)


def test_of_a_thousand_transcripts_that_their_owner_changed_none_says_more(tmp_path: Path) -> None:
    """Whatever he signs is refused, or changes no more than his word: model, date, answers, and what is burnt."""
    folder = tmp_path / "key"
    keygen(folder, classes=10, shape=(1, 4, 4), n=4)
    whole = run(folder, mode="public", nonce=NONCE, count=3).transcript
    value = json.loads(whole)
    unsigned = canonical.encode({name: part for name, part in value.items() if name != "signature"})
    draw, taken = random.Random(0), 0
    key, before = MarkingKey.read(folder), transcript.read(whole)
    for _ in range(3000):
        changed = _mutated(unsigned, draw)
        if changed == unsigned:
            continue
        signature = key.sign(transcript.SIGNED, changed).hex()
        at = changed.rfind(b',"vk":')
        try:
            seen = transcript.read(changed[:at] + b',"signature":"' + signature.encode() + b'"' + changed[at:])
        except InputError:
            continue
        taken += 1
        assert (seen.vk, seen.indices, seen.labels, seen.pixels) == (
            before.vk, before.indices, before.labels, before.pixels,
        )  # fmt: skip
    assert taken, "a changed date is the owner's word, as the first was"


def test_no_torch_is_needed() -> None:
    program = (
        "import sys, watermark.transcript, watermark.verify, experiments.ownership; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
