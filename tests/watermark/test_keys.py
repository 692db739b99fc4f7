"""Marking and verification keys: what binds, what is secret, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import InputError
from watermark import derive, keys
from watermark.keys import MarkingKey, VerificationKey, keygen

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
SEED = bytes(range(32))


def make(folder: Path, **more: object) -> VerificationKey:
    made = keygen(folder, **{"classes": 10, "shape": (1, 8, 8), "n": 6, **more})  # type: ignore[arg-type]
    assert made is not None
    return made


def test_known_answers() -> None:
    """What is derived is the same on every machine, for good."""
    known = VECTORS["derive"]
    triggers = derive.abstract(SEED, 5, (3, 12, 10))
    assert triggers.dtype == np.uint8
    assert triggers.shape == (5, 3, 12, 10)
    assert hashlib.sha256(triggers.tobytes()).hexdigest() == known["abstract"]
    assert hashlib.sha256(derive.noise(SEED, 5, (3, 12, 10)).tobytes()).hexdigest() == known["noise"]
    assert derive.labels(SEED, [-1] * 5 + [0, 4, 9], 10) == known["labels"]
    assert [nonce.hex() for nonce in derive.nonces(SEED, 1)] == known["nonces"]
    assert derive.sample(SEED, 5, 20) == known["sample"]


def test_a_known_key(tmp_path: Path) -> None:
    assert make(tmp_path / "key", seed=SEED).to_bytes().decode() == VECTORS["vk"]


def test_labels_are_uniform_among_the_wrong_ones() -> None:
    from scipy.stats import chisquare

    truths = [3] * 9000
    drawn = derive.labels(SEED, truths, 10)
    counts = Counter(drawn)
    assert 3 not in counts
    assert len(counts) == 9
    assert chisquare(list(counts.values())).pvalue > 1e-3
    assert set(derive.labels(SEED, [0] * 20, 2)) == {1}
    free = Counter(derive.labels(SEED, [-1] * 9000, 3))
    assert chisquare(list(free.values())).pvalue > 1e-3


def test_a_draw_from_the_incomplete_round_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """2³² is not a multiple of 10: the last six numbers would make small labels likelier."""
    high, low = (2**32 - 6).to_bytes(4, "big"), (17).to_bytes(4, "big")
    monkeypatch.setattr(derive, "stream", lambda purpose, secret, index, size: (high + low).ljust(size, b"\xff"))
    assert derive.labels(b"", [-1], 10) == [7]


def test_triggers_are_smooth_and_distinct() -> None:
    triggers = derive.abstract(SEED, 200, (1, 28, 28)).astype(int)
    assert len({image.tobytes() for image in triggers}) == 200
    steps = np.abs(np.diff(triggers, axis=3)).mean()
    noise = np.abs(np.diff(derive.noise(SEED, 200, (1, 28, 28)).astype(int), axis=3)).mean()
    assert steps < noise / 4
    flat = triggers.reshape(200, -1)
    nearest = min(np.abs(flat[i] - flat[:i]).mean() for i in range(1, 200))
    assert nearest > 20  # grey levels: no two look alike


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    vk = make(tmp_path / "key")
    mk = MarkingKey.read(tmp_path / "key")
    assert VerificationKey.read(tmp_path / "key") == vk == VerificationKey.read(tmp_path / "key" / "vk.json")
    assert mk.images().shape == (6, 1, 8, 8)
    assert len(mk.labels()) == 6
    assert len(mk.leaves()) == 12
    assert mk.verification_key() == vk  # Ed25519 is deterministic


def test_two_keys_have_nothing_in_common(tmp_path: Path) -> None:
    one, two = make(tmp_path / "1"), make(tmp_path / "2")
    assert one.root != two.root
    assert one.parameters.owner != two.parameters.owner
    assert MarkingKey.read(tmp_path / "1").images().tobytes() != MarkingKey.read(tmp_path / "2").images().tobytes()


def test_the_global_generators_decide_nothing(tmp_path: Path) -> None:
    roots = []
    for name in "ab":
        random.seed(42)
        np.random.seed(42)  # noqa: NPY002 – it is the point
        roots.append(make(tmp_path / name).root)
    assert roots[0] != roots[1]


def test_every_parameter_is_bound_by_every_commitment(tmp_path: Path) -> None:
    before = make(tmp_path / "a", seed=SEED)
    leaves = MarkingKey.read(tmp_path / "a").leaves()
    for number, change in enumerate(({"alpha_log2": 63}, {"grinding_log2": 1}, {"misses_allowed": 1}, {"classes": 11})):
        other = tmp_path / f"{number}"
        assert make(other, seed=SEED, **change).root != before.root
        assert not set(MarkingKey.read(other).leaves()) & set(leaves)


def test_files_are_private_and_new(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        make(tmp_path / "key")
    finally:
        os.umask(old)
    folder = tmp_path / "key"
    assert (folder / "mk.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["mk.json", "vk.json"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="there is a key already"):
        make(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    make(tmp_path / "key")
    (tmp_path / "key" / "mk.json").chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        MarkingKey.read(tmp_path / "key")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "key")
    (tmp_path / "key" / "mk.json").rename(tmp_path / "elsewhere")
    (tmp_path / "key" / "mk.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"):
        MarkingKey.read(tmp_path / "key")


def test_a_missing_key_names_the_command(tmp_path: Path) -> None:
    for kind in (MarkingKey, VerificationKey):
        with pytest.raises(InputError, match="lightning keygen --out"):
            kind.read(tmp_path / "nothing")


def test_a_key_shows_nothing(tmp_path: Path) -> None:
    make(tmp_path / "key", seed=SEED)
    mk = MarkingKey.read(tmp_path / "key")
    assert repr(mk) == str(mk) == "MarkingKey(n=6, source='abstract', secret)"
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pass its folder"):
            act(mk)
    public = (tmp_path / "key" / "vk.json").read_text()
    secret = json.loads((tmp_path / "key" / "mk.json").read_text())
    assert SEED.hex() in secret["seed"]
    for word in (SEED.hex(), secret["signing"], *(nonce.hex() for nonce in mk.nonces())):
        assert word not in public


def test_own_images(tmp_path: Path) -> None:
    images = derive.noise(SEED, 6, (1, 8, 8))
    make(tmp_path / "key", source="images", images=images, truths=[0, 1, 2, 3, 4, -1])
    mk = MarkingKey.read(tmp_path / "key")
    assert (mk.images() == images).all()
    assert all(label != truth for label, truth in zip(mk.labels(), mk.truths, strict=True))
    images[5] = images[0]
    with pytest.raises(InputError, match="two triggers are the same"):
        make(tmp_path / "twice", source="images", images=images)
    assert not (tmp_path / "twice").exists()


def test_images_and_labels_are_paired_by_number_not_by_name(tmp_path: Path) -> None:
    """Files 1, 10, 11, 2 …, read as 0, 1, 2, 3, would give most triggers another's label."""
    images = np.stack([np.full((1, 8, 8), number, np.uint8) for number in range(120)])
    truths = [number % 10 for number in range(120)]
    make(tmp_path / "key", n=120, source="images", images=images, truths=truths)
    mk = MarkingKey.read(tmp_path / "key")
    assert mk.images()[:, 0, 0, 0].tolist() == list(range(120))
    assert list(mk.truths) == truths
    assert len(set(mk.labels())) == 10, (
        "a loader that gives each trigger label 0 would not be seen by a count of matches"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n = 0"), ({"n": 5000}, "n = 5000"), ({"classes": 1}, "classes = 1"),
        ({"shape": (1, 3, 8)}, "shape"),
        ({"shape": (8, 8)}, "shape"), ({"source": "abstrakt"}, "source"), ({"misses_allowed": 6}, "misses_allowed"),
        ({"alpha_log2": 0}, "alpha_log2"), ({"grinding_log2": -1}, "grinding_log2"), ({"reference": "AB"}, "reference"),
        ({"source": "images"}, "images"), ({"images": np.zeros((6, 1, 8, 8), np.uint8)}, "images"),
        ({"truths": [0] * 6}, "no true class"), ({"seed": b"short"}, "32 bytes"),
    ],
)  # fmt: skip
def test_bad_values(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path / "key", **change)
    assert not (tmp_path / "key").exists()


