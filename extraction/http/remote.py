"""`RemoteOracle`: a victim behind a network, asked over HTTP; `lightning serve` is the other side.

Each run has a ledger of its own here, too, with its budget and what was answered. The server charges the key, whichever
runs share it. A request is sent under an id made of the run's name and its own: one whose answer was lost on the way,
or that a crash cut off, is sent again under the same id, and answered again for free.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import torch
from torch import Tensor

from datamodules.errors import InputError, bad
from datamodules.imageset import fingerprint
from datamodules.measures import answered
from extraction.answers import Answers, check_mode, pack, unpack
from extraction.http.keys import check_key
from extraction.ledger import Account, BudgetError, Ledger
from extraction.oracle import Oracle, ledgers_folder
from extraction.service import FlaggedError

if TYPE_CHECKING:
    import httpx

_ABOUT = ("shape", "dtype", "mode", "k", "num_classes", "identity", "price", "images")

_WAITS = 100
"""So often a request waits for the rate limit, which is never longer than a minute."""


class RemoteOracle(Oracle):
    """A victim behind HTTP. Keys come from the environment, and never from a config.

    Args:
        url: Of the server, such as ``http://127.0.0.1:8000``; over a network it is https.
        key_variable: The environment variable that holds the attacker's key.
        evaluation_key_variable: The one that holds the key that fidelity is measured with; where it is not set,
            fidelity is not measured.
        mode: What the server answers, see `Oracle`; it must be what it says.
        k: See `Oracle`.
        timeout: Seconds that an answer may take.
        retries: How often a request is sent again after a lost connection, after 0.5, 1, 2, … seconds.

    Raises:
        InputError: If a value is wrong.
    """

    version = 1

    def __init__(
        self,
        url: str,
        key_variable: str = "PHARMAKON_ORACLE_KEY",
        evaluation_key_variable: str = "PHARMAKON_EVALUATION_KEY",
        mode: str = "scores",
        k: int | None = None,
        timeout: float = 600.0,
        retries: int = 5,
    ) -> None:
        super().__init__(mode, k)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise bad("url", url, "give one such as http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise InputError(f"url: leave the password out; the key belongs into {key_variable}")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise bad("url", url, "a key is not sent over a network in the clear; use https")
        if not timeout > 0:
            raise bad("timeout", timeout, "it must be above 0")
        if retries < 0:
            raise bad("retries", retries, "it must be 0 or more")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.key_variable, self.evaluation_key_variable = key_variable, evaluation_key_variable
        self._described: dict[str, Any] | None = None

    @classmethod
    def as_served(cls, url: str) -> tuple[RemoteOracle, int, tuple[int, int, int]]:
        """A server's oracle in whichever mode it answers, its number of classes, and the shape of its images."""
        about = cls(url)._line("PHARMAKON_ORACLE_KEY").get("/v1/oracle", _ABOUT)
        channels, height, width = about["shape"]
        return cls(url, mode=about["mode"], k=about["k"]), int(about["num_classes"]), (channels, height, width)

    def identity(self) -> str:
        """Of the server's victim, defence and detector, as it tells, and the mode."""
        return fingerprint("remote", self.version, str(self._about["identity"]), self.mode, self.k)

    def check(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """See that the server's victim is for such data, and answers as expected."""
        about = self._about
        if about["dtype"] != "uint8" or [about["num_classes"], *about["shape"]] != [num_classes, *image_shape]:
            shape = "×".join(map(str, about["shape"]))
            made = f"{about['num_classes']} classes and {about['dtype']} inputs of {shape}"
            raise bad("url", self.url, f"this victim is for {made}; choose one for these data")
        check_mode(self.mode, self.k, num_classes)

    def client(self, name: str, budget: int | None = None, samples: int | None = None) -> RemoteClient:
        """Someone who asks under the attacker's key."""
        path = ledgers_folder() / f"remote-{fingerprint(self.identity(), name)}.sqlite"
        ledger = Ledger(path, budget, samples, float(self._about["price"]))
        return RemoteClient(self._line(self.key_variable), ledger, name, int(self._about["images"]))

    def cost(self, queries: int) -> float:
        """What so many queries cost, at the server's price."""
        return queries * float(self._about["price"]) / 1000

    def evaluator(self) -> RemoteClient | None:
        """Whoever measures fidelity, under the key for it; None: there is none."""
        if not os.environ.get(self.evaluation_key_variable):
            return None
        ledger = Ledger(ledgers_folder() / f"evaluation-{self.identity()}.sqlite")
        line = self._line(self.evaluation_key_variable)
        return RemoteClient(line, ledger, "evaluation", int(self._about["images"]))

    @property
    def _about(self) -> dict[str, Any]:
        if self._described is None:
            about = self._line(self.key_variable).get("/v1/oracle", _ABOUT)
            wrong = self.mode != about["mode"] or (self.mode == "top_k" and self.k != about["k"])
            if wrong:
                k = f", k = {about['k']}" if about["mode"] == "top_k" else ""
                raise bad("mode", self.mode, f"{self.url} answers in mode {about['mode']}{k}; set that")
            self._described = about
        return self._described

    def _line(self, variable: str) -> Line:
        key = check_key(os.environ.get(variable, ""), variable)
        return Line(self.url, key, variable, self.timeout, self.retries)


class RemoteClient:
    """A client of a server.

    Args:
        line: To the server.
        ledger: Of this run: its budget, and what was answered.
        name: Of this run; the server knows the key's.
        images: The most in one request; more are sent in parts, and parts that were answered before one that is
            refused are charged, and free when asked again.
    """

    def __init__(self, line: Line, ledger: Ledger, name: str, images: int) -> None:
        self.line, self.ledger, self.name, self.images = line, ledger, name, images

    def query(self, images: Tensor, request: str | None = None) -> Answers:
        """Ask; see `extraction.oracle.Client`."""
        images = images.cpu().contiguous()
        contents = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        request = request or uuid4().hex
        with self.ledger.request(self.name, request, contents) as entry:
            if entry.answer is None:
                entry.answer = pack(**self._ask(images, request)._asdict())
            return Answers(**unpack(entry.answer))

    @property
    def account(self) -> Account:
        """How this run stands."""
        return self.ledger.account(self.name)

    @property
    def left(self) -> int | None:
        """Queries left, to this run and to the key."""
        limits = [self.ledger.left(self.name), self.line.get("/v1/account", ("left", "rate"))["left"]]
        return min((limit for limit in limits if limit is not None), default=None)

    def _ask(self, images: Tensor, request: str) -> Answers:
        rate = self.line.get("/v1/account", ("left", "rate"))["rate"] if len(images) > 1 else None
        size = self.images if rate is None else min(self.images, int(rate))
        parts = []
        for start in range(0, max(1, len(images)), size):
            part = images[start : start + size]
            whole = f"{quote(self.name, safe='')}/{quote(request, safe='')}"
            name = whole if len(part) == len(images) else f"{whole}/{start}+{len(part)}"
            found = unpack(self.line.post("/v1/answers", pack(images=part), name))
            if set(found) != set(Answers._fields) or {tensor.shape[:1] for tensor in found.values()} != {
                part.shape[:1]
            }:
                raise bad("url", self.line.url, "what it answers are no answers to these images; is it such a server?")
            answered(found["values"], self.line.url)
            parts.append(Answers(**found))
        return Answers(*(torch.cat(part) for part in zip(*parts, strict=True)))


class Line:
    """A connection to a server under a key, made again when it is lost.

    Args:
        url: Of the server.
        key: The key.
        variable: Where it came from, for complaints.
        timeout: Seconds that an answer may take.
        retries: How often a request is sent again.
    """

    def __init__(self, url: str, key: str, variable: str, timeout: float, retries: int) -> None:
        self.url, self.variable, self.timeout, self.retries = url, variable, timeout, retries
        self._key = key
        self._open: httpx.Client | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens a connection of its own."""
        return {**self.__dict__, "_open": None}

    def get(self, path: str, fields: Collection[str]) -> dict[str, Any]:
        """Ask for JSON with these fields; see `post`."""
        try:
            found = self._send("GET", path).json()
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            found = None
        if not isinstance(found, dict) or not set(fields) <= set(found):
            raise bad("url", self.url, "this is no lightning serve, or one of another version")
        return found

    def post(self, path: str, content: bytes, request: str) -> bytes:
        """Send bytes under a request id, again if need be.

        Raises:
            BudgetError: As the server says.
            FlaggedError: As the server says.
            InputError: As the server says, or if there is no answer.
        """
        return self._send("POST", path, content, {"X-Request-Id": request}).content

    def _send(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        try:
            import httpx
        except ImportError as error:
            raise InputError("httpx is missing: pip install 'pharmakon[serve]'") from error
        lost, waited, why = 0, 0, ""
        while lost <= self.retries:
            if self._open is None:
                near = is_loopback(str(urlsplit(self.url).hostname))  # no proxy of the environment knows this machine
                authorization = {"Authorization": f"Bearer {self._key}"}
                self._open = httpx.Client(headers=authorization, timeout=self.timeout, trust_env=not near)
            try:
                response = self._open.request(method, self.url + path, content=content, headers=headers)
            except httpx.TransportError as error:
                self._open.close()
                self._open, why = None, f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return response
                kind, message = _complaint(response)
                if kind == "rate" and waited < _WAITS:
                    waited += 1
                    time.sleep(min(60.0, _seconds(response.headers.get("retry-after", "1"))))
                    continue
                if response.status_code < 500:
                    raise self._error(kind, message)
                why = f"{response.status_code} {message}"
            if lost < self.retries:
                time.sleep(min(30.0, 0.5 * 2**lost))
            lost += 1
        raise InputError(f"url = {self.url!r}: no answer after {lost} tries ({' '.join(why.split())}); is it running?")

    def _error(self, kind: str, message: str) -> InputError:
        if kind == "budget":
            return BudgetError(message)
        if kind == "flagged":
            return FlaggedError(message)
        if kind in ("key", "role"):
            return InputError(f"{self.variable}: {self.url} does not take this key ({message})")
        return InputError(f"{self.url}: {message}")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and no other can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _complaint(response: httpx.Response) -> tuple[str, str]:
    """What an error says, in one line."""
    try:
        found = response.json()
        return str(found["error"]), " ".join(str(found["message"]).split())
    except (ValueError, KeyError, TypeError):
        return "", f"status {response.status_code}"


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 1.0
