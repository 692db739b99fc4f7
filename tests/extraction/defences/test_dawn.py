"""DAWN: the same images always, in every mode, verified by those who learned the marks and by nobody else."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from extraction.answers import labels, reveal
from extraction.defences.dawn import DAWN
from extraction.oracle import identity_of
from tests.helpers import refused

KEY = bytes(range(32))


@pytest.fixture
def key(tmp_path: Path) -> str:
    (tmp_path / "key").write_bytes(KEY)
    return str(tmp_path / "key")


def asked(n: int) -> tuple[Tensor, Tensor]:
    private = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=private)
    return images, (3 * torch.randn(n, 10, generator=private)).softmax(1)


def test_by_hand(key: str) -> None:
    images, scores = asked(200)
    found = DAWN(key, 0.25)(scores, images, torch.arange(200))
    changed = 0
    for row in range(200):
        digest = hmac.new(KEY, bytes(images[row].flatten().tolist()), hashlib.sha256).digest()
        expected = scores[row].tolist()
        if int.from_bytes(digest[:8], "big") / 2**64 < 0.25:
            top = int(scores[row].argmax())
            wrong = (top + 1 + int.from_bytes(digest[8:16], "big") % 9) % 10
            expected[top], expected[wrong] = expected[wrong], expected[top]
            changed += 1
        assert found[row].tolist() == expected
    assert 30 < changed < 70


def test_a_repeat_and_another_order_get_the_same_and_all_modes_show_the_mark(key: str) -> None:
    images, scores = asked(400)
    defence, order = DAWN(key, 0.1), torch.arange(399, -1, -1)
    found = defence(scores, images, torch.arange(400))
    assert torch.equal(defence(scores[order], images[order], order), found[order])
    marked, _ = defence.marks(images, 10)
    for mode in ("label", "label_score", "top_k", "scores"):
        assert torch.equal(labels(reveal(found, mode, 3)) != scores.argmax(1), marked)


def test_verified_by_who_learned_the_marks_and_not_by_others(key: str) -> None:
    images, scores = asked(4000)
    defence = DAWN(key, 0.01)
    answered = defence(scores, images, torch.arange(4000)).argmax(1)
    marked = int(defence.marks(images, 10)[0].sum())
    learned = defence.verify(images, scores, answered)
    assert (learned.marked, learned.agreeing) == (marked, marked)
    assert learned.p_value == pytest.approx(9.0**-marked)
    honest = defence.verify(images, scores, scores.argmax(1))
    assert (honest.agreeing, honest.p_value) == (0, 1)
    other = torch.randint(0, 10, (4000,), generator=torch.Generator().manual_seed(1))
    found = defence.verify(images, scores, other)
    assert found.p_value == pytest.approx(float(binom.sf(found.agreeing - 1, marked, 1 / 9)))
    assert found.p_value > 0.01
    assert defence.verify(images[:0], scores[:0], other[:0]).p_value == 1


def test_identity_tells_keys_apart_and_shows_neither_key_nor_its_hash(tmp_path: Path, key: str) -> None:
    (tmp_path / "other").write_bytes(KEY[::-1])
    (tmp_path / "copy").write_bytes(KEY)
    one = identity_of(DAWN(key))
    assert one == identity_of(DAWN(str(tmp_path / "copy")))
    assert one != identity_of(DAWN(str(tmp_path / "other")))
    assert one != identity_of(DAWN(key, 0.01))
    assert KEY.hex() not in one
    assert hashlib.sha256(KEY).hexdigest() not in one
    assert "KEY" not in repr(vars(DAWN(key)))
    assert not [value for value in vars(DAWN(key)).values() if isinstance(value, bytes)]


def test_what_is_refused(tmp_path: Path) -> None:
    with refused("share = 0"):
        DAWN("x", 0)
    with refused("key_file", "no such file"):
        DAWN(str(tmp_path / "none")).identity()
    (tmp_path / "short").write_bytes(b"secret")
    with refused("key_file", "16 bytes"):
        DAWN(str(tmp_path / "short")).identity()
