"""Reports of small studies written by hand: their numbers, what is said of them, and how the page looks in Chromium."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image
from scipy import stats

from datamodules.errors import InputError
from datamodules.measures import wilson
from experiments.report import report, write_report
from experiments.report.figures import COLOURS, draw
from experiments.report.markup import Html, join, tag
from experiments.report.plots import plot
from experiments.report.results import check, gained, is_one_of, reached, read_results, summarise
from experiments.report.spec import Quantity, parse, quantity, read_study
from experiments.report.tables import as_latex, as_markdown, table

NASTY = '<script>alert("1")</script> & $x_1$'
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
VOID = {"meta", "img", "br", "hr"}


# --- studies by hand --------------------------------------------------------------------------------------------------
def a_row(
    stage: str, point: Mapping[str, Any], seed: int, hits: Mapping[str, tuple[int, int]], **more: Any
) -> dict[str, Any]:
    """A row of results.csv: hits and cases of each measure, with Wilson's interval."""
    cell = hashlib.sha256(repr((stage, point, seed)).encode()).hexdigest()[:16]
    row = {"study": "by_hand", "size": "quick", "stage": stage, "cell": cell, "status": "finished", "error": ""}
    row |= {"seed": seed, **point}
    for name, (k, n) in hits.items():
        each = wilson(k, n)
        row |= {name: each.value, f"{name}.low": each.low, f"{name}.high": each.high, f"{name}.n": n}
    hashes = {
        name: f"{name[0]}" * 64 for name in ("config_hash", "data_hash", "poison_hash", "weights_hash", "code_hash")
    }
    words = " ".join(f"--{key}={value}" for key, value in point.items())
    command = f"lightning fit --config badnets_digits {words} --seed_everything={seed}"
    return row | hashes | {"threads": 1, "seconds": 30.5, "command": command} | more


def failed(stage: str, point: Mapping[str, Any], seed: int, error: str, status: str = "failed") -> dict[str, Any]:
    """A row without a result."""
    empty = dict.fromkeys(
        ("config_hash", "data_hash", "poison_hash", "weights_hash", "code_hash", "threads", "seconds"), ""
    )
    return a_row(stage, point, seed, {}, status=status, error=error) | empty


def write_study(folder: Path, rows: Sequence[Mapping[str, Any]], **study: Any) -> Path:
    """The folder of a study; the first cell of each stage has a picture."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(text.getvalue(), encoding="utf-8")
    stages: dict[str, dict[str, Any]] = {}
    for row in rows:
        cell = folder / "cells" / row["cell"]
        if row["status"] == "finished":
            cell.mkdir(parents=True, exist_ok=True)
            metrics = {"device": "cpu", "versions": {"python": "3.11.7", "torch": "2.15.0"}}
            (cell / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
            if row["stage"] not in stages:
                Image.new("RGB", (678, 264), "white").save(cell / "poisons.png")
        grid = {key: [] for key in row if key.startswith(("data.", "model."))}
        stages.setdefault(row["stage"], {"name": row["stage"], "grid": grid})
    content = {"name": "by_hand", "description": "One.\n\nTwo <b>.", "size": "quick", "stages": list(stages.values())}
    (folder / "study.yaml").write_text(yaml.safe_dump(content | study, sort_keys=False), encoding="utf-8")
    return folder


FIGURE = {
    "name": "errors",
    "title": f"Errors {NASTY}",
    "stage": "attack",
    "x": "data.poison_fraction",
    "x_label": "poisoned fraction p",
    "y": ["1 - clean_accuracy", "1 - attack_success_rate"],
    "y_label": "error (%)",
    "labels": {"1 - clean_accuracy": NASTY, "1 - attack_success_rate": "backdoor error"},
    "published": [
        {
            "label": "Gu et al. 2017, Fig. 6",
            "y": "1 - attack_success_rate",
            "points": [[0.1, 0.05], [0.5, 0.0123]],
            "source": "read off <the figure>",
            "deviation": "their network",
        }
    ],
}
TABLE = {
    "name": "fractions",
    "title": "By fraction",
    "stage": "attack",
    "rows": ["data.poison_fraction"],
    "columns": ["clean_accuracy", "attack_success_rate", "accepted", "fact.poisoned"],
    "published": [
        {
            "where": {"data.poison_fraction": 0.1},
            "attack_success_rate": 0.987,
            "source": "Gu et al. 2017, Table 1",
            "deviation": "their split",
        },
        {"where": {"data.poison_fraction": 0.7}, "attack_success_rate": 0.991, "source": "Gu et al. 2017"},
    ],
}
SUCCESS = {0.1: (0.90, 0.92, 0.97), 0.5: (0.99, 1.0, 1.0)}


def rows_of_attack() -> list[dict[str, Any]]:
    """Two fractions with three seeds each, one of 0.3 that failed and one that has not run."""
    rows = []
    for fraction, shares in SUCCESS.items():
        for seed, share in enumerate(shares):
            hits = {"clean_accuracy": (980 - seed, 1000), "attack_success_rate": (round(100 * share), 100)}
            more = {"accepted": "true" if seed else "false", "fact.poisoned": int(5000 * fraction)}
            rows.append(a_row("attack", {"data.poison_fraction": fraction}, seed, hits, **more))
    rows.append(failed("attack", {"data.poison_fraction": 0.3}, 0, 'RuntimeError: a <b> & "c"\nsecond line'))
    rows.append(failed("attack", {"data.poison_fraction": 0.3}, 1, "", status="missing"))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its report."""
    made = write_study(tmp_path_factory.mktemp("study"), rows_of_attack(), figures=[FIGURE], tables=[TABLE])
    write_report(made)
    return made


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements with their attributes and texts; complains of an end without a beginning."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never ended: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        begun = self.open.pop()
        assert begun == tag, f"<{begun}> is ended by </{tag}>"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())


