"""The oracle over HTTP: exact counts under concurrency and kill −9, the same bytes as in process, one-line faults."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from classifiers.backbones import MLP
from classifiers.classifier import load_classifier
from datamodules.sources.digits import Digits
from extraction import strategy
from extraction.active_learning import ActiveLearning
from extraction.answers import Answers, pack, unpack
from extraction.defences import PRADA, GaussianNoise
from extraction.http.keys import Key, Keys
from extraction.http.patience import patient
from extraction.http.remote import Line, RemoteClient, RemoteOracle
from extraction.http.server import Limits, make_app
from extraction.knockoff_nets import KnockoffNets
from extraction.ledger import BudgetError, Ledger
from extraction.oracle import LocalOracle, Oracle
from extraction.service import Domain, FlaggedError, Service
from extraction.strategy import Extraction
from extraction.surrogate import Surrogate
from tests.helpers import mlp, refused, tiny_trainer

SHAPE = (1, 8, 8)


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ready(data: KnockoffNets) -> KnockoffNets:
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


class Site:
    """A server's application without a network, its files, and its keys."""

    def __init__(self, folder: Path, victim: str, limits: Limits | None = None, **settings: Any) -> None:
        self.ledger = Ledger(folder / "ledger", price=2.0)
        self.keys = Keys(folder / "ledger.keys")
        model = load_classifier(victim)
        service = Service(model, self.ledger, **settings)
        self.app = make_app(service, self.keys, 10, "victim 1", Service(model, self.ledger), limits)
        self.web = TestClient(self.app)

    def ask(self, key: str, images: Tensor | bytes, request: str = "1", **headers: str) -> Any:
        content = images if isinstance(images, bytes) else pack(images=images)
        given = {"Authorization": f"Bearer {key}", "X-Request-Id": request, **headers}
        return self.web.post("/v1/answers", content=content, headers=given)


@pytest.fixture
def site(tmp_path: Path, victim: str) -> Site:
    return Site(tmp_path, victim)


@contextmanager
def listening(app: Any, **settings: Any) -> Iterator[str]:
    """An application served from a thread: its address."""
    import uvicorn

    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()  # who comes before the thread has begun waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def outcome(response: Any) -> tuple[int, str]:
    message = response.json()["message"]
    assert message
    assert "\n" not in message
    return response.status_code, response.json()["error"]


# --- the same attack as in process ------------------------------------------------------------------------------------
def test_an_attack_gets_the_same_bytes_as_in_process(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, victim)
    monkeypatch.setenv("PHARMAKON_ORACLE_KEY", site.keys.create("ann", budget=150))
    monkeypatch.setenv("PHARMAKON_EVALUATION_KEY", site.keys.create("judge", "evaluation"))
    monkeypatch.setattr(strategy, "CHUNK", 64)
    here = ready(KnockoffNets(Digits(), LocalOracle(victim, price=2.0), 150, seed=3))
    with listening(site.app) as url:
        there = ready(KnockoffNets(Digits(), RemoteOracle(url), 150, seed=3))
        local, remote = here.evaluations("test"), there.evaluations("test")
    rows = torch.arange(150)
    assert there.train_set.images_at(rows).numpy().tobytes() == here.train_set.images_at(rows).numpy().tobytes()
    assert there.train_set.labels.numpy().tobytes() == here.train_set.labels.numpy().tobytes()
    assert torch.equal(there.train_set.ids, here.train_set.ids)
    assert there.facts() == here.facts()
    assert [each.name for each in remote] == [each.name for each in local]
    assert site.ledger.account("ann").queries == 150  # the evaluation has an account of its own
    assert site.ledger.account("judge").queries == len(there.test_set)
    again = ready(KnockoffNets(Digits(), there.oracle, 150, seed=3))  # the server is gone, the answers are here
    assert torch.equal(again.train_set.labels, here.train_set.labels)


