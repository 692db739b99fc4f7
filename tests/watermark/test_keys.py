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
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import InputError
from watermark import canonical, derive, keys, sources
from watermark.keys import MarkingKey, VerificationKey, keygen

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
SEED = bytes(range(32))
IMAGES = derive.noise(SEED, 6, (1, 8, 8))
ROOT = Path(__file__).parents[2]


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
    assert derive.order(SEED, 20) == known["order"]
    assert sorted(derive.order(SEED, 20)) == list(range(20))


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
    assert sorted(path.name for path in folder.iterdir()) == ["burnt.json", "mk.json", "vk.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["key"], "nothing half-made is left"
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
    make(tmp_path / "key", source="images", images=images, truths=[0, 1, 2, 3, 4, 5])
    mk = MarkingKey.read(tmp_path / "key")
    assert (mk.images() == images).all()
    assert all(label != truth for label, truth in zip(mk.labels(), mk.truths, strict=True))
    images[5] = images[0]
    with pytest.raises(InputError, match="two triggers are the same"):
        make(tmp_path / "twice", source="images", images=images, truths=[0, 1, 2, 3, 4, 5])
    assert not (tmp_path / "twice").exists()


def test_images_of_a_folder_keep_their_own_classes(tmp_path: Path) -> None:
    """Of files 1, 10, 2 the second is 10: whoever numbers what `ls` shows gives most triggers another's label."""
    (tmp_path / "own").mkdir()
    numbers = [1, 10, 2, 11, 100, 3, 20]
    assert sorted(numbers) != [int(name) for name in sorted(map(str, numbers))]
    for number in numbers:
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "own" / f"{number}.png")
    images, truths = sources.pick(tmp_path / "own", 7, (1, 8, 8))
    assert truths is None
    assert sorted(images[:, 0, 0, 0].tolist()) == sorted(numbers)
    classes = [int(image[0, 0, 0]) % 10 for image in images]  # as a reference says, of each image
    make(tmp_path / "key", n=7, source="images", images=images, truths=classes)
    mk = MarkingKey.read(tmp_path / "key")
    assert [int(image[0, 0, 0]) % 10 for image in mk.images()] == list(mk.truths)
    assert len(set(mk.labels())) > 1
    np.savez(tmp_path / "own.npz", x=np.stack([np.full((8, 8), at, np.uint8) for at in numbers]), y=numbers)
    images, truths = sources.pick(tmp_path / "own.npz", 7, (1, 8, 8))
    assert images[:, 0, 0, 0].tolist() == truths


def test_images_and_labels_are_paired_by_number_not_by_name(tmp_path: Path) -> None:
    """The hundred triggers of a key, each with its own class and its own label."""
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
        ({"source": "overlay", "images": IMAGES}, "give y in the file, or --reference.*--source unrelated"),
        ({"source": "images", "images": IMAGES, "truths": [0, 1, 2, 3, 4, -1]}, "truths"),
        ({"source": "unrelated", "images": IMAGES, "truths": [0] * 6}, "unrelated triggers have no true class"),
        ({"beacon_source": "drand"}, "beacon_round"), ({"beacon_round": "1"}, "beacon_source"),
        ({"beacon_source": "drand\n", "beacon_round": "1"}, "printable ASCII"),
    ],
)  # fmt: skip
def test_bad_values(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path / "key", **change)
    assert not (tmp_path / "key").exists()


