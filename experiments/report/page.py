"""The page: one HTML file that asks nothing of any network, for a desk, a phone and paper, in light and dark."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.report.figures import COLOURS, wraps
from experiments.report.markup import Html, join, tag
from experiments.report.plots import Plot
from experiments.report.results import (
    FIXED,
    HASHES,
    Results,
    Row,
    Summary,
    counted,
    heading,
    in_figures,
    number,
    pretty,
    spoken,
)
from experiments.report.spec import StudySpec
from experiments.report.tables import Table, as_html

MOST_ROWS = 1000
"""Of the table of all results; the file results.csv, which the page holds too, has them all."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Shown:
    """What a page is made of.

    Attributes:
        study: What was asked for.
        text: Of its study.yaml.
        results: All rows.
        plots: The figures, each with its SVG; None where nothing was measured.
        tables: In order.
        folder: Of the study: for the pictures, and what the runs say of themselves.
    """

    study: StudySpec
    text: str
    results: Results
    plots: Sequence[tuple[Plot, str | None]]
    tables: Sequence[Table]
    folder: Path


def page(shown: Shown) -> str:
    """The report as HTML."""
    study = shown.study
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{study.name}: report"),
        tag("style", Html(_style())),
    )
    parts = [
        tag("h1", study.name.replace("_", " ")),
        *(tag("p", " ".join(text.split())) for text in study.description.split("\n\n") if text.strip()),
        *_warnings(shown),
    ]
    main = [
        _section("run", "What was run", _facts(shown)),
        _section("figures", "Figures", *([tag("div", *map(_figure, *_columns(shown)), class_="figures")]
                 if shown.plots else [])),
        _section("tables", "Tables", *map(as_html, shown.tables)),
        _section("pictures", "Poisons", *_pictures(shown)),
        _section("failed", "Failed cells", *_failures(shown)),
        _section("results", "All results", *_all_results(shown)),
    ]  # fmt: skip
    footer = tag("footer", "Written by ", tag("code", "lightning report"), f", pharmakon {_version()}.")
    body = tag("body", tag("header", *parts), tag("main", *main), footer)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en-GB')}\n"


def _columns(shown: Shown) -> tuple[list[Plot], list[str | None]]:
    return [plot for plot, _ in shown.plots], [svg for _, svg in shown.plots]


def _section(mark: str, title: str, *content: Html) -> Html | None:
    if not content:
        return None
    return tag("section", tag("h2", title, id=f"{mark}-title"), *content, id=mark, aria_labelledby=f"{mark}-title")


def _style() -> str:
    light, dark = ("".join(f" --{name}: {each[which]};" for name, each in COLOURS.items()) for which in (0, 1))
    colours = f":root {{{light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n"
    return colours + Path(__file__).with_name("style.css").read_text(encoding="utf-8")


# --- what was run ----------------------------------------------------------------------------------------------------
def _warnings(shown: Shown) -> list[Html]:
    found = []
    codes = Counter(row["code_hash"] for row in shown.results.finished if row.get("code_hash"))
    if len(codes) > 1:
        listed = ", ".join(f"{code[:12]} ({counted(n, 'row')})" for code, n in codes.most_common())
        found.append(f"These results were made with different versions of the code: {listed}.")
    cells = _by_status(shown.results)
    if cells["missing"]:
        found.append(f"The study is not finished: {counted(cells['missing'], 'cell')} of {sum(cells.values()):,} "
                     "not run yet.")  # fmt: skip
    if cells["failed"]:
        found.append(f"{counted(cells['failed'], 'cell')} of {sum(cells.values()):,} failed; the errors are below.")
    noted = Counter(note for row in shown.results.finished for note in (row.get("notes") or "").split("; ") if note)
    found += [f"{counted(n, 'row')}: {note}." for note, n in noted.most_common()]
    return [tag("p", text, class_="warning", role="note") for text in found]


def _by_status(results: Results) -> Counter[str]:
    """How many cells are finished, failed or missing."""
    return Counter({(row["stage"], row["cell"]): row["status"] for row in results.rows}.values())