@pytest.mark.parametrize("strategy", ["knockoff", "active learning"])
def test_an_attack_gets_the_same_surrogate_as_in_process(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    def fitted(oracle: Oracle) -> tuple[Extraction, dict[str, Tensor]]:
        data: Extraction = KnockoffNets(Digits(batch_size=16), oracle, 90, seed=3)
        if strategy == "active learning":
            data = ActiveLearning(Digits(batch_size=16), oracle, 90, "k_center", 3, 0.2, seed=3)
        torch.manual_seed(1)
        model = mlp(data, Surrogate, optimizer=partial(torch.optim.Adam, lr=0.01))
        tiny_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, limit_val_batches=0).fit(model, data)
        return data, model.net.state_dict()

    site = Site(tmp_path, victim)
    monkeypatch.setenv("PHARMAKON_ORACLE_KEY", site.keys.create("ann", budget=90))
    here, expected = fitted(LocalOracle(victim, price=2.0))
    with listening(site.app) as url:
        there, found = fitted(RemoteOracle(url))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert there.train_set.digest() == here.train_set.digest()
    assert there.facts() == here.facts()
    assert site.ledger.account("ann").queries == 90


def test_a_victim_of_another_mode_or_kind_is_refused_in_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHARMAKON_ORACLE_KEY", site.keys.create("ann"))
    with listening(site.app) as url:
        with refused("mode = 'label'", "answers in mode scores"):
            RemoteOracle(url, mode="label").check(10, SHAPE)
        with refused("10 classes", "1×8×8"):
            RemoteOracle(url).check(10, (1, 28, 28))
        with refused("10 classes"):
            RemoteOracle(url).check(9, SHAPE)
        RemoteOracle(url).check(10, SHAPE)
        assert RemoteOracle(url).evaluator() is None
        assert RemoteOracle(url).identity() == RemoteOracle(url, timeout=5).identity()
        monkeypatch.setenv("PHARMAKON_ORACLE_KEY", "x" * 43)
        with refused("PHARMAKON_ORACLE_KEY", "does not take this key"):
            RemoteOracle(url).check(10, SHAPE)
    monkeypatch.delenv("PHARMAKON_ORACLE_KEY")
    with refused("PHARMAKON_ORACLE_KEY", "lightning serve"):
        RemoteOracle(url).identity()
    with refused("url", "https"):
        RemoteOracle("http://example.org")
    with refused("url = 'example.org'"):
        RemoteOracle("example.org")
    monkeypatch.setenv("PHARMAKON_ORACLE_KEY", "x" * 43)
    with refused("no answer after 2 tries"):
        RemoteOracle(url, retries=1).identity()


def test_evaluation_is_undefended_and_has_no_budget(tmp_path: Path, victim: str) -> None:
    site = Site(tmp_path, victim, mode="scores", defence=GaussianNoise(0.3))
    attacker, judge = site.keys.create("ann", budget=5), site.keys.create("judge", "evaluation")
    images = pictures(9)
    with torch.no_grad():
        expected = load_classifier(victim).eval()(images).softmax(1)
    torch.testing.assert_close(unpack(site.ask(judge, images).content)["values"], expected)
    shown = unpack(site.ask(attacker, images[:5]).content)["values"]
    assert (shown - expected[:5]).abs().max() > 0.01
    assert outcome(site.ask(attacker, images[5:], "2")) == (429, "budget")


