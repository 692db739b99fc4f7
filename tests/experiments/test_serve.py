"""`lightning serve`: keys shown once, this machine alone unless there is TLS, complaints in one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import torch

from classifiers.backbones import MLP
from datamodules.sources.digits import Digits
from extraction.answers import pack, unpack
from extraction.http.keys import RATE, Budgets, Key, Keys
from extraction.ledger import Ledger
from tests.experiments.running import QUIET, Outcome, complaint, read_json, runs
from tests.extraction.test_foreign import logits_of
from tests.helpers import mlp

Command = Callable[..., Outcome]
IMAGES = torch.arange(3 * 64, dtype=torch.uint8).reshape(3, 1, 8, 8)


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mlp(Digits(), backbone=partial(MLP, hidden=[8])).save(tmp_path / "victim.safetensors")
    return str(tmp_path / "victim.safetensors")


@contextmanager
def serving(*args: str) -> Iterator[tuple[str, str]]:
    """The server as a process of its own: its address, and all that it printed."""
    command = [sys.executable, "-m", "experiments", "serve", "--port=0", *args]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        printed = ""
        try:
            while "serving" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            found = re.search(r"https?://\S+:\d+", printed)
            assert found
            yield found[0], printed
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)


def test_keys_are_shown_once_and_an_attack_runs_with_them(
    victim: str, tmp_path: Path, lightning: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = str(tmp_path / "ledger")
    with serving("--config=knockoff_digits", "--weights", victim, "--ledger", ledger, "--budget=60") as (url, printed):
        assert url.startswith("http://127.0.0.1:")
        for variable in ("PHARMAKON_ORACLE_KEY", "PHARMAKON_EVALUATION_KEY"):
            found = re.search(rf"{variable}=(\S+)", printed)
            assert found
            monkeypatch.setenv(variable, found[1])
        door = ("--data.oracle=RemoteOracle", f"--data.oracle.url={url}")
        options = ("--data.budget=50", "--trainer.max_epochs=1", "--trainer.logger=false", *QUIET)
        outcome = lightning("fit", "--config=knockoff_digits", *door, *options)
        assert outcome.code == 0, outcome
        metrics = read_json(runs()[-1] / "metrics.json")
        assert metrics["facts"]["queries"] == 50
        assert "fidelity" in metrics["measures"]
    assert Ledger(ledger).account("attacker").queries == 50
    assert [key.role for key in Keys(f"{ledger}.keys").all()] == ["admin", "attacker", "evaluation"]
    assert dict(Budgets(Keys(f"{ledger}.keys"))) == {"attacker": 60}
    assert [key.rate for key in Keys(f"{ledger}.keys").all()] == [None, RATE, RATE]


FOREIGN = """
data:
  init_args:
    oracle:
      class_path: ForeignOracle
      init_args:
        victim:
          class_path: ForeignFunction
          init_args:
            function: tests.extraction.test_foreign.logits_of
            name: line 1
            num_classes: 10
            image_shape: [1, 8, 8]
            returns: logits
