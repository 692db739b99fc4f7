"""The rows of a study, and what they come to over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import InputError, did_you_mean
from experiments.report.spec import FigureSpec, Quantity, StudySpec, TableSpec, quantity

if TYPE_CHECKING:  # it brings torch, which a report needs for its intervals alone
    from datamodules.measures import Interval

Row = Mapping[str, str]

TEST_IMAGES = "test images"
"""What a measure's cases are where its row does not say."""

DIFFERENCE = "_drop"
"""How the names of measures end that are differences in percentage points, and no shares."""

HASHES = ("config_hash", "data_hash", "poison_hash", "weights_hash", "code_hash")
FIXED = (
    "study",
    "size",
    "stage",
    "cell",
    "status",
    "error",
    "seed",
    "accepted",
    "notes",
    *HASHES,
    "threads",
    "seconds",
    "command",
)
"""The columns that every study has."""

_NEEDED = ("stage", "cell", "status", "seed")


@dataclass(frozen=True)
class Summary:
    """What some rows come to in one quantity.

    Attributes:
        value: The mean; NaN if nothing was measured.
        low: Of the 95 % interval; NaN if there is none.
        high: The same.
        runs: Rows behind it.
        seeds: Different seeds among them.
        cases: Least and most cases of a row; None if that is not known.
        interval: ``t``: Student's over `over`; ``wilson``: of the one run, or of the cases of several where that is
            wider; ``paired``: of the one run, a difference's; empty: none.
        over: ``seeds``, or ``runs`` where all have the same seed.
        unit: What the cases are.
    """

    value: float
    low: float
    high: float
    runs: int
    seeds: int
    cases: tuple[int, int] | None
    interval: str
    over: str = "seeds"
    unit: str = TEST_IMAGES


@dataclass(frozen=True)
class Results:
    """A study's results.csv.

    Attributes:
        columns: Their names, in order.
        rows: Column → text; empty where there is nothing.
        text: The file.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    text: str = ""

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The columns that have an interval and a number of cases beside them."""
        there = set(self.columns)
        return tuple(name for name in self.columns if {f"{name}.low", f"{name}.high", f"{name}.n"} <= there)

    @cached_property
    def shares(self) -> frozenset[str]:
        """The measures that are shares of cases: each has an interval wherever it was measured."""
        found = set()
        for name in self.measures:
            rows = [row for row in self.finished if number(row[name]) is not None]
            values = [[number(row[column]) for column in (name, f"{name}.low", f"{name}.high")] for row in rows]
            if name.endswith(DIFFERENCE):
                continue
            if rows and all(None not in each and 0 <= (each[0] or 0) <= 1 for each in values):
                found.add(name)
        return frozenset(found)

    @cached_property
    def finished(self) -> tuple[Row, ...]:
        """The rows of cells that have a result."""
        return tuple(row for row in self.rows if row["status"] == "finished")

    @cached_property
    def parts(self) -> frozenset[str]:
        """The columns that go with a measure."""
        return frozenset(f"{name}.{part}" for name in self.measures for part in ("low", "high", "n", "unit"))

    def grid(self, study: StudySpec, *stages: str) -> tuple[str, ...]:
        """The columns in which the cells of some stages were made to differ, apart from the seed."""
        keys = dict.fromkeys(key for stage in stages for key in study.grids.get(stage, ()))
        if keys:
            return tuple(key for key in keys if key in self.columns)
        others = {*FIXED, *self.measures, *self.parts}
        return tuple(name for name in self.columns if name not in others and not name.startswith("fact."))

    def select(self, stages: Collection[str], where: Mapping[str, Any]) -> list[Row]:
        """The rows of some stages that have the wanted values, finished or not."""
        return [
            row
            for row in self.rows
            if row["stage"] in stages and all(is_one_of(row.get(key, ""), value) for key, value in where.items())
        ]

    def is_share(self, of: Quantity) -> bool:
        """Whether it is shown in per cent."""
        return of.column in self.shares