# --- counting ---------------------------------------------------------------------------------------------------------
def test_eight_at_once_never_overspend(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = site.keys.create("ann", budget=100)
    with listening(site.app) as url:

        def attack(number: int) -> int:
            line = Line(url, key, "KEY", 60, 0)
            client = RemoteClient(line, Ledger(tmp_path / f"own {number}"), f"run {number}", 4096)
            answered = 0
            for turn in range(6):
                try:
                    answered += len(client.query(pictures(7, 10 * number + turn), str(turn)).values)
                except BudgetError:
                    assert client.left is not None
            assert client.account.queries == answered
            return answered

        with ThreadPoolExecutor(8) as pool:
            total = sum(pool.map(attack, range(8)))
    assert total == site.ledger.account("ann").queries == 98  # 8 × 6 × 7 = 336 were asked for
    assert site.ledger.left("ann") == 2


def test_a_request_sent_again_is_free_and_repeats_count(site: Site) -> None:
    key = site.keys.create("ann", budget=20)
    first = site.ask(key, pictures(8), "a")
    assert site.ask(key, pictures(8), "a").content == first.content
    assert site.ledger.account("ann").queries == 8
    assert site.ask(key, pictures(8), "b").content == first.content  # a new request: the same images cost again
    account = site.web.get("/v1/account", headers={"Authorization": f"Bearer {key}"}).json()
    assert account == {
        "queries": 16, "samples": 8, "requests": 2, "cost": 0.032, "left": 4, "samples_left": None, "rate": None,
    }  # fmt: skip
    assert outcome(site.ask(key, pictures(8, 5), "a")) == (422, "input")  # an id is of its images


def test_an_answer_does_not_depend_on_what_is_asked_with_it(site: Site, tmp_path: Path, victim: str) -> None:
    """By another service each time: one keeps what it has said of an image, whatever that was asked with."""
    key, images = site.keys.create("ann"), pictures(300)
    together = unpack(site.ask(key, images, "all").content)["values"]
    for row in (0, 255, 256, 299):
        fresh = Site(tmp_path, victim)
        alone = unpack(fresh.ask(key, images[row : row + 1], f"row {row}").content)["values"]
        assert alone.numpy().tobytes() == together[row].numpy().tobytes()
    # each call of the model is of the one size, whatever is asked
    seen: list[int] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return torch.zeros(len(batch), 10)

    service = Service(model, Ledger(tmp_path / "other"), domain=Domain(SHAPE), batch_size=64)
    for number, count in enumerate((1, 63, 64, 65, 130)):
        service.answer("ann", pictures(count, 50 + number), str(number))
    assert seen == [64] * 8


def test_lost_answers_are_asked_for_again_and_not_charged(site: Site, tmp_path: Path) -> None:
    """Every answer is lost on its way at first: by a relay that hangs up when the server has worked."""
    key = site.keys.create("ann")
    lost: list[str] = []

    async def relay(scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope.get("headers", ())).get(b"x-request-id", b"").decode()
        if not name or name in lost:
            await site.app(scope, receive, send)
            return

        async def nowhere(message: Any) -> None:
            pass

        lost.append(name)
        await site.app(scope, receive, nowhere)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"99")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ConnectionError("cut")

    with listening(relay) as url:
        client = RemoteClient(Line(url, key, "KEY", 30, 2), Ledger(tmp_path / "own"), "run 1", 4)
        found = client.query(pictures(10), "a")
        again = RemoteClient(Line(url, key, "KEY", 30, 0), Ledger(tmp_path / "new"), "run 1", 4)  # after a crash here
        assert torch.equal(again.query(pictures(10), "a").values, found.values)
        assert site.ledger.account("ann").queries == 10
    assert len(lost) == 3  # 4 + 4 + 2 images
    assert site.ledger.account("ann")[:3] == (10, 10, 3)
    assert found.values.shape == (10, 10)
    assert torch.equal(client.query(pictures(10), "a").values, found.values)  # no server is needed


def test_runs_under_one_key_do_not_clash(site: Site, tmp_path: Path) -> None:
    key = site.keys.create("ann", budget=10)
    with listening(site.app) as url:
        one, two = (
            RemoteClient(Line(url, key, "KEY", 30, 0), Ledger(tmp_path / quote(name, ""), 6), name, 4096)
            for name in ("a", "a/b")
        )
        one.query(pictures(4, 1), "b/c")
        two.query(pictures(4, 2), "c")
        assert (one.left, two.left) == (2, 2)
        with pytest.raises(BudgetError, match="budget = 6"):  # its own: the server has not heard of it
            one.query(pictures(3, 3), "d")
        one.query(pictures(2, 3), "e")
        with pytest.raises(BudgetError, match="budget = 10"):
            two.query(pictures(1, 4), "f")
        assert two.account.queries == 4


# --- kill −9 ----------------------------------------------------------------------------------------------------------
SERVER = """
import sys, time, torch
from pathlib import Path
import uvicorn
from classifiers.classifier import load_classifier
from extraction.http.keys import Keys
from extraction.http.server import make_app
from extraction.ledger import Ledger
from extraction.service import Domain, Service

folder, port = Path(sys.argv[1]), int(sys.argv[2])
victim = load_classifier(folder / "victim.safetensors").eval()

def slow(images):
    time.sleep(0.08)
    return victim(images)

service = Service(slow, Ledger(folder / "ledger"), domain=Domain((1, 8, 8)))
app = make_app(service, Keys(folder / "ledger.keys"), 10, "victim 1")
print("ready", flush=True)
uvicorn.run(app, port=port, log_level="error")
"""


