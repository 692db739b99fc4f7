"""A study's tables: our values with their intervals beside the published ones, as HTML, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.markup import Html, join, tag
from experiments.report.plots import cells, how, left_out, shared
from experiments.report.results import (
    TEST_IMAGES,
    Results,
    Row,
    Summary,
    averaged_over,
    canonical,
    gained,
    grouped,
    heading,
    in_figures,
    is_one_of,
    number,
    pretty,
    reached,
    spoken,
    summarise,
)
from experiments.report.spec import PublishedEntry, Quantity, StudySpec, TableSpec


@dataclass(frozen=True)
class Entry:
    """What stands at one place of a table.

    Attributes:
        text: The value.
        plus: Half the width of a symmetric interval, or empty.
        interval: Both ends, or empty.
        more: What HTML has room for: the number of cases.
        note: The letter of a note.
    """

    text: str
    plus: str = ""
    interval: str = ""
    more: str = ""
    note: str = ""

    @property
    def plain(self) -> str:
        """In one line."""
        shown = f"{self.text} ± {self.plus}" if self.plus else self.text
        shown = f"{shown} ({self.interval})" if self.interval and not self.plus else shown
        return f"{shown} [{self.note}]" if self.note else shown


@dataclass(frozen=True)
class Table:
    """A table with its numbers, ready to be written.

    Attributes:
        spec: What was asked for.
        keys: The headings of the columns that make a row.
        headings: Of the other columns.
        rows: For each row the texts of its keys and its entries.
        notes: Letter → where a published value is from, and what was done in another way there.
        remarks: What the values are.
    """

    spec: TableSpec
    keys: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Entry, ...]], ...]
    notes: dict[str, str]
    remarks: tuple[str, ...]


def table(spec: TableSpec, study: StudySpec, results: Results) -> Table:
    """The numbers of a table.

    Args:
        spec: The table.
        study: It belongs to.
        results: Of that study; `check` has seen that the columns are there.
    """
    chosen = results.select(spec.stages, spec.where)
    groups = grouped(chosen, spec.rows)
    letters = {index: _letter(index) for index in range(len(spec.published))}
    published = {of.text for of in spec.columns if any(of.text in each.values for each in spec.published)}
    headings: list[str] = []
    for of in spec.columns:
        unit = " (%)" if results.is_share(of) else ""
        headings.append(heading(of.text, spec.labels) + unit)
        if of.text in published:
            headings.append(f"published{unit}")
    if spec.reach is not None:
        of, share = spec.reach.of, results.is_share(spec.reach.of)
        measure = heading(of.text, spec.labels)
        for level in spec.reach.levels:
            shown = f"{100 * level:.10g} %" if share else f"{level:.10g}"
            headings.append(f"{heading(spec.reach.along, spec.labels)} to {shown} {measure}")
    if spec.gain is not None:
        over = ", ".join(pretty(str(value), spec.labels) for value in spec.gain.over.values())
        for of in spec.gain.of:
            unit = " (points)" if results.is_share(of) else ""
            headings.append(f"gain in {heading(of.text, spec.labels)} over {over}{unit}")
    rows, used, all_summaries = [], set(), []
    for key, members in groups.items():
        entries: list[Entry] = []
        for of in spec.columns:
            share = results.is_share(of)
            if of.column in ("accepted",) or _is_text(of, results):
                entries.append(_words(of, members))
            else:
                summary = summarise(members, of, share)
                all_summaries.append(summary)
                entries.append(_entry(summary, share))
            if of.text in published:
                theirs = [
                    (index, each.values[of.text])
                    for index, each in enumerate(spec.published)
                    if of.text in each.values and _agrees(each, spec.rows, members[0])
                ]
                used |= {index for index, _ in theirs}
                entries.append(_published(theirs, share, letters))
        entries += _reached(spec, members)
        for of in spec.gain.of if spec.gain is not None else ():
            others = grouped(_compared(spec, members[0], chosen), spec.rows)
            summary = gained(members, next(iter(others.values()), []), of)
            entries.append(Entry("–") if members in others.values() else _entry(summary, results.is_share(of)))
        entries.append(_seeds(members))
        rows.append((tuple(pretty(text, spec.labels) for text in key), tuple(entries)))
    means = spec.columns or spec.gain  # what is needed for a level is no mean
    keys = [key for key in results.grid(study, *spec.stages) if key not in spec.rows] if means else []
    averaged = averaged_over(groups.values(), keys)
    return Table(
        spec=spec,
        keys=tuple(heading(key, spec.labels) for key in spec.rows),
        headings=(*headings, "seeds"),
        rows=tuple(rows),
        notes={letters[index]: _source(each) for index, each in enumerate(spec.published) if index in used},
        remarks=_remarks(spec, results, chosen, all_summaries, averaged, used, shared(spec, study, all_summaries)),
    )


def _reached(spec: TableSpec, members: Sequence[Row]) -> list[Entry]:
    """How much was needed for each level; where it was not reached, the most that was tried."""
    found = []
    for level in spec.reach.levels if spec.reach is not None else ():
        assert spec.reach is not None
        value, enough = reached(members, spec.reach.of, spec.reach.along, level)
        text = "–" if value is None else in_figures(value, False)
        found.append(Entry(text if enough or value is None else f"not reached ({text})"))
    return found


def _compared(spec: TableSpec, member: Row, chosen: Sequence[Row]) -> list[Row]:
    """The rows that a row's gain is over."""
    assert spec.gain is not None
    same = [key for key in spec.rows if key not in spec.gain.over]
    return [
        row
        for row in chosen
        if all(is_one_of(row.get(key, ""), value) for key, value in spec.gain.over.items())
        and all(canonical(row.get(key, "")) == canonical(member.get(key, "")) for key in same)
    ]


