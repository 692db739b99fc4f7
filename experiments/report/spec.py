"""The figures and tables that a study's YAML asks for, checked key by key; nothing heavy is imported here."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from datamodules.errors import InputError, bad, did_you_mean
from experiments.documents import check_yaml

KINDS = ("line", "bars", "points", "heatmap")
SCALES = ("linear", "log")

_FIGURE = ("name", "title", "stage", "kind", "x", "x_label", "x_scale", "y", "y_label", "y2", "y2_label", "labels",
           "series", "where", "published")  # fmt: skip
_POINTS = ("label", "y", "series", "points", "source", "deviation")
_TABLE = ("name", "title", "stage", "rows", "columns", "labels", "where", "published", "reach", "gain")
_REACH = ("of", "along", "levels")
_GAIN = ("of", "over")
_ENTRY = ("where", "source", "deviation")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_COMPLEMENT = re.compile(r"1\s*[-−–]\s*(\S.*)")


class Quantity(NamedTuple):
    """What is drawn or listed: a column, or what is missing to 1: ``1 - clean_accuracy`` is the clean error."""

    column: str
    complement: bool = False

    @property
    def text(self) -> str:
        """As it stands in a study's YAML."""
        return f"1 - {self.column}" if self.complement else self.column


@dataclass(frozen=True)
class PublishedPoints:
    """A published curve, or single points of it.

    Attributes:
        label: Whose it is.
        y: The quantity, one of its figure's.
        points: (x, value) each; a share in [0, 1].
        source: Where the numbers come from.
        deviation: What was done in another way there.
        series: The value of its figure's series that it belongs to; None: to none, or there are no series.
    """

    label: str
    y: Quantity
    points: tuple[tuple[Any, float], ...]
    source: str
    deviation: str
    series: Any = None


@dataclass(frozen=True)
class FigureSpec:
    """A figure; see `PublishedPoints` for what stands beside our own.

    Attributes:
        name: Of its files.
        title: Over the picture.
        stages: Whose cells it shows: ``stage`` in the YAML, a name or a list of them; left out: the study's only one.
        kind: ``line``, ``bars``, ``points`` (a point for each x, not joined; runs of one series and the same x are
            averaged) or ``heatmap``.
        x: The column along the axis.
        x_label: None: made from `x`.
        x_scale: ``linear`` or ``log``.
        y: The quantities; a heatmap has one.
        y_label: None: made from `y`; a heatmap's is that of its colours.
        y2: A heatmap's other column, downwards.
        y2_label: None: made from `y2`.
        labels: Names of quantities, and values of columns → what the reader sees.
        series: The column that splits the cells into lines.
        where: Column → the value, or list of values, that cells must have to be shown.
        published: What others measured.
    """

    name: str
    title: str
    stages: tuple[str, ...]
    kind: str
    x: str
    y: tuple[Quantity, ...]
    x_label: str | None = None
    x_scale: str = "linear"
    y_label: str | None = None
    y2: str | None = None
    y2_label: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    series: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[PublishedPoints, ...] = ()


@dataclass(frozen=True)
class PublishedEntry:
    """Published values for the rows of a table that agree with `where`."""

    where: Mapping[str, Any]
    values: Mapping[str, float]
    source: str
    deviation: str


@dataclass(frozen=True)
class ReachSpec:
    """A column for each level: the least `along` at which the mean of `of` over seeds is that or more."""

    of: Quantity
    along: str
    levels: tuple[float, ...]


@dataclass(frozen=True)
class GainSpec:
    """A column for each quantity: a row's mean difference over seeds to the row that has the values `over`.

    The other row agrees with this one in all that `over` does not name, and so do the seeds of each difference.
    """

    of: tuple[Quantity, ...]
    over: Mapping[str, Any]