@pytest.fixture
def server(tmp_path: Path, victim: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the server of `port`, again and again."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        root = str(Path(__file__).resolve().parents[2])
        args = [sys.executable, "-c", SERVER, str(tmp_path), str(port)]
        environment = {**os.environ, "PYTHONPATH": root}
        process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    start.port = port  # type: ignore[attr-defined]
    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_server_killed_in_mid_attack_loses_and_doubles_nothing(
    server: Any, tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.2)))
    keys, ledger = Keys(tmp_path / "ledger.keys"), Ledger(tmp_path / "ledger")
    key, images = keys.create("ann", budget=200), pictures(200)
    client = RemoteClient(
        Line(f"http://127.0.0.1:{server.port}", key, "KEY", 30, 200), Ledger(tmp_path / "own", 200), "run 1", 4096
    )
    first = server()
    with ThreadPoolExecutor(1) as pool:
        attack = pool.submit(lambda: [client.query(part, str(n)) for n, part in enumerate(images.split(10))])
        while ledger.account("ann").queries < 60:
            time.sleep(0.01)
        time.sleep(0.04)  # in the middle of a model call
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        between = ledger.account("ann")
        assert 60 <= between.queries < 200
        assert between.queries == 10 * between.requests  # whole requests or none of them
        server()
        answers = attack.result(timeout=60)
    assert ledger.account("ann")[:3] == (200, 200, 20)
    assert client.account.queries == 200
    with torch.no_grad():
        expected = load_classifier(victim).eval()(images).softmax(1)
    torch.testing.assert_close(torch.cat([each.values for each in answers]), expected)


# --- keys, people, detectors ------------------------------------------------------------------------------------------
def test_keys_are_nowhere_in_the_files(site: Site, tmp_path: Path) -> None:
    made = [site.keys.create(name, budget=n) for n, name in enumerate(("ann", "bob"))]
    admin = site.keys.create("admin", "admin")
    site.ask(made[1], pictures(1))
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not [1 for content in files for key in (*made, admin) if key.encode() in content]
    assert site.keys.path.stat().st_mode & 0o077 == 0
    assert site.keys.find(made[1]) == Key("bob", "attacker", 1, None)
    assert site.keys.find(made[1][:-1]) is None
    assert site.keys.find("") is None
    assert len({*made, admin}) == 3
    with refused("name = 'ann'", "choose another"):
        site.keys.create("ann")
    with refused("role", "did you mean 'attacker'"):
        site.keys.create("eve", "atacker")
    with refused("budget = 3", "evaluation"):
        site.keys.create("eve", "evaluation", budget=3)
    for wrong in ("", "<b>", "a b", "ä"):
        with refused("name"):
            site.keys.create(wrong)


def test_the_status_page_is_for_the_admin(site: Site) -> None:
    attacker, admin = site.keys.create("ann", budget=10, rate=600), site.keys.create("root", "admin")
    site.ask(attacker, pictures(4))
    status = partial(site.web.get, "/status")
    assert outcome(status()) == (401, "key")
    assert outcome(status(headers={"Authorization": f"Bearer {attacker}"})) == (403, "role")
    page = status(headers={"Authorization": f"Bearer {admin}"})
    assert page.status_code == 200
    assert "<td>ann</td><td>attacker</td><td>4</td><td>4</td><td>1</td><td>0.01</td><td>6</td><td>600</td>" in page.text
    assert status(auth=("anyone", admin)).text == page.text  # as a browser asks
    assert status(auth=("ann", attacker)).status_code == 403
    assert outcome(site.ask(admin, pictures(1))) == (403, "role")
    assert admin not in page.text


def test_a_flag_persists_over_a_restart(tmp_path: Path, victim: str) -> None:
    settings: dict[str, Any] = {"detector": PRADA(least=20), "response": "refuse"}
    site = Site(tmp_path, victim, **settings)
    key = site.keys.create("ann")
    base = pictures(1)
    for turn in range(6):  # the same image, again and again: repeats reach the detector
        response = site.ask(key, base.repeat(10, 1, 1, 1), f"turn {turn}")
        if response.status_code != 200:
            break
    assert outcome(response) == (403, "flagged")
    spent = site.ledger.account("ann").queries
    assert 0 < spent < 60
    after = Site(tmp_path, victim, **settings)
    assert outcome(after.ask(key, pictures(1, 9), "new")) == (403, "flagged")
    admin = after.keys.create("root", "admin")
    page = after.web.get("/status", auth=("", admin)).text
    assert f"<td>{spent} queries</td>" in page
    assert "smallest_w" in page, "what the detector said is known after a restart"
    assert page == site.web.get("/status", auth=("", admin)).text
    assert after.ledger.account("ann").queries == spent
    with listening(after.app) as url:
        client = RemoteClient(Line(url, key, "KEY", 30, 0), Ledger(tmp_path / "own"), "run", 4096)
        with pytest.raises(FlaggedError):
            client.query(pictures(1, 9))
        assert client.account.queries == 0


