"""API keys: who may ask a server, as what, how much and how fast.

A key is 256 random bits. It is shown once, when it is made; the file has its SHA-256. No slow hash is needed: there is
nothing to guess as there is in a password.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import full_path

ROLES = ("attacker", "evaluation", "admin")
"""Who asks for money; who measures fidelity, undefended and without a budget; who looks at the status page."""

RATE = 60_000
"""Queries in a minute that `lightning serve` gives a key for which nobody names a rate."""

_TABLE = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, role TEXT NOT NULL, budget INTEGER, rate INTEGER,
    samples INTEGER
)
"""
_COLUMNS = "name, role, budget, rate, samples"


class Key(NamedTuple):
    """What is known of a key: all but the key.

    Attributes:
        name: Its owner's, and the client's in the ledger.
        role: One of `ROLES`.
        budget: The most queries; None: no limit.
        rate: The most queries in a minute; None: no limit.
        samples: The most different images; None: no limit.
    """

    name: str
    role: str
    budget: int | None
    rate: int | None
    samples: int | None = None


class Keys:
    """The keys of one server, in a SQLite file that only its owner can read.

    Args:
        path: Of the file, made if missing; its folder must exist.

    Raises:
        InputError: If the file is something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = full_path(path)
        try:
            self.path.touch(mode=0o600)
            with self._open() as connection:
                connection.execute(_TABLE)
                if "samples" not in {row[1] for row in connection.execute("PRAGMA table_info(keys)")}:
                    connection.execute("ALTER TABLE keys ADD COLUMN samples INTEGER")  # an older file
        except (OSError, sqlite3.DatabaseError) as error:
            raise bad("keys", str(path), f"not a file of keys ({error}); give another ledger") from error

    def create(
        self,
        name: str,
        role: str = "attacker",
        budget: int | None = None,
        rate: int | None = None,
        samples: int | None = None,
    ) -> str:
        """Make a key.

        Args:
            name: Of its owner: letters, digits, ``.``, ``_`` and ``-``.
            role: One of `ROLES`.
            budget: The most queries; None: no limit. Only an attacker has one.
            rate: The most queries in a minute; None: no limit.
            samples: The most different images; None: no limit. Only an attacker has one.

        Returns:
            The key, which is not to be had again.

        Raises:
            InputError: If a value is wrong, or the name is taken.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
            raise bad("name", name, "take 1 to 64 letters, digits, '.', '_' and '-'")
        if role not in ROLES:
            raise bad("role", role, f"choose one of {', '.join(ROLES)}{did_you_mean(role, ROLES)}")
        for field, value in (("budget", budget), ("samples", samples)):
            if value is not None and value < 0:
                raise bad(field, value, "it must be 0 or more")
            if value is not None and role != "attacker":
                raise bad(field, value, f"a key for {role} has none; leave it out")
        if rate is not None and rate < 1:
            raise bad("rate", rate, "it must be 1 or more queries in a minute")
        key = secrets.token_urlsafe(32)
        try:
            with self._open() as connection:
                connection.execute(
                    "INSERT INTO keys (name, digest, role, budget, rate, samples) VALUES (?, ?, ?, ?, ?, ?)",
                    (name, _digest(key), role, budget, rate, samples),
                )
        except sqlite3.IntegrityError as error:
            raise bad("name", name, "there is a key of this name; choose another") from error
        return key

    def find(self, key: str) -> Key | None:
        """Whose key this is; None: nobody's."""
        digest, found = _digest(key), None
        with self._open() as connection:
            for row in connection.execute(f"SELECT digest, {_COLUMNS} FROM keys"):
                if hmac.compare_digest(row[0], digest):  # all are looked at, each in the same time
                    found = Key(*row[1:])
        return found

    def all(self) -> list[Key]:
        """All, by name."""
        with self._open() as connection:
            return [Key(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY name")]

    def revoke(self, name: str) -> None:
        """Let nobody in with this key, from the next request on.

        The ledger keeps the account: a new key of the same name goes on with it, so a lost key is replaced without its
        budget being filled again.

        Raises:
            InputError: If there is no key of this name.
        """
        with self._open() as connection:
            if not connection.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
                names = [row[0] for row in connection.execute("SELECT name FROM keys ORDER BY name")]
                known = ", ".join(names) or "none"
                raise bad("name", name, f"there is no such key; there are: {known}{did_you_mean(name, names)}")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
            yield connection


class Budgets(Mapping[str, int]):
    """Name → budget, of the keys that have one, as the file has it at each look: a ledger's `limits`.

    A key may be made by another process while a server runs.

    Args:
        keys: Whose.
        field: ``budget`` or ``samples``, a ledger's `sample_limits`.
    """

    def __init__(self, keys: Keys, field: str = "budget") -> None:
        self._keys, self._field = keys, field

    def __getitem__(self, name: str) -> int:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> dict[str, int]:
        found = {key.name: getattr(key, self._field) for key in self._keys.all()}
        return {name: most for name, most in found.items() if most is not None}


def check_key(text: str, variable: str) -> str:
    """A key as it came from the environment.

    Raises:
        InputError: If it is none; the message does not show it.
    """
    if not re.fullmatch(r"[\w-]{20,200}", text, re.ASCII):
        raise InputError(f"{variable}: it holds no key; set it to one that lightning serve has shown")
    return text


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