def rows_in(page: str, number: int) -> list[list[str]]:
    """The texts of the cells of a table's body."""
    found = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)[number]
    body = found.split("<tbody>", 1)[1]
    rows = re.findall(r"<tr.*?</tr>", body, flags=re.DOTALL)
    return [[Page(cell).text for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)] for row in rows]


# --- the numbers ------------------------------------------------------------------------------------------------------
def test_several_seeds_have_students_t_and_a_table_shows_it_beyond_100_per_cent(folder: Path) -> None:
    low, high = stats.t.interval(0.95, 2, 0.93, stats.sem(SUCCESS[0.1]))
    assert (round(low, 4), round(high, 4)) == (0.8404, 1.0196)  # 0.93 ± 4.3027 · 0.036056 / √3
    study, _ = read_study(folder)
    found = table(study.tables[0], study, read_results(folder))
    assert [keys for keys, _ in found.rows] == [("0.1",), ("0.5",), ("0.3",)]
    entry = found.rows[0][1][1]
    assert (entry.text, entry.plus, entry.interval, entry.more) == ("93.00", "8.96", "84.04 – 101.96", "n = 100")


def test_the_page_holds_the_table(html: str) -> None:
    page = re.search(r'<section class="table">.*?</section>', html, flags=re.DOTALL)
    assert page
    first, second, third = rows_in(page[0], 0)
    assert first[:3] == ["0.1", "97.90 96.81 – 98.62, n = 1,000", "93.00 ± 8.96 84.04 – 101.96, n = 100"]
    assert first[3:] == ["98.7 a", "2 of 3", "500", "3"]
    assert second[3] == "–"
    assert third == ["0.3", "–", "–", "–", "–", "–", "0 (1 failed, 1 missing)"]
    text = Page(page[0]).text
    assert "a Gu et al. 2017, Table 1; deviation: their split" in text
    assert "published, not run here: poison fraction 0.7: attack success rate 99.1 %; Gu et al. 2017" in text
    assert "Mean and Student's t 95 % interval over 3 seeds" in text
    assert "Wilson's of the n cases where that is wider" in text
    assert "left out: 1 cell failed, 1 cell not run yet" in text


def test_one_seed_has_the_interval_of_its_run(tmp_path: Path) -> None:
    rows = [a_row("attack", {"data.poison_fraction": 0.1}, 0, {"clean_accuracy": (90, 100)})]
    write_study(tmp_path, rows, figures=[], tables=[{"name": "t", "rows": ["seed"], "columns": ["clean_accuracy"]}])
    results = read_results(tmp_path)
    summary = summarise(results.rows, Quantity("clean_accuracy"), share=True)
    assert summary.interval == "wilson"
    assert (round(summary.low, 4), round(summary.high, 4)) == (0.8256, 0.9448)  # Wilson 1927, of 90 in 100
    error = summarise(results.rows, quantity("1 - clean_accuracy"), share=True)
    assert (error.value, error.low, error.high) == (1 - summary.value, 1 - summary.high, 1 - summary.low)
    study, _ = read_study(tmp_path)
    markdown = as_markdown(table(study.tables[0], study, results))
    assert "| 0 | 90.00 (82.56 – 94.48) | 1 |" in markdown
    assert "One run with Wilson's 95 % interval" in markdown


def test_a_drop_is_in_points_and_has_the_interval_of_its_run(tmp_path: Path) -> None:
    drop = {"clean_drop": 0.05, "clean_drop.low": 0.01, "clean_drop.high": 0.25, "clean_drop.n": 2000}
    rows = [a_row("attack", {"p": 0.1}, 0, {"clean_accuracy": (90, 100)}, **drop)]
    write_study(tmp_path, rows, tables=[{"name": "t", "rows": ["p"], "columns": ["clean_accuracy", "clean_drop"]}])
    study, _ = read_study(tmp_path)
    results = read_results(tmp_path)
    assert results.shares == {"clean_accuracy"}  # a drop of 0.05 points is not 5 %, though it lies in [0, 1]
    assert "clean_drop" in results.measures
    markdown = as_markdown(table(study.tables[0], study, results))
    assert "| 0.1 | 90.00 (82.56 – 94.48) | 0.05 (0.01 – 0.25) | 1 |" in markdown
    assert "of a difference the interval for pairs of its cases" in markdown


def test_runs_that_share_a_seed_are_averaged_before_the_interval_is_made(tmp_path: Path) -> None:
    values = {0: (80, 90), 1: (70, 90), 2: (60, 90)}
    rows = [a_row("attack", {"data.source_label": label}, seed, {"clean_accuracy": (k, 100)})
            for seed, each in values.items() for label, k in enumerate(each)]  # fmt: skip
    write_study(tmp_path, rows, tables=[{"name": "t", "rows": ["stage"], "columns": ["clean_accuracy"]}])
    study, _ = read_study(tmp_path)
    results = read_results(tmp_path)
    summary = summarise(results.rows, Quantity("clean_accuracy"), share=True)
    low, high = stats.t.interval(0.95, 2, 0.8, stats.sem([0.85, 0.80, 0.75]))
    assert (summary.value, summary.low, summary.high) == pytest.approx((0.8, low, high))
    assert (summary.runs, summary.seeds, summary.over) == (6, 3, "seeds")
    assert "averaged over source label too" in as_markdown(table(study.tables[0], study, results))
    alone = summarise([row for row in results.rows if row["seed"] == "0"], Quantity("clean_accuracy"), share=True)
    low, high = stats.t.interval(0.95, 1, 0.85, stats.sem([0.8, 0.9]))
    assert (alone.low, alone.high) == pytest.approx((low, high))
    assert (alone.over, alone.runs) == ("runs", 2)