@dataclass(frozen=True)
class TableSpec:
    """A table: a row for each combination of the columns `rows`, the mean over seeds of each of `columns`.

    After these come the columns of `reach` and `gain`.
    """

    name: str
    title: str
    stages: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[Quantity, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[PublishedEntry, ...] = ()
    reach: ReachSpec | None = None
    gain: GainSpec | None = None


@dataclass(frozen=True)
class StudySpec:
    """What the report goes by.

    Attributes:
        name: Of the study.
        description: Paragraphs of plain text.
        size: ``quick``, ``paper`` …
        grids: Stage → the keys of its grid.
        figures: In order.
        tables: In order.
        shared: Stage → the earlier stages of which all its seeds have the same cell.
    """

    name: str
    description: str = ""
    size: str = ""
    grids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    figures: tuple[FigureSpec, ...] = ()
    tables: tuple[TableSpec, ...] = ()
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def quantity(text: str) -> Quantity:
    """The quantity that ``clean_accuracy`` or ``1 - clean_accuracy`` names."""
    found = _COMPLEMENT.fullmatch(text.strip())
    return Quantity(found[1].strip(), True) if found else Quantity(text.strip())


def read_study(folder: Path) -> tuple[StudySpec, str]:
    """Read the study.yaml of a study's folder.

    Returns:
        What it says, and its text.

    Raises:
        InputError: If it is not there, or is wrong; one line that names the key.
    """
    path = folder / "study.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text, str(path))
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no study.yaml is in it; give the folder that `lightning study` wrote to"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: it cannot be read as YAML ({' '.join(str(error).split())})") from error
    try:
        return parse(content), text
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(content: Any) -> StudySpec:
    """Check what a study says of its figures and tables; the engine can ask this before anything has run.

    Args:
        content: Of the study's YAML; of the keys other than figures and tables, name, description, size and stages
            are read, and the rest is not looked at.

    Raises:
        InputError: If a key is misspelt, missing or of another type; it names the key.
    """
    if not isinstance(content, dict):
        raise InputError("keys are expected, such as name, figures and tables")
    stages = content.get("stages") or []
    listed = stages.items() if isinstance(stages, dict) else [(part.get("name"), part) for part in _parts(stages)]
    named = [(str(name), part or {}) for name, part in listed]
    grids = {name: tuple(part.get("grid") or ()) for name, part in named}
    study = StudySpec(
        name=str(content.get("name") or "study"),
        description=str(content.get("description") or ""),
        size=str(content.get("size") or ""),
        grids=grids,
        figures=tuple(_figure(part, where, grids) for where, part in _named(content, "figures")),
        tables=tuple(_table(part, where, grids) for where, part in _named(content, "tables")),
        shared=_shared(dict(named)),
    )
    return study


