"""`lightning keygen`, `verify` and `check-transcript`: exit status, files, and complaints in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.errors import InputError
from datamodules.sources.digits import Digits
from experiments import commands, ownership
from tests.experiments.running import Outcome, complaint
from tests.helpers import mlp
from watermark import canonical, keys, transcript

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
    assert "not for a judge" in outcome.out
    assert len(keys.burnt(key)) == 100, "what a transcript shows is burnt"
    assert (tmp_path / "t.json").stat().st_mode & 0o777 == 0o600
    assert "Ownership: owned" in (tmp_path / "p.html").read_text()
    assert lightning("check-transcript", str(tmp_path / "t.json")).code == 0
    complaint(lightning("verify", "--key", key, "--model", model, *files), "transcript", "stays as it is")
    data = (tmp_path / "t.json").read_bytes()
    (tmp_path / "t.json").write_bytes(data.replace(b'"when":"', b'"when":"9'))
    complaint(lightning("check-transcript", str(tmp_path / "t.json")), "signature")


def test_another_model_is_not_owned(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    other = lightning("verify", "--key", marked[0], "--model", str(tmp_path / "other.safetensors"))
    assert other.code == 1


def test_a_public_verification(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    public = ("verify", "--key", key, "--model", model, "--public")
    complaint(lightning(*public), "nonce")
    nonce = ("--nonce", "ab" * 16)
    complaint(lightning(*public, "--nonce=abcd"), "nonce", "16 bytes")
    assert lightning(*public, "--nonce", "ab" * 16, "--count=40", "--transcript", str(tmp_path / "t")).code == 0
    assert len(keys.burnt(key)) == 40
    alone = lightning("check-transcript", str(tmp_path / "t"), "--count=40")
    assert alone.code == 2, "the nonce may be the claimant's own"
    assert "whose it is, is not known" in alone.out
    assert lightning("check-transcript", str(tmp_path / "t"), "--count=40", *nonce).code == 0
    complaint(lightning("check-transcript", str(tmp_path / "t"), *nonce), "40 of 100", "fewer than half")
    complaint(lightning("check-transcript", str(tmp_path / "t"), "--nonce", "cd" * 16), "not yours")
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
    complaint(lightning("check-transcript", "a", "b"), "b: there is no such option")
    for option in ("--begun", "--earlier", "--key"):
        complaint(lightning("check-transcript", __file__, option, "nosuch"), "nosuch")
    for option, words in (("--nonce=ab", "16 bytes"), ("--nonce=x", "hexadecimal"), ("--alpha-log2=0", "1 to 1024")):
        complaint(lightning("check-transcript", __file__, option), words)
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
        if source == "images":
            assert known[image.tobytes()] == truth
        assert (truth == -1) == (source == "unrelated"), "the classes of another task are none of this"
    if source == "unrelated":
        complaint(lightning("keygen", "--out", str(tmp_path / "2"), *own, "--reference=x"), "no class is true")
    complaint(lightning("keygen", "--out", str(tmp_path / "2"), *own, "--n=31"), "30 different images")


@pytest.mark.parametrize("source", ["images", "overlay"])
def test_images_without_their_classes_are_refused(lightning: Command, tmp_path: Path, source: str) -> None:
    """Their labels could be the true ones, which any model gives."""
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8))
    made = ("--images", str(tmp_path / "own.npz"), "--n=20", "--shape=1,8,8", "--classes=10", "--out")
    complaint(lightning("keygen", *made, str(tmp_path / "key"), "--source", source), "--reference", "unrelated")
    assert not (tmp_path / "key").exists()
    assert lightning("keygen", *made, str(tmp_path / "key"), "--source=unrelated").code == 0


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
    found = lightning(*check, "--reference", model)
    assert found.code == 1
    assert "truths: checked against" in found.out
    nonce, paper = ("--nonce", "ab" * 16), str(tmp_path / "t")
    lightning(*check, "--reference", model, "--public", *nonce, "--transcript", paper)
    assert "truths: the owner's word; not checked" in lightning("check-transcript", paper, *nonce).out


def test_a_beacon(lightning: Command, tmp_path: Path) -> None:
    out = ("keygen", "--out", str(tmp_path / "key"))
    wait = (*out, "--classes=10", "--shape=1,8,8", "--await-beacon")
    complaint(lightning(*wait), "--beacon-source")
    complaint(lightning(*wait, "--beacon-round=7"), "--beacon-source")
    complaint(lightning(*wait[:-1], "--beacon-round=7", "--beacon-source=drand"), "--await-beacon")
    begun = lightning(*wait, "--beacon-source=drand quicknet", "--beacon-round=7")
    assert begun.code == 0
    assert "round 7 of drand quicknet" in begun.out
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


def test_a_page_is_no_transcript(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    paper, pages = str(tmp_path / "t.json"), [str(tmp_path / f"{number}.html") for number in range(2)]
    lightning("verify", "--key", key, "--model", model, "--transcript", paper)
    assert lightning("check-transcript", "--page", pages[0], paper).code == 0
    assert lightning("check-transcript", paper, f"--page={pages[1]}").code == 0
    assert Path(pages[0]).read_text() == Path(pages[1]).read_text()
    complaint(lightning("check-transcript", paper, "--page", pages[0]), "stays as it is")


def test_a_judge_asks_again(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    paper, nonce = str(tmp_path / "t.json"), ("--nonce", "ab" * 16)
    lightning("verify", "--key", key, "--model", model, "--public", *nonce, "--transcript", paper)
    check = ("check-transcript", paper, *nonce, "--key", key, "--model")
    again = lightning(*check, model)
    assert again.code == 0
    assert "asked again: 0 of 50 answers differ" in again.out
    complaint(lightning(*check, str(tmp_path / "other.safetensors")), "the transcript is about")
    mk = keys.MarkingKey.read(key)
    value = json.loads(Path(paper).read_bytes())
    value |= {"answers": [(answer + 1) % 10 for answer in value["answers"]]}
    del value["signature"]
    signature = mk.sign(transcript.SIGNED, canonical.encode(value)).hex()
    Path(paper).write_bytes(canonical.encode({**value, "signature": signature}))
    assert lightning("check-transcript", paper, *nonce).code == 1
    again = lightning(*check, model)
    assert again.code == 0, "the verdict is about what the model says now"
    assert "asked again: 50 of 50 answers differ" in again.out


def test_what_a_judge_is_told(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    paper, nonce = str(tmp_path / "t.json"), ("--nonce", "ab" * 16)
    for number in range(2):
        lightning("verify", "--key", key, "--model", model, "--public", *nonce, "--transcript", f"{paper}{number}")
    digest = keys.VerificationKey.read(key).digest
    second = lightning("check-transcript", f"{paper}1", *nonce, "--count=25")
    assert second.code == 1
    assert "called burnt, which nothing shows" in second.out
    shown = lightning(
        "check-transcript", f"{paper}1", *nonce, "--count=25", "--earlier", f"{paper}0", "--key", digest,
        "--alpha-log2=60",
    )  # fmt: skip
    assert shown.code == 0
    for words in (
        "mode public, 25 of 100 triggers opened, 50 called burnt", f"key {digest}: the one that was given",
        f"nonce {'ab' * 16}: yours", "α = 2^-60, yours; 1 tried keys declared", "no class is true", "ask it again",
    ):  # fmt: skip
        assert words in shown.out, words
    complaint(lightning("check-transcript", f"{paper}1", *nonce, "--key", "ab" * 32), "of the key")


def test_a_beacon_and_its_judge(lightning: Command, tmp_path: Path, marked: tuple[str, str]) -> None:
    key, paper, nonce = str(tmp_path / "late"), str(tmp_path / "t.json"), ("--nonce", "ab" * 16)
    begin = ("keygen", "--out", key)
    lightning(*begin, "--classes=10", "--shape=1,8,8", "--await-beacon", "--beacon-source=drand", "--beacon-round=7")
    lightning(*begin, "--beacon", "cd" * 16)
    lightning("verify", "--key", key, "--model", marked[1], "--public", *nonce, "--transcript", paper)
    check = ("check-transcript", paper, *nonce, "--key", key)
    assert "not resistant to false claims: give begun.json" in lightning(*check).out
    whole = lightning(*check, "--begun", f"{key}/begun.json").out
    assert "resistant to false claims if begun.json" in whole
    assert "timestamped before round 7 of drand" in whole
    complaint(lightning(*check, "--begun", f"{key}/vk.json"), "begun: it has a field")


@pytest.mark.parametrize("more", [(), ("--page=p.html", "--alpha-log2=64", "--key={key}")])
def test_a_judge_needs_no_torch(
    lightning: Command, marked: tuple[str, str], tmp_path: Path, more: tuple[str, ...]
) -> None:
    key, model = marked
    paper = str(tmp_path / "t.json")
    lightning("verify", "--key", key, "--model", model, "--transcript", paper)
    args = ["check-transcript", paper, *(each.format(key=key) for each in more)]
    program = (
        "import sys; from experiments.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(77 if {'torch', 'lightning'} & set(sys.modules) else code)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], check=False, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nOWNED: 100"), PermissionError(13, "no"), SystemExit(1), MemoryError()]
)
@pytest.mark.parametrize("command", ["verify", "check-transcript"])
def test_whatever_goes_wrong_is_no_verdict(
    lightning: Command, monkeypatch: pytest.MonkeyPatch, command: str, error: BaseException
) -> None:
    def fails(args: list[str]) -> int:
        raise error

    monkeypatch.setattr(commands, "_action", lambda _: fails)
    complaint(lightning(command, "x"), "could not be decided")


def test_files_are_opened_before_anything_is_burnt(lightning: Command, marked: tuple[str, str], tmp_path: Path) -> None:
    key, model = marked
    ask = ("verify", "--key", key, "--model", model, "--reveal")
    for option in ("--transcript", "--page"):
        complaint(lightning(*ask, option, str(tmp_path / "no" / "t")), "cannot be written")
    assert not keys.burnt(key)
    complaint(
        lightning("verify", "--key", key, "--model", model, "--public", "--nonce=abcd", "--page", "p"), "16 bytes"
    )
    assert not Path("p").exists(), "and are gone again where nothing came of it"


def test_the_verdict_is_there_even_if_its_page_is_not(
    lightning: Command, marked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ownership, "page", full)
    found = lightning("verify", "--key", marked[0], "--model", marked[1], "--page", "p.html")
    assert (found.code, "OWNED: 100 of 100" in found.out) == (2, True)


def test_to_stop_early_takes_a_small_budget(
    lightning: Command, marked: tuple[str, str], served: tuple[str, Any], tmp_path: Path
) -> None:
    """A budget of 100 is enough for a key of 120 triggers, since some 22 decide."""
    key, (url, ledger) = str(tmp_path / "large"), served
    lightning("keygen", "--out", key, "--classes=10", "--shape=1,8,8", "--n=120")
    assert lightning("verify", "--key", key, "--model", url, "--stop-early").code == 2, "the last 20 got no answer"
    assert ledger.account("judge").queries == 100
    assert lightning("verify", "--key", marked[0], "--model", url, "--stop-early").code == 2
    assert not keys.burnt(marked[0]), "there is nothing left to ask with"


def test_what_was_answered_before_a_refusal_counts(
    lightning: Command, marked: tuple[str, str], served: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, (url, ledger) = marked[0], served
    from extraction.http.remote import RemoteClient
    from extraction.ledger import BudgetError

    query, asked = RemoteClient.query, [0]

    def refuses(self: RemoteClient, images: torch.Tensor, request: str | None = None) -> Any:
        asked[0] += len(images)
        if asked[0] > 60:
            raise BudgetError("no more")
        return query(self, images, request)

    monkeypatch.setattr(RemoteClient, "query", refuses)
    found = lightning("verify", "--key", key, "--model", url)
    assert found.code == 0
    assert "OWNED: 60 of 100" in found.out
    assert "40 triggers got no answer" in found.out
    assert ledger.account("judge").queries == 60


def test_a_lost_connection_is_not_paid_twice(
    lightning: Command, marked: tuple[str, str], served: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, (url, ledger) = marked[0], served
    from extraction.http.remote import Line

    post, sent = Line.post, [0]

    def lost(self: Line, path: str, content: bytes, request: str) -> bytes:
        answer = post(self, path, content, request)
        sent[0] += 1
        if sent[0] == 3:  # the server has answered, and nobody heard it
            raise InputError("no answer")
        return answer

    monkeypatch.setattr(Line, "post", lost)
    ask = ("verify", "--key", key, "--model", url, "--public", "--nonce", "ab" * 16, "--count=100", "--transcript", "t")
    complaint(lightning(*ask), "no answer")
    assert ledger.account("judge").queries == 60
    assert len(keys.burnt(key)) == 100
    found = lightning(*ask)
    assert found.code == 0
    assert "OWNED: 100 of 100" in found.out
    assert ledger.account("judge").queries == 100
    assert lightning("check-transcript", "t", "--nonce", "ab" * 16, "--count=100", "--key", key).code == 0


def test_an_oracle_in_this_process_is_a_suspect(marked: tuple[str, str]) -> None:
    from experiments.suspects import of_oracle
    from extraction.oracle import LocalOracle
    from watermark.verify import verify

    for mode, budget, owned in (("label", None, True), ("scores", 70, True), ("top_k", 30, None)):
        oracle = LocalOracle(marked[1], mode, 2 if mode == "top_k" else None)
        model = of_oracle(oracle, budget)
        assert (model.classes, model.shape, model.left()) == (10, (1, 8, 8), budget)
        result = verify(marked[0], model.ask, model.name, "today").result
        assert result.owned is owned
        assert result.refused == (0 if budget is None else 100 - budget // 20 * 20)