def test_seeds_that_agree_are_no_certainty(tmp_path: Path) -> None:
    rows = [a_row("attack", {"p": 0.1}, seed, {"clean_accuracy": (535, 539)}) for seed in range(3)]
    write_study(tmp_path, rows, tables=[{"name": "t", "rows": ["p"], "columns": ["clean_accuracy"]}])
    study, _ = read_study(tmp_path)
    results = read_results(tmp_path)
    summary = summarise(results.rows, Quantity("clean_accuracy"), share=True)
    one = wilson(535, 539)  # the same test images for each seed: they count once
    assert (summary.low, summary.high, summary.interval) == (pytest.approx(one.low), pytest.approx(one.high), "wilson")
    markdown = as_markdown(table(study.tables[0], study, results))
    assert "| 0.1 | 99.26 (98.11 – 99.71) | 3 |" in markdown
    error = summarise(results.rows, quantity("1 - clean_accuracy"), share=True)
    assert (error.low, error.high) == (pytest.approx(1 - one.high), pytest.approx(1 - one.low))
    same = gained(results.rows, results.rows, Quantity("clean_accuracy"))
    assert (same.value, same.interval) == (0, "")


def test_cases_that_each_seed_draws_anew_count_together(tmp_path: Path) -> None:
    hits = {"target_success": (0, 5)}
    rows = [{**a_row("scratch", {"attack": "a"}, seed, hits), "target_success.unit": "targets"} for seed in range(4)]
    write_study(tmp_path, rows, tables=[{"name": "t", "rows": ["attack"], "columns": ["target_success"]}])
    results = read_results(tmp_path)
    summary = summarise(results.rows, Quantity("target_success"), share=True)
    assert (summary.low, summary.high) == (0, pytest.approx(wilson(0, 4).high))  # 20 targets of four victims
    assert "target_success.unit" in results.parts
    study, _ = read_study(tmp_path)
    assert "targets a run: target success 5" in as_markdown(table(study.tables[0], study, results))


def test_rows_of_one_cell_have_no_interval(tmp_path: Path) -> None:
    rows = [{**a_row("bulk", {"stream": name}, 0, {"flagged": (k, 10)}), "cell": "one"}
            for name, k in (("a", 1), ("b", 9))]  # fmt: skip
    write_study(tmp_path, rows, tables=[{"name": "t", "rows": ["stage"], "columns": ["flagged"]}])
    summary = summarise(read_results(tmp_path).rows, Quantity("flagged"), share=True)
    assert (summary.value, summary.interval, summary.runs) == (0.5, "", 2)
    assert math.isnan(summary.low)


def test_what_all_seeds_share_is_told(tmp_path: Path) -> None:
    stages = [
        {"name": "victim", "seeds": [0]},
        {"name": "marked", "seeds": [0, 1]},
        {"name": "surrogate", "seeds": [0, 1], "inputs": {"weights": "victim"}},
        {"name": "attack", "seeds": [0, 1], "inputs": {"a": "surrogate", "b": "marked"}},
    ]
    rows = [a_row(stage, {"p": 1}, seed, {"fidelity": (k, 100)})
            for stage in ("attack", "marked") for seed, k in ((0, 80), (1, 95))]  # fmt: skip
    tables = [{"name": name, "stage": name, "rows": ["p"], "columns": ["fidelity"]} for name in ("attack", "marked")]
    write_study(tmp_path, rows, stages=stages, tables=tables)
    study, _ = read_study(tmp_path)
    assert study.shared == {"surrogate": ("victim",), "attack": ("victim",)}
    attack, marked = (as_markdown(table(each, study, read_results(tmp_path))) for each in study.tables)
    assert "all seeds have the same victim, which no interval here covers" in attack
    assert "all seeds" not in marked


BUDGETS = [
    a_row(stage, {"strategy": name, "budget": budget}, seed, {"fidelity": (k, 100)}, queries=budget)
    for stage, name, budget, hits in (
        ("pools", "random", 10, (80, 90, 70)),
        ("pools", "random", 40, (91, 89, 90)),
        ("pools", "random", 160, (96, 97, 95)),
        ("seeds", "seeds", 5, (50, 60, 70)),
        ("jacobian", "JbDA", 40, (53, 61, 75)),
    )
    for seed, k in enumerate(hits)
]


def of_budgets(folder: Path, **asked: Any) -> str:
    stages = ["pools", "seeds", "jacobian"]
    write_study(folder, BUDGETS, tables=[{"name": "t", "stage": stages, "rows": ["strategy"], **asked}])
    study, _ = read_study(folder)
    results = read_results(folder)
    check(study, results)
    return as_markdown(table(study.tables[0], study, results))


def test_a_table_says_how_much_was_needed_for_a_level(tmp_path: Path) -> None:
    markdown = of_budgets(tmp_path, reach={"of": "fidelity", "along": "queries", "levels": [0.9, 0.95, 0.98]})
    assert "| strategy | queries to 90 % fidelity | queries to 95 % fidelity | queries to 98 % fidelity | seeds |" in (
        markdown
    )
    assert "| random | 40 | 160 | not reached (160) | 3 |" in markdown, "one seed had 90 % at 10; their mean had not"
    assert "| JbDA | not reached (40) | not reached (40) | not reached (40) | 3 |" in markdown
    rows = read_results(tmp_path).rows
    assert reached(rows[:9], Quantity("fidelity"), "queries", 0.8) == (10, True)
    assert reached([], Quantity("fidelity"), "queries", 0.8) == (None, False)