def _facts(shown: Shown) -> Html:
    results = shown.results
    cells = _by_status(results)
    stages = Counter(stage for stage, _ in dict.fromkeys((row["stage"], row["cell"]) for row in results.rows))
    seeds = list(dict.fromkeys(row["seed"] for row in results.rows if row["seed"]))
    runs = [_json(path) for path in sorted((shown.folder / "cells").glob("*/metrics.json"))]
    devices = Counter(str(run["device"]) for run in runs if run.get("device"))
    threads = list(dict.fromkeys(row["threads"] for row in results.finished if row.get("threads")))
    listed = {
        "size": shown.study.size,
        "cells": ", ".join(f"{n:,} {status}" for status, n in sorted(cells.items(), key=lambda each: -each[1])),
        "stages": ", ".join(f"{stage} ({counted(n, 'cell')})" for stage, n in stages.items()),
        "seeds": ", ".join(seeds),
        "compute time": _duration(_seconds(results)) + ", the cells' own times added up",
        "device": ", ".join(f"{device} ({counted(n, 'cell')})" for device, n in devices.most_common()),
        "threads a process": ", ".join(threads),
        "finished": _dates(shown.folder),
        "versions": _versions(runs),
    }
    pairs = [part for name, text in listed.items() if text for part in (tag("dt", name), tag("dd", text))]
    return tag("dl", *pairs, class_="facts")


def _seconds(results: Results) -> float:
    """Of all cells; a cell of many rows has its time in each of them, or each row its own."""
    times: dict[str, list[float]] = {}
    for row in results.finished:
        if (seconds := number(row.get("seconds", ""))) is not None:
            times.setdefault(row["cell"], []).append(seconds)
    return sum(each[0] if len(set(each)) == 1 else sum(each) for each in times.values())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _dates(folder: Path) -> str:
    times = [path.stat().st_mtime for path in (folder / "cells").glob("*/metrics.json")]
    if not times:
        return ""
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) for at in (min(times), max(times)))
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def _versions(runs: Iterable[Mapping[str, Any]]) -> str:
    found: dict[str, list[str]] = {}
    for run in runs:
        for name, version in (run.get("versions") or {}).items():
            if version not in found.setdefault(str(name), []):
                found[str(name)].append(str(version))
    return ", ".join(f"{name} {' and '.join(each)}" for name, each in found.items())