def test_a_beacon_that_comes_later(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    assert keygen(folder, classes=10, shape=(1, 8, 8), n=6, beacon_source="drand", beacon_round="7") is None
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
    with pytest.raises(InputError, match="complete"):
        keys.finish(folder, b"the later beacon")
    assert (vk.parameters.beacon_source, vk.parameters.beacon_round) == ("drand", "7")
    assert keys.burnt(folder) == frozenset()


def test_a_key_that_was_cut_off_is_completed_by_its_own_beacon_alone(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    keygen(folder, classes=10, shape=(1, 8, 8), n=6, beacon_source="drand", beacon_round="7")
    vk = keys.finish(folder, b"the later beacon")
    (folder / "vk.json").unlink()  # the last file that is written
    with pytest.raises(InputError, match="complete"):
        keys.finish(folder, b"another beacon!!")
    assert keys.finish(folder, b"the later beacon") == vk


@pytest.mark.parametrize("file", ["mk.json", "burnt.json", "vk.json"])
def test_keygen_makes_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    create = keys._create

    def fails(path: Path, data: bytes, mode: int) -> None:
        if path.name == file:
            raise KeyboardInterrupt
        create(path, data, mode)

    monkeypatch.setattr(keys, "_create", fails)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "key")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    make(tmp_path / "key")


def test_a_key_that_came_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that make a key in one folder both find it empty; one of them wins, and is not overwritten."""
    folder, sealed = tmp_path / "key", keys._create_folder

    def late(place: Path, files: Any) -> None:
        monkeypatch.setattr(keys, "_create_folder", sealed)
        make(folder, seed=SEED)
        sealed(place, files)

    monkeypatch.setattr(keys, "_create_folder", late)
    with pytest.raises(InputError, match="stays as it is"):
        make(folder)
    assert (folder / "vk.json").read_text() == VECTORS["vk"]
    with pytest.raises(FileExistsError):
        keys._create(folder / "vk.json", b"another", 0o644)
    assert (folder / "vk.json").read_text() == VECTORS["vk"]
    MarkingKey.read(folder)


def test_truths_are_committed_to_before_the_beacon(tmp_path: Path) -> None:
    """Else an owner could choose, after the beacon, among the labels that other truths lead to."""
    folder = tmp_path / "key"
    own = {"source": "images", "images": IMAGES, "truths": [0] * 6, "beacon_source": "drand", "beacon_round": "7"}
    keygen(folder, classes=10, shape=(1, 8, 8), n=6, **own)  # type: ignore[arg-type]
    value = json.loads((folder / "mk.json").read_text())
    (folder / "mk.json").write_bytes(canonical.encode({**value, "truths": [1, 0, 0, 0, 0, 0]}))
    with pytest.raises(InputError, match="does not commit to the triggers"):
        keys.finish(folder, b"the later beacon")
    (folder / "mk.json").write_bytes(canonical.encode(value))
    vk = keys.finish(folder, b"the later beacon")
    value = json.loads((folder / "mk.json").read_text())
    (folder / "mk.json").write_bytes(canonical.encode({**value, "truths": [1, 0, 0, 0, 0, 0]}))
    with pytest.raises(InputError, match="does not commit to these triggers"):
        MarkingKey.read(folder)
    begun = (folder / "begun.json").read_bytes()
    assert keys.check_begun(begun, vk) == hashlib.sha256(begun).hexdigest()
    keygen(tmp_path / "other", classes=10, shape=(1, 8, 8), n=6, **own)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other parameters"):
        keys.check_begun((tmp_path / "other" / "begun.json").read_bytes(), vk)
    changed = canonical.encode({**json.loads(begun), "signature": "00" * 64})
    with pytest.raises(InputError, match="not the owner's"):
        keys.check_begun(changed, vk)
    with pytest.raises(InputError, match="other triggers"):
        keys.check_begun(canonical.encode({**json.loads(begun), "trigger_root": "00" * 32}), vk)


def burn(folder: Path, *indices: int, run: str = "") -> keys.Taken:
    return keys.take(folder, lambda out: indices, run)


def test_burnt_triggers_are_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    make(folder)
    assert keys.burnt(folder) == frozenset()
    assert burn(folder, 3, 1) == (frozenset(), [3, 1])
    assert burn(folder, 3, 5).before == {1, 3}
    assert keys.burnt(folder) == {1, 3, 5}


def test_what_was_cut_off_gets_what_it_got(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    make(folder)
    burn(folder, 0)
    assert burn(folder, 1, 2, run="a") == burn(folder, 3, 4, run="a") == (frozenset({0}), [1, 2])
    assert keys.burnt(folder) == {0, 1, 2}
    assert burn(folder, 5, run="b").before == {0, 1, 2}
    keys.finished(folder, "a")
    assert burn(folder, 3, run="a") == (frozenset({0, 1, 2, 5}), [3])


def test_without_a_sound_record_of_what_is_burnt_nothing_is_verified(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    make(folder)
    make(tmp_path / "other")
    record = folder / "burnt.json"
    burn(folder, 1)
    whole = json.loads(record.read_text())
    for change in (
        {"burnt": [3, 1]}, {"burnt": [6]}, {"burnt": [True]}, {"format": "pharmakon-burnt-1"}, {"pending": [{}]},
        {"vk": "00" * 32},
    ):  # fmt: skip
        record.write_bytes(canonical.encode({**whole, **change}))
        with pytest.raises(InputError, match=r"burnt\.json.*restore it"):
            keys.burnt(folder)
    record.write_bytes((tmp_path / "other" / "burnt.json").read_bytes())
    with pytest.raises(InputError, match="of another key"):
        burn(folder, 2)
    record.unlink()
    with pytest.raises(InputError, match=r"cannot be read.*restore it"):
        burn(folder, 2)
    assert not record.exists()


TAKES = """
import sys, time
from watermark import keys
def choose(out):
    print("chosen", flush=True)
    time.sleep(float(sys.argv[2]))
    return [index for index in range(6) if index not in out][:3]
print(*keys.take(sys.argv[1], choose).indices)
"""


def taking(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TAKES, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_processes_at_once_take_different_triggers(tmp_path: Path) -> None:
    make(tmp_path / "key")
    both = [taking(tmp_path / "key", 1), taking(tmp_path / "key", 1)]
    found = [set(process.communicate(timeout=60)[0].splitlines()[1].split()) for process in both]
    assert not found[0] & found[1]
    assert len(keys.burnt(tmp_path / "key")) == 6


def test_a_kill_in_between_leaves_a_sound_record(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    make(folder)
    process = taking(folder, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "chosen\n"
    process.kill()
    process.wait()
    assert keys.burnt(folder) == frozenset(), "it had shown nothing yet"
    assert burn(folder, 2).before == frozenset(), "and its lock is gone with it"


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
    make(tmp_path / "key", n=2, shape=(1, 4, 4), source="unrelated", images=derive.noise(SEED, 2, (1, 4, 4)))
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
