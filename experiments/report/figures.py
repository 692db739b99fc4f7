"""Drawing a figure with matplotlib, in colours that a page can exchange for those of a dark one."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

from experiments.report.plots import Line, Plot, belongs, published_x, units
from experiments.report.results import Summary, spoken

COLOURS = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1d2126", "#e8eaed"),
    "muted": ("#5a626c", "#a5adb8"),
    "rule": ("#d7dbe0", "#3b424b"),
    "series-1": ("#0067a5", "#5ab4f0"),
    "series-2": ("#cc4e00", "#ff9a57"),
    "series-3": ("#8c1aff", "#ff0080"),
    "series-4": ("#564729", "#9966ff"),
    "series-5": ("#bd7599", "#bfe600"),
    "series-6": ("#0da559", "#f9b8ce"),
    "series-7": ("#ff1ad9", "#42f099"),
    "series-8": ("#80006a", "#b464b4"),
}
"""Name → on white, on dark.

Any two of the series are 19 or more apart in CIELAB, for normal sight and for protanopia, deuteranopia and tritanopia
(Machado et al. 2009), and have a contrast of 3 or more with the paper. Each line has its own marker and dashes besides.
"""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 2)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
HOLLOW = ("D", "s", "^", "o", "v", "p", "h", "8")

WIDTH = 4.8
"""Inches: what is 10 points here is 11 pixels high on a phone, and 16 on a desk."""


class Drawing(NamedTuple):
    """A figure as files: for the page, and on white."""

    inline: str
    svg: bytes
    png: bytes


def draw(plot: Plot) -> Drawing:
    """Draw a figure that has at least one point."""
    with _style(plot.spec.name):
        figure = _heatmap(plot) if plot.spec.kind == "heatmap" else _lines(plot)
        _grow(figure, 0.4 * len(plot.xs) if plot.spec.kind == "heatmap" else 2.6)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        vectors, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vectors, format="svg", transparent=True, metadata=nothing)
        on_white = io.BytesIO()
        figure.savefig(on_white, format="svg", metadata=nothing)
        figure.savefig(pixels, format="png", dpi=200, metadata={"Software": None})
    return Drawing(inline(vectors.getvalue(), plot), on_white.getvalue(), pixels.getvalue())


def inline(svg: str, plot: Plot) -> str:
    """An SVG file as a part of a page: no header, ids of its own, the page's colours, words for those who listen."""
    svg = svg[svg.index("<svg") :]
    mark = f"figure-{plot.spec.name}"
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)  # it would reach all of the page
    svg = re.sub(r'(<rect [^>]*)fill="(#[0-9a-f]{6})"', r'\1style="fill: \2"', svg)  # an attribute takes no variable
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{mark}-")
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    box = re.search(r'viewBox="([^"]*)"', svg)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[1] if box else "0 0 400 300"}" role="img" aria-labelledby="{mark}-title {mark}-desc">'
        f'<title id="{mark}-title">{escape(plot.spec.title)}</title>'
        f'<desc id="{mark}-desc">{escape(describe(plot))}</desc>'
    )
    return opening + svg[svg.index(">") + 1 :].strip()


def describe(plot: Plot) -> str:
    """A figure in words, for those who do not see it."""
    unit = " %" if plot.share else ""
    parts = [f"{plot.y_label} against {plot.x_label}."]
    for line in plot.lines:
        values = [_scaled(summary.value, plot) for summary in line.points.values()]
        parts.append(f"{line.label}: from {values[0]:.4g}{unit} to {values[-1]:.4g}{unit}.")
    return " ".join(parts) + " The numbers are in the table below."