def test_a_gain_is_the_mean_of_differences_of_the_same_seeds(tmp_path: Path) -> None:
    markdown = of_budgets(tmp_path, gain={"of": "fidelity", "over": {"strategy": "seeds"}})
    assert "gain in fidelity over seeds (points)" in markdown
    # differences 3, 1 and 5 points: 3 ± 4.3027 · 2 / √3, though the values themselves are 10 apart
    assert "| JbDA | 3.00 ± 4.97 | 3 |" in markdown
    assert "| seeds | – | 3 |" in markdown
    rows = read_results(tmp_path).rows
    pair = gained(rows[12:14], rows[10:12], Quantity("fidelity"))
    assert (round(pair.value, 12), pair.runs) == (0.01, 1), "seed 1 alone is in both"
    assert pair.interval == ""


def test_points_have_a_share_along_x_in_per_cent(tmp_path: Path) -> None:
    rows = [
        a_row("pools", {"strategy": name}, seed, {"accuracy": (k, 100), "fidelity": (k + 1, 100)})
        for name, hits in (("a", (50, 70)), ("b", (90,)))
        for seed, k in enumerate(hits)
    ]
    figure = {"name": "goals", "kind": "points", "x": "accuracy", "y": ["fidelity"], "series": "strategy"}
    write_study(tmp_path, rows, figures=[figure])
    study, _ = read_study(tmp_path)
    shown = plot(study.figures[0], study, read_results(tmp_path))
    assert [list(line.points) for line in shown.lines] == [["0.5", "0.7"], ["0.9"]]
    assert (shown.x_label, shown.point_label("0.5")) == ("accuracy (%)", "50.00")
    assert draw(shown).png


def test_points_of_one_x_are_not_averaged(tmp_path: Path) -> None:
    rows = [
        a_row("pools", {"setting": name}, 0, {"cost": (50, 100), "fidelity": (hits, 100)})
        for name, hits in (("a", 20), ("b", 90))
    ]
    write_study(tmp_path, rows, figures=[{"name": "f", "kind": "points", "x": "cost", "y": ["fidelity"]}])
    study, _ = read_study(tmp_path)
    (line,) = plot(study.figures[0], study, read_results(tmp_path)).lines
    assert [float(x) for x in line.points] == [0.5, 0.5]
    assert [summary.value for summary in line.points.values()] == [0.2, 0.9]
    assert {summary.interval for summary in line.points.values()} == {"wilson"}
    assert draw(plot(study.figures[0], study, read_results(tmp_path))).png


def test_a_measure_that_is_no_share_is_shown_as_it_is(tmp_path: Path) -> None:
    rows = [a_row("attack", {"data.k": k}, seed, {"clean_accuracy": (9, 10)}) for k in (1, 2) for seed in (0, 1)]
    for place, row in enumerate(rows):
        row |= {"divergence": 2.5 + place, "divergence.low": "", "divergence.high": "", "divergence.n": 70}
    figure = {"name": "f", "x": "data.k", "y": "divergence"}
    tables = [{"name": "t", "rows": ["data.k"], "columns": ["divergence"]}]
    write_study(tmp_path, rows, figures=[figure], tables=tables)
    study, results = read_study(tmp_path)[0], read_results(tmp_path)
    assert results.shares == {"clean_accuracy"}
    shown = table(study.tables[0], study, results)
    assert shown.headings == ("divergence", "seeds")
    half = stats.t.ppf(0.975, 1) * 0.5
    assert (shown.rows[0][1][0].text, shown.rows[0][1][0].plus) == ("3", f"{half:.4g}")
    assert plot(study.figures[0], study, results).y_label == "divergence"


def test_a_figure_has_its_means_and_what_was_published(folder: Path, html: str) -> None:
    study, _ = read_study(folder)
    made = plot(study.figures[0], study, read_results(folder))
    clean, backdoor = made.lines
    assert (clean.label, backdoor.label) == (NASTY, "backdoor error")
    assert list(backdoor.points) == ["0.1", "0.5"]
    assert backdoor.points["0.1"].value == pytest.approx(0.07)
    assert backdoor.points["0.1"].low == pytest.approx(-0.0196, abs=1e-4)
    assert (made.failed, made.missing) == (1, 1)
    caption = Page(re.findall(r"<figcaption>.*?</figcaption>", html, flags=re.DOTALL)[0]).text
    assert "Mean and Student's t 95 % interval over 3 seeds" in caption
    assert "n = 1,000 (" in caption
    assert "100 (backdoor error) test images a run" in caption
    assert "Gu et al. 2017, Fig. 6 (backdoor error): read off <the figure>; deviation: their network" in caption
    assert "the interval goes on beyond 0 or 100 %" in caption
    assert "left out: 1 cell failed, 1 cell not run yet" in caption
    numbers = re.search(r'<table class="numbers">.*?</table>', html, flags=re.DOTALL)
    assert numbers
    text = Page(numbers[0]).text
    assert "0.1 7.00 −1.96 – 15.96 100 3" in text
    assert "0.1 5 – – –" in text
    assert "0.5 1.23 – – –" in text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """matplotlib's figures, as they are saved."""
    from matplotlib.figure import Figure

    seen: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (seen.append(self), save(self, *args, **more))[1]
    )
    return seen


def test_nothing_is_drawn_outside_the_axis(folder: Path, drawn: list[Any]) -> None:
    study, _ = read_study(folder)
    draw(plot(study.figures[0], study, read_results(folder)))
    axis = drawn[0].axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("poisoned fraction p", "error (%)")
    ends = [y for each in axis.collections for path in each.get_paths() for y in path.vertices[:, 1]]
    assert min(ends) == 0  # the interval goes down to −1.96 %
    assert all(0 <= tick <= 100 for tick in axis.get_yticks())
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[1:] == ["backdoor error (n = 100)", "published: Gu et al. 2017, Fig. 6"]
    assert "over 3 seeds" in drawn[0].legends[0].get_title().get_text()


