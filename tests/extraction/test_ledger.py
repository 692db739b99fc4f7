"""Charging: once, whole or not at all, by any number of processes, over a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.errors import InputError
from extraction.ledger import Account, BudgetError, Ledger
from tests.helpers import refused


def images(*names: int) -> list[bytes]:
    return [bytes([name]) * 32 for name in names]


def test_queries_count_repeats_and_samples_do_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", price=2.0)
    assert ledger.charge("a", "1", images(1, 2, 1)) == 0
    assert ledger.charge("a", "2", images(2, 3)) == 3
    assert ledger.charge("b", "1", images(9)) == 0
    assert ledger.account("a") == Account(queries=5, samples=3, requests=2, cost=0.01)
    assert ledger.account("nobody") == Account(0, 0, 0, 0.0)
    assert ledger.left("a") is None


def test_the_same_request_is_charged_once_and_has_the_same_number(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", budget=4)
    ledger.charge("a", "0", images(7))
    assert [ledger.charge("a", "1", images(1, 2, 3)) for _ in range(3)] == [1, 1, 1]
    assert Ledger(tmp_path / "l", budget=4).charge("a", "1", images(1, 2, 3)) == 1  # by another process, later
    assert ledger.account("a").queries == 4
    with refused("request = '1'", "other images"):
        ledger.charge("a", "1", images(1, 2, 4))


def test_a_request_beyond_the_budget_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", budget=3, samples=2)
    ledger.charge("a", "1", images(1, 1))
    with pytest.raises(BudgetError, match="2 queries are spent and 2 more were asked for; ask for 1 or fewer"):
        ledger.charge("a", "2", images(1, 1))
    assert ledger.account("a") == Account(2, 1, 1, 0.002)
    assert ledger.left("a") == 1
    other = Ledger(tmp_path / "l", samples=2)
    with pytest.raises(BudgetError, match="1 samples are spent and 2 more"):
        other.charge("a", "3", images(2, 3))
    assert other.account("a") == Account(2, 1, 1, 0.002)  # the samples of the refused request are not kept
    assert other.charge("a", "4", images(1, 2)) == 2


def test_many_clients_at_once_never_overspend(tmp_path: Path) -> None:
    Ledger(tmp_path / "l")

    def ask(number: int) -> bool:
        try:
            Ledger(tmp_path / "l", budget=50).charge("a", str(number), images(number % 250, 1, 2))
        except BudgetError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        granted = sum(pool.map(ask, range(60)))
    assert granted == 16
    assert Ledger(tmp_path / "l").account("a").queries == 48


def test_a_kill_in_the_middle_of_a_charge_leaves_no_trace(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.charge("a", "1", images(1))
    code = (
        "import os, signal, sys; from extraction.ledger import Ledger\n"
        "l = Ledger(sys.argv[1], samples=100)\n"
        "l._refuse = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if a[0] == 'samples' else None\n"
        "l.charge('a', '2', [b'x' * 32])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ledger.path)], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert ledger.account("a") == Account(1, 1, 1, 0.001)
    assert ledger.charge("a", "2", images(5)) == 1


VERSION_2 = """
CREATE TABLE requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    client TEXT NOT NULL, request TEXT NOT NULL, content TEXT NOT NULL,
    first INTEGER NOT NULL, queries INTEGER NOT NULL, cost REAL NOT NULL, at REAL NOT NULL,
    answer BLOB, digest TEXT, seen BLOB,
    UNIQUE (client, request)
);
CREATE TABLE samples (client TEXT NOT NULL, sample BLOB NOT NULL, PRIMARY KEY (client, sample));
CREATE TABLE flags (client TEXT PRIMARY KEY, at INTEGER NOT NULL);
INSERT INTO requests VALUES (1, 'a', '1', '', 0, 3, 0.003, 0, NULL, NULL, NULL);
INSERT INTO requests VALUES (2, 'a', '2', '', 3, 2, 0.002, 0, NULL, NULL, NULL);
INSERT INTO requests VALUES (3, 'b', '1', '', 0, 1, 0.001, 0, NULL, NULL, NULL);
INSERT INTO samples VALUES ('a', x'01'), ('a', x'02'), ('b', x'01');
PRAGMA user_version = 2;
"""


def test_a_file_without_totals_gets_them(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "l")) as connection:
        connection.executescript(VERSION_2)
    for _ in range(2):
        ledger = Ledger(tmp_path / "l", budget=7)
        assert ledger.account("a") == Account(5, 2, 2, pytest.approx(0.005))
        assert ledger.account("b") == Account(1, 1, 1, 0.001)
    assert ledger.charge("a", "3", images(1, 1)) == 5
    assert ledger.account("a")[:3] == (7, 3, 3)
    assert (tmp_path / "l").stat().st_mode & 0o077 == 0
    with closing(sqlite3.connect(tmp_path / "old")) as connection:
        connection.executescript(VERSION_2.replace("user_version = 2", "user_version = 1"))
    with refused("ledger", "version 1 and not 3", "another file"):
        Ledger(tmp_path / "old")


def test_only_its_owner_reads_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    with ledger.request("a", "1", images(1)) as entry:
        entry.answer = b"answer"
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"l": 0o600, "l-journal": 0o600}


def test_a_charge_costs_the_same_after_many(tmp_path: Path) -> None:
    """By the work that SQLite does, which no busy machine changes."""
    ledger = Ledger(tmp_path / "l", budget=10**9, samples=10**9)

    def steps(request: str) -> int:
        done = 0

        def count() -> int:
            nonlocal done
            done += 1
            return 0

        plain = sqlite3.connect

        def counted(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = plain(*args, **kwargs)
            connection.set_progress_handler(count, 1)
            return connection

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite3, "connect", counted)
            with ledger.request("a", request, images(1, 2, 3)) as entry:
                list(entry.watched(entry.number - 1))
                ledger_since = ledger.since("a", time.time() + 60)
        assert ledger_since == 0
        return done

    steps("first")
    few = steps("early")
    with closing(sqlite3.connect(tmp_path / "l")) as connection, connection:
        connection.executemany(
            "INSERT INTO requests (client, request, content, first, queries, cost, at, seen) "
            "VALUES ('a', ?, '', 0, 1, 0, 0, x'00')",
            ((f"r{number}",) for number in range(3000)),
        )
        connection.executemany(
            "INSERT INTO samples VALUES ('a', ?)", ((number.to_bytes(32, "big"),) for number in range(3000))
        )
    assert steps("late") <= few + 20


def test_what_is_refused(tmp_path: Path) -> None:
    with refused("budget = -1"):
        Ledger(tmp_path / "l", budget=-1)
    (tmp_path / "text").write_text("no database, but long enough to be taken for one " * 40)
    with refused("ledger = ", "not a ledger"):
        Ledger(tmp_path / "text")


def test_damaged_pages_are_one_line(tmp_path: Path) -> None:
    """Flips of a few bits anywhere: every call gives what was written, or one line that names the file."""
    whole = Ledger(tmp_path / "whole", budget=1000)
    for number in range(40):
        contents = [bytes([number, part]) * 16 for part in range(3)]
        with whole.request(f"client {number % 3}", f"request {number}", contents) as entry:
            entry.answer, entry.seen, entry.state = bytes(range(200)), bytes(50), {"a": 1}
            entry.flagged = number == 7
    data, draw = (tmp_path / "whole").read_bytes(), np.random.default_rng(0)
    said: list[str] = []
    for number in range(80):
        path, damaged = tmp_path / f"{number}", bytearray(data)
        places = draw.integers(0, len(data), 8) if number % 2 else draw.integers(0, 2048, 2)  # the tables, at the front
        for place in places:
            damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        try:
            use(Ledger(path, budget=1000))
        except InputError as error:
            said.append(str(error))
    assert len(said) > 10
    assert all("ledger = " in text or "request = " in text for text in said), said
    assert not any("\n" in text for text in said)


def use(ledger: Ledger) -> None:
    for client in ledger.clients():
        ledger.account(client)
        ledger.left(client)
        ledger.flagged_at(client)
        ledger.state(client)
        ledger.since(client, 0.0)
    with ledger.request("client 0", "request 0", [bytes([0, part]) * 16 for part in range(3)]) as entry:
        assert entry.answer in (bytes(range(200)), None), "as it was written, or a request that is not known"
    ledger.charge("client 1", "a new one", [b"another image"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "may not write"),
        (sqlite3.OperationalError("unable to open database file"), "may not write"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "may not write"),
        (sqlite3.OperationalError("database or disk is full"), "free space"),
        (sqlite3.DatabaseError("file is not a database"), "not a ledger"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_apart(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("extraction.ledger.sqlite3.connect", fail)
    with refused("ledger", str(tmp_path / "x"), words):
        Ledger(tmp_path / "x")
