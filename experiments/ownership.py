"""`lightning keygen`, `verify` and `check-transcript`: who owns a model.

Exit status of `verify` and `check-transcript`: 0 owned, 1 not owned, 2 could not be decided – which is also that of
every complaint.
"""

from __future__ import annotations

import datetime
import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import InputError, bad
from datamodules.files import write_atomically
from experiments.arguments import options, whole

if TYPE_CHECKING:
    from watermark.keys import VerificationKey
    from watermark.transcript import Result

_KEYGEN = (
    "--out", "--classes", "--shape", "--n", "--source", "--images", "--reference", "--misses-allowed", "--alpha-log2",
    "--grinding-log2", "--beacon",
)  # fmt: skip
_VERIFY = ("--key", "--model", "--reference", "--transcript", "--page", "--nonce", "--count")


def keygen(args: list[str]) -> int:
    """Make a key.

    Args:
        args: ``keygen --out DIR --classes K --shape C,H,W [--n 100] [--source abstract|noise|images|overlay|unrelated]
            [--images FILE.npz|FOLDER] [--reference WEIGHTS] [--misses-allowed 10] [--alpha-log2 64]
            [--grinding-log2 0] [--await-beacon]``; or ``keygen --out DIR --beacon HEX`` to complete one.

    Raises:
        InputError: If a value is wrong, or there is a key already.
    """
    from watermark import canonical, keys

    given = options(args[1:], _KEYGEN, ("--await-beacon",))
    out = given.get("out")
    if not out:
        raise InputError("out: name a folder: lightning keygen --out keys/mine --classes 10 --shape 3,32,32")
    if "beacon" in given:
        vk = keys.finish(out, canonical.unhex(given["beacon"], "beacon"))
        print(_about(vk, out))
        return 0
    classes = whole(given, "classes")
    if classes is None or "shape" not in given:
        raise InputError("classes, shape: give both: --classes 10 --shape 3,32,32")
    shape = _shape(given["shape"])
    source, n = given.get("source", "abstract"), whole(given, "n")
    n = 100 if n is None else n
    if source not in keys.SOURCES:
        raise bad("source", source, f"choose from {', '.join(keys.SOURCES)}")
    if (source in keys.DERIVED) == ("images" in given):
        wanted = "leave --images out" if source in keys.DERIVED else "give --images FILE.npz or FOLDER"
        raise bad("source", source, wanted)
    images = truths = None
    reference = "none"
    if "images" in given:
        from watermark import sources

        images, truths = sources.pick(Path(given["images"]), n, shape)
        if source == "overlay":
            images = sources.overlay(images)
    if "reference" in given:
        if images is None:
            raise bad("reference", given["reference"], f"no class is true of {source} triggers")
        from experiments.suspects import check_fit, suspect

        model = suspect(given["reference"])
        check_fit(model, classes, shape)
        reference, truths = model.name, list(model.ask(images))
    more = {name: whole(given, name.replace("_", "-")) for name in ("misses_allowed", "alpha_log2", "grinding_log2")}
    made = keys.keygen(
        out,
        classes=classes,
        shape=shape,
        n=n,
        source=source,
        images=images,
        truths=truths,
        reference=reference,
        beacon_later="await-beacon" in given,
        **{name: value for name, value in more.items() if value is not None},  # type: ignore[arg-type]
    )
    if made is None:
        begun = Path(out) / keys.BEGUN
        print(f"begun: {out}\n  timestamp {begun} now, before the beacon is known; then: lightning keygen --out {out}")
        print("  --beacon HEX, of a public number that came later (16 bytes or more)")
    else:
        print(_about(made, out))
    return 0