def _entry(summary: Summary, share: bool) -> Entry:
    if not summary.runs:
        return Entry("–")
    value, low, high = (in_figures(each, share) for each in (summary.value, summary.low, summary.high))
    known = not math.isnan(summary.low) and not math.isnan(summary.high)
    known = known and (share or summary.low < summary.high)  # a fact that is the same in all runs has no interval
    n = spoken(summary.cases)
    return Entry(
        text=value,
        plus=in_figures(summary.high - summary.value, share) if known and summary.interval == "t" else "",
        interval=f"{low} – {high}" if known else "",
        more=f"n = {n}" if n else "",
    )


def _words(of: Quantity, members: Sequence[Row]) -> Entry:
    """What is no number: how often the gate accepted; the different values of anything else."""
    texts = [row[of.column] for row in members if row["status"] == "finished" and row.get(of.column)]
    if not texts:
        return Entry("–")
    if of.column == "accepted":
        return Entry(f"{sum(text == 'true' for text in texts)} of {len(texts)}")
    return Entry(", ".join(pretty(text, {}) for text in dict.fromkeys(texts)))


def _published(theirs: Sequence[tuple[int, float]], share: bool, letters: dict[int, str]) -> Entry:
    if not theirs:
        return Entry("–")
    values = [f"{100 * value:.10g}" if share else f"{value:.10g}" for _, value in theirs]
    return Entry(", ".join(values), note=", ".join(letters[index] for index, _ in theirs))


def _seeds(members: Sequence[Row]) -> Entry:
    """How many seeds are behind a row, and how many of its cells have no result."""
    done = len({row["seed"] for row in members if row["status"] == "finished"})
    words = [f"{cells(members, status)} {status}" for status in ("failed", "missing") if cells(members, status)]
    return Entry(f"{done} ({', '.join(words)})" if words else f"{done}")


def _remarks(
    spec: TableSpec,
    results: Results,
    chosen: Sequence[Row],
    summaries: Sequence[Summary],
    averaged: Sequence[str],
    used: set[int],
    same: str,
) -> tuple[str, ...]:
    remarks = [how(summaries)] if any(summary.runs for summary in summaries) else []
    remarks += [same] if same else []
    counts: dict[str, list[str]] = {}
    for of in spec.columns:
        known = [int(n) for row in chosen if (n := number(row.get(f"{of.column}.n", ""))) is not None]
        if known:
            unit = next((row[f"{of.column}.unit"] for row in chosen if row.get(f"{of.column}.unit")), TEST_IMAGES)
            counts.setdefault(unit, []).append(f"{heading(of.text, spec.labels)} {spoken((min(known), max(known)))}")
    remarks += [f"{unit} a run: {', '.join(named)}" for unit, named in counts.items()]
    if spec.reach is not None:
        remarks.append(
            f"{heading(spec.reach.along, spec.labels)}: the least of those tried at which the mean over seeds is so "
            f"much; not reached: in brackets the most that was tried"
        )
    if spec.gain is not None:
        remarks.append("gain: the mean difference of the same seeds, with Student's t 95 % interval")
    if averaged:
        remarks.append(f"averaged over {', '.join(heading(key, spec.labels) for key in averaged)} too")
    out = left_out(cells(chosen, "failed"), cells(chosen, "missing"))
    remarks += [out] if out else []
    for index, each in enumerate(spec.published):
        if index not in used:
            values = ", ".join(
                f"{heading(name, spec.labels)} {f'{100 * v:.10g} %' if name in _shares(spec, results) else f'{v:.10g}'}"
                for name, v in each.values.items()
            )
            where = ", ".join(f"{heading(key, spec.labels)} {value}" for key, value in each.where.items())
            remarks.append(f"published, not run here: {where + ': ' if where else ''}{values}; {_source(each)}")
    return tuple(remarks)


def _shares(spec: TableSpec, results: Results) -> set[str]:
    return {of.text for of in spec.columns if results.is_share(of)}


def _agrees(entry: PublishedEntry, rows: Sequence[str], member: Row) -> bool:
    return all(is_one_of(member.get(key, ""), value) for key, value in entry.where.items() if key in rows)


def _source(entry: PublishedEntry) -> str:
    return f"{entry.source}; deviation: {entry.deviation}" if entry.deviation else entry.source


def _is_text(of: Quantity, results: Results) -> bool:
    texts = [row[of.column] for row in results.finished if row.get(of.column)]
    return bool(texts) and any(number(text) is None for text in texts)


