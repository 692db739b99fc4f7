"""The ledger: what each client asked, what it was answered, what that cost, and where its budget ends.

Charging, answering and watching are one transaction under the request's id: a request that is sent again – after a
crash, or because its answer was lost on the way – gets the same answer and is not charged again. A request that does
not fit into what is left of a budget is refused whole, and changes nothing. SQLite gives this to any number of threads
and processes; a transaction that a kill cuts off never was.

Each client has a row of running totals, so that a charge costs as much after a million requests as after one. The file
has clients' images in it, and their owner alone may read it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import InputError, bad
from datamodules.files import full_path

State = Mapping[str, float | int | str | None]
"""What a detector has to say of a client: numbers by name."""

_VERSION = 3
_TABLES = """
CREATE TABLE IF NOT EXISTS clients (
    client TEXT PRIMARY KEY, queries INTEGER NOT NULL, samples INTEGER NOT NULL, requests INTEGER NOT NULL,
    cost REAL NOT NULL, state TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    client TEXT NOT NULL, request TEXT NOT NULL, content TEXT NOT NULL,
    first INTEGER NOT NULL, queries INTEGER NOT NULL, cost REAL NOT NULL, at REAL NOT NULL,
    answer BLOB, digest TEXT, seen BLOB,
    UNIQUE (client, request)
);
CREATE INDEX IF NOT EXISTS moments ON requests (client, at);
CREATE INDEX IF NOT EXISTS watched ON requests (client, number) WHERE seen IS NOT NULL;
CREATE TABLE IF NOT EXISTS samples (
    client TEXT NOT NULL, sample BLOB NOT NULL, PRIMARY KEY (client, sample)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS flags (client TEXT PRIMARY KEY, at INTEGER NOT NULL);
"""
_FROM_2 = """
INSERT INTO clients SELECT client, SUM(queries), 0, COUNT(*), SUM(cost), NULL FROM requests GROUP BY client;
UPDATE clients SET samples = (SELECT COUNT(*) FROM samples WHERE samples.client = clients.client);
"""
"""The totals of a file that had none; its table of samples stays as it is."""


class BudgetError(InputError):
    """A request that is larger than what is left of a budget."""


class Account(NamedTuple):
    """How a client stands.

    Attributes:
        queries: Images asked about, repeats counted.
        samples: Different images asked about.
        requests: Requests charged.
        cost: Of the queries, at the prices when they were asked, in their currency.
    """

    queries: int
    samples: int
    requests: int
    cost: float


class Seen(NamedTuple):
    """A request that a detector is to look at.

    Attributes:
        number: Its place among all requests; later ones have higher ones.
        content: What was kept of it.
    """

    number: int
    content: bytes


class Entry:
    """A request while it is being worked on, inside the ledger's transaction.

    Attributes:
        number: Its place among all requests; later ones have higher ones.
        first: The number, from 0, of its first query among this client's: what a noisy defence draws by.
        answer: The answer; None until there is one. Set it, and it is kept with the charge.
        seen: What a detector will need of it after a restart; None: nothing.
        flagged: Whether the client is flagged. Set it, and it stays so, even if the request is refused.
        state: What a detector says of the client now; None: nothing new. Set it, and it is kept, too.
    """

    def __init__(
        self, connection: sqlite3.Connection, client: str, number: int, first: int, answer: bytes | None
    ) -> None:
        self._connection, self._client = connection, client
        self.number, self.first, self.answer = number, first, answer
        self.seen: bytes | None = None
        self.state: State | None = None
        (count,) = connection.execute("SELECT COUNT(*) FROM flags WHERE client = ?", (client,)).fetchone()
        self.flagged = bool(count)

    def watched(self, after: int) -> Iterator[Seen]:
        """What detectors have kept of this client's requests with higher numbers than `after`, in order."""
        rows = self._connection.execute(
            "SELECT number, seen FROM requests WHERE client = ? AND number > ? AND seen IS NOT NULL ORDER BY number",
            (self._client, after),
        )
        for number, seen in rows:
            yield Seen(int(number), bytes(seen) if isinstance(seen, bytes) else b"")


class Refused(InputError):
    """Raised inside a transaction: the request is not charged, but a flag stays."""


class Ledger:
    """Requests of all clients of one oracle.

    Args:
        path: A SQLite file, made if missing; its folder must exist.
        budget: The most queries of a client; None: no limit.
        samples: The most different images of a client; None: no limit.
        price: Of a thousand queries.

    Raises:
        InputError: If a number is below 0, or the file is no ledger, or one of another version.
    """

    def __init__(
        self, path: str | Path, budget: int | None = None, samples: int | None = None, price: float = 1.0
    ) -> None:
        for name, value in (("budget", budget), ("samples", samples), ("price", price)):
            if value is not None and value < 0:
                raise bad(name, value, "it must be 0 or more")
        self.path, self.budget, self.samples, self.price = full_path(path), budget, samples, price
        self.limits: Mapping[str, int] = {}
        """Budgets of clients that have one of their own."""
        self.sample_limits: Mapping[str, int] = {}
        """The most different images of clients that have a limit of their own."""
        try:
            self.path.touch(mode=0o600)  # SQLite's own files beside it get its mode
            with self._open() as connection:
                connection.execute("BEGIN IMMEDIATE")  # one process makes the tables, the others find them
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
                if version not in (2, _VERSION) and tables:
                    raise bad("ledger", str(path), f"it is of version {version} and not {_VERSION}; give another file")
                for statement in (_TABLES + (_FROM_2 if version == 2 else "")).split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            if version == 2:
                with suppress(PermissionError):  # it may be another user's
                    self.path.chmod(0o600)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    @contextmanager
    def request(self, client: str, request: str, contents: list[bytes]) -> Iterator[Entry]:
        """One request: charged, worked on inside the `with`, and kept with its answer at the end of it.

        Args:
            client: Who asks.
            request: The request's id: the same id is the same request.
            contents: A digest of each image, in order; repeats count as queries and not as samples.

        Yields:
            The entry. Where its answer is there already, the request was charged before. An exception undoes all,
            but for the flag if it is `Refused`.

        Raises:
            BudgetError: If it does not fit into the budget; nothing is charged.
            InputError: If the id was used for other images, or the answer that was kept is damaged.
        """
        whole = hashlib.sha256(b"".join(contents)).hexdigest()
        refused: Refused | None = None
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            entry, fresh = self._enter(connection, client, request, whole, contents)
            try:
                yield entry
            except Refused as error:
                connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                refused = error
            if entry.flagged:
                connection.execute("INSERT OR IGNORE INTO flags VALUES (?, ?)", (client, entry.first))
            if entry.state is not None:
                self._add(connection, client, state=json.dumps(dict(entry.state)))
            if refused is None and fresh:
                digest = None if entry.answer is None else hashlib.sha256(entry.answer).hexdigest()
                connection.execute(
                    "UPDATE requests SET answer = ?, digest = ?, seen = ? WHERE client = ? AND request = ?",
                    (entry.answer, digest, entry.seen, client, request),
                )
        if refused is not None:
            raise refused

    def charge(self, client: str, request: str, contents: list[bytes]) -> int:
        """Charge a request, once, without an answer; see `request`.

        Returns:
            The number, from 0, of its first query among this client's.
        """
        with self.request(client, request, contents) as entry:
            return entry.first

    def account(self, client: str) -> Account:
        """How a client stands; all zero for one that never asked."""
        with self._open() as connection:
            return self._account(connection, client)

    def left(self, client: str) -> int | None:
        """Queries that a client may still ask; None: any number."""
        most = self._budget(client)
        return None if most is None else max(0, most - self.account(client).queries)

    def samples_left(self, client: str) -> int | None:
        """Different images that a client may still ask about; None: any number."""
        most = self._most_samples(client)
        return None if most is None else max(0, most - self.account(client).samples)

    def clients(self) -> list[str]:
        """All that ever asked, or were flagged, in alphabetical order."""
        with self._open() as connection:
            rows = connection.execute("SELECT client FROM clients UNION SELECT client FROM flags ORDER BY 1")
            return [str(row[0]) for row in rows]

    def flagged_at(self, client: str) -> int | None:
        """How many queries a client had been charged before the request that had it flagged; None: it is not."""
        with self._open() as connection:
            row = connection.execute("SELECT at FROM flags WHERE client = ?", (client,)).fetchone()
        return None if row is None else self._number(row[0])

    def state(self, client: str) -> State:
        """What a detector said of a client, whichever process it was in; empty where none has seen it."""
        with self._open() as connection:
            row = connection.execute("SELECT state FROM clients WHERE client = ?", (client,)).fetchone()
        if row is None or row[0] is None:
            return {}
        try:
            found: State = dict(json.loads(row[0]))
        except (TypeError, ValueError) as error:
            raise self._unusable(error) from error
        return found

    def answered(self, client: str, request: str) -> bool:
        """Whether a request was charged before, so that it is answered again for nothing."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT 1 FROM requests WHERE client = ? AND request = ?", (client, request)
            ).fetchone()
        return row is not None

    def since(self, client: str, moment: float) -> int:
        """Queries charged to a client since a moment, in seconds since 1970: what a rate limit counts."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT COALESCE(SUM(queries), 0) FROM requests WHERE client = ? AND at >= ?", (client, moment)
            ).fetchone()
        return self._number(row[0])

    def _budget(self, client: str) -> int | None:
        return self.limits.get(client, self.budget)

    def _most_samples(self, client: str) -> int | None:
        return self.sample_limits.get(client, self.samples)

    def _enter(
        self, connection: sqlite3.Connection, client: str, request: str, whole: str, contents: list[bytes]
    ) -> tuple[Entry, bool]:
        """The entry, and whether it is a new one, which is charged."""
        known = connection.execute(
            "SELECT number, content, first, answer, digest FROM requests WHERE client = ? AND request = ?",
            (client, request),
        ).fetchone()
        if known is not None:
            number, content, first, answer, digest = known
            if content != whole:
                raise bad("request", request, "this id was used for other images; give each request its own")
            if answer is not None and (not isinstance(answer, bytes) or hashlib.sha256(answer).hexdigest() != digest):
                raise bad("ledger", str(self.path), f"the answer to {request!r} is damaged; delete the file")
            return Entry(connection, client, self._number(number), self._number(first), answer), False
        account = self._account(connection, client)
        spent = account.queries
        self._refuse("budget", "queries", self._budget(client), spent, len(contents))
        before = connection.total_changes
        connection.executemany(
            "INSERT OR IGNORE INTO samples VALUES (?, ?)", ((client, content) for content in contents)
        )
        new = connection.total_changes - before
        self._refuse("samples", "samples", self._most_samples(client), account.samples, new)
        cost = len(contents) * self.price / 1000
        self._add(connection, client, len(contents), new, 1, cost)
        cursor = connection.execute(
            "INSERT INTO requests (client, request, content, first, queries, cost, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (client, request, whole, spent, len(contents), cost, time.time()),
        )
        return Entry(connection, client, int(cursor.lastrowid or 0), spent, None), True

    @staticmethod
    def _refuse(field: str, what: str, most: int | None, spent: int, more: int) -> None:
        if most is not None and spent + more > most:
            raise BudgetError(
                f"{field} = {most}: {spent} {what} are spent and {more} more were asked for; "
                f"ask for {max(0, most - spent)} or fewer, or raise {field}"
            )

    def _account(self, connection: sqlite3.Connection, client: str) -> Account:
        row = connection.execute(
            "SELECT queries, samples, requests, cost FROM clients WHERE client = ?", (client,)
        ).fetchone()
        if row is None:
            return Account(0, 0, 0, 0.0)
        if not isinstance(row[3], float):
            raise self._unusable(ValueError(f"{row[3]!r:.40} where a cost was written"))
        queries, samples, requests = map(self._number, row[:3])
        return Account(queries, samples, requests, row[3])

    @staticmethod
    def _add(
        connection: sqlite3.Connection,
        client: str,
        queries: int = 0,
        samples: int = 0,
        requests: int = 0,
        cost: float = 0.0,
        state: str | None = None,
    ) -> None:
        """Add to a client's totals; a state replaces the one before."""
        connection.execute(
            "INSERT INTO clients VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (client) DO UPDATE SET "
            "queries = queries + excluded.queries, samples = samples + excluded.samples, "
            "requests = requests + excluded.requests, cost = cost + excluded.cost, "
            "state = COALESCE(excluded.state, state)",
            (client, queries, samples, requests, cost, state),
        )

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Tell of a file that SQLite cannot use, and of one whose content is not what was written, in one line."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> InputError:
        text = str(error)
        if isinstance(error, PermissionError) or "unable to open" in text or "readonly" in text:
            return bad("ledger", str(self.path), f"this user may not write to it or to its folder ({error})")
        if "full" in text:
            return bad("ledger", str(self.path), f"the disk is full ({error}); free space")
        return bad("ledger", str(self.path), f"not a ledger, or a damaged one ({error}); give another file")

    def _number(self, value: object) -> int:
        """A whole number that was written as one; SQLite hands on whatever a damaged page holds."""
        if not isinstance(value, int):
            raise self._unusable(ValueError(f"{value!r:.40} where a number was written"))
        return value

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection whose transaction is committed at the end, or undone by an exception; safe after a kill."""
        # a transaction takes as long as the model does: others wait for it, an hour if need be
        with (
            self._sound(),
            closing(sqlite3.connect(self.path, timeout=3600, isolation_level=None)) as connection,
        ):
            connection.execute("PRAGMA synchronous = FULL")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    with suppress(sqlite3.DatabaseError):
                        connection.execute("ROLLBACK")
                raise
            if connection.in_transaction:
                connection.execute("COMMIT")
