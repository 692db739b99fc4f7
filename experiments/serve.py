"""`lightning serve`: a victim behind HTTP, answers counted per key; `extraction.http.RemoteOracle` is the other side.

Without keys, on this machine, three are made and shown once. Any other machine is let in only with a key and TLS.

A key has a rate: as many queries in a minute as ``--rate`` says, else `extraction.http.keys.RATE`. Its requests are
counted, too, see `extraction.http.server.Limits`, and whoever connects and says nothing is dropped, see
`extraction.http.patience`.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.errors import InputError, bad
from experiments.arguments import options, whole
from experiments.documents import read_yaml
from experiments.registry import find_config

OPTIONS = (
    "--weights", "--config", "--port", "--host", "--ledger", "--certificate", "--private-key", "--new-key", "--role",
    "--budget", "--samples", "--rate", "--keys", "--revoke",
)  # fmt: skip

VARIABLES = {"attacker": "PHARMAKON_ORACLE_KEY", "evaluation": "PHARMAKON_EVALUATION_KEY"}
"""Where `RemoteOracle` looks for keys."""


def serve(args: list[str]) -> int:
    """Serve a victim until interrupted; or make a key and show it, list the keys, or revoke one.

    Args:
        args: ``serve --weights FILE|RUN [--config FILE] [--port 8000] [--host 127.0.0.1] [--ledger FILE]
            [--certificate FILE --private-key FILE] [--new-key NAME [--role ROLE] [--budget N] [--samples N]
            [--rate N|any]] [--keys all] [--revoke NAME]``; the config has the section ``oracle``, at its top or, that
            of an attack, in its data: a `LocalOracle` or a `ForeignOracle` with its mode, defence and detector.
            ``--budget`` (queries), ``--samples`` (different images) and ``--rate`` (queries in a minute; ``any``: no
            limit) are those of the key that is made.

    Raises:
        InputError: Whatever a person got wrong.
    """
    given = options(args[1:], OPTIONS)
    number, budget, samples = (whole(given, name) for name in ("port", "budget", "samples"))
    if number is not None and number > 65535:
        raise bad("port", number, "a port is 65535 or less; 0 is any that is free")
    port, host = 8000 if number is None else number, given.get("host", "127.0.0.1")
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'pharmakon[serve]'") from error

    from extraction.http.keys import RATE, Keys
    from extraction.http.patience import patient
    from extraction.http.remote import is_loopback
    from extraction.http.server import make_app
    from extraction.ledger import Ledger
    from extraction.oracle import ledgers_folder

    oracle = _oracle(given)
    path = Path(given.get("ledger") or ledgers_folder() / f"served-{oracle.identity()}.sqlite")
    if not path.absolute().parent.is_dir():
        raise bad("ledger", str(path), "there is no such folder; make it")
    keys = Keys(f"{path}.keys")
    rate = None if given.get("rate") == "any" else whole(given, "rate") if "rate" in given else RATE
    if _of_keys(keys, given, budget, rate, samples):
        return 0
    secure = "certificate" in given and "private-key" in given
    if not is_loopback(host) and not (secure and keys.all()):
        raise bad("host", host, "other machines need a key (--new-key) and TLS (--certificate, --private-key)")
    for name in ("certificate", "private-key"):
        if name in given and not (secure and Path(given[name]).is_file()):
            raise bad(name, given[name], "give two files: --certificate and --private-key")
    ledger = Ledger(path, price=oracle.price)
    service, evaluation = oracle.service(ledger), oracle.evaluation(ledger)
    app = make_app(service, keys, oracle.num_classes, oracle.identity(), evaluation)
    tls: dict[str, Any] = {"ssl_certfile": given["certificate"], "ssl_keyfile": given["private-key"]} if secure else {}
    with _listen(host, port) as listening:
        config = uvicorn.Config(app, log_level="warning", http=patient(), ws="none", **tls)
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise bad("certificate", given.get("certificate"), f"it cannot be used ({error})") from error
        if not keys.all():
            _first_keys(keys, {"attacker": (budget, rate, samples), "evaluation": (None, RATE, None)})
        elif {"budget", "rate", "samples"} & set(given):
            raise InputError("budget, rate, samples: they are of a new key; name one with --new-key")
        address = f"{'https' if secure else 'http'}://{_in_url(host)}:{listening.getsockname()[1]}"
        print(f"serving {oracle.named[1]} at {address} – {address}/docs, {address}/status", flush=True)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _of_keys(keys: Any, given: dict[str, str], budget: int | None, rate: int | None, samples: int | None) -> bool:
    """Make, list or revoke keys; False: nobody asked for it."""
    asked = [name for name in ("new-key", "keys", "revoke") if name in given]
    if len(asked) > 1:  # else one would be done and the other forgotten: a key that was to be revoked would go on
        raise InputError(f"{', '.join(asked)}: one thing at a time; leave out all but one")
    if "new-key" in given:
        key = keys.create(given["new-key"], given.get("role", "attacker"), budget, rate, samples)
        print(f"the key of {given['new-key']}, shown this once: {key}")
    elif "role" in given:
        raise InputError("role: it is of a new key; name one with --new-key")
    elif "revoke" in given:
        keys.revoke(given["revoke"])
        print(f"the key of {given['revoke']} is revoked; what it spent stays in the ledger")
    elif "keys" in given:
        if given["keys"] != "all":
            raise bad("keys", given["keys"], "write all; of one client the status page tells")
        for key in keys.all():
            limits = (("budget", key.budget), ("samples", key.samples), ("queries a minute", key.rate))
            told = ", ".join(f"{what} {'any number' if most is None else most}" for what, most in limits)
            print(f"{key.name}: {key.role}, {told}")
    else:
        return False
    return True


def _oracle(given: dict[str, str]) -> Any:
    """The `LocalOracle` that is to be served."""
    from extraction.foreign import ForeignOracle
    from extraction.oracle import InProcessOracle, LocalOracle

    section: dict[str, Any] = {"class_path": "LocalOracle", "init_args": {}}
    if "config" in given:
        whole = read_yaml(Path(find_config(given["config"])))
        data = whole.get("data")
        inner = (data.get("init_args") or {}).get("oracle") if isinstance(data, dict) else None
        named = whole.get("oracle") or inner
        if not isinstance(named, dict):
            raise bad("config", given["config"], "it has no section oracle with class_path: LocalOracle")
        section = {"class_path": named.get("class_path"), "init_args": dict(named.get("init_args") or {})}
    kinds = {path: kind for kind in (LocalOracle, ForeignOracle) for path in (kind.__name__, _path(kind))}
    kind = kinds.get(section["class_path"])
    if kind is None:
        raise bad("oracle.class_path", section["class_path"], "only a LocalOracle or a ForeignOracle can be served")
    if "weights" in given:
        if kind is ForeignOracle:
            raise bad("weights", given["weights"], "the config's oracle has a victim of its own; leave one out")
        section["init_args"]["weights"] = given["weights"]
    if kind is LocalOracle and "weights" not in section["init_args"]:
        raise InputError("weights: name the victim: lightning serve --weights runs/victim_digits")
    if "config" not in given:
        return LocalOracle(given["weights"])

    from experiments.cli import Parser, check_classes
    from experiments.complaints import input_error, one_line
    from experiments.registry import import_all

    import_all()
    parser = Parser()
    parser.add_argument("--oracle", type=InProcessOracle)
    try:
        parsed = parser.parse_object({"oracle": section})
        check_classes(parsed, ())
        return parser.instantiate(parsed).oracle
    except Exception as error:
        ours = input_error(error)
        if ours is not None:
            raise ours from error
        if isinstance(error, argparse.ArgumentError):
            raise InputError(one_line(error, ("oracle",))) from error
        raise


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise bad("port", port, f"{host} cannot be listened on ({why}); choose another") from error
    return listening


def _first_keys(keys: Any, limits: Mapping[str, tuple[int | None, int | None, int | None]]) -> None:
    """Make and show one key for each role; `limits`: role → budget, rate, samples."""
    print("there were no keys; these are shown this once:")
    for role in ("attacker", "evaluation", "admin"):
        key = keys.create(role, role, *limits.get(role, ()))
        use = f"{VARIABLES[role]}={key}" if role in VARIABLES else f"{key}  (the status page's password)"
        print(f"  {role}: {use}")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