def _json(path: Path) -> dict[str, Any]:
    """A run's own account of itself; empty if it cannot be read, for the numbers are in results.csv."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pharmakon")
    except PackageNotFoundError:
        return "(not installed)"


# --- figures ---------------------------------------------------------------------------------------------------------
def _figure(plot: Plot, svg: str | None) -> Html:
    spec = plot.spec
    title = tag("h3", spec.title)
    if svg is None:
        words = "; ".join(
            word for word in ("Nothing to draw: no finished cell has measured it", plot.left_out()) if word
        )
        return tag("figure", title, tag("p", f"{words}.", class_="empty"), id=f"figure-{spec.name}")
    text = "; ".join(_remarks(plot))
    theirs = [
        tag("li", tag("b", each.label), f" ({heading(each.y.text, spec.labels)}): {each.source}"
            + (f"; deviation: {each.deviation}" if each.deviation else ""))
        for each in spec.published
    ]  # fmt: skip
    below = [tag("p", "Hollow: published."), tag("ul", *theirs)] if theirs else []
    caption = tag("figcaption", tag("p", text[:1].upper() + text[1:] + "."), *below)
    return tag("figure", title, Html(svg), caption, _numbers(plot), id=f"figure-{spec.name}")


def _remarks(plot: Plot) -> list[str]:
    """What has to be known to read a figure."""
    share = plot.share
    words = [plot.how(), plot.shared, plot.images()]
    if plot.averaged:
        words.append(f"averaged over {', '.join(heading(key, plot.spec.labels) for key in plot.averaged)} too")
    widest = max((s.high - s.low for s in plot.summaries if s.interval), default=None)
    if plot.spec.kind == "heatmap" and widest is not None:
        words.append(f"the widest interval spans {in_figures(widest, share)}{' percentage points' if share else ''}")
    elif any(any(wraps(summary, share)) for summary in plot.summaries):
        words.append("an arrow: the interval goes on beyond 0 or 100 %; it is in the numbers in full")
    if plot.off_axis:
        words.append(f"not drawn, for it has no place on a logarithmic axis: {plot.x_label} {', '.join(plot.off_axis)}")
    return [word for word in (*words, plot.left_out()) if word]


def _numbers(plot: Plot) -> Html:
    """What a figure shows, as a table: a block for each line, and for what was published."""
    runs = any(summary.runs != summary.seeds for summary in plot.summaries)
    unit = " (%)" if plot.share else ""
    names = [plot.x_label, f"value{unit}", f"95 % interval{unit}", "n", "seeds", *(["runs"] if runs else [])]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    blocks = []
    for line in plot.lines:
        label = f"{plot.y2_label} {line.label}" if plot.spec.kind == "heatmap" else line.label
        rows = [[plot.point_label(x), *_summary(each, plot.share)][: len(names)] for x, each in line.points.items()]
        blocks.append(_block(label, rows))
    for each in plot.spec.published:
        values = [(f"{x}", f"{100 * value:.10g}" if plot.share else f"{value:.10g}") for x, value in each.points]
        rows = [[plot.point_label(x), value, *["–"] * (len(names) - 2)] for x, value in values]
        blocks.append(_block(f"{heading(each.y.text, plot.spec.labels)}, {each.label}", rows))
    label = f"Numbers of: {plot.spec.title}"
    table = tag("table", head, *blocks, class_="numbers")
    box = tag("div", table, class_="scroll", role="region", tabindex=0, aria_label=label)
    return tag("details", tag("summary", "The numbers"), box)


def _block(label: str, rows: Sequence[Sequence[str]]) -> Html:
    """Some rows of a table under a heading of their own."""
    lines = [tag("tr", tag("th", first, scope="row"), *(tag("td", text) for text in others)) for first, *others in rows]
    title = tag("tr", tag("th", label, scope="rowgroup", colspan=len(rows[0])))
    return tag("tbody", title, *lines)


def _summary(summary: Summary, share: bool) -> list[str]:
    interval = f"{in_figures(summary.low, share)} – {in_figures(summary.high, share)}" if summary.interval else "–"
    images = spoken(summary.cases) or "–"
    return [in_figures(summary.value, share), interval, images, f"{summary.seeds}", f"{summary.runs}"]


# --- pictures, failures, all results ---------------------------------------------------------------------------------
def _pictures(shown: Shown) -> list[Html]:
    found, seen = [], set()
    for row in shown.results.rows:
        path = shown.folder / "cells" / row["cell"] / "poisons.png"
        if not row["cell"] or row["cell"] in seen or "/" in row["cell"] or not path.is_file():
            continue
        seen.add(row["cell"])
        data = path.read_bytes()
        if not data.startswith(_PNG) or len(data) < 24:
            continue
        wide, high = struct.unpack(">II", data[16:24])
        words = _cell_in_words(shown, row)
        words = words[:1].upper() + words[1:]
        image = tag(
            "img",
            src=f"data:image/png;base64,{base64.b64encode(data).decode()}",
            alt=f"Training images before (clean) and after (poisoned), and the difference. {words}.",
            width=wide,
            height=high,
        )
        caption = f"{words}. Rows: clean, poisoned, difference – grey where nothing changed. Above: the labels."
        box = tag("div", image, class_="scroll", role="region", tabindex=0, aria_label=words)
        found.append(tag("figure", box, tag("figcaption", caption)))
    return [tag("div", *found, class_="pictures")] if found else []


def _failures(shown: Shown) -> list[Html]:
    failed = [row for row in shown.results.rows if row["status"] == "failed"]
    if not failed:
        return []
    head = tag("thead", tag("tr", tag("th", "cell", scope="col"), tag("th", "error, and the command", scope="col")))
    body = [
        tag("tr", tag("th", _cell_in_words(shown, row), scope="row"), tag("td", row.get("error"), _command(row)))
        for row in failed
    ]
    table = tag("table", head, tag("tbody", *body), class_="prose")
    return [tag("div", table, class_="scroll", role="region", tabindex=0, aria_labelledby="failed-title")]


def _cell_in_words(shown: Shown, row: Row) -> str:
    grid = shown.results.grid(shown.study, row["stage"])
    values = [f"{heading(key, {})} {pretty(row[key], {})}" for key in grid if row.get(key)]
    return ", ".join([f"stage {row['stage']}", *values, f"seed {row['seed']}", f"cell {row['cell']}"])


def _all_results(shown: Shown) -> list[Html]:
    found = []
    for stage in dict.fromkeys(row["stage"] for row in shown.results.rows):
        rows = [row for row in shown.results.rows if row["stage"] == stage]
        found.append(_stage_results(shown, stage, rows))
    source = base64.b64encode(shown.results.text.encode()).decode()
    link = tag("a", "results.csv", href=f"data:text/csv;charset=utf-8;base64,{source}", download="results.csv")
    words = join(["Every row with its command – a click selects it – and the hashes of its config, data, poisons, "
                  "weights and code. The same as a file: ", link, "."])  # fmt: skip
    study = tag("div", tag("pre", shown.text), class_="scroll", role="region", tabindex=0, aria_label="study.yaml")
    return [tag("p", words), *found, tag("details", tag("summary", "The study's YAML"), study)]


def _stage_results(shown: Shown, stage: str, rows: Sequence[Row]) -> Html:
    results = shown.results
    grid = _kept(results.grid(shown.study, stage), rows)
    measures = _kept(results.measures, rows)
    skipped = {*FIXED, *grid, *results.measures, *results.parts}
    others = _kept([name for name in results.columns if name not in skipped], rows)
    same = {name: found.pop() for name in others if len(found := {row.get(name, "") for row in rows} - {""}) == 1}
    others = [name for name in others if name not in same]
    extra = ["accepted"] if any(row.get("accepted") for row in rows) else []
    names = ["cell", "status", *(heading(key, {}) for key in grid), "seed"]
    names += [heading(name, {}) + (" (%)" if name in results.shares else "") for name in measures]
    names += [heading(name, {}) for name in (*extra, *others)] + ["seconds"]
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    body = []
    for row in rows[:MOST_ROWS]:
        values: list[str | Html] = [row["status"], *(pretty(row[key], {}) for key in grid), row["seed"]]
        values += [_measured(row, name, name in results.shares) for name in measures]
        values += [_brief(row.get(name, "")) for name in (*extra, *others)] + [row.get("seconds", "")]
        first = tag("th", tag("code", row["cell"]), scope="row", data_label="cell")
        rest = [
            tag(
                "td", value, data_label=name, class_="long" if len(value) > 40 and not isinstance(value, Html) else None
            )
            for name, value in zip(names[1:], values, strict=True)
        ]
        hashes = [tag("span", f"{name.removesuffix('_hash')} ", tag("code", row[name][:16], title=row[name]))
                  for name in HASHES if row.get(name)]  # fmt: skip
        trace = tag("div", _command(row), tag("div", *hashes, class_="hashes") if hashes else None)
        body += [tag("tr", first, *rest, class_="row"), tag("tr", tag("td", trace, colspan=len(names)), class_="trace")]
    left = f"; the first {MOST_ROWS:,} are shown, results.csv has all" if len(rows) > MOST_ROWS else ""
    words = f"Stage {stage}: {counted(len(rows), 'row')}{left}"
    box = tag(
        "div", tag("table", head, tag("tbody", *body)), class_="scroll all", role="region", tabindex=0, aria_label=words
    )
    alike = "; ".join(f"{heading(name, {})} {_brief(text)}" for name, text in same.items())
    return tag("details", tag("summary", words), tag("p", f"In all rows: {alike}.") if alike else None, box)


def _measured(row: Row, name: str, share: bool) -> Html:
    value = number(row.get(name, ""))
    if value is None:
        return tag("span", "–")
    low, high = (number(row.get(f"{name}.{part}", "")) for part in ("low", "high"))
    n = number(row.get(f"{name}.n", ""))
    more = [f"{in_figures(low, share)} – {in_figures(high, share)}"] if low is not None and high is not None else []
    more += [f"n = {int(n):,}"] if n else []
    return join([in_figures(value, share), tag("small", ", ".join(more)) if more else None])


def _command(row: Row) -> Html | None:
    if not row.get("command"):
        return None
    words = [tag("span", word) for word in row["command"].split(" ")]
    return tag("code", join(words, " "), class_="copy")


def _brief(text: str) -> str:
    value = number(text)
    return text if value is None else f"{value:.6g}"


def _kept(names: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """The columns in which some row has something, each once."""
    return [name for name in dict.fromkeys(names) if any(row.get(name) for row in rows)]