def verify(args: list[str]) -> int:
    """Verify a model.

    Args:
        args: ``verify --key DIR --model WEIGHTS|RUN|URL [--reference WEIGHTS] [--public --nonce HEX [--count N]]
            [--reveal] [--stop-early] [--transcript FILE] [--page FILE]``.

    Returns:
        0 owned, 1 not owned, 2 could not be decided.

    Raises:
        InputError: If a value is wrong, or the key is damaged; nothing was asked then.
    """
    from watermark import canonical, keys
    from watermark.verify import verify as verification

    given = options(args[1:], _VERIFY, ("--public", "--reveal", "--stop-early"))
    count = _check_verify(given)
    vk = keys.VerificationKey.read(given["key"])
    keys.MarkingKey.read(given["key"])
    from experiments.suspects import check_budget, check_fit, suspect

    model = suspect(given["model"])
    check_fit(model, vk.parameters.classes, vk.parameters.shape)
    reference = None
    if vk.parameters.reference != "none" and "reference" in given:
        truth = suspect(given["reference"])
        if truth.name != vk.parameters.reference:
            raise bad("reference", given["reference"], "these are not the weights that the key names")
        reference = truth.ask
    left = vk.parameters.n - len(keys.burnt(given["key"]))
    check_budget(model, left if "public" not in given else (left // 2 if count is None else count))
    found = verification(
        given["key"],
        model.ask,
        model.name,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        mode="public" if "public" in given else "revealed" if "reveal" in given else "private",
        nonce=canonical.unhex(given.get("nonce", ""), "nonce"),
        count=count,
        remote=model.remote,
        reference=reference,
        stop_early="stop-early" in given,
    )
    if "transcript" in given:
        _write_private(given["transcript"], found.transcript)
    if "page" in given:
        write_atomically(Path(given["page"]), page(vk, found.result, model.name).encode())
    print(summary(found.result))
    if "transcript" in given:
        print(f"transcript: {given['transcript']} – it shows {found.result.scored} triggers to whoever reads it")
    return _code(found.result)


def _check_verify(given: dict[str, str]) -> int | None:
    """Refuse options of `verify` that do not go together, before anything is read or asked; the count."""
    for name in ("key", "model"):
        if name not in given:
            raise InputError(f"{name}: it is missing: lightning verify --key DIR --model WEIGHTS")
    if "public" in given and "reveal" in given:
        raise InputError("public, reveal: choose one of them")
    if ("public" in given) != ("nonce" in given):
        raise InputError("nonce: a public verification needs one, and only it: --public --nonce HEX, of the verifier")
    count = whole(given, "count")
    if count is not None and "public" not in given:
        raise bad("count", count, "it belongs to --public")
    stop = "stop-early" in given
    if stop and ("public" in given or "reveal" in given or "transcript" in given):
        raise InputError("stop-early: it is for the owner alone, and makes no transcript")
    for name in ("transcript", "page"):
        if name in given and Path(given[name]).exists():
            raise bad(name, given[name], "there is such a file already, and it stays as it is")
    return count


def check_transcript(args: list[str]) -> int:
    """Check a transcript, without torch and without the model.

    Args:
        args: ``check-transcript FILE [--page FILE]``.

    Returns:
        0 owned, 1 not owned, 2 could not be decided.

    Raises:
        InputError: If anything in it does not hold; it names what.
    """
    from watermark import transcript

    files = [arg for arg in args[1:] if not arg.startswith("--")][:1]
    rest = list(args[1:])
    if files:
        rest.remove(files[0])
    given = options(rest, ("--page",))
    if not files:
        raise InputError("file: name a transcript: lightning check-transcript FILE")
    try:
        data = Path(files[0]).read_bytes()
    except OSError as error:
        raise bad("file", files[0], f"it cannot be read ({error.strerror})") from error
    vk, result = transcript.check(data, files[0])
    model = str(transcript.model_of(data))
    if "page" in given:
        write_atomically(Path(given["page"]), page(vk, result, model).encode())
    print(f"{files[0]}: whole; the owner {vk.parameters.owner} saw these answers of {model}")
    print(summary(result))
    print("a transcript does not prove that the model gave these answers: ask it again")
    return _code(result)


def summary(result: Result) -> str:
    """A verdict for a person, in a few lines."""
    verdict = {True: "OWNED", False: "not owned", None: "could not be decided"}[result.owned]
    needed = "anytime-valid test" if result.needed is None else f"{result.needed} are needed"
    lines = [
        f"{verdict}: {result.matches} of {result.scored} triggers match ({needed}), p ≤ {_power(result.log2_p)}",
        f"  the published rule (all but ε·n match): {'owned' if result.published else 'not owned'}",
        f"  {result.claims}",
    ]
    if result.refused:
        lines.append(f"  {result.refused} triggers got no answer")
    if result.reason:
        lines.append(f"  why not decided: {result.reason}")
    return "\n".join(lines)


def page(vk: VerificationKey, result: Result, model: str) -> str:
    """A page for a person, in one file."""
    from experiments.report.markup import tag

    verdict = {True: "owned", False: "not owned", None: "could not be decided"}[result.owned]
    parameters = vk.parameters
    rows: list[tuple[str, Any]] = [
        ("model", model),
        ("owner", parameters.owner),
        ("verification key", vk.digest),
        ("Merkle root of the commitments", vk.root),
        ("triggers asked about", f"{result.scored} of {parameters.n}"),
        ("matches", result.matches),
        ("matches needed", "–" if result.needed is None else result.needed),
        ("p at most", _power(result.log2_p)),
        ("α", f"2^-{parameters.alpha_log2}, {_power(parameters.grinding_log2)} tried keys allowed for"),
        ("without an answer", result.refused),
        ("published rule", "owned" if result.published else "not owned"),
        ("false claims", result.claims),
    ]
    if result.reason:
        rows.append(("why not decided", result.reason))
    style = "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
    style += "td{padding:.2em 1em .2em 0;vertical-align:top;overflow-wrap:anywhere}"
    table = tag("table", *(tag("tr", tag("td", name), tag("td", str(value))) for name, value in rows))
    note = "Under the null hypothesis each trigger is matched with probability 1/(K − 1) at the most; p is exact."
    head = tag("head", tag("meta", charset="utf-8"), tag("title", f"Ownership: {verdict}"), tag("style", style))
    body = tag("body", tag("h1", f"Ownership: {verdict}"), table, tag("p", note))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _power(exponent: int) -> str:
    return f"2^{exponent}" if abs(exponent) > 9 else f"{float(Fraction(2) ** exponent):.3g}"


def _code(result: Result) -> int:
    return {True: 0, False: 1, None: 2}[result.owned]


def _about(vk: VerificationKey, out: str) -> str:
    parameters = vk.parameters
    return "\n".join(
        [
            f"key: {out} – mk.json is secret: keep it, and show it to nobody; vk.json is public",
            f"  {parameters.n} {parameters.source} triggers, {parameters.classes} classes",
            f"  verified at α = 2^-{parameters.alpha_log2}",
            f"  owner {parameters.owner}",
            f"  root  {vk.root}",
            f"  timestamp vk.json (SHA-256 {vk.digest}) before the model is published",
        ]
    )


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise bad("shape", text, "give channels, height and width: 3,32,32")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def _write_private(path: str, data: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise bad("transcript", path, f"it cannot be written ({error.strerror})") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
