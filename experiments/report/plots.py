"""What a figure shows: its lines of means with intervals, what others published, and the words that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.errors import bad
from experiments.report.results import (
    TEST_IMAGES,
    Results,
    Row,
    Summary,
    averaged_over,
    canonical,
    counted,
    grouped,
    heading,
    is_one_of,
    number,
    ordered,
    pretty,
    spoken,
    summarise,
)
from experiments.report.spec import FigureSpec, PublishedPoints, Quantity, StudySpec, TableSpec


@dataclass(frozen=True)
class Line:
    """One quantity of one series along x.

    Attributes:
        label: What the reader sees.
        of: The quantity.
        series: The value of the series; None without series.
        points: x → what was measured there, in order.
    """

    label: str
    of: Quantity
    series: str | None
    points: dict[str, Summary]

    @property
    def cases(self) -> tuple[int, int] | None:
        """Least and most cases of a point."""
        return _widest(list(self.points.values()))


@dataclass(frozen=True)
class Plot:
    """A figure with its numbers.

    Attributes:
        spec: What was asked for.
        lines: Those that have a point; a heatmap has one for each row of it.
        share: Whether values are shares, shown in per cent.
        x_share: Whether those along x are.
        failed: Cells among those asked for that failed.
        missing: Cells that have not run.
        averaged: Columns of the grid over which the mean is taken as well.
        shared: What all seeds have in common, in words.
    """

    spec: FigureSpec
    lines: tuple[Line, ...]
    share: bool
    failed: int
    missing: int
    averaged: tuple[str, ...]
    x_share: bool = False
    shared: str = ""

    @property
    def xs(self) -> list[str]:
        """All x that were measured."""
        return ordered(x for line in self.lines for x in line.points)

    @property
    def summaries(self) -> list[Summary]:
        """All that is drawn."""
        return [summary for line in self.lines for summary in line.points.values()]

    @property
    def x_label(self) -> str:
        """Of the axis."""
        return self.spec.x_label or heading(self.spec.x, self.spec.labels) + (" (%)" if self.x_share else "")

    @property
    def y2_label(self) -> str:
        """Of a heatmap's other axis."""
        return self.spec.y2_label or heading(self.spec.y2 or "", self.spec.labels)

    @property
    def y_label(self) -> str:
        """Of the axis, with its unit; of a heatmap's colours."""
        names = [heading(of.text, self.spec.labels) for of in self.spec.y]
        return self.spec.y_label or ", ".join(dict.fromkeys(names)) + (" (%)" if self.share else "")

    @property
    def categories(self) -> list[str] | None:
        """The x in order where they are names and not positions on an axis; None where they are numbers."""
        xs = ordered([*self.xs, *(published_x(x) for each in self.spec.published for x, _ in each.points)])
        by_name = self.spec.kind not in ("line", "points") or any(number(x) is None for x in self.xs)
        return xs if by_name else None

    @property
    def off_axis(self) -> list[str]:
        """The x that have no place on a logarithmic axis."""
        logarithmic = self.spec.x_scale == "log" and self.categories is None
        return [x for x in self.xs if logarithmic and float(x) <= 0]

    def point_label(self, x: str) -> str:
        """What the reader sees of an x."""
        if self.x_share and number(x) is not None:
            return f"{100 * float(x):.2f}"
        return pretty(x, self.spec.labels)

    def how(self) -> str:
        """What the values and the intervals are, in one line."""
        return how(self.summaries)

    def images(self) -> str:
        """How many cases are behind a run, and what they are."""
        known: dict[str, dict[str, str]] = {}
        for of in self.spec.y:
            some = [summary for line in self.lines if line.of == of for summary in line.points.values()]
            if (cases := _widest(some)) is not None:
                known.setdefault(units(some), {})[heading(of.text, self.spec.labels)] = spoken(cases)
        parts = []
        for unit, counts in known.items():
            alike = len(set(counts.values())) == 1 and len(known) == 1
            named = [n if alike else f"{n} ({name})" for name, n in counts.items()]
            parts.append(f"{', '.join(dict.fromkeys(named))} {unit} a run")
        return f"n = {'; '.join(parts)}" if parts else ""

    def left_out(self) -> str:
        """Which of the cells asked for have no result."""
        return left_out(self.failed, self.missing)