def read_results(folder: Path) -> Results:
    """Read a study's results.csv.

    Raises:
        InputError: If it is not there, or is no such table.
    """
    path = folder / "results.csv"
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text), restkey="", restval="", strict=True)
        rows = tuple({key: value or "" for key, value in row.items()} for row in reader)
        columns = tuple(reader.fieldnames or ())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no results.csv is in it yet; run the study first: lightning study") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: it cannot be read as a table ({error})") from error
    for name in _NEEDED:
        if name not in columns:
            raise InputError(f"{path}: the column {name!r} is missing; let `lightning study` write the file again")
    if not rows:
        raise InputError(f"{path}: it has no rows yet; run the study first: lightning study")
    if any("" in row for row in rows):
        raise InputError(f"{path}: a row has more values than there are columns; let `lightning study` write it again")
    return Results(columns, rows, text)


def check(study: StudySpec, results: Results) -> None:
    """See that the columns which figures and tables name are there.

    A stage without one finished cell has no measures yet; what is asked of it is let through.

    Raises:
        InputError: If a column is not there; it suggests the nearest.
    """
    specs: list[tuple[str, FigureSpec | TableSpec]] = [(f"figures.{each.name}", each) for each in study.figures]
    specs += [(f"tables.{each.name}", each) for each in study.tables]
    for where, spec in specs:
        stages = {row["stage"] for row in results.rows} | set(study.grids)
        for stage in spec.stages:
            if stage not in stages:
                raise InputError(
                    f"{where}.stage = {stage!r}: the study has {', '.join(sorted(stages))}{did_you_mean(stage, stages)}"
                )
        if not any(row["stage"] in spec.stages for row in results.finished):
            continue
        for key, column in _columns_of(spec):
            if column not in results.columns:
                shown = [name for name in results.columns if name not in results.parts]
                hint = did_you_mean(column, shown) or f"; there are {', '.join(results.measures)}"
                raise InputError(f"{where}.{key} = {column!r}: results.csv has no such column{hint}")
        quantities = spec.y if isinstance(spec, FigureSpec) else ()
        for of in quantities:
            texts = [row[of.column] for row in results.finished if row["stage"] in spec.stages and row[of.column]]
            if texts and all(number(text) is None for text in texts):
                raise InputError(f"{where}.y = {of.column!r}: its values are no numbers, such as {texts[0]!r}")
        if isinstance(spec, FigureSpec) and spec.x_scale == "log":
            for row in results.select(spec.stages, spec.where):
                if row["status"] == "finished" and number(row[spec.x]) is None:
                    raise InputError(f"{where}.x_scale = 'log': {spec.x} is {row[spec.x]!r}, which is no number")
        if len({results.is_share(of) for of in quantities if _measured(of, results)}) > 1:
            raise InputError(f"{where}.y: shares and other numbers have no axis in common; make two figures of them")


def _columns_of(spec: FigureSpec | TableSpec) -> list[tuple[str, str]]:
    found = [("where." + key, key) for key in spec.where]
    if isinstance(spec, TableSpec):
        found += [*(("rows", key) for key in spec.rows), *(("columns", q.column) for q in spec.columns)]
        if spec.reach is not None:
            found += [("reach.of", spec.reach.of.column), ("reach.along", spec.reach.along)]
        return found + ([("gain.of", q.column) for q in spec.gain.of] if spec.gain is not None else [])
    optional = [("series", spec.series), ("y2", spec.y2)]
    found += [(key, column) for key, column in optional if column is not None]
    return [*found, ("x", spec.x), *(("y", q.column) for q in spec.y)]


def _measured(of: Quantity, results: Results) -> bool:
    return any(number(row.get(of.column, "")) is not None for row in results.finished)


