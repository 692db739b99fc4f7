"""`lightning keygen`, `verify` and `check-transcript`: who owns a model.

Exit status of `verify` and `check-transcript`: 0 owned, 1 not owned, 2 could not be decided – which is also that of
every complaint.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from datamodules.errors import InputError, bad
from datamodules.files import unwritable
from experiments.arguments import options, whole

if TYPE_CHECKING:
    from experiments.suspects import Suspect
    from watermark.keys import Parameters, VerificationKey
    from watermark.transcript import Judge, Result, Transcript

_KEYGEN = (
    "--out", "--classes", "--shape", "--n", "--source", "--images", "--reference", "--misses-allowed", "--alpha-log2",
    "--grinding-log2", "--beacon", "--beacon-source", "--beacon-round",
)  # fmt: skip
_VERIFY = ("--key", "--model", "--reference", "--transcript", "--page", "--nonce", "--count")
_CHECK = ("--key", "--nonce", "--count", "--begun", "--alpha-log2", "--model", "--page")


def keygen(args: list[str]) -> int:
    """Make a key.

    Args:
        args: ``keygen --out DIR --classes K --shape C,H,W [--n 100] [--source abstract|noise|images|overlay|unrelated]
            [--images FILE.npz|FOLDER] [--reference WEIGHTS] [--misses-allowed 10] [--alpha-log2 64]
            [--grinding-log2 0] [--await-beacon --beacon-source TEXT --beacon-round TEXT]``; or ``keygen --out DIR
            --beacon HEX`` to complete one.

    Raises:
        InputError: If a value is wrong, or there is a key already.
    """
    from watermark import canonical, keys

    given = options(args[1:], _KEYGEN, ("--await-beacon",))
    out = given.get("out")
    if not out:
        raise InputError("out: name a folder: lightning keygen --out keys/mine --classes 10 --shape 3,32,32")
    beacon_source, beacon_round = _beacon(given)
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
        if source == "unrelated":  # classes of another task say nothing of this one
            truths = None
        if source == "overlay":
            images = sources.overlay(images)
    if "reference" in given:
        if images is None or source == "unrelated":
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
        beacon_source=beacon_source,
        beacon_round=beacon_round,
        **{name: value for name, value in more.items() if value is not None},  # type: ignore[arg-type]
    )
    if made is None:
        begun = Path(out) / keys.BEGUN
        print(f"begun: {out}\n  timestamp {begun} now, before the beacon is known; then: lightning keygen --out {out}")
        print(f"  --beacon HEX, which is round {beacon_round} of {beacon_source} (16 bytes or more)")
    else:
        print(_about(made, out))
    return 0


def _beacon(given: dict[str, str]) -> tuple[str, str]:
    """Source and round of the beacon that a key is to wait for; empty if it waits for none."""
    source, number = given.get("beacon-source", ""), given.get("beacon-round", "")
    if (bool(source), bool(number)) != ("await-beacon" in given,) * 2:
        raise InputError(
            'beacon-source, beacon-round: --await-beacon needs both: --beacon-source "drand quicknet" --beacon-round '
            "123456, one that is not out yet"
        )
    return source, number


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
    from watermark.verify import run_of
    from watermark.verify import verify as verification

    given = options(args[1:], _VERIFY, ("--public", "--reveal", "--stop-early"))
    count = _check_verify(given)
    nonce = canonical.unhex(given.get("nonce", ""), "nonce")
    mode = "public" if "public" in given else "revealed" if "reveal" in given else "private"
    vk = keys.VerificationKey.read(given["key"])
    keys.MarkingKey.read(given["key"])
    left = vk.parameters.n - len(keys.burnt(given["key"]))
    from experiments.suspects import check_fit, suspect

    model = suspect(given["model"])
    check_fit(model, vk.parameters.classes, vk.parameters.shape)
    reference = None
    if vk.parameters.reference != "none" and "reference" in given:
        truth = suspect(given["reference"])
        if truth.name != vk.parameters.reference:
            raise bad("reference", given["reference"], "these are not the weights that the key names")
        reference = truth.ask
    run = run_of(vk, model.name, mode, nonce, count)
    _check_left(given, model, vk, run, count, left)
    with _new(given, "transcript", 0o600) as written, _new(given, "page", 0o644) as paper:
        found = verification(
            given["key"],
            model.under(run),
            model.name,
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            mode=mode,
            nonce=nonce,
            count=count,
            remote=model.remote,
            reference=reference,
            stop_early="stop-early" in given,
            keep=None if written is None else lambda data: _put(written, data),
        )
        print(f"{mode}, key {vk.digest}")
        print(summary(found.result))
        print(f"  {_truths(vk.parameters, reference is not None)}")
        if "stop-early" in given:
            print("  asked one by one, by a test that may be stopped at any time")
        if written is not None:
            print(f"transcript: {given['transcript']} – it shows triggers to whoever reads it, and they are burnt")
        if paper is not None:
            _put(paper, page(vk, found.result, model.name, reference is not None).encode())
    return _code(found.result)


def _check_left(
    given: dict[str, str], model: Suspect, vk: VerificationKey, run: str, count: int | None, left: int
) -> None:
    """See that the suspect may be asked as much as needed; what was cut off has been charged, and is gone on with."""
    from experiments.suspects import check_budget
    from watermark import keys
    from watermark.verify import least_queries

    if keys.pending(given["key"], run) is not None:
        return
    wanted = left
    if "public" in given:
        wanted = left // 2 if count is None else count
    elif "reveal" in given:
        wanted = vk.parameters.n
    elif "stop-early" in given:
        wanted = min(left, least_queries(vk.parameters))
    check_budget(model, wanted)


@contextlib.contextmanager
def _new(given: dict[str, str], field: str, mode: int) -> Iterator[BinaryIO | None]:
    """A new file, opened before anything is asked or burnt; it is gone again if nothing was written into it."""
    if field not in given:
        yield None
        return
    path = Path(given[field])
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise bad(field, given[field], "there is such a file already, and it stays as it is") from error
    except OSError as error:
        raise bad(field, given[field], f"it cannot be written ({error.strerror}); choose another place") from error
    with os.fdopen(descriptor, "wb") as file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _put(file: BinaryIO, data: bytes) -> None:
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(Path(str(file.name)), error) from error


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
    return count


def check_transcript(args: list[str]) -> int:
    """Check a transcript, without torch and, unless it is to be asked again, without the model.

    Args:
        args: ``check-transcript FILE [--key VK|DIGEST] [--nonce HEX] [--count N] [--begun FILE] [--alpha-log2 64]
            [--earlier FILE ...] [--model WEIGHTS|RUN|URL] [--page FILE]``: what the judge brings himself.

    Returns:
        0 owned, 1 not owned, 2 could not be decided.

    Raises:
        InputError: If anything in it does not hold, or it is not what the judge asked for; it names what.
    """
    from watermark import transcript

    earlier: dict[str, list[str]] = {"--earlier": []}
    given = options(args[1:], _CHECK, word="file", many=earlier)
    if "file" not in given:
        raise InputError("file: name a transcript: lightning check-transcript FILE")
    by = _judge(given, earlier["--earlier"])
    seen = transcript.read(_bytes("file", given["file"]), given["file"])
    result = transcript.judged(seen, by, what=given["file"])  # before anybody is asked
    again = "a transcript does not prove that the model gave these answers: ask it again with --model"
    with _new(given, "page", 0o644) as paper:
        if "model" in given:
            answers = _asked_again(seen, given["model"])
            result = transcript.judged(seen, by, answers, given["file"])
            differ = sum(now != then for now, then in zip(answers, seen.answers, strict=True))
            again = f"asked again: {differ} of {len(answers)} answers differ; the verdict is about the new ones"
        print("\n".join([*_about_transcript(given["file"], seen, result, by), summary(result)]))
        print(f"  {_truths(seen.vk.parameters, False)}\n{again}")
        if paper is not None:
            _put(paper, page(seen.vk, result, seen.model).encode())
    return _code(result)


def _judge(given: dict[str, str], earlier: list[str]) -> Judge:
    from watermark import canonical, keys, transcript

    key = given.get("key", "")
    if key and not (len(key) == 64 and set(key) <= set("0123456789abcdef")):
        key = keys.VerificationKey.read(key).digest
    nonce = canonical.unhex(given.get("nonce", ""), "nonce")
    if "nonce" in given and len(nonce) < transcript.LEAST_NONCE:
        raise bad(
            "nonce", given["nonce"], f"{transcript.LEAST_NONCE} bytes or more are expected: the one that you gave"
        )
    alpha = whole(given, "alpha-log2")
    if alpha is not None and not 1 <= alpha <= 1024:
        raise bad("alpha-log2", alpha, "α = 2^−alpha-log2, from 1 to 1024; 64 is the default")
    begun = _bytes("begun", given["begun"]) if "begun" in given else b""
    before = tuple(_bytes("earlier", path) for path in earlier)
    return transcript.Judge(key, nonce, whole(given, "count"), begun, alpha, before)


def _bytes(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise bad(field, path, f"it cannot be read ({error.strerror})") from error


def _asked_again(seen: Transcript, name: str) -> list[int]:
    from experiments.suspects import check_budget, check_fit, suspect
    from watermark.verify import checked

    model = suspect(name)
    if model.name != seen.model:
        raise bad("model", name, f"it is {model.name}, and the transcript is about {seen.model}")
    check_fit(model, seen.vk.parameters.classes, seen.vk.parameters.shape)
    check_budget(model, len(seen.indices))
    return checked(model.ask(seen.images()), len(seen.indices), seen.vk.parameters.classes)


def _about_transcript(file: str, seen: Transcript, result: Result, by: Judge) -> list[str]:
    """What it is that is judged, and whose choice each part of it was."""
    parameters = seen.vk.parameters
    choices = result.grinding_log2 - parameters.grinding_log2
    counts = f"; p × {_power(choices)}, since he could choose how many to open: give --count" if choices else ""
    lines = [
        f"{file}: whole; the owner {parameters.owner} saw these answers of {seen.model}, as he says on {seen.when}",
        f"key {seen.vk.digest}: {'the one that was given' if by.key else 'see that it is the one that was published'}",
        f"mode {seen.mode}, {len(seen.indices)} of {parameters.n} triggers opened, {len(seen.burnt)} called burnt",
        f"α = 2^-{result.alpha_log2}, {'yours' if by.alpha_log2 is not None else 'of the key'}; "
        f"{_power(parameters.grinding_log2)} tried keys declared{counts}",
    ]
    if seen.nonce:
        lines.insert(3, f"nonce {seen.nonce.hex()}: {'yours' if by.nonce else 'whose it is, is not known'}")
    return lines


def _truths(parameters: Parameters, checked: bool) -> str:
    """The first step of the published procedure, and whether anybody took it: every label differs from f(t)."""
    from watermark.keys import UNTRUE

    if parameters.source in UNTRUE:
        return f"truths: of {parameters.source} triggers no class is true"
    if checked:
        return f"truths: checked against {parameters.reference}"
    return "truths: the owner's word; not checked against a classifier"


def summary(result: Result) -> str:
    """A verdict for a person, in a few lines."""
    verdict = {True: "OWNED", False: "not owned", None: "could not be decided"}[result.owned]
    needed = "" if result.needed is None else f" ({result.needed} are needed)"
    lines = [
        f"{verdict}: {result.matches} of {result.scored} triggers match{needed}, p ≤ {_power(result.log2_p)}",
        f"  the published rule (all but ε·n match): {'owned' if result.published else 'not owned'}",
        f"  {result.claims}",
    ]
    if result.burnt:
        lines.append(f"  {result.burnt} of them are called burnt, which nothing shows: they count as misses")
    if result.refused:
        lines.append(f"  {result.refused} triggers got no answer")
    if result.reason:
        lines.append(f"  why not decided: {result.reason}")
    return "\n".join(lines)


def page(vk: VerificationKey, result: Result, model: str, checked: bool = False) -> str:
    """A page for a person, in one file; `checked`: whether true classes were checked against f."""
    from experiments.report.markup import tag

    verdict = {True: "owned", False: "not owned", None: "could not be decided"}[result.owned]
    parameters = vk.parameters
    rows: list[tuple[str, Any]] = [
        ("model", model),
        ("owner", parameters.owner),
        ("verification key", vk.digest),
        ("Merkle root of the commitments", vk.root),
        ("triggers that count", f"{result.scored} of {parameters.n}"),
        ("of these called burnt: misses", result.burnt),
        ("matches", result.matches),
        ("matches needed", "–" if result.needed is None else result.needed),
        ("p at most", _power(result.log2_p)),
        ("α", f"2^-{result.alpha_log2}; p × {_power(result.grinding_log2)} for what may have been tried"),
        ("without an answer", result.refused),
        ("published rule", "owned" if result.published else "not owned"),
        ("false claims", result.claims),
        ("true classes", _truths(parameters, checked)),
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