# --- faults -----------------------------------------------------------------------------------------------------------
def test_each_fault_has_its_status_and_then_a_valid_query_is_answered(site: Site, tmp_path: Path, victim: str) -> None:
    key = site.keys.create("ann", budget=10)
    assert outcome(site.ask("x" * 43, pictures(1))) == (401, "key")
    assert outcome(site.web.post("/v1/answers", content=b"")) == (401, "key")
    assert outcome(site.ask(key, b"not tensors")) == (400, "malformed")
    assert outcome(site.ask(key, pack(pictures=pictures(1)))) == (400, "malformed")
    assert outcome(site.ask(key, pack(images=pictures(1), more=pictures(1)))) == (400, "malformed")
    assert outcome(site.ask(key, pictures(1), "")) == (400, "malformed")
    assert outcome(site.ask(key, pictures(1), "x" * 501)) == (400, "malformed")
    assert outcome(site.ask(key, pictures(1)[..., :4])) == (422, "input")
    assert outcome(site.ask(key, pictures(1).float())) == (422, "input")
    assert outcome(site.ask(key, pictures(0))) == (422, "input")
    assert outcome(site.ask(key, pictures(11))) == (429, "budget")
    assert site.ledger.account("ann").queries == 0
    answers = Answers(**unpack(site.ask(key, pictures(10)).content))
    with torch.no_grad():
        torch.testing.assert_close(answers.values, load_classifier(victim).eval()(pictures(10)).softmax(1))


def test_nan_is_refused_where_inputs_are_real(tmp_path: Path) -> None:
    domain = Domain((3,), torch.float64)
    service = Service(lambda inputs: inputs.cumsum(1), Ledger(tmp_path / "ledger"), "logits", domain=domain)
    keys = Keys(tmp_path / "keys")
    web, key = TestClient(make_app(service, keys, 3, "function")), keys.create("ann")

    def ask(inputs: Tensor) -> Any:
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "1"}
        return web.post("/v1/answers", content=pack(images=inputs), headers=headers)

    for wrong in (float("nan"), float("inf")):
        assert outcome(ask(torch.tensor([[0, wrong, 0]], dtype=torch.float64))) == (422, "input")
    found = unpack(ask(torch.tensor([[0.1, 1, 2]], dtype=torch.float64)).content)["values"]
    assert found.tolist() == [[0.1, 1.1, 3.1]]


def test_a_large_body_is_refused_unread(tmp_path: Path, victim: str) -> None:
    site = Site(tmp_path, victim, Limits(body=10_000, images=50))
    key = site.keys.create("ann")
    assert outcome(site.ask(key, pictures(51))) == (422, "input")
    assert outcome(site.ask(key, pictures(160))) == (413, "size")
    head = f"POST /v1/answers HTTP/1.1\r\nHost: x\r\nX-Request-Id: 1\r\nAuthorization: Bearer {key}\r\n"
    with listening(site.app) as url:
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        for more, body in (
            ("Content-Length: 100000000\r\n\r\n", b""),  # announced, and not one byte of it sent
            ("Transfer-Encoding: chunked\r\n\r\n", b"2000\r\n" + b"x" * 0x2000 + b"\r\n" + b"2000\r\n" + b"x" * 0x2000),
        ):
            with socket.create_connection(address, timeout=10) as line:
                line.sendall((head + more).encode() + body)
                assert line.recv(100).startswith(b"HTTP/1.1 413")
        with socket.create_connection(address, timeout=10) as line:  # without a key nothing is read at all
            line.sendall(head.replace(key, "x").encode() + b"Content-Length: 9999\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 401")
    assert site.ask(key, pictures(50)).status_code == 200