# --- over seeds ------------------------------------------------------------------------------------------------------
def summarise(rows: Iterable[Row], of: Quantity, share: bool) -> Summary:
    """The mean of some rows with its 95 % interval.

    Several seeds: Student's t over the seeds; rows that share a seed are averaged first, for they are not independent.
    One seed and several cells: t over the cells; rows of one cell share its models, and have no interval. One row: the
    interval of that run, Wilson's, if it is a share. Seeds that happen to agree are no certainty: where the interval of
    a share's cases is wider than Student's, it is that one.

    Args:
        rows: Those that are not finished are left out.
        of: What to average.
        share: Whether it is a share.
    """
    from datamodules.measures import over_seeds

    by_seed: dict[str, list[float]] = {}
    used: list[Row] = []
    for row in rows:
        value = number(row.get(of.column, ""))
        if row["status"] == "finished" and value is not None:
            by_seed.setdefault(row["seed"], []).append(1 - value if of.complement else value)
            used.append(row)
    cases = [int(n) for row in used if (n := number(row.get(f"{of.column}.n", ""))) is not None]
    counted = (min(cases), max(cases)) if cases else None
    unit = next((row[f"{of.column}.unit"] for row in used if row.get(f"{of.column}.unit")), TEST_IMAGES)
    if len(used) == 1:
        row = used[0]
        low, high = (number(row.get(f"{of.column}.{part}", "")) for part in ("low", "high"))
        if of.complement:
            low, high = (None if high is None else 1 - high), (None if low is None else 1 - low)
        value = next(iter(by_seed.values()))[0]
        kind = "" if low is None or high is None else "wilson" if share else "paired"
        return Summary(value, _or_nan(low), _or_nan(high), 1, 1, counted, kind, unit=unit)
    groups, over = list(grouped(used, ["seed"]).values()), "seeds"
    if len(groups) == 1:
        groups, over = list(grouped(used, ["cell"]).values()), "runs"
    values = [_mean(group, of) for group in groups]
    found, kind = over_seeds(values), "t"
    if len(values) < 2:
        found, kind = replace(found, low=math.nan, high=math.nan), ""
    elif share and len(cases) == len(used):
        least = _of_cases(groups, of, values, unit)
        if least.high - least.low > found.high - found.low:
            found, kind = least, "wilson"
    return Summary(found.value, found.low, found.high, len(used), len(by_seed), counted, kind, over, unit)


def _mean(rows: Sequence[Row], of: Quantity) -> float:
    value = math.fsum(float(row[of.column]) for row in rows) / len(rows)
    return 1 - value if of.complement else value


def _of_cases(groups: Sequence[Sequence[Row]], of: Quantity, values: Sequence[float], unit: str) -> Interval:
    """The interval of a mean of shares for its cases: of one run, where all runs have the same, or of all of them."""
    from datamodules.measures import SAME, clustered, wilson

    counts = [[float(row[f"{of.column}.n"]) for row in group] for group in groups]
    mean = math.fsum(values) / len(values)
    if unit in SAME:
        least = min(min(each) for each in counts)
        return replace(wilson(mean * least, least), value=mean)
    cases = [math.fsum(each) / len(each) for each in counts]
    hits = [value * n for value, n in zip(values, cases, strict=True)]
    return replace(clustered(hits, cases), value=mean)


def reached(rows: Iterable[Row], of: Quantity, along: str, level: float) -> tuple[float | None, bool]:
    """The least value of `along` at which the mean of `of` over seeds is `level` or more.

    Returns:
        That value and True; or the largest that was tried and False. None if nothing was measured.
    """
    most: float | None = None
    by_value = grouped((row for row in rows if number(row.get(along, "")) is not None), [along])
    for text in ordered(key for (key,) in by_value):
        summary = summarise(by_value[(text,)], of, False)
        if summary.runs:
            most = float(text)
            if summary.value >= level - 1e-9:  # a mean of shares is rounded
                return most, True
    return most, False