def wraps(summary: Summary, share: bool) -> tuple[bool, bool]:
    """Whether an interval goes beyond what the axis can show: below 0 %, above 100 %."""
    return share and summary.low < 0, share and summary.high > 1


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Matplotlib's own defaults, whatever is in a matplotlibrc, and ours; all put back at the end."""
    import matplotlib

    ink, muted, rule = (COLOURS[key][0] for key in ("ink", "muted", "rule"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "path",
                "svg.hashsalt": name,
                "text.parse_math": False,  # a dollar is a dollar
                "text.color": ink,
                "axes.labelcolor": ink,
                "axes.edgecolor": muted,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.facecolor": "none",
                "figure.facecolor": COLOURS["paper"][0],
                "xtick.color": muted,
                "ytick.color": muted,
                "xtick.labelcolor": ink,
                "ytick.labelcolor": ink,
                "grid.color": rule,
                "grid.linewidth": 0.7,
                "legend.frameon": False,
                "legend.fontsize": 9,
                "legend.title_fontsize": 9,
                "hatch.linewidth": 0.8,
            }
        )
        yield


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# --- lines and bars --------------------------------------------------------------------------------------------------
def _lines(plot: Plot) -> Any:
    labels = [_wrapped(_legend_label(plot, line), 52) for line in plot.lines]
    labels += [_wrapped(f"published: {each.label}", 52) for each in plot.spec.published]
    title = _wrapped(f"{plot.how()}; n: {units(plot.summaries)}", 66)
    figure = _figure(3.1 + 0.17 * sum(text.count("\n") + 1 for text in (*labels, title)))
    axis = figure.subplots()
    places = _places(plot)
    handles: list[Any] = []
    for index, line in enumerate(plot.lines):
        handles.append(_bars(axis, plot, line, index, places) if plot.spec.kind == "bars"
                       else _line(axis, plot, line, index, places))  # fmt: skip
    handles += _published(axis, plot, places)
    axis.set_axisbelow(True)
    axis.grid(axis="y")
    axis.set_ylabel(_wrapped(plot.y_label, 32))
    axis.set_xlabel(_wrapped(plot.x_label, 50))
    _x_axis(axis, plot, places)
    _y_axis(axis, plot)
    legend = figure.legend(handles, labels, loc="outside lower left", title=title, alignment="left", handlelength=2.8)
    legend.get_title().set_color(COLOURS["muted"][0])
    return figure


def _grow(figure: Any, least: float) -> None:
    """Give a figure the size that its labels need – a layout leaves them none – and its axes `least` inches across."""
    for _ in range(5):
        figure.draw_without_rendering()
        box, wide, high = figure.get_tightbbox(), figure.get_figwidth(), figure.get_figheight()
        axes = figure.axes[0].get_window_extent()
        across = max(box.x1 - wide, -box.x0, 0.0) + max(least - axes.width / figure.dpi, 0.0)
        down = max(box.y1 - high, -box.y0, 0.0) + max(2.1 - axes.height / figure.dpi, 0.0)
        if max(across, down) < 0.02:
            return
        figure.set_size_inches(wide + 1.1 * across, high + 1.1 * down)