"""


def test_a_function_of_someone_elses_is_attacked_and_served_as_a_config_names_it(
    tmp_path: Path, lightning: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHARMAKON_CACHE", str(tmp_path / "cache"))
    config, ledger = tmp_path / "foreign.yaml", tmp_path / "ledger"
    config.write_text(FOREIGN)
    options = ("--data.budget=50", "--trainer.max_epochs=1", "--trainer.logger=false", *QUIET)
    outcome = lightning("fit", "--config=knockoff_digits", f"--config={config}", *options)
    assert outcome.code == 0, outcome
    metrics = read_json(runs()[-1] / "metrics.json")
    assert metrics["facts"]["queries"] == 50
    with serving(f"--config={config}", f"--ledger={ledger}") as (url, printed):
        found = re.search(r"PHARMAKON_ORACLE_KEY=(\S+)", printed)
        assert found
        headers = {"Authorization": f"Bearer {found[1]}", "X-Request-Id": "1"}
        answered = httpx.post(f"{url}/v1/answers", content=pack(images=IMAGES), headers=headers, trust_env=False)
    torch.testing.assert_close(unpack(answered.content)["values"], logits_of(IMAGES).softmax(1), atol=1e-6, rtol=1e-5)
    assert Ledger(ledger).account("attacker").queries == 3


def test_a_new_key_is_made_and_shown(victim: str, tmp_path: Path, lightning: Command) -> None:
    ledger = str(tmp_path / "ledger")
    made = ("serve", "--weights", victim, "--ledger", ledger, "--new-key")
    outcome = lightning(*made, "ann", "--budget=7", "--rate", "9", "--samples=5")
    assert outcome.code == 0
    keys = Keys(f"{ledger}.keys")
    assert keys.find(outcome.out.split()[-1]) == Key("ann", "attacker", 7, 9, 5)
    free = lightning(*made, "free", "--rate=any").out.split()[-1]
    assert keys.find(free) == Key("free", "attacker", None, None, None)
    keys.revoke("free")
    assert lightning(*made, "judge", "--role=evaluation").code == 0
    complaint(lightning(*made, "ann"), "name = 'ann'", "choose another")
    complaint(lightning(*made, "eve", "--role=king"), "role", "evaluation")
    complaint(lightning(*made, "eve", "--rate=0"), "rate = 0")
    assert [key.name for key in keys.all()] == ["ann", "judge"]


def test_keys_are_listed_and_revoked(victim: str, tmp_path: Path, lightning: Command) -> None:
    ledger = str(tmp_path / "ledger")
    served = ("serve", "--weights", victim, "--ledger", ledger)
    key = lightning(*served, "--new-key=ann", "--budget=7").out.split()[-1]
    assert lightning(*served, "--new-key=judge", "--role=evaluation", "--rate=9").code == 0
    outcome = lightning(*served, "--keys=all")
    assert outcome.code == 0
    assert "ann: attacker, budget 7, samples any number, queries a minute 60000\n" in outcome.out
    assert "judge: evaluation, budget any number, samples any number, queries a minute 9\n" in outcome.out
    assert key not in outcome.out
    complaint(lightning(*served, "--revoke=anne"), "name = 'anne'", "ann, judge")
    complaint(lightning(*served, "--keys=ann"), "keys = 'ann'", "all")
    complaint(lightning(*served, "--new-key=bob", "--revoke=ann"), "new-key, revoke", "one thing at a time")
    keys = Keys(f"{ledger}.keys")
    assert keys.find(key)
    assert lightning(*served, "--revoke", "ann").code == 0
    assert keys.find(key) is None
    assert [known.name for known in keys.all()] == ["judge"]
    again = lightning(*served, "--new-key=ann").out.split()[-1]
    assert again != key
    assert keys.find(key) is None


def test_a_running_server_refuses_a_key_from_when_it_is_revoked(
    victim: str, tmp_path: Path, lightning: Command
) -> None:
    served = ("--weights", victim, "--ledger", str(tmp_path / "ledger"))
    keys = {name: lightning("serve", *served, f"--new-key={name}").out.split()[-1] for name in ("ann", "bob")}
    with serving(*served) as (url, _):

        def ask(name: str) -> int:
            headers = {"Authorization": f"Bearer {keys[name]}", "X-Request-Id": uuid4().hex}
            content = pack(images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
            return httpx.post(f"{url}/v1/answers", content=content, headers=headers, trust_env=False).status_code

        assert ask("ann") == 200
        assert lightning("serve", *served, "--revoke=ann").code == 0
        assert ask("ann") == 401
        assert ask("bob") == 200
        keys["ann"] = lightning("serve", *served, "--new-key=ann").out.split()[-1]
        assert ask("ann") == 200
    assert Ledger(tmp_path / "ledger").account("ann").queries == 4, "the account goes on"


def test_other_machines_need_a_key_and_tls(victim: str, tmp_path: Path, lightning: Command) -> None:
    served = ("serve", "--weights", victim, "--ledger", str(tmp_path / "ledger"))
    for host in ("", "0.0.0.0", "::", "192.0.2.1", "example.org"):
        complaint(lightning(*served, "--host", host), f"host = '{host}'", "--new-key", "--certificate")
    paper = tmp_path / "paper"
    paper.write_text("no certificate")
    both = ("--certificate", str(paper), "--private-key", str(paper))
    complaint(lightning(*served, "--host=0.0.0.0", *both), "host")  # no key yet
    assert lightning(*served, "--new-key=ann").code == 0
    complaint(lightning(*served, "--host=0.0.0.0"), "host")  # no TLS
    complaint(lightning(*served, "--host=0.0.0.0", *both[:2]), "host")
    complaint(lightning(*served, *both[:2]), "certificate", "--private-key")
    complaint(lightning(*served, *both[:3], str(tmp_path / "nosuch")), "private-key")
    complaint(lightning(*served, "--port=0", *both), "certificate", "cannot be used")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made with openssl")
def test_over_tls(victim: str, tmp_path: Path, lightning: Command) -> None:
    certificate, private = str(tmp_path / "certificate"), str(tmp_path / "private")
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=oracle -keyout {private} -out {certificate}"
    subprocess.run([*make.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    ledger = ("--weights", victim, "--ledger", str(tmp_path / "ledger"))
    key = lightning("serve", *ledger, "--new-key=ann").out.split()[-1]
    tls = ("--certificate", certificate, "--private-key", private)
    with serving(*ledger, "--host=0.0.0.0", *tls) as (url, printed):
        assert "shown" not in printed  # there was a key, and none is made
        near = url.replace("0.0.0.0", "127.0.0.1")
        assert near.startswith("https://")
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "1"}
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx.Client(verify=trusted, trust_env=False) as web:
            found = web.post(f"{near}/v1/answers", content=pack(images=IMAGES), headers=headers)
        assert unpack(found.content)["values"].shape == (3, 10)
        with pytest.raises(httpx.ConnectError), httpx.Client(trust_env=False) as stranger:
            stranger.get(f"{near}/docs")


def test_complaints(victim: str, tmp_path: Path, lightning: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    served = ("serve", "--weights", victim, "--ledger", str(tmp_path / "ledger"))
    complaint(lightning("serve"), "weights", "lightning serve")
    complaint(lightning("serve", "--weights", "nosuch.safetensors"), "no such file")
    complaint(lightning(*served, "--prot=1"), "--prot", "--port")
    complaint(lightning(*served, "--port"), "a value is missing")
    complaint(lightning(*served, "--port=65536"), "port = 65536")
    complaint(lightning(*served, "--budget=many"), "budget = 'many'")
    complaint(lightning(*served, "--role=admin"), "--new-key")
    complaint(lightning(*served, "--config=nosuch"), "nosuch")
    complaint(lightning(*served, "--config=victim_digits"), "oracle")
    complaint(lightning("serve", "--weights", victim, "--ledger=nosuch/ledger"), "no such folder")
    for text, words in (
        ("oracle: {class_path: RemoteOracle}", ("class_path", "LocalOracle")),
        ("oracle: {class_path: LocalOracle, init_args: {mood: scores}}", ("mood", "mode")),
        ("oracle: {class_path: LocalOracle, init_args: {mode: scors}}", ("mode = 'scors'", "scores")),
    ):
        config = tmp_path / "oracle.yaml"
        config.write_text(text)
        complaint(lightning(*served, f"--config={config}"), *words)
    config.write_text(FOREIGN)
    complaint(lightning(*served, f"--config={config}"), "weights", "victim of its own")
    calling = "{class_path: os.system, init_args: {command: touch ran}}"
    config.write_text(FOREIGN.replace("tests.extraction.test_foreign.logits_of", calling))
    complaint(lightning("serve", f"--config={config}"), "'os.system'", "is no class")
    assert not Path("ran").exists()
    config.write_text(FOREIGN.replace("logits_of", "no_such"))
    complaint(lightning("serve", f"--config={config}"), "no_such")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        complaint(lightning(*served, f"--port={taken.getsockname()[1]}"), "port", "choose another")
    (tmp_path / "ledger").write_text("something else entirely")
    complaint(lightning(*served, "--port=0"), "ledger", "not a ledger")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    complaint(lightning(*served), "uvicorn", "pharmakon[serve]")