@pytest.mark.parametrize("kind", ["line", "bars"])
def test_names_along_the_axis_and_what_others_have_beside_ours(tmp_path: Path, kind: str) -> None:
    rows = [a_row("d", {"data.defence": name}, 0, {"clean_accuracy": (9, 10)}) for name in ("STRIP", "none")]
    published = [{"label": "P", "points": [["none", 0.5], ["Other", 0.4]], "source": "S"}]
    figure = {"name": "f", "x": "data.defence", "kind": kind, "y": "clean_accuracy", "published": published}
    write_study(tmp_path, rows, figures=[figure])
    study = read_study(tmp_path)[0]
    made = plot(study.figures[0], study, read_results(tmp_path))
    assert made.categories == ["STRIP", "none", "Other"]
    assert ElementTree.fromstring(draw(made).svg).tag.endswith("svg")


@pytest.mark.parametrize("kind", ["bars", "line", "heatmap"])
def test_long_names_are_not_cut_off(tmp_path: Path, drawn: list[Any], kind: str) -> None:
    names = [f"a rather long name of a defence, number {number}" for number in range(6)]
    rows = [a_row("d", {"data.defence": name, "data.k": k}, 0, {"success": (9, 10)}) for name in names for k in (1, 2)]
    label = "the share of images that the model takes for what the attacker wants, of all that have a trigger (%)"
    split = {"y2": "data.k", "y2_label": label} if kind == "heatmap" else {"series": "data.k"}
    figure = {"name": "f", "x": "data.defence", "x_label": label, "kind": kind, "y": "success", "y_label": label}
    write_study(tmp_path, rows, figures=[figure | split | {"labels": {"1": label, "2": "_two"}}])
    study = read_study(tmp_path)[0]
    draw(plot(study.figures[0], study, read_results(tmp_path)))
    drawn[0].draw_without_rendering()
    box, wide, high = drawn[0].get_tightbbox(), drawn[0].get_figwidth(), drawn[0].get_figheight()
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < wide + 0.02
    assert box.y1 < high + 0.02
    assert high < 12


def test_a_heatmap_of_pairs(tmp_path: Path) -> None:
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    rows = [a_row("p", {"data.a": a, "data.b": b}, 0, {"success": (5 + a, 10)}) for a, b in pairs]
    figure = {"name": "f", "kind": "heatmap", "x": "data.b", "y2": "data.a", "y2_label": "source", "y": "success"}
    html = write_report(write_study(tmp_path, rows, figures=[figure])).read_text(encoding="utf-8")
    text = Page(html).text
    assert "the widest interval spans 52.68 percentage points; left out" not in text
    assert "the widest interval spans" in text
    assert "source 2" in text


def test_a_point_without_a_place_on_a_logarithmic_axis_is_named(tmp_path: Path) -> None:
    rows = [a_row("s", {"data.p": p}, 0, {"success": (5, 10)}) for p in (0, 0.01, 0.1)]
    figure = {"name": "f", "x": "data.p", "x_scale": "log", "y": "success"}
    html = write_report(write_study(tmp_path, rows, figures=[figure])).read_text(encoding="utf-8")
    assert "not drawn, for it has no place on a logarithmic axis: p 0" in Page(html).text


# --- the page ---------------------------------------------------------------------------------------------------------
def test_what_was_run(html: str) -> None:
    text = Page(html).text
    assert "6 finished, 1 failed, 1 missing" in text
    assert "seeds 0, 1, 2" in text
    assert "compute time 3 min 3 s" in text  # 6 · 30.5 s
    assert "device cpu (6 cells)" in text
    assert "python 3.11.7, torch 2.15.0" in text
    assert "One. Two <b>." in text
    assert re.search(r"finished \d{4}-\d\d-\d\d \d\d:\d\d", text)


def test_failed_cells_are_listed_with_their_errors(html: str) -> None:
    section = html.split('<section id="failed"', 1)[1].split("</section>", 1)[0]
    text = Page(f"<section{section}</section>").text
    assert 'RuntimeError: a <b> & "c" second line' in text
    assert "stage attack, poison fraction 0.3, seed 0" in text
    assert "1 cell of 8 failed" in Page(html).text
    assert "The study is not finished: 1 cell of 8 not run yet." in Page(html).text


def test_every_row_has_its_command_and_hashes(html: str) -> None:
    page = Page(html)
    assert "lightning fit --config badnets_digits --data.poison_fraction=0.1 --seed_everything=2" in page.text
    titles = [attributes["title"] for _, attributes in page.elements if "title" in attributes]
    assert titles.count("c" * 64) == 12  # config and code, of six rows
    link = next(attributes["href"] for name, attributes in page.elements if name == "a")
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(str(link).split(",", 1)[1]).decode())))
    assert len(rows) == 8
    assert rows[0]["poison_hash"] == "p" * 64


@pytest.mark.parametrize("mixed", [False, True])
def test_a_mixture_of_versions_of_the_code_is_told(tmp_path: Path, mixed: bool) -> None:
    rows = rows_of_attack()
    if mixed:
        rows[0]["code_hash"] = "e" * 64
    html = write_report(write_study(tmp_path, rows)).read_text(encoding="utf-8")
    said = "made with different versions of the code: cccccccccccc (5 rows), eeeeeeeeeeee (1 row)"
    assert (said in Page(html).text) == mixed


def test_markup_in_names_and_errors_stays_text(html: str) -> None:
    page = Page(html)
    assert NASTY in page.text
    assert "<script" not in html
    assert not [name for name, _ in page.elements if name in ("script", "iframe", "link", "b") and name != "b"]
    assert f"<title>{NASTY}" not in html


