"""The ledger: what each client asked, what it cost, and where its budget ends.

Charging is one transaction under an id of the request: a request that is sent again – after a crash, or because its
answer was lost on the way – is answered again and not charged again. A request that does not fit into what is left of
the budget is refused whole, and changes nothing. SQLite gives both to any number of threads and processes.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import InputError, bad

_TABLES = """
CREATE TABLE IF NOT EXISTS charges (
    client TEXT NOT NULL, request TEXT NOT NULL, content TEXT NOT NULL,
    first INTEGER NOT NULL, queries INTEGER NOT NULL,
    PRIMARY KEY (client, request)
);
CREATE TABLE IF NOT EXISTS samples (client TEXT NOT NULL, sample BLOB NOT NULL, PRIMARY KEY (client, sample));
"""


class BudgetError(InputError):
    """A request that is larger than what is left of a budget."""


class Account(NamedTuple):
    """How a client stands.

    Attributes:
        queries: Images asked about, repeats counted.
        samples: Different images asked about.
        requests: Requests charged.
        cost: Queries at the price, in its currency.
    """

    queries: int
    samples: int
    requests: int
    cost: float


class Ledger:
    """Charges of all clients of one oracle.

    Args:
        path: A SQLite file, made if missing; its folder must exist.
        budget: The most queries of a client; None: no limit.
        samples: The most different images of a client; None: no limit.
        price: Of a thousand queries.

    Raises:
        InputError: If a number is below 0, or the file is no ledger.
    """

    def __init__(
        self, path: str | Path, budget: int | None = None, samples: int | None = None, price: float = 1.0
    ) -> None:
        for name, value in (("budget", budget), ("samples", samples), ("price", price)):
            if value is not None and value < 0:
                raise bad(name, value, "it must be 0 or more")
        self.path, self.budget, self.samples, self.price = Path(path), budget, samples, price
        try:
            with self._open() as connection:
                connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise bad("ledger", str(path), f"not a ledger ({error}); give another file") from error

    def charge(self, client: str, request: str, contents: list[bytes]) -> int:
        """Charge a request, once.

        Args:
            client: Who asks.
            request: The request's id: the same id is the same request.
            contents: A digest of each image, in order; repeats count as queries and not as samples.

        Returns:
            The number, from 0, of its first query among this client's: what a noisy defence draws by.

        Raises:
            BudgetError: If it does not fit into the budget; nothing is charged.
            InputError: If the id was used for other images.
        """
        whole = hashlib.sha256(b"".join(contents)).hexdigest()
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute(
                "SELECT content, first FROM charges WHERE client = ? AND request = ?", (client, request)
            ).fetchone()
            if known is not None:
                if known[0] != whole:
                    raise bad("request", request, "this id was used for other images; give each request its own")
                return int(known[1])
            spent = self._queries(connection, client)
            self._refuse("budget", "queries", self.budget, spent, len(contents))
            before = self._samples(connection, client)
            connection.executemany(
                "INSERT OR IGNORE INTO samples VALUES (?, ?)", ((client, content) for content in contents)
            )
            self._refuse("samples", "samples", self.samples, before, self._samples(connection, client) - before)
            connection.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?)",
                               (client, request, whole, spent, len(contents)))  # fmt: skip
            return spent

    def account(self, client: str) -> Account:
        """How a client stands; all zero for one that never asked."""
        with self._open() as connection:
            queries, samples = self._queries(connection, client), self._samples(connection, client)
            (requests,) = connection.execute("SELECT COUNT(*) FROM charges WHERE client = ?", (client,)).fetchone()
        return Account(queries, samples, int(requests), queries * self.price / 1000)

    def left(self, client: str) -> int | None:
        """Queries that a client may still ask; None: any number."""
        return None if self.budget is None else self.budget - self.account(client).queries

    @staticmethod
    def _refuse(field: str, what: str, most: int | None, spent: int, more: int) -> None:
        if most is not None and spent + more > most:
            raise BudgetError(
                f"{field} = {most}: {spent} {what} are spent and {more} more were asked for; "
                f"ask for {max(0, most - spent)} or fewer, or raise {field}"
            )

    @staticmethod
    def _queries(connection: sqlite3.Connection, client: str) -> int:
        row = connection.execute("SELECT COALESCE(SUM(queries), 0) FROM charges WHERE client = ?", (client,)).fetchone()
        return int(row[0])

    @staticmethod
    def _samples(connection: sqlite3.Connection, client: str) -> int:
        return int(connection.execute("SELECT COUNT(*) FROM samples WHERE client = ?", (client,)).fetchone()[0])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection whose transaction is committed at the end, or undone by an exception; safe after a kill."""
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            if connection.in_transaction:
                connection.execute("COMMIT")