def gained(rows: Iterable[Row], others: Iterable[Row], of: Quantity) -> Summary:
    """The mean difference to other rows over the seeds that both have, with Student's t interval of the pairs.

    Differences that happen to be all the same have none.
    """
    from datamodules.measures import over_seeds

    def by_seed(some: Iterable[Row]) -> dict[tuple[str, ...], Summary]:
        found = {seed: summarise(each, of, False) for seed, each in grouped(some, ["seed"]).items()}
        return {seed: summary for seed, summary in found.items() if summary.runs}

    mine, theirs = by_seed(rows), by_seed(others)
    found = over_seeds([mine[seed].value - theirs[seed].value for seed in mine if seed in theirs])
    known = "t" if found.n > 1 and found.low < found.high else ""
    ends = (found.low, found.high) if known else (math.nan, math.nan)
    return Summary(found.value, *ends, found.n, found.n, None, known)


def grouped(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their values in some columns, in the order in which these appear."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(canonical(row.get(column, "")) for column in columns), []).append(row)
    return groups


def averaged_over(groups: Iterable[Sequence[Row]], grid: Sequence[str]) -> list[str]:
    """The grid's columns that differ within a group: what the mean is taken over, apart from the seed."""
    listed = [list(group) for group in groups]
    return [key for key in grid if any(len({canonical(row.get(key, "")) for row in group}) > 1 for group in listed)]


# --- values ----------------------------------------------------------------------------------------------------------
def number(text: str) -> float | None:
    """The number that a text is; None if it is none, or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def canonical(text: str) -> str:
    """One text for each value: ``0.10`` and ``1e-1`` are ``0.1``."""
    value = number(text)
    return text if value is None else f"{value:.12g}"


def ordered(texts: Iterable[str]) -> list[str]:
    """Each once: numbers by size, or in the order of appearance if one is no number."""
    found = list(dict.fromkeys(texts))
    return sorted(found, key=float) if all(number(text) is not None for text in found) else found


def is_one_of(text: str, wanted: Any) -> bool:
    """Whether a value of the table is the one that a YAML names, or one of several."""
    if isinstance(wanted, list) and any(is_one_of(text, each) for each in wanted):
        return True
    if wanted is None:
        return text in ("", "null")
    if isinstance(wanted, bool):
        return text.lower() == str(wanted).lower()
    if isinstance(wanted, list | dict):
        try:
            return bool(json.loads(text) == wanted)
        except ValueError:
            return False
    return canonical(text) == canonical(str(wanted))


def pretty(text: str, labels: Mapping[str, str]) -> str:
    """What the reader sees of a value: its label; a class's bare name with its arguments; or the value."""
    for key, label in labels.items():
        if canonical(key) == canonical(text):
            return label
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except ValueError:
            return text
        if isinstance(content, dict) and isinstance(content.get("class_path"), str):
            more = content.get("init_args") or {}
            inside = ", ".join(f"{key} {value}" for key, value in more.items()) if isinstance(more, dict) else ""
            name = content["class_path"].rsplit(".", 1)[-1]
            return f"{name} ({inside})" if inside else name
    return text or "none"


def heading(column: str, labels: Mapping[str, str]) -> str:
    """What the reader sees of a quantity or a column: ``1 - clean_accuracy`` is the clean error."""
    if column in labels:
        return labels[column]
    of = quantity(column)
    words = of.column.removeprefix("fact.").rsplit(".", 1)[-1].replace("_", " ")
    if not of.complement:
        return words
    return words.removesuffix("accuracy") + "error" if words.endswith("accuracy") else f"1 − {words}"


def in_figures(value: float, share: bool) -> str:
    """A value as it is shown, without its unit."""
    if math.isnan(value):
        return "–"
    if share:
        text = f"{100 * value:.2f}"
    elif value == round(value) or abs(value) >= 10_000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−")


def spoken(cases: tuple[int, int] | None) -> str:
    """``9,020``, or ``445–9,020``; empty if it is not known."""
    if cases is None:
        return ""
    low, high = cases
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def counted(n: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