def _line(axis: Any, plot: Plot, line: Line, index: int, places: dict[str, float]) -> Any:
    colour = _colour(index)
    shift = _shift(plot, index)
    points = [(places[x] + shift, summary) for x, summary in line.points.items() if x in places]
    xs = [x for x, _ in points]
    values = [_scaled(summary.value, plot) for _, summary in points]
    bounds = [_drawn_bounds(summary, plot) for _, summary in points]
    lows, highs = [low for low, _ in bounds], [high for _, high in bounds]
    joined = plot.categories is None and plot.spec.kind != "points"
    if joined and len(points) > 1:
        axis.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0)
    errors = [
        [v - low for v, low in zip(values, lows, strict=True)],
        [h - v for v, h in zip(values, highs, strict=True)],
    ]
    drawn = axis.errorbar(
        xs,
        values,
        yerr=errors,
        color=colour,
        marker=MARKERS[(index + index // len(MARKERS)) % len(MARKERS)],
        markersize=5,
        linestyle=DASHES[index % len(DASHES)] if joined else "none",
        linewidth=1.6,
        elinewidth=1,
        capsize=2.5,
        zorder=3,
    )
    _arrows(axis, plot, points, colour)
    return drawn


def _bars(axis: Any, plot: Plot, line: Line, index: int, places: dict[str, float]) -> Any:
    colour, wide, shift = _colour(index), 0.8 / len(plot.lines), _shift(plot, index)
    points = [(places[x] + shift, summary) for x, summary in line.points.items()]
    values = [_scaled(summary.value, plot) for _, summary in points]
    bounds = [_drawn_bounds(summary, plot) for _, summary in points]
    errors = [
        [v - low for v, (low, _) in zip(values, bounds, strict=True)],
        [high - v for v, (_, high) in zip(values, bounds, strict=True)],
    ]
    drawn = axis.bar([x for x, _ in points], values, 0.92 * wide, facecolor=colour, edgecolor=COLOURS["paper"][0],
                     hatch=HATCHES[index % len(HATCHES)], linewidth=1)  # fmt: skip
    ink = COLOURS["ink"][0]
    axis.errorbar([x for x, _ in points], values, yerr=errors, linestyle="none", color=ink, elinewidth=1, capsize=2.5)
    _arrows(axis, plot, points, ink)
    return drawn


def _arrows(axis: Any, plot: Plot, points: list[tuple[float, Summary]], colour: str) -> None:
    """Where an interval ends at the edge because the axis does, an arrow says that it goes on."""
    for x, summary in points:
        below, above = wraps(summary, plot.share)
        for there, edge, marker in ((below, 0, 7), (above, 100, 6)):  # matplotlib's carets, down and up
            if there:
                axis.plot([x], [edge], marker=marker, color=colour, markersize=5, zorder=4, clip_on=False)


def _published(axis: Any, plot: Plot, places: dict[str, float]) -> list[Any]:
    handles = []
    for index, each in enumerate(plot.spec.published):
        own = [place for place, line in enumerate(plot.lines) if belongs(each, line)]
        bars = plot.spec.kind == "bars"  # on a bar of its own colour a marker would not be seen
        colour = _colour(own[0]) if len(own) == 1 and not bars else COLOURS["ink"][0]
        shift = _shift(plot, own[0]) if len(own) == 1 else 0.0
        (drawn,) = axis.plot(
            [places[published_x(x)] + shift for x, _ in each.points],
            [_scaled(value, plot) for _, value in each.points],
            linestyle="none",
            marker=HOLLOW[index % len(HOLLOW)],
            markersize=8,
            markerfacecolor=COLOURS["paper"][0] if bars else "none",
            markeredgecolor=colour,
            markeredgewidth=1.5,
            clip_on=False,
            zorder=5,
        )
        handles.append(drawn)
    return handles


def _shift(plot: Plot, index: int) -> float:
    """How far a line's points stand beside their names, so that no line hides another."""
    if plot.categories is None:
        return 0.0
    wide = 0.8 if plot.spec.kind == "bars" else 0.5
    return (index - (len(plot.lines) - 1) / 2) * wide / len(plot.lines)


def _places(plot: Plot) -> dict[str, float]:
    """Where each x stands on the axis."""
    if plot.categories is not None:
        return {x: float(place) for place, x in enumerate(plot.categories)}
    published = [published_x(x) for each in plot.spec.published for x, _ in each.points]
    times = 100 if plot.x_share else 1
    return {x: times * float(x) for x in [*plot.xs, *published] if x not in plot.off_axis}


def _x_axis(axis: Any, plot: Plot, places: dict[str, float]) -> None:
    if plot.categories is not None:
        _names(axis, [plot.point_label(x) for x in plot.categories])
        axis.set_xlim(-0.6, len(places) - 0.4)
    elif plot.spec.x_scale == "log":
        axis.set_xscale("log")
        ticks = _thinned(sorted(set(places.values())))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)


def _names(axis: Any, names: list[str]) -> None:
    """Names along x: level where there is room, slanting where there is not."""
    slanting = sum(len(name) for name in names) > 40 or max(map(len, names)) > 56 / len(names)
    shown = [_wrapped(name, 28) for name in names]
    more = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanting else {}
    axis.set_xticks(range(len(names)), shown, fontsize=9 if slanting else 10, **more)


def _thinned(values: list[float]) -> list[float]:
    """Positions on a logarithmic axis that leave room for their labels."""
    room = 0.09 * (math.log(values[-1]) - math.log(values[0])) if values else 0
    kept: list[float] = []
    for value in values:
        if not kept or math.log(value) - math.log(kept[-1]) >= room:
            kept.append(value)
    return kept


def _y_axis(axis: Any, plot: Plot) -> None:
    """Shares have no place below 0 and above 100 %; what lies close together fills the axis."""
    if not plot.share:
        axis.margins(y=0.08)
        return
    from matplotlib.ticker import MaxNLocator

    ends = [end for summary in plot.summaries for end in _drawn_bounds(summary, plot)]
    ends += [_scaled(summary.value, plot) for summary in plot.summaries]
    ends += [_scaled(value, plot) for each in plot.spec.published for _, value in each.points]
    low, high = (0.0 if plot.spec.kind == "bars" else min(ends)), max(ends)
    if low < 0.5 * high:
        low = 0.0
    room = max(high - low, 0.1)
    bottom, top = low - 0.06 * room, high + 0.06 * room
    if plot.spec.kind == "bars":
        bottom = 0.0
    axis.set_ylim(max(bottom, -0.04 * room), min(top, 100 + 0.04 * room))
    ticks = [
        tick
        for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(max(bottom, 0), min(top, 100))
        if 0 <= tick <= 100
    ]
    limits = axis.get_ylim()
    axis.set_yticks([tick for tick in ticks if limits[0] <= tick <= limits[1]])


def _legend_label(plot: Plot, line: Line) -> str:
    n = spoken(line.cases)
    return f"{line.label} (n = {n})" if n else line.label


# --- heatmaps --------------------------------------------------------------------------------------------------------
def _heatmap(plot: Plot) -> Any:
    columns = plot.xs
    small = max(len(columns), len(plot.lines)) <= 12
    figure = _figure(min(7.5, 1.6 + max(1.2, 0.42 * len(plot.lines))))
    axis = figure.subplots()
    values = [
        [_scaled(line.points[x].value, plot) if x in line.points else math.nan for x in columns] for line in plot.lines
    ]
    known = [value for line in values for value in line if not math.isnan(value)]
    alike = bool(known) and plot.share and min(known) == max(known)  # then colours would go past 100 %
    mesh = axis.pcolormesh(values, cmap="cividis", linewidth=0, **({"vmin": 0, "vmax": 100} if alike else {}))
    axis.set_xticks([place + 0.5 for place in range(len(columns))])
    axis.set_yticks([place + 0.5 for place in range(len(plot.lines))])
    names = [_wrapped(plot.point_label(x), 24) for x in columns]
    axis.set_xticklabels(names, rotation=90 if sum(map(len, names)) > 36 else 0)
    axis.set_yticklabels([_wrapped(line.label, 20) for line in plot.lines])
    axis.invert_yaxis()
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlabel(_wrapped(plot.x_label, 50))
    axis.set_ylabel(_wrapped(plot.y2_label, 40))
    bar = figure.colorbar(mesh, ax=axis, pad=0.02, label=_wrapped(plot.y_label, 40))
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    if small:
        _write_values(axis, plot, mesh, values)
    return figure


def _write_values(axis: Any, plot: Plot, mesh: Any, values: list[list[float]]) -> None:
    size = 9 if len(values[0]) <= 8 else 7
    for down, row in enumerate(values):
        for across, value in enumerate(row):
            known = not math.isnan(value)
            red, green, blue, _ = mesh.cmap(mesh.norm(value)) if known else (0, 0, 0, 0)
            bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
            colour = ("#0a0a0a" if bright else "#fefefe") if known else COLOURS["muted"][0]
            text = (f"{value:.1f}" if plot.share else f"{value:.3g}") if known else "–"
            axis.text(across + 0.5, down + 0.5, text, ha="center", va="center", color=colour, fontsize=size)


# --- small things ----------------------------------------------------------------------------------------------------
def _colour(index: int) -> str:
    return COLOURS[f"series-{index % 8 + 1}"][0]


def _scaled(value: float, plot: Plot) -> float:
    return 100 * value if plot.share else value


def _drawn_bounds(summary: Summary, plot: Plot) -> tuple[float, float]:
    """The ends of an interval as far as the axis goes; the value itself where there is none."""
    value = _scaled(summary.value, plot)
    low, high = _scaled(summary.low, plot), _scaled(summary.high, plot)
    if math.isnan(low) or math.isnan(high):
        return value, value
    if plot.share:
        low, high = max(low, 0.0), min(high, 100.0)
    return min(low, value), max(high, value)


def _wrapped(text: str, width: int) -> str:
    """Lines of a readable length. A leading underscore would have matplotlib leave a label out of the legend."""
    shown = "\n".join(textwrap.wrap(text, width)) or text
    return f" {shown}" if shown.startswith("_") else shown
