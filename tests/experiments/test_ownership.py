"""`lightning keygen`, `verify` and `check-transcript`: exit status, files, and complaints in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.sources.digits import Digits
from tests.experiments.running import Outcome, complaint
from tests.helpers import mlp
from watermark import keys

Command = Callable[..., Outcome]


@pytest.fixture
def marked(lightning: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A key, and a model that was fitted to its triggers alone."""
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    assert lightning("keygen", "--out", str(tmp_path / "key"), "--classes=10", "--shape=1,8,8").code == 0
    key = keys.MarkingKey.read(tmp_path / "key")
    torch.manual_seed(0)
    model = mlp(Digits())
    images, labels = torch.from_numpy(key.images()), torch.tensor(key.labels())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).all()
    model.save(tmp_path / "marked.safetensors")
    torch.manual_seed(1)
    mlp(Digits()).save(tmp_path / "other.safetensors")
    return str(tmp_path / "key"), str(tmp_path / "marked.safetensors")


def test_owned_not_owned_and_a_transcript(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    files = ("--transcript", str(tmp_path / "t.json"), "--page", str(tmp_path / "p.html"))
    outcome = lightning("verify", "--key", key, "--model", model, *files)
    assert outcome.code == 0
    assert "OWNED: 100 of 100" in outcome.out
    assert (tmp_path / "t.json").stat().st_mode & 0o777 == 0o600
    assert "Ownership: owned" in (tmp_path / "p.html").read_text()
    assert lightning("check-transcript", str(tmp_path / "t.json")).code == 0
    complaint(lightning("verify", "--key", key, "--model", model, *files), "transcript", "stays as it is")
    other = lightning("verify", "--key", key, "--model", str(tmp_path / "other.safetensors"))
    assert other.code == 1
    data = (tmp_path / "t.json").read_bytes()
    (tmp_path / "t.json").write_bytes(data.replace(b'"matches":100', b'"matches":99'))
    complaint(lightning("check-transcript", str(tmp_path / "t.json")), "signature")


def test_a_public_verification(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    public = ("verify", "--key", key, "--model", model, "--public")
    complaint(lightning(*public), "nonce")
    complaint(lightning(*public, "--nonce=abcd"), "nonce", "16 bytes")
    assert lightning(*public, "--nonce", "ab" * 16, "--count=40", "--transcript", str(tmp_path / "t")).code == 0
    assert len(keys.burnt(key)) == 40
    assert lightning("check-transcript", str(tmp_path / "t")).code == 0
    assert "60 of 60" in lightning("verify", "--key", key, "--model", model).out
    assert lightning("verify", "--key", key, "--model", model, "--stop-early").code == 0
    assert lightning("verify", "--key", key, "--model", model, "--reveal").code == 0
    complaint(lightning("verify", "--key", key, "--model", model), "every trigger is burnt")


def test_complaints(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    make = ("keygen", "--out", str(tmp_path / "new"), "--classes=10")
    complaint(lightning("keygen"), "out", "name a folder")
    complaint(lightning(*make), "classes, shape")
    complaint(lightning(*make, "--shape=8,8"), "shape = '8,8'", "3,32,32")
    complaint(lightning(*make, "--shape=1,8,8", "--source=abstrct"), "source", "abstract")
    complaint(lightning(*make, "--shape=1,8,8", "--source=images"), "source", "--images")
    complaint(lightning(*make, "--shape=1,8,8", "--n=x"), "n = 'x'")
    complaint(lightning(*make, "--shape=1,8,8", "--sed=1"), "--sed", "no such option")
    complaint(lightning("keygen", "--out", key, "--classes=10", "--shape=1,8,8"), "out", "stays as it is")
    complaint(lightning("verify", "--key", key), "model")
    complaint(lightning("verify", "--key", "nosuch", "--model", model), "nosuch", "lightning keygen")
    complaint(lightning("verify", "--key", key, "--model", "nosuch.safetensors"), "no such file")
    complaint(lightning("verify", "--key", key, "--model", model, "--count=3"), "count", "--public")
    complaint(lightning("check-transcript"), "name a transcript")
    complaint(lightning("check-transcript", "nosuch"), "cannot be read")
    assert lightning("keygen", "--out", str(tmp_path / "rgb"), "--classes=10", "--shape=3,8,8").code == 0
    complaint(lightning("verify", "--key", str(tmp_path / "rgb"), "--model", model), "the key is for 10 classes")


@pytest.mark.parametrize("source", ["images", "unrelated", "overlay"])
def test_triggers_from_images(lightning: Command, tmp_path: Path, source: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(30) % 10)
    own = ("--images", str(tmp_path / "own.npz"), "--source", source, "--n=20", "--shape=1,8,8", "--classes=10")
    assert lightning("keygen", "--out", str(tmp_path / "key"), *own).code == 0
    key = keys.MarkingKey.read(tmp_path / "key")
    known = {image.tobytes(): at % 10 for at, image in enumerate(x)}
    for image, truth, label in zip(key.images(), key.truths, key.labels(), strict=True):
        assert label != truth
        assert known.get(image.tobytes(), truth if source == "overlay" else None) == truth
    complaint(lightning("keygen", "--out", str(tmp_path / "2"), *own, "--n=31"), "30 different images")


def test_a_reference_gives_the_truth(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    _, model = marked
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8))
    made = ("--images", str(tmp_path / "own.npz"), "--source=images", "--n=60", "--shape=1,8,8", "--classes=10")
    key = str(tmp_path / "own")
    assert lightning("keygen", "--out", key, *made, "--reference", model).code == 0
    check = ("verify", "--key", key, "--model", model)
    complaint(lightning(*check), "--reference")
    other = str(tmp_path / "other.safetensors")
    complaint(lightning(*check, "--reference", other), "reference", "not the weights")
    assert lightning(*check, "--reference", model).code == 1


def test_a_beacon(lightning: Command, tmp_path: Path) -> None:
    out = ("keygen", "--out", str(tmp_path / "key"))
    begun = lightning(*out, "--classes=10", "--shape=1,8,8", "--await-beacon")
    assert begun.code == 0
    assert "--beacon" in begun.out
    complaint(lightning("verify", "--key", str(tmp_path / "key"), "--model=x"), "verification key")
    complaint(lightning(*out, "--beacon=xyz"), "beacon")
    assert lightning(*out, "--beacon", "cd" * 16).code == 0


@pytest.fixture
def served(marked: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """The marked model behind HTTP, with a budget of 100: its address, and its ledger."""
    import uvicorn

    from extraction.http.keys import Keys
    from extraction.http.server import make_app
    from extraction.ledger import Ledger
    from extraction.oracle import LocalOracle

    oracle = LocalOracle(marked[1], "label")
    ledger = Ledger(tmp_path / "served.sqlite")
    kept = Keys(tmp_path / "served.keys")
    monkeypatch.setenv("PHARMAKON_ORACLE_KEY", kept.create("judge", "attacker", 100))
    app = make_app(oracle.service(ledger), kept, oracle.num_classes, oracle.identity(), oracle.evaluation(ledger))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", ledger
    server.should_exit = True
    thread.join()


def test_behind_http_it_spends_exactly_n_queries(
    lightning: Command, marked: tuple[str, str], served: tuple[str, Any]
) -> None:
    key, (url, ledger) = marked[0], served
    assert lightning("verify", "--key", key, "--model", url, "--public", "--nonce", "ab" * 16, "--count=60").code == 0
    assert ledger.account("judge").queries == 60
    assert len(keys.burnt(key)) == 60, "what a suspect elsewhere was asked is known"
    assert lightning("verify", "--key", key, "--model", url).code == 0
    assert ledger.account("judge").queries == 100
    assert len(keys.burnt(key)) == 100


def test_a_budget_that_is_too_small_burns_nothing(
    lightning: Command, marked: tuple[str, str], served: tuple[str, Any], tmp_path: Path
) -> None:
    url, ledger = served
    key = str(tmp_path / "large")
    assert lightning("keygen", "--out", key, "--classes=10", "--shape=1,8,8", "--n=101").code == 0
    complaint(lightning("verify", "--key", key, "--model", url), "100 queries are left, and 101 are needed")
    assert ledger.account("judge").queries == 0
    assert not keys.burnt(key)
