"""Studies: cells and their names, resuming, failures, pools and clusters."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from classifiers.weights import load_weights
from datamodules.errors import InputError
from experiments.registry import configs_folder
from experiments.studies.cells import code_files, plan
from experiments.studies.command import study
from experiments.studies.pool import call
from experiments.studies.resolve import resolve
from experiments.studies.results import write_results
from experiments.studies.spec import read_study
from experiments.studies.work import _checked
from tests.experiments.running import Fork, fork

TIMES = ("seconds", "code_hash")  # and what somebody may be at work on


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process with one thread: other tests fork it, and a pool of threads does not survive that."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text("# A study for the tests\n" + yaml.safe_dump(content, sort_keys=False))
    return path


def small(**stage: Any) -> dict[str, Any]:
    """Two points and two seeds on the digits, two batches each."""
    return {
        "stages": {
            "attack": {
                "configs": ["badnets_digits", "debug/smoke"],
                "grid": {"data.poison_fraction": [0.05, 0.1]},
                "seeds": [0, 1],
                "seeded": ["seed_everything", "data.seed"],
                **stage,
            }
        }
    }


def trials(folder: Path, seed: int, **arguments: Any) -> list[dict[str, Any]]:
    """Bulk trials: three rows."""
    (folder / "note.txt").write_text("kept")
    if arguments.get("fails"):
        raise RuntimeError("no such luck")
    return [{"trial": number, "score": number * seed + arguments["data_size"]} for number in range(3)]


def die(folder: Path, seed: int, **arguments: Any) -> list[dict[str, Any]]:
    """A cell whose process is killed, for the first seed."""
    if seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"trial": 0}]


def dawdle(folder: Path, seed: int) -> list[dict[str, Any]]:
    """A cell that takes long, but for seed 0."""
    (folder / "process").write_text(str(os.getpid()))
    time.sleep(300 * (seed > 0))
    return [{"trial": 0}]


def nap(folder: Path, seed: int) -> list[dict[str, Any]]:
    """A cell of a second."""
    time.sleep(1)
    return [{"trial": 0}]


def craft(folder: Path, seed: int, model_extractor: str, data_size: int, leave: bool = True) -> list[dict[str, Any]]:
    """Takes an earlier stage's weights, and leaves them and a picture behind."""
    read, _ = load_weights(model_extractor)
    if leave:
        shutil.copy(model_extractor, folder / "weights.safetensors")
    (folder / "trigger.png").write_bytes(b"")
    hits = {"value": 0.5, "n": data_size, "low": 0.25, "high": 0.75}
    return [{"tensors": len(read), "success_rate": hits, "seed_seen": seed}]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(out: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in table(out)]


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stagse": {}}, "did you mean 'stages'"),
        (small(gird={}), "did you mean 'grid'"),
        (small(grid={"data.seed": 3}), "give a list"),
        (small(seeds=["a"]), "whole numbers"),
        (small(configs=["badnets_digit"]), "did you mean 'badnets_digits'"),
        (small(inputs={"model.weights": "victim"}), "no earlier stage"),
        (small(configs=[], function=None), "one of the two"),
        (small(exclude=[{"data.poison_fractoin": 1}]), "no such key"),
        ({**small(), "executor": {"kind": "slrum"}}, "did you mean 'slurm'"),
        ({**small(), "workers": 0}, "1 or more"),
        ({**small(), "minutes": 0}, "above 0"),
        ({"stages": {}}, "one stage or more"),
        ({**small(), "wandb": "yes please"}, "true or false"),
        ({**small(), "figures": [{"name": "f", "x": "seed", "y": ["a"], "x_lable": "x"}]}, "did you mean 'x_label'"),
        ({**small(), "figures": [{"name": "f", "x": "seed", "y": ["a"], "stage": "atack"}]}, "did you mean 'attack'"),
        ({**small(), "tables": [{"name": "t", "rows": ["seed"], "colums": ["a"]}]}, "did you mean 'columns'"),
        (
            {**small(), "sizes": {"quick": {"tables": [{"name": "t", "rwos": ["seed"], "columns": ["a"]}]}}},
            "did you mean 'rows'",
        ),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_study(write(tmp_path / "s.yaml", change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_size_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    content = small() | {"sizes": {"quick": {"stages": {"attack": {"seeds": [5]}}}, "paper": {}}}
    path = write(tmp_path / "s.yaml", content)
    assert read_study(path).stages[0].seeds == (5,)  # the first is the default
    assert read_study(path, "paper").stages[0].seeds == (0, 1)
    assert read_study(path, "quick").stages[0].grid == read_study(path, "paper").stages[0].grid
    with pytest.raises(InputError, match="did you mean 'quick'"):
        read_study(path, "qiuck")


def test_a_size_has_tables_and_figures_of_its_own(tmp_path: Path) -> None:
    columns = {"rows": ["data.poison_fraction"], "columns": ["clean_accuracy"]}
    figure = {"name": "f", "x": "data.poison_fraction", "y": ["clean_accuracy"]}
    content = small() | {"tables": [{"name": "one", **columns}, {"name": "two", **columns}], "figures": [figure]}
    content["sizes"] = {"quick": {"tables": [{"name": "other", **columns}], "figures": []}, "paper": {}}
    path = write(tmp_path / "s.yaml", content)
    quick, paper = read_study(path, "quick"), read_study(path, "paper")
    assert [table["name"] for table in quick.tables] == ["other"]  # a list takes the place of the other
    assert [table["name"] for table in paper.tables] == ["one", "two"]
    assert (len(quick.figures), len(paper.figures)) == (0, 1)


def test_a_size_without_a_stage_shows_the_others(tmp_path: Path) -> None:
    content = small() | {"tables": [{"name": n, "rows": ["seed"], "columns": ["clean_accuracy"], "stage": stages}
                         for n, stages in (("both", ["attack", "more"]), ("one", ["more"]))]}  # fmt: skip
    content["stages"]["more"] = content["stages"]["attack"]
    content["sizes"] = {"quick": {"stages": {"more": None}}, "paper": {}}
    path = write(tmp_path / "s.yaml", content)
    assert [(table["name"], table["stage"]) for table in read_study(path, "quick").tables] == [("both", ["attack"])]
    assert [table["stage"] for table in read_study(path, "paper").tables] == [["attack", "more"], ["more"]]


@pytest.mark.parametrize("path", sorted((configs_folder() / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_have_both_sizes_and_a_line(path: Path) -> None:
    for size in ("quick", "paper"):
        spec = read_study(path, size)
        assert spec.description
        assert spec.figures
        assert spec.stages


# --- cells -----------------------------------------------------------------------------------------------------------
def test_a_plan_is_the_product_less_what_is_excluded(tmp_path: Path) -> None:
    grid = {"data.source_label": [1, 2], "data.target_label": [1, 2, 3]}
    exclude = [{"data.source_label": 1, "data.target_label": 1}, {"data.source_label": 2, "data.target_label": 2}]
    path = write(tmp_path / "s.yaml", small(grid=grid, exclude=exclude, overrides={"data.poison_fraction": 0.01}))
    cells = plan(read_study(path), threads=1)
    points = [(cell.point["data.source_label"], cell.point["data.target_label"], cell.seed) for cell in cells]
    assert points == [(s, t, k) for s, t in ((1, 2), (1, 3), (2, 1), (2, 3)) for k in (0, 1)]
    assert len({cell.identity for cell in cells}) == len(cells)


def test_a_stage_has_a_cell_for_each_of_its_input(tmp_path: Path) -> None:
    name = "tests.experiments.test_studies.trials"
    content: dict[str, Any] = {
        "stages": {
            "attack": {"function": name, "grid": {"p": [1, 2], "kind": ["a", "b"]}, "seeds": [0, 1]},
            "other": {"function": name, "grid": {"p": [1, 2, 3]}, "seeds": [0]},
            "defence": {
                "function": name, "inputs": {"of": "attack", "and": "other"}, "grid": {"kind": ["b"], "q": [5]},
                "seeds": [0, 1],
            },
            "after": {"function": name, "inputs": {"of": "defence"}, "seeds": [1]},
        }
    }  # fmt: skip
    cells = plan(read_study(write(tmp_path / "s.yaml", content)), threads=1)
    by_name = {identity: cell for cell in cells for identity in [cell.identity]}
    defences = [cell for cell in cells if cell.stage.name == "defence"]
    assert [({**cell.point}, cell.seed) for cell in defences] == [
        ({"kind": "b", "q": 5, "p": p}, seed) for p in (1, 2) for seed in (0, 1)
    ]  # kind is its own, p that of both its inputs; the other has seed 0 alone
    for cell in defences:
        attack, other = (by_name[cell.needs[key]] for key in ("of", "and"))
        assert (attack.point, attack.seed) == ({"p": cell.point["p"], "kind": "b"}, cell.seed)
        assert (other.point, other.seed) == ({"p": cell.point["p"]}, 0)
        assert cell.own == {"kind": "b", "q": 5}  # what it is called with
    assert [{**cell.point} for cell in cells if cell.stage.name == "after"] == [
        {"kind": "b", "q": 5, "p": 1}, {"kind": "b", "q": 5, "p": 2},
    ]  # fmt: skip
    assert len(by_name) == len(cells)
    content["stages"]["defence"]["grid"]["p"] = [3]
    with pytest.raises(InputError, match="stage attack has 0 cells"):
        plan(read_study(write(tmp_path / "s.yaml", content)), threads=1)


def test_an_identity_depends_on_all_that_determines_the_result(tmp_path: Path) -> None:
    def identities(threads: int = 1, **stage: Any) -> list[str]:
        return [cell.identity for cell in plan(read_study(write(tmp_path / "s.yaml", small(**stage))), threads)]

    base = identities()
    assert base == identities()
    assert base[0] == identities(seeds=[0])[0]  # what else is in the grid does not matter
    for other in (
        identities(threads=2),
        identities(overrides={"trainer.max_epochs": 2}),
        identities(overrides={"data.base.split_seed": 5}),  # other data
        identities(configs=["badnets_digits"]),
        identities(seeded=["seed_everything"]),
    ):
        assert not set(base) & set(other)


def test_an_identity_depends_on_what_is_in_the_files_that_an_override_names(tmp_path: Path) -> None:
    def identity(width: int) -> str:
        model = {
            "class_path": "Victim",
            "init_args": {"backbone": {"class_path": "classifiers.backbones.MLP", "init_args": {"hidden": [width]}}},
        }
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
        resolve.cache_clear()
        path = write(tmp_path / "s.yaml", small(overrides={"model": str(tmp_path / "model.yaml")}, seeds=[0]))
        return plan(read_study(path), threads=1)[0].identity

    assert identity(8) == identity(8) != identity(9)


def test_an_identity_of_a_function_depends_on_the_data_that_its_arguments_name(tmp_path: Path) -> None:
    def identity(**arguments: Any) -> str:
        stage = {"function": "tests.experiments.test_studies.trials", "arguments": arguments}
        return plan(read_study(write(tmp_path / "s.yaml", {"stages": {"craft": stage}})), threads=1)[0].identity

    found = [identity(configs=["victim_digits"], overrides=over) for over in ({}, {}, {"data.split_seed": 3})]
    assert found[0] == found[1] != found[2]
    with pytest.raises(InputError, match="did you mean 'victim_digits'"):
        identity(configs=["victim_digit"])


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"grid": {"data.poison_fractoin": [0.1]}}, "did you mean 'poison_fraction'"),
        ({"overrides": {"trainer.max_epoch": 3}}, "did you mean 'trainer.max_epochs'"),
        ({"inputs": {"model.wieghts": "victim"}}, "did you mean 'weights'"),
        ({"seeded": ["data.sed"]}, "did you mean 'seed'"),
    ],
)
def test_a_misspelt_key_is_refused_before_anything_runs(tmp_path: Path, stage: dict[str, Any], says: str) -> None:
    content = small(**stage)
    content["stages"] = {"victim": {"configs": ["victim_digits"], "seeds": [0, 1]}, **content["stages"]}
    with pytest.raises(InputError) as caught:
        plan(read_study(write(tmp_path / "s.yaml", content)), threads=1)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hash_of_the_code_is_of_what_makes_results() -> None:
    root = Path(__file__).resolve().parents[2]
    names = {path.relative_to(root).as_posix() for path in code_files(root)}
    assert {"experiments/studies/work.py", "datamodules/imageset.py", "poisoning/badnets.py"} <= names
    assert not [name for name in names if name.startswith(("experiments/report/", "tests/"))]


# --- running ---------------------------------------------------------------------------------------------------------
def test_a_study_runs_once_and_its_rows_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "s.yaml", small()), tmp_path / "out"
    began = datetime.now(UTC).replace(microsecond=0)
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    rows = table(out)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert [(row["data.poison_fraction"], row["seed"]) for row in rows] == [
        ("0.05", "0"), ("0.05", "1"), ("0.1", "0"), ("0.1", "1"),
    ]  # fmt: skip
    assert len({row["data_hash"] for row in rows}) == 1
    for name in ("config_hash", "poison_hash", "weights_hash"):
        assert len({row[name] for row in rows}) == 4
    assert all("--data.seed=" in row["command"] for row in rows)
    metrics = json.loads((out / "cells" / rows[2]["cell"] / "metrics.json").read_text())
    assert float(rows[2]["clean_accuracy"]) == metrics["measures"]["clean_accuracy"]["value"]
    record = json.loads((out / "cells" / rows[0]["cell"] / "cell.json").read_text())
    assert began <= datetime.fromisoformat(record["finished"]) <= datetime.now(UTC)
    pictures = [cell.name for cell in (out / "cells").iterdir() if (cell / "poisons.png").exists()]
    assert pictures == [rows[0]["cell"]]  # the first cell's, once a study
    from pyarrow import parquet

    assert parquet.read_table(out / "results.parquet").num_rows == 4
    before = {cell: cell.stat().st_mtime_ns for cell in (out / "cells").iterdir()}
    text = (out / "results.csv").read_bytes()
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    assert "nothing to run: 4 cells are finished\n" in capsys.readouterr().out
    assert {cell: cell.stat().st_mtime_ns for cell in (out / "cells").iterdir()} == before
    assert (out / "results.csv").read_bytes() == text
    assert study(["study", "--config", str(path), "--out", str(out), "--dry-run"]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_pool_that_is_not_there_is_known_beforehand(tmp_path: Path) -> None:
    pool = f"--data.pool={json.dumps({'class_path': 'GTSRB', 'init_args': {'data_dir': str(tmp_path)}})}"
    path = configs_folder() / "knockoff_digits.yaml"
    assert resolve((str(path),), (pool,)).absent.startswith("GTSRB: no gtsrb/GTSRB/Training, ")
    assert not resolve((str(path),), ()).absent


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    # the second asks for more images than there are
    path = write(tmp_path / "s.yaml", small(grid={"data.poison_fraction": [0.1, 0.99]}, seeds=[0]))
    out = tmp_path / "out"
    args = ["study", "--config", str(path), "--out", str(out), "--no-report"]
    assert study(args) == 1
    good, failed = table(out)
    assert (good["status"], failed["status"]) == ("finished", "failed")
    assert "poison_fraction" in failed["error"]
    assert study(args) == 1  # it is not tried again …
    record = out / "failed" / f"{failed['cell']}.json"
    record.write_text(json.dumps({"error": "of an earlier day"}))
    assert study(args) == 1
    assert table(out)[1]["error"] == "of an earlier day"
    assert study([*args, "--retry-failed"]) == 1  # … unless one asks for it
    assert "poison_fraction" in table(out)[1]["error"]


def test_a_stage_gets_the_weights_of_an_earlier_one(tmp_path: Path) -> None:
    content = small(grid={}, inputs={"model.honest": "victim"})
    victim = {"configs": ["victim_digits", "debug/smoke"], "seeds": [0, 1]}
    content["stages"] = {"victim": victim, **content["stages"]}
    out = tmp_path / "out"
    path = write(tmp_path / "s.yaml", content)
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    rows = table(out)
    assert [row["stage"] for row in rows] == ["victim", "victim", "attack", "attack"]
    for victim_row, attack_row in zip(rows[:2], rows[2:], strict=True):
        assert victim_row["cell"] in attack_row["command"]
        assert float(attack_row["honest_clean_accuracy"]) == float(victim_row["clean_accuracy"])
    # an input that failed fails what needs it, and only that
    shutil.rmtree(out / "cells")
    (out / "failed").mkdir(exist_ok=True)
    (out / "failed" / f"{rows[0]['cell']}.json").write_text(json.dumps({"error": "lost"}))
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 1
    assert [row["status"] for row in table(out)] == ["failed", "finished", "failed", "finished"]
    assert "its input" in table(out)[2]["error"]


def test_cells_whose_data_are_not_there_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    content = small(seeds=[0])
    content["stages"]["signs"] = {
        "configs": ["victim_gtsrb", "debug/smoke"], "overrides": {"data.data_dir": str(empty)},
    }  # fmt: skip
    content["stages"]["after"] = {"configs": ["victim_digits"], "inputs": {"model.honest": "signs"}}
    content["tables"] = [{"name": "signs", "stage": "signs", "rows": ["seed"], "columns": ["clean_accuracy"]}]
    path = write(tmp_path / "s.yaml", content)
    assert study(["study", "--config", str(path), "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not run")]
    rows = table(out)
    assert [row["status"] for row in rows] == ["finished", "finished", "not run", "not run"]
    assert rows[2]["error"] == rows[3]["error"]
    assert said == [f"not run: 2 of 4 cells: {rows[2]['error']}"]
    assert rows[2]["error"].startswith("GTSRB: no gtsrb/GTSRB/Training, ")
    assert str(empty) in rows[2]["error"]
    assert (out / "study.yaml").is_file()
    assert "not run" in (out / "report.html").read_text()
    assert study(["study", "--config", str(path), "--out", str(out), "--dry-run"]) == 0
    assert said[0] in capsys.readouterr().out
    # a mistake in the same config is one all the same
    content["stages"]["signs"]["overrides"]["data.size"] = "large"
    with pytest.raises(InputError, match="size"):
        study(["study", "--config", str(write(path, content)), "--out", str(out)])


def test_only_some_cells_and_what_they_need(tmp_path: Path) -> None:
    name = "tests.experiments.test_studies.trials"
    arguments = {"data_size": 1}
    content = {
        "stages": {
            "first": {"function": name, "arguments": arguments, "seeds": [0, 1]},
            "second": {"function": name, "arguments": arguments, "inputs": {"weights": "first"}, "seeds": [0, 1]},
        }
    }
    path, out = write(tmp_path / "s.yaml", content), tmp_path / "out"
    args = ["study", "--config", str(path), "--out", str(out), "--no-report", "--only", "second", "--only", "seed=1"]
    assert study(args) == 1  # the first leaves no weights
    assert [(row["stage"], row["seed"], row["status"]) for row in table(out)] == [
        ("first", "0", "missing"), *[("first", "1", "finished")] * 3, ("second", "0", "missing"),
        ("second", "1", "failed"),
    ]  # fmt: skip
    wanted = f"lightning study --config {path} --size paper --only second --only seed=1"
    assert table(out)[-1]["command"] == wanted
    with pytest.raises(InputError, match="no cell matches"):
        study([*args, "--only", "third"])


def test_the_report_goes_to_wandb_once_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    content = small(configs=["badnets_digits"], overrides={"trainer.max_epochs": 1}, seeds=[0])
    content["tables"] = [{"name": "t", "rows": ["data.poison_fraction"], "columns": ["clean_accuracy"]}]
    path, out = write(tmp_path / "s.yaml", content), tmp_path / "out"
    args = ["study", "--config", str(path), "--out", str(out)]
    assert study([*args, "--wandb"]) == 0
    assert [run.parent for run in tmp_path.rglob("offline-run-*") if run.is_dir()] == [out / "wandb"]
    assert study(args) == 0  # nothing was asked for
    assert len(list((out / "wandb").glob("offline-run-*"))) == 1
    assert study(["study", "--config", str(write(path, content | {"wandb": True})), "--out", str(out)]) == 0
    assert len(list((out / "wandb").glob("offline-run-*"))) == 2
    with pytest.raises(InputError, match="--no-report"):
        study([*args, "--wandb", "--no-report"])


def test_bulk_trials_return_many_rows(tmp_path: Path) -> None:
    stage = {
        "function": "tests.experiments.test_studies.trials", "grid": {"data.size": [10, 20]}, "seeds": [3],
        "arguments": {"fails": False},
    }  # fmt: skip
    out = tmp_path / "out"
    path = write(tmp_path / "s.yaml", {"stages": {"craft": stage}})
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
    found = [(int(row["data.size"]), int(row["trial"]), int(row["score"])) for row in table(out)]
    assert found == [(size, trial, size + 3 * trial) for size in (10, 20) for trial in range(3)]


def test_a_function_gets_weights_and_leaves_weights(tmp_path: Path) -> None:
    name = "tests.experiments.test_studies.craft"
    stages: dict[str, Any] = {
        "victim": {"configs": ["victim_digits", "debug/smoke"], "seeds": [0, 1]},
        "craft": {
            "function": name, "inputs": {"model.extractor": "victim"}, "grid": {"data.size": [10, 20]}, "seeds": [0, 1],
        },
        "again": {
            "function": name, "inputs": {"model.extractor": "craft"}, "grid": {"data.size": [20]}, "seeds": [1],
        },
        "none": {
            "function": name, "inputs": {"model.extractor": "again"}, "seeds": [1],
            "arguments": {"leave": False, "data_size": 1},
        },
        "attack": {**small(grid={}, seeds=[1])["stages"]["attack"], "inputs": {"model.honest": "again"}},
        "broken": {
            "function": name, "inputs": {"model.extractor": "none"}, "seeds": [1], "arguments": {"data_size": 1},
        },
    }  # fmt: skip
    path, out = write(tmp_path / "s.yaml", {"stages": stages}), tmp_path / "out"
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 1
    rows = table(out)
    victims, crafted = rows[:2], rows[2:6]
    assert [(row["stage"], row["data.size"], row["seed"]) for row in crafted] == [
        ("craft", "10", "0"), ("craft", "10", "1"), ("craft", "20", "0"), ("craft", "20", "1"),
    ]  # fmt: skip
    for row in crafted:  # each had the weights of the victim of its seed
        folder = out / "cells" / row["cell"]
        victim = out / "cells" / victims[int(row["seed"])]["cell"]
        assert (folder / "weights.safetensors").read_bytes() == (victim / "weights.safetensors").read_bytes()
        assert row["seed_seen"] == row["seed"]
        assert [row[f"success_rate{part}"] for part in ("", ".low", ".high", ".n")] == [
            "0.5", "0.25", "0.75", row["data.size"],
        ]  # fmt: skip
    assert [row["status"] for row in rows] == ["finished"] * 9 + ["failed"]
    assert [row["stage"] for row in rows[6:]] == ["again", "none", "attack", "broken"]
    assert float(rows[8]["honest_clean_accuracy"]) == float(victims[1]["clean_accuracy"])  # handed on, twice
    assert rows[9]["error"] == (
        f"InputError: inputs.model.extractor = 'none': its cell {rows[7]['cell']} left no weights.safetensors"
    )


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"function": "tests.experiments.test_studies.carft"}, "cannot be imported"),
        ({"function": "tests.experiments.test_studies.craft"}, "missing a required argument: 'model_extractor'"),
        ({"function": "tests.experiments.test_studies.trials", "arguments": {"seed": 1}}, "seed is given twice"),
        (
            {"function": "tests.experiments.test_studies.trials", "arguments": {"a_b": 1}, "grid": {"a.b": [1]}},
            "a_b is given twice",
        ),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_in_one_line(
    tmp_path: Path, stage: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        plan(read_study(write(tmp_path / "s.yaml", {"stages": {"craft": stage}})), threads=1)


@pytest.mark.parametrize(
    ("row", "says"),
    [(3, "mappings"), ({"status": "good"}, "column of that name"), ({"a": {"value": 1, "m": 2}}, "n, low and high")],
)
def test_rows_of_a_function_are_checked(row: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        _checked([row])


@pytest.mark.parametrize(
    "executor",
    [{"kind": "local"}, pytest.param({"kind": "submitit_local", "timeout_min": 5}, marks=pytest.mark.slow)],
)
def test_a_process_that_dies_fails_its_cell_alone(tmp_path: Path, executor: dict[str, Any]) -> None:
    stage = {"function": "tests.experiments.test_studies.die", "seeds": [0, 1, 2]}
    out = tmp_path / "out"
    path = write(tmp_path / "s.yaml", {"stages": {"craft": stage}, "workers": 2, "executor": executor})
    assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 1
    assert [row["status"] for row in table(out)] == ["failed", "finished", "finished"]


def test_the_pool_and_submitit_give_the_rows_of_one_process(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", small(seeds=[0]))
    threads = max(1, (os.cpu_count() or 1) // 2)
    tables = []
    for kind, workers in (("local", 2), ("submitit_debug", 2)):
        content = small(seeds=[0]) | {"executor": {"kind": kind}, "workers": workers}
        path = write(tmp_path / "s.yaml", content)
        out = tmp_path / kind
        assert study(["study", "--config", str(path), "--out", str(out), "--no-report"]) == 0
        tables.append([{k: v for k, v in row.items() if k != "command"} for row in without_times(out)])
    assert tables[0] == tables[1]
    assert all(row["threads"] == str(threads) for row in tables[0])


def test_only_one_study_at_a_time_in_a_folder(tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    path = write(tmp_path / "s.yaml", small())
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another study"):
            study(["study", "--config", str(path), "--out", str(out)])


def test_a_sweep_runs_the_same_points(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", small(seeded=["seed_everything"], overrides={"trainer.max_epochs": 1}))
    study(["study", "--config", str(path), "--sweep", str(tmp_path / "sweep.yaml")])
    sweep = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    assert sweep["parameters"]["data.poison_fraction"] == {"values": [0.05, 0.1]}
    assert sweep["parameters"]["seed_everything"] == {"values": [0, 1]}
    assert sweep["command"][:2] == ["lightning", "fit"]
    assert sweep["command"][-2:] == ["--trainer.max_epochs=1", "${args}"]


@pytest.mark.parametrize("workers", [1, 2])
def test_no_cell_is_begun_when_the_minutes_are_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    function = "tests.experiments.test_studies.nap"
    stages = {"first": {"function": function, "seeds": [0, 1, 2, 3]}, "second": {"function": function, "seeds": [9]}}
    path, out = write(tmp_path / "s.yaml", {"stages": stages, "minutes": 0.01}), tmp_path / "out"
    args = ["study", "--config", str(path), "--out", str(out), "--no-report", "--workers", str(workers)]
    assert study(args) == 0
    rest = 4 - workers
    states = [row["status"] for row in table(out)]
    assert states == ["finished"] * workers + ["missing"] * (rest + 1)
    said = capsys.readouterr().out
    assert f"the 0.01 minutes are over; left out: {rest} of first, 1 of second; the same command goes on" in said
    assert study(args) == 0
    assert [row["status"] for row in table(out)].count("finished") == 2 * workers


def test_an_interrupted_study_says_how_to_go_on(tmp_path: Path) -> None:
    stage = {"function": "tests.experiments.test_studies.dawdle", "seeds": [0, 1]}
    path, out = write(tmp_path / "s.yaml", {"stages": {"craft": stage}}), tmp_path / "out"
    args = ["study", "--config", str(path), "--out", str(out), "--no-report"]
    with fork(args, tmp_path / "log") as process:
        _wait_for(lambda: (out / "cells").is_dir() and any((out / "work").glob("*/made")))
        process.send(signal.SIGINT)
        assert process.wait() == 130
        assert "interrupted: 1 of 2 cells are finished; the same command goes on from there" in process.text
        assert "Traceback" not in process.text
    assert [row["status"] for row in table(out)] == ["finished", "missing"]
    assert not (out / "work").exists()
    assert not (out / "failed").exists()


def _wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_of_a_pool_outlives_its_study(tmp_path: Path, number: int) -> None:
    stage = {"function": "tests.experiments.test_studies.dawdle", "seeds": [1, 2]}
    path, out = write(tmp_path / "s.yaml", {"stages": {"craft": stage}, "workers": 2}), tmp_path / "out"
    # a shell that runs the tests in the background has interrupts ignored
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; import sys; from experiments.__main__ import main; sys.exit(main(sys.argv[1:]))"
    args = [sys.executable, "-c", code, "study", "--config", str(path), "--out", str(out), "--no-report"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(args, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def written() -> int:
        return sum(file.stat().st_size > 0 for file in (out / "work").glob("*/made/process"))

    _wait_for(lambda: written() == 2 or process.poll() is not None)
    workers = [int(file.read_text()) for file in (out / "work").glob("*/made/process")]
    assert len(workers) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
        assert process.wait(60) == 130
        text = (tmp_path / "log").read_text()
        assert "interrupted: 0 of 2 cells are finished; the same command goes on from there" in text
        assert "Traceback" not in text
    else:
        process.kill()
        process.wait(60)
    _wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 20)
    assert not (out / "failed").exists()


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", small(seeds=[0, 1, 2]))
    one, other = tmp_path / "killed", tmp_path / "undisturbed"

    def begin(out: Path) -> Fork:
        return Fork(["study", "--config", str(path), "--out", str(out), "--no-report"], tmp_path / "log")

    for number in range(3):
        process = begin(one)
        wanted = 1 + number
        until = time.monotonic() + 120
        while len(list((one / "cells").glob("*"))) < wanted and process.running() and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
        assert not [cell for cell in (one / "cells").iterdir() if not (cell / "cell.json").is_file()]
    assert begin(one).wait(240) == 0
    assert begin(other).wait(240) == 0
    same = [{k: v for k, v in row.items() if k != "command"} for row in without_times(one)]
    assert same == [{k: v for k, v in row.items() if k != "command"} for row in without_times(other)]


def test_columns_of_mixed_types_are_kept_as_text(tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = [{"a": 1, "b": "x", "c": [1]}, {"a": 2.5, "b": 3, "c": None}]
    write_results(rows, tmp_path)
    read = parquet.read_table(tmp_path / "results.parquet").to_pydict()
    assert read["a"] == [1.0, 2.5]
    assert read["b"] == ["x", "3"]
    assert read["c"] == ["[1]", None]


@pytest.mark.slow
def test_a_call_in_another_process_returns_and_raises_what_the_function_does() -> None:
    assert call(os.getpid) != os.getpid()
    with pytest.raises(InputError, match="base 16"):
        call(complain, "base 16")
    with pytest.raises(ChildProcessError, match=r"_exit: its process died \(exit code 3\)"):
        call(os._exit, 3)


def complain(what: str) -> None:
    raise InputError(what)
