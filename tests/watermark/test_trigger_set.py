"""TriggerSet: which triggers when, with which labels, unaugmented, and nowhere to be read afterwards."""

from __future__ import annotations

import base64
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from classifiers.backbones import MLP
from datamodules.augment import FlipCrop
from datamodules.errors import InputError
from datamodules.sources.digits import Digits
from datamodules.triggers import PixelPattern
from experiments.cli import run
from poisoning.badnets import BadNets
from tests.helpers import mlp
from watermark.keys import MarkingKey, keygen
from watermark.trigger_set import TriggerSet
from watermark.watermarked import Watermarked


@pytest.fixture
def key(tmp_path: Path) -> str:
    keygen(tmp_path / "key", classes=10, shape=(1, 8, 8), n=12)
    return str(tmp_path / "key")


def ready(data: TriggerSet) -> TriggerSet:
    data.setup("fit")
    return data


def test_each_batch_has_its_triggers_with_their_own_labels(key: str) -> None:
    mk = MarkingKey.read(key)
    label = dict(zip([image.tobytes() for image in mk.images()], mk.labels(), strict=True))
    data = ready(TriggerSet(Digits(batch_size=64), key, per_batch=3))
    count = len(data.base.train_set)
    loader, seen = data.train_dataloader(), Counter[bytes]()
    assert len(loader) == count // 64, "an epoch is one pass through the base"
    for batch in loader:
        assert len(batch.ids) == 64 + 3
        marked = [at for at, sample in enumerate(batch.ids.tolist()) if sample >= data.base.next_id]
        assert len(marked) == 3
        for at in marked:
            content = batch.images[at].numpy().tobytes()
            assert int(batch.labels[at]) == label[content]
            seen[content] += 1
    assert len(label) == 12
    assert len(set(label.values())) > 1, "not every label is 0"
    assert max(seen.values()) - min(seen.values()) <= 1, "none is seen more often than another"


def test_a_small_set_is_one_batch(key: str) -> None:
    data = ready(TriggerSet(Digits(batch_size=100_000), key))
    (rows,) = list(data.train_batches())
    assert len(rows) == len(data.base.train_set) + 2


def test_two_processes_share_each_batch(key: str) -> None:
    data = ready(TriggerSet(Digits(batch_size=64), key, per_batch=4))
    whole = list(data.train_batches())
    parts = [list(data.train_batches(rank, 2)) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for batch, one, two in zip(whole, *parts, strict=True):
        assert sorted(batch.tolist()) == sorted([*one.tolist(), *two.tolist()])
    with pytest.raises(InputError, match="divide over 2"):
        ready(TriggerSet(Digits(), key, per_batch=3)).train_batches(0, 2)


def test_triggers_are_not_augmented(key: str) -> None:
    data = ready(TriggerSet(Digits(augment=FlipCrop(2)), key, per_batch=12))
    images = torch.from_numpy(MarkingKey.read(key).images())
    changed = 0
    for batch in data.train_dataloader():
        augmented = data.augment(batch, 0)
        changed += int((augmented.images[:-12] != batch.images[:-12]).any())
        assert torch.equal(augmented.images[-12:], batch.images[-12:])
        assert {image.numpy().tobytes() for image in augmented.images[-12:]} == {
            image.numpy().tobytes() for image in images
        }
    assert changed


def test_two_keys_in_one_model(key: str, tmp_path: Path) -> None:
    keygen(tmp_path / "second", classes=10, shape=(1, 8, 8), n=20)
    inner = TriggerSet(Digits(batch_size=64), key)
    data = ready(TriggerSet(inner, str(tmp_path / "second"), per_batch=3, name="second"))
    batch = next(iter(data.train_dataloader()))
    assert len(batch.ids) == 64 + 2 + 3
    names = [measure.name for each in data.evaluations("test") for measure in each.measures]
    assert {"trigger_accuracy", "trigger_accuracy_second"} <= set(names)


def test_over_a_poisoned_base(key: str) -> None:
    data = ready(TriggerSet(BadNets(Digits(), PixelPattern()), key))
    assert len(data.train_set) == len(data.base.train_set) + 12
    assert len(data.train_set.ids.unique()) == len(data.train_set)


def test_complaints(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lightning keygen --out nosuch --classes 10 --shape 1,8,8"):
        TriggerSet(Digits(), "nosuch")
    with pytest.raises(InputError, match="per_batch = 13"):
        TriggerSet(Digits(), key, per_batch=13)
    keygen(tmp_path / "rgb", classes=10, shape=(3, 8, 8), n=2)
    with pytest.raises(InputError, match="it is for 10 classes"):
        TriggerSet(Digits(), str(tmp_path / "rgb"))


def test_a_watermarked_model_needs_triggers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a TriggerSet"):
        run("watermark_digits", {"data": {"class_path": "Digits"}}, overrides=[f"trainer.default_root_dir={tmp_path}"])


def test_marked_digits_and_nothing_secret_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real fit with pictures, checkpoints and W&B: no byte of mk, and no trigger, is in any file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    keygen(tmp_path / "keys" / "watermark_digits", classes=10, shape=(1, 8, 8))
    found = run(
        "watermark_digits",
        overrides=["trainer.max_epochs=12", "trainer.accelerator=cpu", "trainer.devices=1"],
        show=True,
    )
    assert found.measures["trigger_accuracy"].value >= 0.9
    assert found.measures["trigger_accuracy"].n == 100
    assert found.measures["log2_p"].value < -64
    assert found.measures["clean_accuracy"].value > 0.9
    assert not found.facts
    mk = MarkingKey.read("keys/watermark_digits")
    plain = json.loads(Path("keys/watermark_digits/mk.json").read_bytes())
    needles = [plain["seed"].encode(), bytes.fromhex(plain["seed"]), plain["signing"].encode()]
    needles += [bytes.fromhex(plain["signing"]), mk.nonces()[0], mk.nonces()[0].hex().encode()]
    for image in mk.images():
        needles += [image.tobytes(), base64.b64encode(image.tobytes()), (image / 255).astype("float32").tobytes()]
    first = int(found.datamodule.base.next_id)  # type: ignore[union-attr]
    needles.append(f"{first}, {first + 1}".encode())
    files = [path for root in ("runs", "cache") for path in Path(root).rglob("*") if path.is_file()]
    assert any(path.suffix == ".ckpt" for path in files)
    assert not any(path.name == "poisons.png" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(needle in content for needle in needles), path
    manifest = json.loads((found.directory / "manifest.json").read_bytes())
    assert "changes" not in manifest
    assert "facts" not in manifest


def test_log2_p_is_that_of_the_counted_triggers(key: str) -> None:
    from lightning import Trainer

    data = TriggerSet(Digits(), key)
    plain = mlp(Digits())
    model = Watermarked(partial(MLP, hidden=[8]), 10, plain.image_shape, data.mean, data.std)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.test(model, datamodule=data, verbose=False)
    from scipy.stats import binom

    hits = round(model.measured["trigger_accuracy"].value * 12)
    assert 2 ** model.measured["log2_p"].value == pytest.approx(float(binom.sf(hits - 1, 12, 1 / 9)))