def test_a_flood_is_told_when_to_come_again(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, free = site.keys.create("ann", rate=10), site.keys.create("bob")
    assert site.ask(key, pictures(6), "1").status_code == 200
    response = site.ask(key, pictures(5), "2")
    assert outcome(response) == (429, "rate")
    assert 55 <= int(response.headers["retry-after"]) <= 60
    assert site.ask(key, pictures(4), "3").status_code == 200
    assert outcome(site.ask(key, pictures(11), "4")) == (422, "input")  # it would never be let through
    assert site.ask(free, pictures(11), "4").status_code == 200
    now = time.time()
    restarted = Site(tmp_path, str(tmp_path / "victim.safetensors"))  # it is counted in the file
    assert outcome(restarted.ask(key, pictures(1), "5")) == (429, "rate")
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert site.ask(key, pictures(10), "5").status_code == 200


def test_what_was_answered_meets_no_rate(site: Site) -> None:
    key = site.keys.create("ann", rate=10)
    first = site.ask(key, pictures(10), "1")
    assert outcome(site.ask(key, pictures(1), "2")) == (429, "rate")
    assert site.ask(key, pictures(10), "1").content == first.content
    assert outcome(site.ask(key, pictures(3, 5), "1")) == (422, "input"), "the id alone opens nothing"
    assert site.ledger.account("ann").queries == 10


def test_requests_are_counted_whatever_becomes_of_them(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, victim, Limits(requests=4))
    key, other, now = site.keys.create("ann", budget=5), site.keys.create("bob"), time.time()
    assert outcome(site.ask(key, pictures(6))) == (429, "budget")
    assert outcome(site.ask(key, b"x")) == (400, "malformed")
    assert site.web.get("/v1/account", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert outcome(site.web.get("/status", headers={"Authorization": f"Bearer {key}"})) == (403, "role")
    response = site.ask(key, pictures(1))
    assert outcome(response) == (429, "rate")
    assert 55 <= int(response.headers["retry-after"]) <= 60
    assert site.ask(other, pictures(1)).status_code == 200
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert site.ask(key, pictures(1)).status_code == 200


def test_a_key_has_a_budget_in_samples(site: Site, tmp_path: Path) -> None:
    key = site.keys.create("ann", samples=5)
    assert site.ask(key, pictures(5).repeat(3, 1, 1, 1), "1").status_code == 200
    response = site.ask(key, pictures(1, 9), "2")
    assert outcome(response) == (429, "budget")
    assert "samples = 5" in response.json()["message"]
    assert site.ask(key, pictures(5), "3").status_code == 200
    account = site.web.get("/v1/account", headers={"Authorization": f"Bearer {key}"}).json()
    assert (account["queries"], account["samples"], account["samples_left"]) == (20, 5, 0)
    with listening(site.app) as url:
        client = RemoteClient(Line(url, key, "KEY", 30, 0), Ledger(tmp_path / "own"), "run", 4096)
        with pytest.raises(BudgetError, match="samples = 5"):
            client.query(pictures(1, 9))
    with refused("samples = 3", "evaluation"):
        site.keys.create("judge", "evaluation", samples=3)


def test_an_older_file_of_keys_is_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "keys")) as connection, connection:
        connection.execute("CREATE TABLE keys (name TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, role TEXT NOT NULL, "
                           "budget INTEGER, rate INTEGER)")  # fmt: skip
        connection.execute("INSERT INTO keys VALUES ('ann', 'x', 'attacker', 7, 9)")
    for _ in range(2):
        assert Keys(tmp_path / "keys").all() == [Key("ann", "attacker", 7, 9, None)]
    Keys(tmp_path / "keys").create("bob", samples=3)
    assert Keys(tmp_path / "keys").all()[1] == Key("bob", "attacker", None, None, 3)


# --- those who keep a server waiting ----------------------------------------------------------------------------------
def near(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rsplit(":", 1)[1])


def closed(line: socket.socket, seconds: float = 5) -> bool:
    """Whether the other side has hung up, or does within some seconds."""
    line.settimeout(seconds)
    try:
        while line.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_idle_connections_keep_nobody_out_and_are_dropped(site: Site) -> None:
    for protocol, dropped in ((patient(60.0, 30), 50), (patient(1.0, 200), 80)):  # at once; after a while
        with listening(site.app, http=protocol, ws="none") as url, ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(near(url), timeout=5)) for _ in range(80)]
            assert httpx.get(f"{url}/docs", trust_env=False).status_code == 200
            assert all(closed(line) for line in idle[:dropped]), "those that have waited longest"
            assert not any(closed(line, 0.01) for line in idle[dropped + 1 :])