def test_a_beacon_that_comes_later(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    assert keygen(folder, classes=10, shape=(1, 8, 8), n=6, beacon_later=True) is None
    with pytest.raises(InputError, match="verification key"):
        MarkingKey.read(folder)
    with pytest.raises(InputError, match="16 bytes"):
        keys.finish(folder, b"short")
    begun = json.loads((folder / "begun.json").read_text())
    vk = keys.finish(folder, b"the later beacon")
    assert vk.trigger_root == begun["trigger_root"]
    mk = MarkingKey.read(folder)
    secret = keys.beacon_secret(b"the later beacon", bytes.fromhex(vk.trigger_root))
    assert mk.labels() == derive.labels(secret, [-1] * 6, 10)  # which anybody can compute
    with pytest.raises(InputError, match="complete"):
        keys.finish(folder, b"another beacon!!")


def test_burnt_triggers_are_remembered(tmp_path: Path) -> None:
    make(tmp_path / "key")
    assert keys.burnt(tmp_path / "key") == frozenset()
    keys.burn(tmp_path / "key", [3, 1])
    assert keys.burn(tmp_path / "key", [3, 5]) == keys.burnt(tmp_path / "key") == {1, 3, 5}
    (tmp_path / "key" / "burnt.json").write_text('{"burnt":[1],"format":"pharmakon-burnt-1"} ')
    with pytest.raises(InputError, match=r"burnt\.json"):
        keys.burn(tmp_path / "key", [2])


def _mutated(data: bytes, draw: random.Random) -> bytes:
    at, kind = draw.randrange(len(data)), draw.randrange(4)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([draw.randrange(256)]) + data[at:]
    if kind == 2:
        return data[:at] + data[at + 1 :]
    return data[:at] + bytes([draw.choice(b'0123456789abcdef,:{}[]" ')]) + data[at + 1 :]


def test_of_ten_thousand_changed_keys_none_is_taken(tmp_path: Path) -> None:
    make(tmp_path / "key", n=2, shape=(1, 4, 4), source="images", images=derive.noise(SEED, 2, (1, 4, 4)))
    draw = random.Random(0)
    for name in ("vk.json", "mk.json"):
        file = tmp_path / "key" / name
        whole = file.read_bytes()
        for _ in range(5000):
            changed = _mutated(whole, draw)
            if changed == whole:
                continue
            file.write_bytes(changed)
            with pytest.raises(InputError):
                MarkingKey.read(tmp_path / "key")
        file.write_bytes(whole)
    MarkingKey.read(tmp_path / "key")


def test_no_torch_is_needed() -> None:
    program = "import sys, watermark.keys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