def _letter(index: int) -> str:
    """The letter of a note: a to z, then aa, ab and so on."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[index % 26]


# --- as HTML ---------------------------------------------------------------------------------------------------------
def as_html(shown: Table) -> Html:
    """A table in a box of its own, which scrolls where the page is narrow."""
    names = [tag("th", name, scope="col", class_="text") for name in shown.keys]
    names += [tag("th", name, scope="col") for name in shown.headings]
    head, body = tag("thead", tag("tr", *names)), []
    for keys, entries in shown.rows:
        first = [tag("th", key, scope="row") for key in keys]
        body.append(tag("tr", *first, *(tag("td", _entry_html(entry)) for entry in entries)))
    below = [tag("p", _sentence(shown.remarks), class_="remarks")] if shown.remarks else []
    if shown.notes:
        items = [tag("li", tag("b", letter), " ", text) for letter, text in shown.notes.items()]
        below.append(tag("ul", *items, class_="notes"))
    title = f"table-{shown.spec.name}"
    box = tag(
        "div",
        tag("table", head, tag("tbody", *body)),
        class_="scroll",
        role="region",
        tabindex=0,
        aria_labelledby=title,
    )
    return tag("section", tag("h3", shown.spec.title, id=title), box, *below, class_="table")


def _entry_html(entry: Entry) -> Html:
    shown = join([entry.text, f" ± {entry.plus}" if entry.plus else None], "")
    note = tag("sup", entry.note) if entry.note else None
    small = ", ".join(part for part in (entry.interval, entry.more) if part)
    return join([shown, note, tag("small", small) if small else None])


# --- as files --------------------------------------------------------------------------------------------------------
def as_markdown(shown: Table) -> str:
    """A table as GitHub's Markdown."""
    names = [*shown.keys, *shown.headings]
    lines = [f"**{_markdown(shown.spec.title)}**", ""]
    lines.append(f"| {' | '.join(map(_markdown, names))} |")
    lines.append(f"|{'|'.join([' --- '] * len(shown.keys) + [' ---: '] * len(shown.headings))}|")
    for keys, entries in shown.rows:
        lines.append(f"| {' | '.join(_markdown(text) for text in [*keys, *(entry.plain for entry in entries)])} |")
    if shown.remarks:
        lines += ["", _markdown(_sentence(shown.remarks))]
    if shown.notes:
        lines.append("")
        lines += [f"- [{letter}] {_markdown(text)}" for letter, text in shown.notes.items()]
    return "\n".join(lines) + "\n"


def as_latex(shown: Table) -> str:
    """A table as LaTeX with booktabs."""
    names = [_stacked(name, "l") for name in shown.keys] + [_stacked(name, "r") for name in shown.headings]
    lines = [
        "% written by lightning report; needs \\usepackage{booktabs}",
        "\\begin{table}",
        "  \\centering\\small\\setlength{\\tabcolsep}{4pt}",
        f"  \\caption{{{_latex(shown.spec.title)}}}",
        f"  \\label{{tab:{shown.spec.name.replace('_', '-')}}}",
        f"  \\begin{{tabular}}{{{'l' * len(shown.keys)}{'r' * len(shown.headings)}}}",
        "    \\toprule",
        f"    {' & '.join(names)} \\\\",
        "    \\midrule",
    ]
    for keys, entries in shown.rows:
        lines.append(f"    {' & '.join([*map(_latex, keys), *map(_latex_entry, entries)])} \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}"]
    below = [_latex(_sentence(shown.remarks))] if shown.remarks else []
    below += [f"\\textsuperscript{{{letter}}} {_latex(text)}" for letter, text in shown.notes.items()]
    if below:
        lines.append("")
        lines += [f"  \\par\\smallskip\\footnotesize {text}" for text in below]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _stacked(text: str, side: str) -> str:
    """A heading in lines of its own, for a page is narrow."""
    lines = [_latex(line) for line in textwrap.wrap(text, 16)]
    joined = " \\\\ ".join(lines)
    return f"\\shortstack[{side}]{{{joined}}}" if len(lines) > 1 else joined


def _latex_entry(entry: Entry) -> str:
    note = f"\\textsuperscript{{{entry.note}}}" if entry.note else ""
    return _latex(Entry(entry.text, entry.plus, entry.interval).plain) + note


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(part for part in parts if part)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _markdown(text: str) -> str:
    """Text with nothing in it that Markdown, or the HTML within it, would take for its own."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "→": r"$\rightarrow$",
    "≤": r"$\leq$", "≥": r"$\geq$", "≠": r"$\neq$", "≈": r"$\approx$", "∞": r"$\infty$", "·": r"$\cdot$",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "ε": r"$\varepsilon$", "λ": r"$\lambda$", "μ": r"$\mu$",
    "σ": r"$\sigma$", "τ": r"$\tau$", "ℓ": r"$\ell$", "∈": r"$\in$", "…": r"\ldots{}", "“": "``", "”": "''",
}  # fmt: skip


def _latex(text: str) -> str:
    """Text with nothing in it that LaTeX would take for its own, nor for an option of the line's end before it."""
    shown = "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
    return "{[}" + shown[1:] if shown.startswith("[") else shown