def plot(spec: FigureSpec, study: StudySpec, results: Results) -> Plot:
    """The numbers of a figure.

    Args:
        spec: The figure.
        study: It belongs to.
        results: Of that study; `check` has seen that the columns are there.

    Raises:
        InputError: If published points have no place on the axis.
    """
    rows = results.select(spec.stages, spec.where)
    numbers = all(number(row.get(spec.x, "")) is not None for row in rows) and spec.kind in ("line", "points")
    for each in spec.published:
        for x, _ in each.points:
            if numbers and (number(str(x)) is None or (spec.x_scale == "log" and float(x) <= 0)):
                raise bad(f"figures.{spec.name}.published, {each.label}, x", x, "it has no place on the axis")
    share = any(results.is_share(of) for of in spec.y)
    splitting = spec.y2 if spec.kind == "heatmap" else spec.series
    by_line = grouped(rows, [splitting]) if splitting else {("",): rows}
    lines: list[Line] = []
    for name in ordered(key for (key,) in by_line):
        for of in spec.y:
            label = _label(spec, name if splitting else None, of)
            by_x = grouped((row for row in by_line[(name,)] if row["status"] == "finished"), [spec.x])
            if spec.kind == "points":  # each row by itself; those of one x are told apart by spaces after it
                by_x = {(x + " " * place,): [row] for (x,), rows in by_x.items() for place, row in enumerate(rows)}
            points = {x: summarise(by_x[(x,)], of, share) for x in ordered(key for (key,) in by_x)}
            points = {x: summary for x, summary in points.items() if summary.runs}
            if points:
                lines.append(Line(label, of, name if splitting else None, points))
    columns = [spec.x, *([splitting] if splitting else [])]
    finished = [row for row in rows if row["status"] == "finished"]
    groups = grouped(finished, columns).values()
    return Plot(
        spec=spec,
        lines=tuple(lines),
        share=share,
        failed=cells(rows, "failed"),
        missing=cells(rows, "missing"),
        averaged=tuple(averaged_over(groups, [key for key in results.grid(study, *spec.stages) if key not in columns])),
        x_share=spec.kind == "points" and results.is_share(Quantity(spec.x)),
        shared=shared(spec, study, [summary for line in lines for summary in line.points.values()]),
    )


def belongs(points: PublishedPoints, line: Line) -> bool:
    """Whether published values are of the same quantity and series as a line of ours."""
    same_series = line.series is None or points.series is None or is_one_of(line.series, points.series)
    return points.y == line.of and same_series


def published_x(x: object) -> str:
    """An x of the YAML as one of the table."""
    return canonical(str(x).lower() if isinstance(x, bool) else str(x))


def cells(rows: Sequence[Row], status: str) -> int:
    """How many cells stand so."""
    return len({(row["stage"], row["cell"]) for row in rows if row["status"] == status})


def how(summaries: Sequence[Summary]) -> str:
    """What some values and their intervals are, in one line."""
    several = [s for s in summaries if s.interval and s.runs > 1]
    over_seeds = sorted({s.seeds for s in several if s.over == "seeds"})
    over_runs = sorted({s.runs for s in several if s.over == "runs"})
    parts = []
    for counts, noun in ((over_seeds, "seed"), (over_runs, "run")):
        if counts:
            many = counted(counts[0], noun) if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,} {noun}s"
            parts.append(f"mean and Student's t 95 % interval over {many}{' of one seed' if noun == 'run' else ''}")
    if any(s.interval == "wilson" for s in several):
        parts.append("Wilson's of the n cases where that is wider")
    if any(s.interval == "wilson" and s.runs == 1 for s in summaries):
        parts.append("one run with Wilson's 95 % interval" if not parts else "Wilson's where there is one run")
    if any(s.interval == "paired" for s in summaries):
        parts.append("of a difference the interval for pairs of its cases")
    if any(not s.interval and s.runs for s in summaries):
        parts.append("single runs without interval" if not parts else "none where there is one run without counts")
    return "; ".join(parts)


def units(summaries: Sequence[Summary]) -> str:
    """What the cases of some values are."""
    return ", ".join(dict.fromkeys(s.unit for s in summaries if s.cases is not None)) or TEST_IMAGES


def shared(spec: FigureSpec | TableSpec, study: StudySpec, summaries: Sequence[Summary]) -> str:
    """Which stages all seeds share: how these differ from seed to seed is in no interval over seeds."""
    names = dict.fromkeys(name for stage in spec.stages for name in study.shared.get(stage, ()))
    if not names or not any(s.seeds > 1 for s in summaries):
        return ""
    return f"all seeds have the same {', '.join(names).replace('_', ' ')}, which no interval here covers"


def left_out(failed: int, missing: int) -> str:
    """Which cells have no result."""
    parts = ([f"{counted(failed, 'cell')} failed"] if failed else []) + (
        [f"{counted(missing, 'cell')} not run yet"] if missing else []
    )
    return f"left out: {', '.join(parts)}" if parts else ""


def _label(spec: FigureSpec, series: str | None, of: Quantity) -> str:
    name = heading(of.text, spec.labels)
    if series is None or spec.kind == "heatmap":
        return name if series is None else pretty(series, spec.labels)
    shown = pretty(series, spec.labels)
    if spec.series is not None and number(series) is not None and shown == series:
        shown = f"{heading(spec.series, spec.labels)} {series}"
    return shown if len(spec.y) == 1 else f"{shown}: {name}"


def _widest(summaries: Sequence[Summary]) -> tuple[int, int] | None:
    known = [summary.cases for summary in summaries if summary.cases is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None
