"""Verification and its transcripts: each altered byte, forged claim and half-way failure."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import InputError
from tests.watermark.test_keys import _mutated
from watermark import canonical, derive, keys, transcript
from watermark.derive import Images
from watermark.keys import MarkingKey, VerificationKey, keygen
from watermark.transcript import REFUSED
from watermark.verify import Verification, verify

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
    assert transcript.check(found.transcript) == (VerificationKey.read(folder), found.result)
    assert not keys.burnt(folder), "the owner looked for himself"


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
    second = run(folder, mode="public", nonce=NONCE)
    assert second.result.scored == 25
    assert len(keys.burnt(folder)) == 75
    _vk, result = transcript.check(second.transcript)
    assert result == second.result
    assert json.loads(second.transcript)["burnt"] == sorted(opened)
    assert result.claims.startswith("not resistant to false claims")
    rest = run(folder)
    assert rest.result.scored == 25
    assert rest.result.needed == 23
    assert not {each["index"] for each in json.loads(rest.transcript)["openings"]} & keys.burnt(folder)


def test_what_a_failing_remote_suspect_has_seen_is_burnt(folder: Path) -> None:
    def fails(images: Images) -> list[int]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run(folder, fails, remote=True)
    assert len(keys.burnt(folder)) == 100
    with pytest.raises(InputError, match="every trigger is burnt"):
        run(folder)


def test_a_revealed_seed_is_derived_again(folder: Path) -> None:
    found = run(folder, mode="revealed")
    _vk, result = transcript.check(found.transcript)
    assert result.claims.startswith("resistant to false claims")
    assert len(keys.burnt(folder)) == 100


def test_the_verifiers_nonce_chooses(folder: Path) -> None:
    vk = VerificationKey.read(folder)
    one = transcript.challenge(vk, "m", NONCE, frozenset(), 50)
    assert one == transcript.challenge(vk, "m", NONCE, frozenset(), 50)
    assert len(set(one)) == 50
    assert one != transcript.challenge(vk, "m", NONCE + b"x", frozenset(), 50)
    assert one != transcript.challenge(vk, "another", NONCE, frozenset(), 50)
    with pytest.raises(InputError, match="nonce"):
        transcript.challenge(vk, "m", b"short", frozenset(), 50)
    with pytest.raises(InputError, match="count"):
        transcript.challenge(vk, "m", NONCE, frozenset({1}), 100)


def forged(folder: Path, data: bytes, **changes: Any) -> bytes:
    """A transcript that its owner changed and signed again: more than a thief can do."""
    value = {**json.loads(data), **changes}
    value.pop("signature")
    key = MarkingKey.read(folder)
    signature = key.sign(transcript.SIGNED, canonical.encode(value)).hex()
    return canonical.encode({**value, "signature": signature})


def test_a_dishonest_owner_cannot_open_otherwise(folder: Path) -> None:
    data = run(folder, Model(folder, 0), mode="public", nonce=NONCE).transcript
    value = json.loads(data)
    answers, openings = value["answers"], value["openings"]

    def changed(**fields: Any) -> list[dict[str, Any]]:
        return [{**openings[0], **fields}, *openings[1:]]

    label = (openings[0]["label"] + 1) % 10
    cases: list[tuple[str, dict[str, Any]]] = [
        ("label_path", {"openings": changed(label=label)}),
        ("label_path", {"openings": changed(truth=label)}),
        ("the label is the true one", {"openings": changed(truth=openings[0]["label"])}),
        ("trigger_path", {"openings": changed(pixels=openings[1]["pixels"])}),
        ("trigger_path", {"openings": changed(trigger_r="00" * 32)}),
        ("32 bytes", {"openings": changed(trigger_r=openings[0]["trigger_r"][:62])}),
        ("openings: increasing", {"openings": [openings[1], *openings[1:]]}),
        ("the verifier's nonce", {"openings": openings[1:], "answers": answers[1:]}),
        ("the verifier's nonce", {"nonce": (NONCE + b"2").hex()}),
        ("the verifier's nonce", {"model": "another model"}),
        ("does not follow", {"answers": [openings[0]["label"], *answers[1:]]}),
        ("does not follow", {"result": {**value["result"], "owned": "owned"}}),
        ("does not follow", {"result": {**value["result"], "claims": "resistant to false claims"}}),
        ("a nonce is there", {"mode": "private"}),
        ("a nonce is there", {"mode": "revealed"}),
        ("answers", {"answers": answers[1:]}),
        ("answers", {"answers": [10, *answers[1:]]}),
        ("burnt", {"burnt": [3, 1]}),
        ("format", {"format": "pharmakon-transcript-2"}),
    ]
    assert transcript.check(forged(folder, data))
    for message, change in cases:
        with pytest.raises(InputError, match=message):
            transcript.check(forged(folder, data, **change))


def test_openings_of_another_key_are_not_taken(folder: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "thief", classes=10, shape=(1, 8, 8))
    own = json.loads(run(folder).transcript)
    theirs = run(tmp_path / "thief").transcript
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
    import hashlib

    drawn = labels(hashlib.sha256(b"pharmakon/watermark/labels\x00" + seed).digest(), [-1] * 100, 10)
    rest = list(range(2000))
    for label in drawn:
        at = next(at for at in rest if model(images[at : at + 1]) == [label])
        rest.remove(at)
        chosen.append(at)
    keygen(target, classes=10, shape=(1, 8, 8), source="images", images=images[chosen], seed=seed)
    found = run(target, model)
    assert found.result.owned
    assert transcript.check(found.transcript)[1].claims.startswith("not resistant to false claims")
    with pytest.raises(InputError, match="not derived"):
        run(target, model, mode="revealed")


def test_labels_of_a_later_beacon_cannot_be_chosen(tmp_path: Path) -> None:
    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8), n=90, beacon_later=True)
    keys.finish(tmp_path / "key", b"a public beacon!")
    found = run(tmp_path / "key", mode="public", nonce=NONCE)
    _vk, result = transcript.check(found.transcript)
    assert result.claims.startswith("resistant")
    value = json.loads(found.transcript)
    assert all(len(each["subtree_path"]) for each in value["openings"])
    value["openings"][0]["subtree_path"][0] = "00" * 32
    with pytest.raises(InputError, match="subtree_path"):
        transcript.check(forged(tmp_path / "key", found.transcript, openings=value["openings"]))


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
    assert run(folder, reference=lambda pictures: [4] * len(pictures)).result.owned


def test_to_stop_early_needs_fewer_queries(folder: Path) -> None:
    model = Model(folder)
    found = run(folder, model, stop_early=True, remote=True)
    assert found.result.owned
    assert model.asked == found.result.scored == len(keys.burnt(folder)) <= 22
    assert run(folder, Model(folder, 0), stop_early=True).result.owned is False


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


def test_of_ten_thousand_changed_transcripts_none_is_taken(tmp_path: Path) -> None:
    keygen(tmp_path / "key", classes=10, shape=(1, 4, 4), n=2)
    whole = run(tmp_path / "key").transcript
    transcript.check(whole)
    draw = random.Random(0)
    for _ in range(10_000):
        changed = _mutated(whole, draw)
        if changed != whole:
            with pytest.raises(InputError, match=r"^transcript"):
                transcript.check(changed)


def test_no_torch_is_needed() -> None:
    program = (
        "import sys, watermark.transcript, watermark.verify, experiments.ownership; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