def test_a_header_that_never_ends_is_not_waited_for(site: Site) -> None:
    whole = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(site.app, http=patient(0.5), ws="none") as url:
        for before in (b"", whole):  # on a new connection, and on one that was used
            with socket.create_connection(near(url), timeout=5) as line:
                line.sendall(before)
                if before:
                    assert line.recv(10**6).startswith(b"HTTP/1.1 200")
                begun = time.monotonic()
                try:
                    while time.monotonic() - begun < 5:
                        line.sendall(b"G")
                        time.sleep(0.1)
                except ConnectionError:
                    pass
                assert 0.4 < time.monotonic() - begun < 4
        # one that is answered in time is left in peace
        with httpx.Client(trust_env=False) as web:
            for _ in range(3):
                assert web.get(f"{url}/docs").status_code == 200
                time.sleep(0.7)
                assert len(web._transport._pool.connections) == 1  # type: ignore[attr-defined] # no new one is made


def test_a_body_that_never_ends_is_not_waited_for(tmp_path: Path, victim: str) -> None:
    site = Site(tmp_path, victim, Limits(patience=0.5, at_once=2))
    key = site.keys.create("ann")
    head = f"POST /v1/answers HTTP/1.1\r\nHost: x\r\nX-Request-Id: 1\r\nAuthorization: Bearer {key}\r\n"
    with listening(site.app, http=patient(5.0), ws="none") as url, ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(near(url), timeout=5)) for _ in range(3)]
        for line in lines:
            line.sendall(f"{head}Content-Length: 1000\r\n\r\nx".encode())
        found = sorted(line.recv(12).decode() for line in lines)
        assert found == ["HTTP/1.1 408", "HTTP/1.1 408", "HTTP/1.1 429"]
        assert all(closed(line) for line in lines)
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "1"}
        assert httpx.post(f"{url}/v1/answers", content=pack(images=pictures(1)), headers=headers,
                          trust_env=False).status_code == 200  # fmt: skip


def test_a_client_waits_for_the_rate(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, begun, slept = site.keys.create("ann", rate=8), time.time(), [0.0]
    with listening(site.app) as url:
        client = RemoteClient(Line(url, key, "KEY", 30, 0), Ledger(tmp_path / "own"), "run", 4096)
        monkeypatch.setattr(time, "time", lambda: begun + slept[0])
        monkeypatch.setattr("extraction.http.remote.time.sleep", lambda s: slept.__setitem__(0, slept[0] + s + 1))
        assert len(client.query(pictures(20), "a").values) == 20  # 8, 8 and 4
    assert site.ledger.account("ann").queries == 20
    assert slept[0] >= 118


def test_a_key_made_while_the_server_runs_has_its_budget(site: Site) -> None:
    key = Keys(site.keys.path).create("late", budget=3)
    assert outcome(site.ask(key, pictures(4))) == (429, "budget")
    assert site.ask(key, pictures(3)).status_code == 200


def test_another_kind_of_server_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(scope: Any, receive: Any, send: Any) -> None:
        body = pack(values=torch.zeros(2, 10), classes=torch.zeros(3, 0)) if scope["path"] == "/v1/answers" else b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with listening(wrong) as url:
        client = RemoteClient(Line(url, "x", "KEY", 30, 0), Ledger(tmp_path / "own"), "run", 9)
        with refused("url", "no answers to these images"):
            client.query(pictures(1))
        with refused("url", "no lightning serve"):
            client.query(pictures(2))
        monkeypatch.setenv("PHARMAKON_ORACLE_KEY", "x" * 43)
        with refused("url", "no lightning serve"):
            RemoteOracle(url).check(10, SHAPE)
    assert client.account.queries == 0


def test_what_is_not_installed_is_named(tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with refused("fastapi", "pharmakon[serve]"):
        Site(tmp_path, victim)
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.setenv("PHARMAKON_ORACLE_KEY", "x" * 43)
    with refused("httpx", "pharmakon[serve]"):
        RemoteOracle("http://127.0.0.1:1").identity()


def test_what_the_server_says_of_itself(site: Site) -> None:
    key = site.keys.create("ann")
    about = site.web.get("/v1/oracle", headers={"Authorization": f"Bearer {key}"}).json()
    assert about == {
        "shape": [1, 8, 8], "dtype": "uint8", "mode": "scores", "k": None, "num_classes": 10, "identity": "victim 1",
        "price": 2.0, "images": 4096,
    }  # fmt: skip
    assert outcome(site.web.get("/v1/oracle")) == (401, "key")
    assert set(site.web.get("/openapi.json").json()["paths"]) == {
        "/v1/answers", "/v1/oracle", "/v1/account", "/status",
    }  # fmt: skip
    assert site.web.get("/docs").status_code == 200