def _shared(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Stage → the earlier stages of which all its seeds have the same cell: their own seed's is not there."""
    seeds = {name: tuple(part.get("seeds") or (0,)) for name, part in stages.items()}
    order = list(stages)

    def behind(name: str, seed: Any) -> set[tuple[str, Any]]:
        found: set[tuple[str, Any]] = set()
        for source in (stages[name].get("inputs") or {}).values():
            if source in order[: order.index(name)]:
                own = seed if seed in seeds[source] else seeds[source][0]
                found |= {(source, own), *behind(source, own)}
        return found

    shared = {}
    for name, own in seeds.items():
        common = set.intersection(*(behind(name, seed) for seed in own)) if len(own) > 1 else set()
        shared[name] = tuple(source for source in stages if any(source == each for each, _ in common))
    return {name: sources for name, sources in shared.items() if sources}


def _parts(value: Any) -> list[dict[str, Any]]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _named(content: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """The items of a list of mappings, each with the words that lead to it: ``figures.error``."""
    found: list[tuple[str, dict[str, Any]]] = []
    seen: set[str] = set()
    for number, part in enumerate(_listed(content, key, "")):
        if not isinstance(part, dict):
            raise bad(f"{key}[{number}]", part, "keys are expected, such as name and title")
        name = part.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            remedy = "give a file name of letters, digits, dots, dashes and underscores"
            raise bad(f"{key}[{number}].name", name, remedy)
        if name.lower() in seen:
            raise bad(f"{key}[{number}].name", name, "there is another of that name; choose a new one")
        seen.add(name.lower())
        found.append((f"{key}.{name}", part))
    return found


def _figure(part: dict[str, Any], where: str, grids: Collection[str]) -> FigureSpec:
    _check_keys(part, _FIGURE, where)
    kind = _choice(part, "kind", KINDS, where)
    y = tuple(quantity(text) for text in _texts(part, "y", where))
    y2 = _optional(part, "y2", where)
    if kind == "heatmap":
        if len(y) != 1:
            raise bad(f"{where}.y", part["y"], "a heatmap shows one measure")
        if y2 is None:
            raise InputError(f"{where}.y2: a heatmap needs a second column, downwards; name it")
        for key in ("series", "published"):
            if part.get(key):
                raise bad(f"{where}.{key}", part[key], "a heatmap has none; leave it out, or use a table")
    elif y2 is not None:
        raise bad(f"{where}.y2", y2, "only a heatmap has a second column; set kind: heatmap, or name it in series")
    return FigureSpec(
        name=part["name"],
        title=_text(part, "title", where, part["name"].replace("_", " ")),
        stages=_stages(part, where, grids),
        kind=kind,
        x=_text(part, "x", where),
        y=y,
        x_label=_optional(part, "x_label", where),
        x_scale=_choice(part, "x_scale", SCALES, where),
        y_label=_optional(part, "y_label", where),
        y2=y2,
        y2_label=_optional(part, "y2_label", where),
        labels=_labels(part, where, {q.text for q in y}, open_ended=bool(part.get("series")) or kind != "line"),
        series=_optional(part, "series", where),
        where=_mapping(part, "where", where),
        published=tuple(
            _points(each, f"{where}.published[{number}]", y, bool(part.get("series")))
            for number, each in enumerate(_listed(part, "published", where))
        ),
    )


def _points(part: Any, where: str, y: Sequence[Quantity], series: bool) -> PublishedPoints:
    if not isinstance(part, dict):
        raise bad(where, part, "keys are expected: label, y, points, source, deviation")
    _check_keys(part, _POINTS if series else tuple(key for key in _POINTS if key != "series"), where)
    known = [q.text for q in y]
    of = quantity(_text(part, "y", where, known[0] if len(known) == 1 else None))
    if of not in y:
        raise bad(f"{where}.y", part["y"], f"the figure shows {', '.join(known)}{did_you_mean(of.text, known)}")
    points = []
    for number, point in enumerate(_listed(part, "points", where)):
        if not isinstance(point, list) or len(point) != 2 or not _is_number(point[1]):
            raise bad(f"{where}.points[{number}]", point, "give [x, value], a share as a number from 0 to 1")
        points.append((point[0], float(point[1])))
    if not points:
        raise InputError(f"{where}.points: give a list of [x, value]")
    return PublishedPoints(
        label=_text(part, "label", where),
        y=of,
        points=tuple(points),
        source=_text(part, "source", where),
        deviation=_text(part, "deviation", where, ""),
        series=part.get("series"),
    )


def _table(part: dict[str, Any], where: str, grids: Collection[str]) -> TableSpec:
    _check_keys(part, _TABLE, where)
    rows = _texts(part, "rows", where)
    reach, gain = _reach(part, where), _gain(part, where, rows)
    asked = _texts(part, "columns", where) if "columns" in part or not (reach or gain) else ()
    columns = tuple(quantity(text) for text in asked)
    return TableSpec(
        name=part["name"],
        title=_text(part, "title", where, part["name"].replace("_", " ")),
        stages=_stages(part, where, grids),
        rows=rows,
        columns=columns,
        labels=_labels(part, where, {*rows, *(q.text for q in columns)}, open_ended=True),
        where=_mapping(part, "where", where),
        published=tuple(
            _entry(each, f"{where}.published[{number}]", rows, [q.text for q in columns])
            for number, each in enumerate(_listed(part, "published", where))
        ),
        reach=reach,
        gain=gain,
    )


def _reach(part: Mapping[str, Any], where: str) -> ReachSpec | None:
    asked, where = _mapping(part, "reach", where), f"{where}.reach"
    if not asked:
        return None
    _check_keys(asked, _REACH, where)
    levels = _listed(asked, "levels", where)
    if not levels or not all(map(_is_number, levels)):
        raise bad(f"{where}.levels", asked.get("levels"), "give a list of numbers, shares from 0 to 1")
    return ReachSpec(quantity(_text(asked, "of", where)), _text(asked, "along", where), tuple(map(float, levels)))


def _gain(part: Mapping[str, Any], where: str, rows: Collection[str]) -> GainSpec | None:
    asked, where = _mapping(part, "gain", where), f"{where}.gain"
    if not asked:
        return None
    _check_keys(asked, _GAIN, where)
    over = _mapping(asked, "over", where)
    if not over:
        raise InputError(f"{where}.over: name the row that the others are compared with: a column and its value")
    for key in over:
        if key not in rows:
            known = f"the table's rows differ in {', '.join(rows)}"
            raise InputError(f"{where}.over.{key}: {known}{did_you_mean(str(key), rows)}")
    return GainSpec(tuple(quantity(text) for text in _texts(asked, "of", where)), over)


def _entry(part: Any, where: str, rows: Sequence[str], columns: Sequence[str]) -> PublishedEntry:
    if not isinstance(part, dict):
        raise bad(where, part, "keys are expected: where, source, deviation and the table's measures")
    part = {(key if key in _ENTRY else quantity(str(key)).text): value for key, value in part.items()}
    _check_keys(part, (*_ENTRY, *columns), where)
    chosen = _mapping(part, "where", where)
    for key in chosen:
        if key not in rows:
            known = f"the table's rows differ in {', '.join(rows)}"
            raise InputError(f"{where}.where.{key}: {known}{did_you_mean(str(key), rows)}")
    values = {key: value for key, value in part.items() if key not in _ENTRY}
    for key, value in values.items():
        if not _is_number(value):
            raise bad(f"{where}.{key}", value, "give a number, a share from 0 to 1")
    if not values:
        raise InputError(f"{where}: no value is given; name one of {', '.join(columns)}")
    return PublishedEntry(
        where=chosen,
        values={key: float(value) for key, value in values.items()},
        source=_text(part, "source", where),
        deviation=_text(part, "deviation", where, ""),
    )


# --- single keys -----------------------------------------------------------------------------------------------------
def _check_keys(part: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in part:
        if key not in known:
            raise InputError(f"{where}.{key}: there is no such key{did_you_mean(str(key), known)}")


def _text(part: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = part.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise InputError(f"{where}.{key}: it is missing")
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise bad(f"{where}.{key}", value, "a text is expected")
    return str(value)


def _optional(part: Mapping[str, Any], key: str, where: str) -> str | None:
    return _text(part, key, where) if part.get(key) is not None else None


def _choice(part: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> str:
    value = _text(part, key, where, known[0])
    if value not in known:
        raise bad(f"{where}.{key}", value, f"choose one of {', '.join(known)}{did_you_mean(value, known)}")
    return value


def _listed(part: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = part.get(key)
    if value is None or value == ():
        return []
    if not isinstance(value, list | tuple):
        raise bad(f"{where}.{key}".removeprefix("."), value, "a list is expected")
    return list(value)


def _texts(part: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = part.get(key)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not values or not all(isinstance(each, str) for each in values):
        raise bad(f"{where}.{key}", value, "give the name of a column, or a list of names")
    if len(set(values)) < len(values):
        raise bad(f"{where}.{key}", value, "each name once")
    return tuple(values)


def _mapping(part: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = part.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise bad(f"{where}.{key}", value, "keys are expected: a column and its value")
    return {str(name): each for name, each in value.items()}


def _labels(part: Mapping[str, Any], where: str, known: Iterable[str], *, open_ended: bool) -> dict[str, str]:
    """Labels by what they stand for: quantities and, where that is `open_ended`, values of columns."""
    found: dict[str, str] = {}
    known = set(known)
    for key, value in _mapping(part, "labels", where).items():
        name = quantity(key).text
        misspelt = get_close_matches(name, known, n=1, cutoff=0.85)
        if name not in known and (misspelt or not open_ended):
            raise InputError(f"{where}.labels.{key}: the figure shows no such thing{did_you_mean(name, known)}")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise bad(f"{where}.labels.{key}", value, "a text is expected")
        found[name] = str(value)
    return found


def _stages(part: Mapping[str, Any], where: str, known: Collection[str]) -> tuple[str, ...]:
    if part.get("stage") is None:
        if len(known) > 1:
            raise InputError(f"{where}.stage: it is missing; the study has {', '.join(known)}")
        return tuple(known) or ("",)
    stages = _texts(part, "stage", where)
    for stage in stages:
        if known and stage not in known:
            raise bad(f"{where}.stage", stage, f"the study has {', '.join(known)}{did_you_mean(stage, known)}")
    return stages


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