def test_the_page_is_valid_and_asks_nothing_of_any_network(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert str(attributes.get(key) or "#").startswith(("#", "data:")), (name, attributes)
        for key in ("aria-labelledby",):
            assert set(str(attributes.get(key) or "").split()) <= set(ids)
        if str(attributes.get("xlink:href") or "").startswith("#"):
            assert str(attributes["xlink:href"])[1:] in ids
    for used in re.findall(r"url\(#([^)]*)\)", html):
        assert used in ids
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert set(re.findall(r'https?://[^"\s<]*', html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    policy = next(a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    assert str(policy).startswith("default-src 'none'")


def test_the_page_can_be_listened_to(html: str) -> None:
    page = Page(html)
    assert all(attributes.get("alt") for name, attributes in page.elements if name == "img")
    assert all(attributes.get("scope") for name, attributes in page.elements if name == "th")
    (svg,) = [attributes for name, attributes in page.elements if name == "svg"]
    assert svg["role"] == "img"
    assert "against poisoned fraction p." in html.split("<desc", 1)[1].split("</desc>", 1)[0]


def test_a_figure_takes_the_colours_of_the_page(html: str) -> None:
    drawn = html.split("<svg", 1)[1].split("</svg>", 1)[0]
    for name, (light, _) in COLOURS.items():
        assert light not in drawn, name
    assert "var(--series-1)" in drawn
    assert "var(--ink)" in drawn


def test_there_is_a_picture_of_the_poisons(html: str) -> None:
    (image,) = [attributes for name, attributes in Page(html).elements if name == "img"]
    data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (678, 264)
    assert (image["width"], image["height"]) == ("678", "264")


def test_a_stage_without_results_has_a_place_but_no_picture(tmp_path: Path) -> None:
    rows = [failed("attack", {"data.poison_fraction": 0.1}, 0, "no")]
    html = write_report(write_study(tmp_path, rows, figures=[FIGURE], tables=[TABLE])).read_text(encoding="utf-8")
    assert "Nothing to draw: no finished cell has measured it; left out: 1 cell failed." in Page(html).text
    assert not (tmp_path / "figures").exists()
    assert (tmp_path / "tables" / "fractions.md").exists()


def test_the_same_study_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_report(folder, tmp_path)
    for name in (
        "report.html",
        "figures/errors.svg",
        "figures/errors.png",
        "tables/fractions.tex",
        "tables/fractions.md",
    ):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


# --- files ------------------------------------------------------------------------------------------------------------
def test_figures_are_written_as_files(folder: Path) -> None:
    root = ElementTree.parse(folder / "figures" / "errors.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert COLOURS["series-1"][0] in (folder / "figures" / "errors.svg").read_text(encoding="utf-8")
    picture = Image.open(folder / "figures" / "errors.png").convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert len(set(picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata())) > 20


def test_tables_are_written_as_files(folder: Path) -> None:
    markdown = (folder / "tables" / "fractions.md").read_text(encoding="utf-8")
    assert "| 0.1 | 97.90 (96.81 – 98.62) | 93.00 ± 8.96 | 98.7 \\[a\\] | 2 of 3 | 500 | 3 |" in markdown
    assert "- [a] Gu et al. 2017, Table 1; deviation: their split" in markdown
    latex = (folder / "tables" / "fractions.tex").read_text(encoding="utf-8")
    assert r"0.1 & 97.90 (96.81 -- 98.62) & 93.00 $\pm$ 8.96 & 98.7\textsuperscript{a} & 2 of 3 & 500 & 3 \\" in latex
    assert r"\toprule" in latex
    assert r"\begin{tabular}{lrrrrrr}" in latex
    assert latex.count("{") == latex.count("}")


def test_signs_of_markdown_and_latex_are_text(tmp_path: Path) -> None:
    rows = [a_row("s", {"data.name": "a|b_c 5% {x} #1 \\ [y] <i>"}, 0, {"success": (5, 10)})]
    write_study(tmp_path, rows, tables=[{"name": "t", "rows": ["data.name"], "columns": ["success"]}])
    study = read_study(tmp_path)[0]
    shown = table(study.tables[0], study, read_results(tmp_path))
    assert r"| a\|b\_c 5% \{x\} \#1 \\ \[y\] \<i\> |" in as_markdown(shown)
    wanted = r"a\textbar{}b\_c 5\% \{x\} \#1 \textbackslash{} [y] \textless{}i\textgreater{} &"
    assert wanted in as_latex(shown)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_takes_the_tables(folder: Path, tmp_path: Path) -> None:
    source = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{t.tex}\end{document}"
    (tmp_path / "all.tex").write_text(source, encoding="utf-8")
    shutil.copy(folder / "tables" / "fractions.tex", tmp_path / "t.tex")
    made = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "all.tex"], cwd=tmp_path, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stdout.decode(errors="replace")[-2000:]


def test_out_leaves_the_study_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_study(tmp_path / "study", rows_of_attack(), figures=[FIGURE])
    before = sorted(made.rglob("*"))
    assert report(["report", str(made), f"--out={tmp_path / 'new' / 'place'}"]) == 0
    assert sorted(made.rglob("*")) == before
    assert capsys.readouterr().out == f"report: {tmp_path / 'new' / 'place' / 'report.html'}\n"
    assert {path.name for path in (tmp_path / "new" / "place").iterdir()} == {"report.html", "figures"}


# --- what is wrong is told in one line --------------------------------------------------------------------------------
def complaint(folder: Path, *args: str) -> str:
    """The one line of a report that cannot be made; nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.is_dir() else {}
    with pytest.raises(InputError) as caught:
        report(["report", str(folder), *args])
    assert before == ({path: path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.is_dir() else {})
    line = str(caught.value)
    assert "\n" not in line
    return line


FIGURE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelt key": ({"x_lable": "p"}, ("figures.errors.x_lable", "'x_label'")),
    "no such kind": ({"kind": "bar"}, ("figures.errors.kind = 'bar'", "'bars'")),
    "no such scale": ({"x_scale": "logarithmic"}, ("figures.errors.x_scale", "linear, log")),
    "no such x": ({"x": "data.poison_fractoin"}, ("figures.errors.x", "'data.poison_fraction'")),
    "no such y": ({"y": "clean_acuracy", "labels": {}, "published": []}, ("figures.errors.y", "'clean_accuracy'")),
    "no such stage": ({"stage": "atack"}, ("figures.errors.stage", "'attack'")),
    "no such series": ({"series": "data.triger"}, ("figures.errors.series = 'data.triger'",)),
    "no such column in where": ({"where": {"data.poison_fracton": 1}}, ("errors.where", "'data.poison_fraction'")),
    "a label of nothing": ({"labels": {"1 - clean_acuracy": "x"}}, ("figures.errors.labels", "'1 - clean_accuracy'")),
    "a name with a path": ({"name": "../errors"}, ("figures[0].name", "file name")),
    "no y": ({"y": None, "published": []}, ("figures.errors.y",)),
    "a heatmap of one column": ({"kind": "heatmap", "y": "clean_accuracy"}, ("figures.errors.y2",)),
    "y2 without heatmap": ({"y2": "seed"}, ("figures.errors.y2", "heatmap")),
    "text as y": ({"y": "command", "labels": {}, "published": []}, ("figures.errors.y", "no numbers")),
    "shares beside other numbers": (
        {"y": ["clean_accuracy", "fact.poisoned"], "labels": {}, "published": []},
        ("figures.errors.y", "axis in common"),
    ),
    "published of another y": (
        {"published": [{"label": "P", "y": "clean_accuracy", "points": [[1, 1]], "source": "S"}]},
        ("figures.errors.published[0].y", "'1 - clean_accuracy'"),
    ),
    "published without source": (
        {"published": [{"label": "P", "y": "1 - clean_accuracy", "points": [[1, 1]]}]},
        ("figures.errors.published[0].source", "missing"),
    ),
    "published without points": (
        {"published": [{"label": "P", "y": "1 - clean_accuracy", "source": "S", "points": [[1]]}]},
        ("figures.errors.published[0].points[0]",),
    ),
    "published off the axis": (
        {"published": [{"label": "P", "y": "1 - clean_accuracy", "source": "S", "points": [["one", 0.5]]}]},
        ("figures.errors.published", "'one'", "no place on the axis"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIGURE_ERRORS)
def test_a_wrong_figure(tmp_path: Path, case: str) -> None:
    change, words = FIGURE_ERRORS[case]
    write_study(tmp_path, rows_of_attack(), figures=[FIGURE | change])
    line = complaint(tmp_path)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rws": ["seed"]}, ("tables.fractions.rws", "'rows'")),
        ({"columns": ["clean_acuracy"], "published": []}, ("tables.fractions.columns", "'clean_accuracy'")),
        ({"rows": []}, ("tables.fractions.rows",)),
        ({"published": [{"attack_sucess_rate": 1, "source": "S"}]}, ("published[0]", "'attack_success_rate'")),
        (
            {"published": [{"where": {"seeds": 1}, "attack_success_rate": 1, "source": "S"}]},
            ("published[0].where.seeds", "data.poison_fraction"),
        ),
        ({"published": [{"attack_success_rate": "98 %", "source": "S"}]}, ("published[0].attack_success_rate", "98 %")),
        ({"stage": ["attack", "atack"]}, ("tables.fractions.stage", "'atack'")),
        ({"reach": {"of": "clean_accuracy", "along": "seed", "levels": []}}, ("tables.fractions.reach.levels",)),
        ({"reach": {"of": "clean_accuracy", "along": "sed", "levels": [1]}}, ("tables.fractions.reach.along", "'sed'")),
        ({"gain": {"of": "clean_accuracy", "over": {"seed": 0}}}, ("tables.fractions.gain.over.seed",)),
    ],
)
def test_a_wrong_table(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    write_study(tmp_path, rows_of_attack(), tables=[TABLE | change])
    line = complaint(tmp_path)
    for word in words:
        assert word in line


def test_a_folder_that_holds_no_study(tmp_path: Path) -> None:
    assert "there is no such folder" in complaint(tmp_path / "nowhere")
    assert "no study.yaml is in it" in complaint(tmp_path)
    (tmp_path / "study.yaml").write_text("name: [", encoding="utf-8")
    assert "cannot be read as YAML" in complaint(tmp_path)
    (tmp_path / "study.yaml").write_text("- 1", encoding="utf-8")
    assert "keys are expected" in complaint(tmp_path)
    (tmp_path / "study.yaml").write_text("name: a", encoding="utf-8")
    assert "no results.csv is in it yet" in complaint(tmp_path)
    (tmp_path / "results.csv").write_text("stage,cell\na,b\n", encoding="utf-8")
    assert "the column 'status' is missing" in complaint(tmp_path)
    (tmp_path / "results.csv").write_text("stage,cell,status,seed\n", encoding="utf-8")
    assert "no rows yet" in complaint(tmp_path)
    (tmp_path / "results.csv").write_text("stage,cell,status,seed\na,b,c,0,5\n", encoding="utf-8")
    assert "more values than there are columns" in complaint(tmp_path)


def test_wrong_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name the folder of a study"):
        report(["report"])
    assert "did you mean '--out'" in complaint(folder, "--ou=x")
    assert "one folder at a time" in complaint(folder, "another")
    assert "a value is missing" in complaint(folder, "--out")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "cannot be written" in complaint(folder, "--out", str(tmp_path / "file"))


def test_a_study_can_be_checked_before_it_has_run(folder: Path) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    spec = parse(content)
    assert spec.figures[0].y[1] == Quantity("attack_success_rate", complement=True)
    check(spec, read_results(folder))
    with pytest.raises(InputError, match="titel"):
        parse(content | {"figures": [FIGURE | {"titel": "x"}]})


# --- small parts ------------------------------------------------------------------------------------------------------
def test_markup_escapes_all_but_itself() -> None:
    assert tag("p", "<", Html("<br>"), None, title='"&') == '<p title="&quot;&amp;">&lt;<br></p>'
    assert join(["a&", tag("hr")], " < ") == "a&amp; &lt; <hr>"
    assert tag("img", alt="x", hidden=True, width=None) == '<img alt="x" hidden>'


@pytest.mark.parametrize(
    ("text", "wanted", "same"),
    [
        ("0.10", 0.1, True),
        ("1e-4", "0.0001", True),
        ("true", True, True),
        ("True", True, True),
        ("false", True, False),
        ("", None, True),
        ("none", None, False),
        ("b", ["a", "b"], True),
        ("[1, 2]", [1, 2], True),
        ('{"a": 1}', {"a": 1}, True),
        ("a", {"a": 1}, False),
    ],
)
def test_a_value_of_the_yaml_is_found_in_the_table(text: str, wanted: Any, same: bool) -> None:
    assert is_one_of(text, wanted) == same


# --- W&B --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_figures_and_tables_go_to_one_run_of_wandb(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert report(["report", str(folder), "--out", str(tmp_path), "--wandb"]) == 0
    runs = list((tmp_path / "wandb").glob("offline-run-*")) if mode == "offline" else []
    assert len(runs) == (mode == "offline")
    if runs:
        stored = {
            path.relative_to(runs[0] / "files" / "media").parent.as_posix(): path for path in runs[0].rglob("*_0_*")
        }
        assert {"images/figures", "table/tables", "table", "html"} <= set(stored)
        rows = json.loads(stored["table"].read_text(encoding="utf-8"))
        assert rows["data"][0][rows["columns"].index("clean_accuracy")] == 0.98
    assert "W&B: " in capsys.readouterr().out


# --- in Chromium ------------------------------------------------------------------------------------------------------
MEASURE = """<script>
const wide = document.documentElement.clientWidth, out = [];
for (const each of document.querySelectorAll('details')) each.open = true;
for (const each of document.querySelectorAll('body *')) {
  if (each.closest('.scroll') && !each.matches('.scroll')) continue;
  if (each.closest('svg') && !each.matches('svg')) continue;
  if (each.getBoundingClientRect().right > wide + 1) out.push(each.tagName + ' ' + each.className);
}
for (const each of document.querySelectorAll('svg')) {
  const box = each.getBBox(), view = each.viewBox.baseVal;
  if (box.x < -2 || box.y < -2 || box.x + box.width > view.width + 2 || box.y + box.height > view.height + 2)
    out.push('svg ' + [box.x, box.y, box.width, box.height, view.width, view.height].join(' '));
}
const found = {wide: wide, scroll: document.documentElement.scrollWidth, out: out,
  dark: getComputedStyle(document.body).backgroundColor};
parent.postMessage(JSON.stringify(found), '*');
</script></body>"""

FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><script>
addEventListener('message', event => document.documentElement.setAttribute('data-found', event.data));
</script><iframe src="page.html" style="border: 0; height: 2000px; width: """


def chromium(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    """Open a page in a Chromium of its own, which has no network."""
    always = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    always += ["--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    return subprocess.run(
        [CHROMIUM, *always, f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True,
        check=True,
        timeout=120,
    )


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_cut_off_in_chromium(html: str, tmp_path: Path, width: int, dark: bool) -> None:
    page = re.sub(r'<meta http-equiv="[^>]*>', "", html).replace("</body>", MEASURE)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    # a window is 500 pixels wide at least, so the page is looked at in a frame
    (tmp_path / "frame.html").write_text(f'{FRAME}{width}px"></iframe>', encoding="utf-8")
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    opened = chromium(tmp_path / "frame.html", tmp_path / "p", theme, "--window-size=1400,2100", "--dump-dom")
    said = re.search(r'data-found="([^"]*)"', opened.stdout.decode())
    assert said, opened.stderr.decode()[-2000:]
    found = json.loads(said[1].replace("&quot;", '"'))
    assert found["wide"] == width
    assert found["scroll"] <= width
    assert not found["out"]
    paper = COLOURS["paper"][dark]
    assert found["dark"] == f"rgb({', '.join(str(int(paper[at : at + 2], 16)) for at in (1, 3, 5))})"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_chromium_has_no_complaint_and_prints(folder: Path, tmp_path: Path) -> None:
    shot, paper = tmp_path / "shot.png", tmp_path / "paper.pdf"
    dark = "--blink-settings=preferredColorScheme=0"
    opened = chromium(folder / "report.html", tmp_path / "p", dark, "--window-size=1280,1600", f"--screenshot={shot}")
    assert b"CONSOLE" not in opened.stderr, opened.stderr.decode()
    picture = Image.open(shot).convert("RGB")
    assert picture.getpixel((2, 2)) == tuple(int(COLOURS["paper"][1][at : at + 2], 16) for at in (1, 3, 5))
    chromium(folder / "report.html", tmp_path / "p", dark, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
