"""The server: a service's answers over HTTP, counted per key, within limits.

Threat model: whoever is on the other side of the network, with or without a key. A body is not read further than its
limit and not at all without a key; tensors travel as safetensors, which run no code; what a request does – charge,
answer, watch – is the one transaction of its ledger, so that a kill at any moment leaves all or nothing of it. A key's
rate counts queries that are charged: what was answered before is free. So that refusals and repeats do not keep the
server from others, a key's requests are counted, too, of any kind and whatever became of them.

Errors are JSON, ``{"error": KIND, "message": LINE}``:

    400 ``malformed``   the body or a header is not what it should be
    401 ``key``         no key, or an unknown one
    403 ``flagged``     a detector took this client for an attacker;  ``role``: the key is for something else
    408 ``slow``        the body took too long
    413 ``size``        the body is larger than the limit
    422 ``input``       images of another shape or type, NaN, too many or none, or an id that was used for others
    429 ``rate``        too many queries or requests in a minute, or requests at once, with ``Retry-After``;
        ``budget``      more than is left, of queries or of samples
    503 ``ledger``      the ledger cannot be written
"""

# no `from __future__ import annotations`: FastAPI reads the annotations of functions whose types are imported inside

import asyncio
import base64
import html
import json
import math
import sqlite3
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from datamodules.errors import InputError, bad
from extraction.answers import pack
from extraction.http.keys import Budgets, Key, Keys
from extraction.ledger import BudgetError
from extraction.service import FlaggedError, Service

if TYPE_CHECKING:
    from fastapi import FastAPI

MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """What one request may be, and how many a key may send.

    Attributes:
        body: Bytes.
        images: Images.
        requests: In a minute, refused ones among them.
        at_once: Requests for answers, whose bodies are held in memory.
        patience: Seconds that a body may take.
    """

    body: int = 2**25
    images: int = 4096
    requests: int = 6000
    at_once: int = 16
    patience: float = 60.0


class _Refusal(Exception):
    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, headers or {}


def make_app(  # noqa: PLR0915 – the endpoints, one after the other
    service: Service,
    keys: Keys,
    num_classes: int,
    identity: str,
    evaluation: Service | None = None,
    limits: Limits | None = None,
) -> "FastAPI":
    """The web application.

    Args:
        service: Answers attackers; its ledger gets the keys' budgets.
        keys: Who may ask.
        num_classes: K.
        identity: A hash of all that answers depend on.
        evaluation: Answers keys for evaluation: undefended scores; None: they are refused. Same ledger.
        limits: Of one request.

    Raises:
        InputError: If fastapi is missing.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import HTMLResponse, JSONResponse, Response
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'pharmakon[serve]'") from error

    limits = limits or Limits()
    ledger = service.ledger
    ledger.limits, ledger.sample_limits = Budgets(keys), Budgets(keys, "samples")
    element = torch.empty((), dtype=service.domain.dtype).element_size()
    size = element * int(torch.tensor(service.domain.shape).prod())
    most = min(limits.images, (limits.body - 1024) // size)  # a safetensors header is short
    if most < 1:
        raise bad("body limit", limits.body, f"one image has {size} bytes; allow more")
    working = threading.Lock()  # the ledger lets one work at a time; with this the rate counts exactly, too
    pace, under_way = _Pace(limits.requests), Counter[str]()
    app = FastAPI(title="Pharmakon oracle", version="1", description=__doc__)

    def owner(request: Request, *roles: str) -> Key:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic" and roles == ("admin",):  # what a browser asks a person for
            given = _password(given)
        elif scheme.lower() != "bearer":
            given = ""
        key = keys.find(given) if given else None
        if key is None:
            way = "Basic" if roles == ("admin",) else "Bearer"
            raise _Refusal(401, "key", "give a valid key: Authorization: Bearer KEY", {"WWW-Authenticate": way})
        pace.count(key.name)
        if key.role not in roles:
            raise _Refusal(403, "role", f"the key {key.name!r} is for {key.role}; this needs {' or '.join(roles)}")
        return key

    def answering(key: Key) -> Service:
        if key.role != "evaluation":
            return service
        if evaluation is None:
            raise _Refusal(403, "role", "nothing is evaluated on this server")
        return evaluation

    def work(key: Key, images: Tensor, name: str) -> bytes:
        ours = answering(key)
        with working:
            if key.rate is not None and not ledger.answered(key.name, name):
                _check_rate(ledger.since, key, len(images))
            return pack(**ours.answer(key.name, images, name)._asdict())

    @app.exception_handler(_Refusal)
    def refuse(_: Request, error: _Refusal) -> JSONResponse:
        return JSONResponse({"error": error.kind, "message": error.message}, error.status, error.headers)

    @app.exception_handler(sqlite3.Error)
    def broken(_: Request, error: sqlite3.Error) -> JSONResponse:
        return JSONResponse({"error": "ledger", "message": "the ledger cannot be used now; try again"}, 503)

    binary = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    header = {"name": "X-Request-Id", "in": "header", "required": True, "schema": {"type": "string"}}
    secured: dict[str, Any] = {"security": [{"key": []}]}

    @app.post(
        "/v1/answers",
        summary="Ask: safetensors with `images` in, safetensors with `classes` and `values` out; an id sent again is "
        "answered again, to the byte, and free",
        response_class=Response,
        responses={200: binary},
        openapi_extra={"requestBody": {**binary, "required": True}, "parameters": [header], **secured},
    )
    async def answers(request: Request) -> Response:
        key = await run_in_threadpool(owner, request, "attacker", "evaluation")
        name = request.headers.get("x-request-id", "")
        if not 0 < len(name) <= 500:
            raise _Refusal(400, "malformed", "X-Request-Id: give each request an id of 1 to 500 characters")
        if under_way[key.name] >= limits.at_once:
            message = f"{limits.at_once} requests of this key are being answered; wait for one of them"
            raise _Refusal(429, "rate", message, {"Retry-After": "1", "Connection": "close"})
        under_way[key.name] += 1  # one thread runs all that is async: nothing comes in between
        try:
            data = await _body(request, limits)
            images = _images(data, service, most)
            return Response(await run_in_threadpool(work, key, images, name), media_type="application/octet-stream")
        except BudgetError as error:
            raise _Refusal(429, "budget", str(error)) from error
        except FlaggedError as error:
            raise _Refusal(403, "flagged", str(error)) from error
        except InputError as error:
            raise _Refusal(422, "input", str(error)) from error
        finally:
            under_way[key.name] -= 1

    @app.get("/v1/oracle", summary="What this oracle takes and answers", openapi_extra=secured)
    def oracle(request: Request) -> dict[str, Any]:
        ours = answering(owner(request, "attacker", "evaluation"))
        return {
            "shape": list(ours.domain.shape),
            "dtype": str(ours.domain.dtype).removeprefix("torch."),
            "mode": ours.mode,
            "k": ours.k,
            "num_classes": num_classes,
            "identity": identity,
            "price": ledger.price,
            "images": most,
        }

    @app.get("/v1/account", summary="How the key's owner stands", openapi_extra=secured)
    def account(request: Request) -> dict[str, Any]:
        key = owner(request, "attacker", "evaluation")
        left = {"left": ledger.left(key.name), "samples_left": ledger.samples_left(key.name)}
        return {**ledger.account(key.name)._asdict(), **left, "rate": key.rate}

    @app.get("/status", summary="All clients, for a person with an admin key", response_class=HTMLResponse)
    def status(request: Request) -> HTMLResponse:
        owner(request, "admin")
        return HTMLResponse(_status_page(service, keys), headers={"Cache-Control": "no-store"})

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's own way to extend it
    return app


class _Pace:
    """Counts each key's requests of the last minute; a restart forgets them.

    Args:
        most: In a minute.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._at: dict[str, deque[float]] = {}
        self._counting = threading.Lock()

    def count(self, name: str) -> None:
        """One more, unless there are too many."""
        with self._counting:
            at, now = self._at.setdefault(name, deque()), time.time()
            while at and at[0] <= now - MINUTE:
                at.popleft()
            if len(at) < self._most:
                at.append(now)
                return
            wait = max(1, math.ceil(at[0] + MINUTE - now))
        message = f"{self._most} requests in a minute are allowed, refused ones among them; wait {wait} s"
        raise _Refusal(429, "rate", message, {"Retry-After": str(wait), "Connection": "close"})


async def _body(request: Any, limits: Limits) -> bytes:
    """The body, read no further than the limit, and no longer."""
    most = limits.body
    refusal = _Refusal(413, "size", f"the body may have {most} bytes; send fewer images", {"Connection": "close"})
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise refusal
    parts, total = [], 0
    try:
        async with asyncio.timeout(limits.patience):
            async for part in request.stream():
                total += len(part)
                if total > most:
                    raise refusal
                parts.append(part)
    except TimeoutError as error:
        message = f"the body did not come within {limits.patience:g} s; send fewer images"
        raise _Refusal(408, "slow", message, {"Connection": "close"}) from error
    return b"".join(parts)


def _images(data: bytes, service: Service, most: int) -> Tensor:
    """Images of a body; the ledger has not heard of them yet."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _Refusal(400, "malformed", f"body: {len(data)} bytes that are no safetensors") from error
    if set(tensors) != {"images"}:
        raise _Refusal(400, "malformed", "body: one tensor with the name images is expected")
    images: Tensor = tensors["images"]
    shape, dtype = service.domain
    if images.dtype != dtype or images.ndim != len(shape) + 1 or tuple(images.shape[1:]) != shape:
        wanted = f"{str(dtype).removeprefix('torch.')} (N, {', '.join(map(str, shape))})"
        given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise _Refusal(422, "input", f"images: {wanted} is this oracle's domain, not {given}")
    if not 1 <= len(images) <= most:
        raise _Refusal(422, "input", f"images: {len(images)} in one request; send 1 to {most}")
    if dtype.is_floating_point and not bool(images.isfinite().all()):
        raise _Refusal(422, "input", "images: NaN or infinite values are in them")
    return images


def _check_rate(since: Any, key: Key, more: int) -> None:
    assert key.rate is not None
    if more > key.rate:
        raise _Refusal(
            422, "input", f"images: {more} in one request, but {key.rate} in a minute are allowed; send fewer"
        )
    now = time.time()
    if since(key.name, now - MINUTE) + more <= key.rate:
        return
    wait = next((s for s in range(1, int(MINUTE)) if since(key.name, now - MINUTE + s) + more <= key.rate), int(MINUTE))
    message = f"rate = {key.rate} queries in a minute: {more} more are too many now; wait {wait} s"
    raise _Refusal(429, "rate", message, {"Retry-After": str(wait)})


def _password(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _status_page(service: Service, keys: Keys) -> str:
    ledger = service.ledger
    known = {key.name: key for key in keys.all()}
    titles = (
        "client", "role", "queries", "samples", "requests", "cost", "left", "queries a minute", "samples left",
        "flagged after", "detector",
    )  # fmt: skip
    rows = []
    for name in sorted({*known, *ledger.clients()}):
        key, account, left, flagged = known.get(name), ledger.account(name), ledger.left(name), ledger.flagged_at(name)
        state, samples = service.state(name), ledger.samples_left(name)
        cells = (
            name, "no key" if key is None else key.role, account.queries, account.samples, account.requests,
            f"{account.cost:.2f}", "any" if left is None else left,
            "any" if key is None or key.rate is None else key.rate, "any" if samples is None else samples,
            "–" if flagged is None else f"{flagged} queries", json.dumps(dict(state)) if state else "–",
        )  # fmt: skip
        rows.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    about = html.escape(f"answers: {service.mode}{'' if service.k is None else f' {service.k}'}; ")
    about += html.escape(f"flagged clients: {service.response}; price of a thousand queries: {ledger.price:g}")
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ccc}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Pharmakon oracle</title><style>{style}</style>'
        f"<h1>Oracle</h1><p>{about}</p><table><tr>{head}</tr>\n{body}</table></html>"
    )
